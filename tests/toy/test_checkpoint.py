"""toy: the checkpoint it writes is whole, reproducible, and the same model in both layouts."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from jexport.errors import (
    DiskFullError,
    OutputPathError,
    TokenizerError,
    UnsupportedCheckpointError,
)
from jexport.tasks import JINA_V3_PROMPTS
from jexport.toy import checkpoint
from jexport.toy import weights as toy_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
TEXTS = json.loads((FIXTURES / "texts.json").read_text(encoding="utf-8"))[:24]
MATRIX = ".parametrizations.weight"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are 50 times as fast on one thread when the other core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.write(tmp_path_factory.mktemp("toy") / "original")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.write(tmp_path_factory.mktemp("toy") / "native", layout="native")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def folder_of(task: str) -> str:
    return task.replace(".", "_").replace("-", "_")


def open_native(folder: Path, *tasks: str) -> Any:
    """The native model with the adapters of `tasks`, the last one active."""
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    for task in tasks:
        name = folder_of(task)
        report = model.load_adapter(
            str(folder), adapter_name=name, adapter_kwargs={"subfolder": name}
        )
        # transformers 5.23 also names the adapters that were loaded before, which are intact.
        assert not [key for key in report.missing_keys if f".{name}" in key]
        assert not report.unexpected_keys
        assert not report.mismatched_keys
        model.set_adapter(name)
    return model.eval()


def states_of(model: Any, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the texts, and the mask as float, both on the same axes."""
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    return states, mask.unsqueeze(-1).float()


def embed(model: Any, folder: Path) -> torch.Tensor:
    """Mean-pooled, normalised embeddings of the texts, without a prompt."""
    states, mask = states_of(model, folder)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def merged(folder: Path, index: int) -> dict[str, torch.Tensor]:
    """Weights of the original layout with one adapter merged in fp32, by the formula."""
    stacked = {
        name: value.float() for name, value in load_file(folder / "model.safetensors").items()
    }
    weights = {name: value for name, value in stacked.items() if MATRIX not in name}
    for name, value in stacked.items():
        if name.endswith(".original"):
            matrix = name.removesuffix(f"{MATRIX}.original")
            first, second = (stacked[f"{matrix}{MATRIX}.0.lora_{which}"][index] for which in "AB")
            delta = first @ second if "embeddings" in matrix else second @ first
            weights[f"{matrix}.weight"] = value + delta * 0.25
    return weights


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_same_seed_same_bytes(layout: str, tmp_path: Path) -> None:
    first = contents(checkpoint.write(tmp_path / "a", layout=layout, seed=3))
    assert first == contents(checkpoint.write(tmp_path / "b", layout=layout, seed=3))
    other = contents(checkpoint.write(tmp_path / "c", layout=layout, seed=4))
    assert {name for name in first if first[name] != other[name]} == {
        name for name in first if name.endswith(".safetensors")
    }


def test_a_write_leaves_nothing_beside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "new" / "empty").mkdir(parents=True)
    folder = tmp_path / "new" / "empty"
    assert checkpoint.write(folder) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["empty"]


