"""The remote-code fixtures do what they are for: break as known, and work when repaired."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.xlm_roberta import modeling_xlm_roberta

TESTS = Path(__file__).parents[1]
FIXTURES = TESTS / "fixtures"
TEXTS = json.loads((FIXTURES / "texts.json").read_text(encoding="utf-8"))
LORA = "modeling_lora.XLMRobertaLoRA"
GONE = "create_position_ids_from_input_ids"
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")

write_unknown = runpy.run_path(str(TESTS / "remote_unknown.py"))["write"]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """The small original checkpoint with its code beside it."""
    # The folder's name is the code's name in transformers' module cache: one entry, however often.
    folder = tmp_path / "jexport_remote_original"
    for name in [name for name in sys.modules if folder.name in name]:
        del sys.modules[name]
    shutil.copytree(FIXTURES / "jina_original_small", folder)
    for path in (FIXTURES / "remote_original").glob("*.py"):
        shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_xlm_roberta.XLMRobertaFlashConfig",
        "AutoModel": LORA,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def restore_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """First repair: a stand-in for the function that transformers 5 dropped."""
    monkeypatch.setattr(modeling_xlm_roberta, GONE, lambda *_: None, raising=False)


def call_post_init(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Second repair: finish the constructor of the class that `folder` names."""
    remote = get_class_from_dynamic_module(LORA, str(folder))
    construct = remote.__init__

    def construct_whole(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self.post_init()

    monkeypatch.setattr(remote, "__init__", construct_whole)


def recompute_rotary(model: Any) -> None:
    """Third repair: the buffers that were never filled."""
    for layer in model.roberta.encoder.layers:
        rotary = layer.mixer.rotary_emb
        rotary.inv_freq = rotary._compute_inv_freq(model.device)
        rotary._seq_len_cached = 0
        rotary._cos_cached = rotary._sin_cached = None


def load(folder: Path) -> Any:
    model, report = AutoModel.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values())
    return model


def reference(task: str | None) -> np.ndarray:
    return np.load(FIXTURES / f"jina_original_small.{task or 'none'}.npy")


def test_original_names_a_function_that_is_gone(original: Path) -> None:
    with pytest.raises(ImportError, match=GONE):
        load(original)


def test_original_misses_post_init(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore_import(monkeypatch)
    with pytest.raises(AttributeError, match="all_tied_weights_keys"):
        load(original)


@pytest.fixture
def unfilled_is_nan() -> Iterator[None]:
    """Memory that torch does not fill holds NaN, not what happened to be there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("unfilled_is_nan")
def test_original_forced_to_load_has_unfilled_buffers(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_import(monkeypatch)
    call_post_init(monkeypatch, original)
    model = load(original)
    unfilled = [name for name, buffer in model.named_buffers() if buffer.isnan().any()]
    assert unfilled == [f"roberta.encoder.layers.{n}.mixer.rotary_emb.inv_freq" for n in range(2)]
    assert not any(weight.isnan().any() for weight in model.state_dict().values())


def test_original_with_other_frequencies_is_wrong(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_import(monkeypatch)
    call_post_init(monkeypatch, original)
    model = load(original)
    recompute_rotary(model)
    for layer in model.roberta.encoder.layers:
        layer.mixer.rotary_emb.inv_freq.zero_()
    texts = TEXTS[:8]
    assert np.abs(model.encode(texts) - reference(None)[:8]).max() > 1e-3


def test_original_repaired_is_the_reference(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_import(monkeypatch)
    call_post_init(monkeypatch, original)
    model = load(original)
    recompute_rotary(model)
    assert model.dtype == torch.float32
    for task in (None, *TASKS):
        found = model.encode(TEXTS, task=task, batch_size=8)
        assert found.dtype == np.float32
        assert np.abs(found - reference(task)).max() <= 1e-6, task
    assert model.encode(TEXTS[0]).shape == (64,)
    cut = model.encode(TEXTS[:8], truncate_dim=16)
    assert np.allclose(np.linalg.norm(cut, axis=1), 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="truncate_dim 17"):
        model.encode(TEXTS, truncate_dim=17)
    with pytest.raises(ValueError, match="unsupported task"):
        model.encode(TEXTS, task="retrieval")


def test_original_mixes_tasks_in_a_batch(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore_import(monkeypatch)
    call_post_init(monkeypatch, original)
    model = load(original)
    recompute_rotary(model)
    ids = torch.tensor([[0, 5, 6, 2]]).repeat(3, 1)
    with torch.no_grad():
        mixed = model(ids, adapter_mask=torch.tensor([3, 0, 3], dtype=torch.int32))
        alone = model(ids[:1], adapter_mask=torch.tensor([0], dtype=torch.int32))
    states = mixed.last_hidden_state
    assert torch.allclose(states[0], states[2])
    assert torch.allclose(states[1], alone.last_hidden_state[0], atol=1e-6)
    assert not torch.allclose(states[0], states[1], atol=1e-3)


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A complete checkpoint of the unknown architecture."""
    return write_unknown(tmp_path / "jexport_remote_unknown")


def mean_pooled(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        states = model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def test_unknown_needs_trust(unknown: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("trust_remote_code=True")):
        AutoConfig.from_pretrained(unknown, trust_remote_code=False)


def test_unknown_loads_in_sentence_transformers(unknown: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = load(unknown)
    sentences = SentenceTransformer(str(unknown), trust_remote_code=True, device="cpu")
    assert sentences.max_seq_length == 512
    batch = AutoTokenizer.from_pretrained(unknown, trust_remote_code=True)(
        TEXTS, padding=True, truncation=True, max_length=512, return_tensors="pt"
    )
    wanted = mean_pooled(model, batch).numpy()
    assert np.allclose(sentences.encode(TEXTS), wanted, atol=1e-6)
    similar = (wanted @ wanted.T)[~np.eye(len(TEXTS), dtype=bool)]
    assert similar.mean() < 0.9


def test_unknown_exports_with_dynamic_axes(unknown: Path) -> None:
    model = load(unknown).eval()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    ids = torch.randint(4, 330, (2, 7), generator=torch.Generator().manual_seed(0))
    program = torch.export.export(
        model,
        (),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic_shapes={"input_ids": axes, "attention_mask": axes},
    ).module()
    longer = torch.randint(4, 330, (5, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(longer)
    mask[0, 12:] = 0
    with torch.no_grad():
        exported = program(input_ids=longer, attention_mask=mask).last_hidden_state
        direct = model(longer, mask).last_hidden_state
        alone = model(longer[:1, :12]).last_hidden_state
    assert torch.allclose(exported, direct, atol=1e-6)
    assert torch.allclose(direct[:1, :12], alone, atol=1e-5)


def test_unknown_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second, third = (
        write_unknown(tmp_path / name, seed=seed) / "model.safetensors"
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.read_bytes() == second.read_bytes() != third.read_bytes()
