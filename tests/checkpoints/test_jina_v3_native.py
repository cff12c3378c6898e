"""The native layout: equal to transformers and PEFT, and every way in which an adapter can lie."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from jexport.errors import (
    AdapterError,
    CheckpointError,
    NotFiniteError,
    StateDictError,
    UnknownTaskError,
    UnsupportedCheckpointError,
)
from jexport.toy import checkpoint
from jexport.types import LoadedModel

SMALL = Path(__file__).parents[1] / "fixtures" / "jina_original_small"
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
ADAPTED = [
    "word_embeddings",
    "token_type_embeddings",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "fc1",
    "fc2",
    "dense",
]
FACTORS = "adapter_model.safetensors"
Open = Callable[..., LoadedModel]
Edit = Callable[..., None]
Vectors = Callable[[LoadedModel, list[str]], np.ndarray]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in both layouts, with the small checkpoint's tokenizer."""
    home = tmp_path_factory.mktemp("toys")
    tokenizer = SMALL / "tokenizer.json"
    return {
        layout: checkpoint.write(home / layout, layout=layout, tokenizer=tokenizer, seed=5)
        for layout in checkpoint.LAYOUTS
    }


@pytest.fixture
def native(toys: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the toy to break."""
    return Path(shutil.copytree(toys["native"], tmp_path / "native"))


def tokenizer_beside(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, folder)
    return folder


def tiny_model(**config: Any) -> Any:
    """A seeded model whose every weight counts, the norms' too."""
    sizes = {"vocab_size": 331, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    model = JinaEmbeddingsV3Model(JinaEmbeddingsV3Config(**sizes, num_attention_heads=4, **config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            weight.copy_(around + 0.3 * torch.randn(weight.shape))
    return model.eval()


def states(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy())


def reference_states(model: LoadedModel, ids: list[int]) -> np.ndarray:
    with model.reference() as run:
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        return np.asarray(run(feed)["last_hidden_state"][0])


IDS = [0, *range(30, 90), 2]


@pytest.mark.parametrize("task", ["none", *TASKS])
def test_both_layouts_give_the_same_vectors(
    task: str,
    toys: dict[str, Path],
    opened: Open,
    texts: list[str],
    reference_vectors: Vectors,
    merged_vectors: Vectors,
) -> None:
    found = [
        vectors(opened(folder, task), texts)
        for folder in toys.values()
        for vectors in (reference_vectors, merged_vectors)
    ]
    for one in found[1:]:
        assert np.abs(one - found[0]).max() <= 1e-6
    if task != "none":
        plain = reference_vectors(opened(toys["native"]), texts)
        assert np.abs(plain - found[0]).max() > 1e-2


def test_what_is_known_of_it(toys: dict[str, Path], opened: Open) -> None:
    model = opened(toys["native"], "text-matching")
    assert model.source.layout == "jina_v3_native"
    assert {file.path for file in model.source.files} >= {
        "model.safetensors",
        f"text_matching/{FACTORS}",
        "text_matching/adapter_config.json",
    }
    assert not [file for file in model.source.files if "retrieval" in file.path]
    assert opened(toys["native"], "retrieval.passage").embedding.prompt == (
        "Represent the document for retrieval: "
    )


@pytest.mark.parametrize("prefix", ["", "roberta."])
@pytest.mark.parametrize("original_names", [True, False])
def test_every_naming_of_the_base_is_transformers_model(
    original_names: bool, prefix: str, tmp_path: Path, opened: Open, edit_weights: Edit
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, save_original_format=original_names)
    edit_weights(tmp_path, lambda ts: {prefix + name: tensor for name, tensor in ts.items()})
    names = load_file(tmp_path / "model.safetensors")
    assert any("Wqkv" in name for name in names) == original_names
    loaded = opened(tokenizer_beside(tmp_path))
    assert np.abs(reference_states(loaded, IDS) - states(model, IDS)).max() <= 1e-6
    assert loaded.embedding.pooling == "mean"


@pytest.mark.parametrize("theta", [700.0, 20_000.0])
def test_rope_parameters_take_effect(theta: float, tmp_path: Path, opened: Open) -> None:
    model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": theta})
    frequencies = [theta ** (-2 * n / 8) for n in range(4)]
    assert np.allclose(model.rotary_emb.inv_freq, frequencies)
    model.save_pretrained(tmp_path)
    loaded = opened(tokenizer_beside(tmp_path))
    assert np.allclose(loaded.assemble(loaded.weights).rotary_emb.inv_freq, frequencies)
    assert np.abs(reference_states(loaded, IDS) - states(model, IDS)).max() <= 1e-6


def test_a_theta_of_its_own_key_takes_effect(native: Path, opened: Open, edit_json: Edit) -> None:
    edit_json(native / "config.json", rope_theta=900.0, rotary_emb_base=...)
    wanted = states(AutoModel.from_pretrained(native, dtype=torch.float32), IDS)
    assert np.abs(reference_states(opened(native), IDS) - wanted).max() <= 1e-6


def test_rope_that_transformers_would_run_otherwise_is_refused(
    native: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(native / "config.json", rotary_emb_base=10_000.0)
    with pytest.raises(UnsupportedCheckpointError, match="transformers would ignore"):
        opened(native)
    edit_json(native / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e3})
    loaded = opened(native)
    assert loaded.assemble(loaded.weights).config.rope_parameters["rope_theta"] == 5e3
    edit_json(native / "config.json", rope_parameters={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(UnsupportedCheckpointError, match="'linear'"):
        opened(native)
    edit_json(native / "config.json", rope_parameters=[5e3])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        opened(native)


def peft_checkpoint(folder: Path, **lora: Any) -> tuple[Any, list[str]]:
    """A base and one adapter as PEFT writes them today, and the PEFT model."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model()
    base.save_pretrained(folder, save_original_format=False)
    settings = {"r": 4, "lora_alpha": 3, "target_modules": ADAPTED} | lora
    wrapped: Any = get_peft_model(base, LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape))
    wrapped.eval().save_pretrained(folder / "text_matching")
    tokenizer_beside(folder)
    return wrapped, sorted(load_file(folder / "text_matching" / FACTORS))


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "fc1", "word_embeddings"]},
        {"target_modules": r".*layers\.1\..*\.(k_proj|fc2)"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.2, "task_type": "FEATURE_EXTRACTION"},
    ],
)
def test_an_adapter_as_peft_writes_it_gives_pefts_vectors(
    lora: dict[str, Any],
    tmp_path: Path,
    opened: Open,
    reference_vectors: Vectors,
    merged_vectors: Vectors,
    texts: list[str],
) -> None:
    wrapped, names = peft_checkpoint(tmp_path, **lora)
    assert all(name.startswith("base_model.model.") for name in names)
    model = opened(tmp_path, "text-matching")
    wanted = states(wrapped, IDS)
    with wrapped.disable_adapter():
        assert np.abs(wanted - states(wrapped, IDS)).max() > 1e-2
    # Hidden states are of order 3: 2e-6 is a few units in the last place of float32.
    assert np.abs(reference_states(model, IDS) - wanted).max() <= 2e-6
    found = merged_vectors(model, texts[:6])
    assert np.abs(found - reference_vectors(model, texts[:6])).max() <= 1e-6
    means = [states(wrapped, ids).mean(axis=0) for ids in model.tokenize_reference(texts[:6])]
    normal = [mean / np.linalg.norm(mean) for mean in means]
    assert np.abs(found - np.stack(normal)).max() <= 1e-6


def test_the_merge_is_pefts(tmp_path: Path, opened: Open) -> None:
    """Weight by weight, not only in what comes out."""
    from jexport.stages import merge

    wrapped, _ = peft_checkpoint(tmp_path)
    merged = merge.run(opened(tmp_path, "text-matching")).weights
    wanted = wrapped.merge_and_unload().state_dict()
    assert set(merged) == set(wanted)
    for name, read in merged.items():
        assert (read() - wanted[name]).abs().max() <= 1e-6, name


def test_an_adapter_saved_by_transformers_loads(tmp_path: Path, opened: Open) -> None:
    """`model.add_adapter(...); model.save_pretrained(...)`, without PEFT's own wrapper."""
    from peft import LoraConfig

    model = tiny_model()
    model.save_pretrained(tmp_path)
    model.add_adapter(LoraConfig(r=2, target_modules=ADAPTED, init_lora_weights=False))
    model.save_pretrained(tmp_path / "separation")
    tokenizer_beside(tmp_path)
    found = reference_states(opened(tmp_path, "separation"), IDS)
    assert np.abs(found - states(model, IDS)).max() <= 2e-6


def test_a_merged_checkpoint_offers_none_only(tmp_path: Path, opened: Open) -> None:
    wrapped, _ = peft_checkpoint(tmp_path)
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer_beside(tmp_path / "merged")
    with pytest.raises(UnknownTaskError) as caught:
        opened(tmp_path / "merged", "text-matching")
    assert caught.value.evidence == "this checkpoint has: none"
    found = reference_states(opened(tmp_path / "merged"), IDS)
    assert np.abs(found - states(merged, IDS)).max() <= 1e-6


def test_only_tasks_with_a_folder_are_offered(native: Path, opened: Open) -> None:
    shutil.rmtree(native / "separation")
    with pytest.raises(UnknownTaskError) as caught:
        opened(native, "separation")
    assert "separation" not in caught.value.evidence
    assert opened(native, "classification").adapter


BASE = [
    f"roberta.{name}"
    for name in (
        "embeddings.word_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "emb_ln.weight",
        "emb_ln.bias",
        "pooler.dense.weight",
        "pooler.dense.bias",
        *[
            f"encoder.layers.{n}.{part}.{kind}"
            for n in range(2)
            for kind in ("weight", "bias")
            for part in ("mixer.Wqkv", "mixer.out_proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
        ],
    )
]


def test_the_keys_below_are_all_there_are(toys: dict[str, Path]) -> None:
    assert sorted(BASE) == sorted(load_file(toys["native"] / "model.safetensors"))
    for task in TASKS:
        folder = toys["native"] / task.replace(".", "_").replace("-", "_")
        assert sorted(PAIRS) == sorted(load_file(folder / FACTORS))


@pytest.mark.parametrize("key", BASE)
def test_a_missing_or_reshaped_tensor_of_the_base_is_named(
    key: str, native: Path, opened: Open, edit_weights: Edit
) -> None:
    whole = load_file(native / "model.safetensors")
    save_file({n: t for n, t in whole.items() if n != key}, native / "model.safetensors")
    with pytest.raises(StateDictError) as caught:
        opened(native, "separation")
    assert "missing: none" not in caught.value.evidence
    whole[key] = torch.cat([whole[key], whole[key][-1:]])
    save_file(whole, native / "model.safetensors")
    with pytest.raises(StateDictError) as caught:
        opened(native, "separation")
    assert "mismatched: none" not in caught.value.evidence


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.q_proj.weight",
        "emb_ln.bias",
        "roberta.layers.0.mlp.fc1.bias",
        "lm_head.weight",
        "base_model.model.emb_ln.bias",
        "embeddings.position_embeddings.weight",
    ],
)
def test_a_tensor_too_many_in_the_base_is_named(
    name: str, native: Path, opened: Open, edit_weights: Edit
) -> None:
    edit_weights(native, lambda tensors: {**tensors, name: torch.zeros(64)})
    with pytest.raises(StateDictError) as caught:
        opened(native)
    assert "unexpected: none" not in caught.value.evidence


MODULES = [
    "roberta.pooler.dense",
    *[
        f"roberta.encoder.layers.{n}.{module}"
        for n in range(2)
        for module in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mixer.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
    ],
]
TABLES = [f"roberta.embeddings.{kind}_embeddings" for kind in ("word", "token_type")]
PAIRS = [
    *[f"{module}.lora_{side}.weight" for module in MODULES for side in "AB"],
    *[f"{table}.lora_embedding_{side}" for table in TABLES for side in "AB"],
]


@pytest.mark.parametrize("key", PAIRS)
def test_a_missing_or_reshaped_matrix_of_the_adapter_is_named(
    key: str, native: Path, opened: Open, edit_weights: Edit
) -> None:
    path = native / "separation" / FACTORS
    whole = load_file(path)
    save_file({n: t for n, t in whole.items() if n != key}, path)
    with pytest.raises(AdapterError, match="separation") as caught:
        opened(native, "separation")
    assert "missing: none" not in caught.value.evidence
    assert opened(native, "classification").adapter
    assert not opened(native).adapter
    whole[key] = torch.cat([whole[key], whole[key][-1:]])
    save_file(whole, path)
    with pytest.raises(AdapterError, match="another shape or rank"):
        opened(native, "separation")


@pytest.mark.parametrize(
    "name",
    [
        "roberta.encoder.layers.2.mlp.fc1.lora_A.weight",
        "roberta.encoder.layers.0.norm1.lora_A.weight",
        "roberta.encoder.layers.0.mixer.Wqkv.lora_A.weight",
        "base_model.model.layers.0.mlp.fc1.lora_A.weight",
        "roberta.encoder.layers.0.mlp.fc1.lora_magnitude_vector",
        "roberta.emb_ln.bias",
        "something",
    ],
)
def test_a_matrix_too_many_in_the_adapter_is_named(
    name: str, native: Path, opened: Open, edit_weights: Edit
) -> None:
    edit_weights(native / "separation" / FACTORS, lambda ts: {**ts, name: torch.zeros(4, 64)})
    with pytest.raises(AdapterError) as caught:
        opened(native, "separation")
    assert name in caught.value.evidence


@pytest.mark.parametrize("rank", [2, 8])
def test_an_adapter_of_another_rank_is_refused(
    rank: int, native: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(native / "separation" / "adapter_config.json", r=rank)
    with pytest.raises(AdapterError, match="another shape or rank") as caught:
        opened(native, "separation")
    assert "separation/adapter_config.json" in caught.value.evidence


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_of_the_adapter_that_is_not_finite_is_an_error(
    value: float, native: Path, opened: Open, edit_weights: Edit
) -> None:
    key = "roberta.encoder.layers.0.mlp.fc1.lora_B.weight"
    edit_weights(native / "separation" / FACTORS, lambda ts: ts[key][0].fill_(value))
    with (
        pytest.raises(NotFiniteError, match="NaN or an infinity"),
        opened(native, "separation").reference(),
    ):
        pass
    # Another task's file is not even opened.
    (native / "retrieval_query" / FACTORS).write_bytes(b"")
    model = opened(native, "classification")
    with model.reference():
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"exclude_modules": ["fc1"]}, "exclude_modules"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [4]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [4]}, "alora_invocation_tokens"),
        ({"use_something_of_next_year": True}, "use_something_of_next_year"),
    ],
)
def test_a_variant_of_lora_is_refused(
    change: dict[str, Any], said: str, native: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(native / "separation" / "adapter_config.json", **change)
    with pytest.raises(AdapterError, match="not plain LoRA") as caught:
        opened(native, "separation")
    assert said in caught.value.evidence


@pytest.mark.parametrize(
    "change",
    [
        {"r": 0},
        {"r": "4"},
        {"r": ...},
        {"r": True},
        {"r": None},
        {"lora_alpha": ...},
        {"lora_alpha": "1"},
        {"lora_alpha": math.nan},
        {"target_modules": "("},
    ],
)
def test_adapter_settings_that_cannot_be_used_are_refused(
    change: dict[str, Any], native: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(native / "separation" / "adapter_config.json", **change)
    with pytest.raises(AdapterError):
        opened(native, "separation")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '{"r": 4'])
def test_adapter_settings_that_cannot_be_read_are_refused(
    text: str | None, native: Path, opened: Open
) -> None:
    path = native / "separation" / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        opened(native, "separation")


def test_an_adapter_without_its_file_is_refused(native: Path, opened: Open) -> None:
    path = native / "separation" / FACTORS
    path.rename(path.with_name("adapter_model.bin"))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        opened(native, "separation")


def test_a_truncated_adapter_is_refused(native: Path, opened: Open) -> None:
    path = native / "separation" / FACTORS
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="truncated"):
        opened(native, "separation")


def test_a_list_of_adapters_that_is_none_is_refused(
    native: Path, opened: Open, edit_json: Edit
) -> None:
    edit_json(native / "config.json", lora_adaptations={"separation": 0})
    with pytest.raises(CheckpointError, match="list the adapters"):
        opened(native)
    edit_json(native / "config.json", lora_adaptations=..., task_instructions=...)
    assert json.loads((native / "config.json").read_text())["model_type"] == "jina_embeddings_v3"
    assert opened(native, "retrieval.query").embedding.prompt.startswith("Represent the query")