def test_original_has_every_tensor_of_the_layout(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    config = json.loads((original / "config.json").read_text())
    shapes = toy_weights.tensor_shapes(toy_weights.SMALL, config["vocab_size"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.any() and tensor.isfinite().all() for tensor in tensors.values())
    assert "auto_map" not in config
    assert config["lora_adaptations"] == list(JINA_V3_PROMPTS)


def test_full_size_is_the_size_of_the_real_model() -> None:
    shapes = toy_weights.tensor_shapes(toy_weights.FULL, 250_002)
    assert len(shapes) == 492
    assert sum(map(math.prod, shapes.values())) == 572_310_396
    assert sum(math.prod(shape) for name, shape in shapes.items() if "lora" in name) == 12_946_300


def test_native_names_are_the_hubs(native: Path) -> None:
    base = load_file(native / "model.safetensors")
    assert len(base) == 2 * 12 + 6
    assert base["roberta.encoder.layers.1.mixer.Wqkv.weight"].shape == (384, 128)
    adapter = load_file(native / "text_matching" / "adapter_model.safetensors")
    assert len(adapter) == 2 * (2 * 6 + 3)
    rows = base["roberta.embeddings.word_embeddings.weight"].shape[0]
    assert adapter["roberta.embeddings.word_embeddings.lora_embedding_A"].shape == (4, rows)
    assert adapter["roberta.embeddings.word_embeddings.lora_embedding_B"].shape == (128, 4)
    assert adapter["roberta.encoder.layers.0.self_attn.q_proj.lora_B.weight"].shape == (128, 4)
    assert adapter["roberta.encoder.layers.0.mixer.out_proj.lora_A.weight"].shape == (4, 128)
    assert adapter["roberta.pooler.dense.lora_A.weight"].shape == (4, 128)


def test_both_layouts_are_one_model(original: Path, native: Path, tmp_path: Path) -> None:
    everything = open_native(native, *JINA_V3_PROMPTS)
    shutil.copy(native / "config.json", tmp_path)
    for index, task in enumerate(JINA_V3_PROMPTS):
        save_file(merged(original, index), tmp_path / "model.safetensors", {"format": "pt"})
        wanted, mask = states_of(open_native(tmp_path), original)
        everything.set_adapter(folder_of(task))
        for model in (everything, open_native(native, task)):
            found, _ = states_of(model, native)
            assert ((found - wanted) * mask).abs().max() < 2e-5, task


def test_texts_and_tasks_differ(native: Path) -> None:
    tasks: tuple[str | None, ...] = (None, *JINA_V3_PROMPTS)
    vectors = {
        task: embed(open_native(native, *([task] if task else [])), native) for task in tasks
    }
    for task, embeddings in vectors.items():
        similar = (embeddings @ embeddings.T)[~torch.eye(len(TEXTS), dtype=torch.bool)]
        assert similar.mean() < 0.9
        assert similar.max() < 0.999
        for other in set(vectors) - {task}:
            assert (embeddings * vectors[other]).sum(1).max() < 0.98


def test_tokens_of_a_text_differ(native: Path) -> None:
    states, _ = states_of(open_native(native), native)
    first = torch.nn.functional.normalize(states[:, 0], dim=1)
    assert (first * embed(open_native(native), native)).sum(1).max() < 0.9


@pytest.mark.parametrize(
    "text", [*TEXTS, "a <b> & \x00\ttab", "\U0001f642\u200d\u2194\ufe0f e\u0301 \u200f", ""]
)
def test_tokenizer_gives_every_text_back(text: str, original: Path) -> None:
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids[-1]) == (0, 2)
    assert 3 not in ids
    assert tokenizer.decode(ids) == text


def test_tokenizer_loads_in_transformers(original: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original)
    special = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id]
    assert special == [0, 1, 2]
    assert tokenizer.model_max_length == 8194
    rows = json.loads((original / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) == rows == tokenizer.mask_token_id + 1
    direct = Tokenizer.from_file(str(original / "tokenizer.json"))
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [
        direct.encode(text).ids for text in TEXTS
    ]


def test_given_tokenizer_is_copied(tmp_path: Path) -> None:
    given = FIXTURES / "jina_original_small" / "tokenizer.json"
    folder = checkpoint.write(tmp_path / "toy", tokenizer=given)
    assert (folder / "tokenizer.json").read_bytes() == given.read_bytes()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 331


def test_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    given = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match="cannot read"):
        checkpoint.write(tmp_path / "toy", tokenizer=given)
    given.write_text("{}")
    with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json"):
        checkpoint.write(tmp_path / "toy", tokenizer=given)
    from tokenizers import models

    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(given))
    with pytest.raises(TokenizerError, match="special tokens of XLM-R"):
        checkpoint.write(tmp_path / "toy", tokenizer=given)
    assert not (tmp_path / "toy").exists()


def test_table_shorter_than_the_tokenizer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FULL", dataclasses.replace(checkpoint.SMALL, vocabulary=100))
    with pytest.raises(TokenizerError, match="does not fit"):
        checkpoint.write(tmp_path / "toy", full_size=True)


def test_disk_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(toy_weights, "write_tensors", fill_up)
    with pytest.raises(DiskFullError, match="no space left"):
        checkpoint.write(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputPathError, match=r"notes\.txt"):
        checkpoint.write(tmp_path)
    with pytest.raises(OutputPathError, match="it is a file"):
        checkpoint.write(tmp_path / "notes.txt")
    with pytest.raises(OutputPathError, match="cannot write"):
        checkpoint.write(tmp_path / "notes.txt" / "toy")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="did you mean 'original'"):
        checkpoint.write(tmp_path / "toy", layout="orignal")
