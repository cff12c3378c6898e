"""The original layout: the authors' vectors, and every way in which a file can lie about it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.base.modules import Dense

from jexport.errors import (
    AdapterError,
    CheckpointError,
    NotFiniteError,
    StateDictError,
    UnknownTaskError,
    UnsupportedCheckpointError,
)
from jexport.stages import merge
from jexport.types import LoadedModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
SMALL = FIXTURES / "jina_original_small"
KEYS = sorted(load_file(SMALL / "model.safetensors"))
TASKS = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")
SIZES = (
    "hidden_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
STACK = ".parametrizations.weight"
Open = Callable[..., LoadedModel]
Vectors = Callable[[LoadedModel, list[str]], np.ndarray]


def authors(task: str) -> np.ndarray:
    """What the authors' own encode() returned (tests/fixtures/README.md)."""
    return np.asarray(np.load(FIXTURES / f"jina_original_small.{task}.npy"))


def by_hand(folder: Path, base: float, ids: list[int]) -> np.ndarray:
    """Hidden states of one text in float64, from the formulas: RoFormer, post-norm, erf GELU."""
    stored = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("roberta."): tensor.double() for name, tensor in stored.items()}
    config = json.loads((folder / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["hidden_size"]
    size = width // heads

    def matrix(name: str) -> torch.Tensor:
        return weights[f"{name}{STACK}.original"]

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        return states @ matrix(name).T + weights[f"{name}.bias"]

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        centred = states - states.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + config["layer_norm_eps"]).sqrt()
        return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def turned(states: torch.Tensor) -> torch.Tensor:
        made = states.clone()
        for place in range(len(ids)):
            for n in range(size // 2):
                angle = place * base ** (-2 * n / size)
                first, second = states[:, place, n], states[:, place, n + size // 2]
                made[:, place, n] = first * math.cos(angle) - second * math.sin(angle)
                made[:, place, n + size // 2] = second * math.cos(angle) + first * math.sin(angle)
        return made

    words = matrix("embeddings.word_embeddings")[ids]
    states = norm("emb_ln", words + matrix("embeddings.token_type_embeddings")[0])
    for n in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{n}"
        qkv = (
            linear(f"{layer}.mixer.Wqkv", states).view(len(ids), 3, heads, size).permute(1, 2, 0, 3)
        )
        query, key, value = turned(qkv[0]), turned(qkv[1]), qkv[2]
        mixed = (query @ key.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ value
        joined = mixed.transpose(0, 1).reshape(len(ids), width)
        states = norm(f"{layer}.norm1", states + linear(f"{layer}.mixer.out_proj", joined))
        wide = linear(f"{layer}.mlp.fc1", states)
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        states = norm(f"{layer}.norm2", states + linear(f"{layer}.mlp.fc2", wide))
    return states.numpy()


def run_reference(model: LoadedModel, ids: list[int]) -> np.ndarray:
    with model.reference() as run:
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        return np.asarray(run(feed)["last_hidden_state"][0])


@pytest.mark.parametrize("task", ["none", *TASKS])
def test_both_routes_give_the_authors_vectors(
    task: str, opened: Open, texts: list[str], reference_vectors: Vectors, merged_vectors: Vectors
) -> None:
    model = opened(SMALL, task)
    assert bool(model.adapter) == (task != "none")
    for vectors in (reference_vectors, merged_vectors):
        assert np.abs(vectors(model, texts) - authors(task)).max() <= 1e-6


def test_the_tasks_vectors_are_far_apart() -> None:
    """So that the test above could not pass with another task's adapter, or none."""
    for task in TASKS:
        for other in {"none", *TASKS} - {task}:
            assert np.abs(authors(task) - authors(other)).max() > 1e-2


def test_what_is_known_of_it(opened: Open) -> None:
    model = opened(SMALL, "retrieval.query")
    how = model.embedding
    assert how.prompt == "Represent the query for retrieving evidence documents: "
    assert (how.pooling, how.normalize, how.dimension) == ("mean", True, 64)
    assert (how.matryoshka, how.max_tokens) == ((16, 32, 64), 8192)
    assert opened(SMALL, "none").embedding.prompt == ""
    assert model.source.layout == "jina_v3_original"
    assert model.source.licence == "CC-BY-NC-4.0"
    assert {Path(file.path).name for file in model.source.files} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "modules.json",
        "config_sentence_transformers.json",
    }
    assert not model.source.code


@pytest.mark.parametrize("base", [500.0, 20_000.0])
def test_rotary_emb_base_takes_effect(
    base: float, small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    ids = [0, *range(40, 70), 2]
    edit_json(small_copy / "config.json", rotary_emb_base=base)
    found = run_reference(opened(small_copy), ids)
    assert np.abs(found - by_hand(small_copy, base, ids)).max() < 2e-5
    other = 20_000.0 if base == 500.0 else 500.0
    assert np.abs(found - by_hand(small_copy, other, ids)).max() > 1e-2
    module = opened(small_copy).assemble(opened(small_copy).weights)
    assert module.config.rope_parameters["rope_theta"] == base


def test_no_rotary_emb_base_is_the_authors_default(
    small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    ids = [0, *range(40, 60), 2]
    edit_json(small_copy / "config.json", rotary_emb_base=...)
    assert (
        np.abs(run_reference(opened(small_copy), ids) - by_hand(small_copy, 10_000.0, ids)).max()
        < 2e-5
    )


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("task", ["none", "separation"])
def test_a_missing_tensor_is_named(
    key: str, task: str, small_copy: Path, opened: Open, edit_weights: Callable[..., None]
) -> None:
    edit_weights(small_copy, lambda tensors: {n: t for n, t in tensors.items() if n != key})
    with pytest.raises((StateDictError, AdapterError)) as caught:
        opened(small_copy, task)
    assert isinstance(caught.value, AdapterError) == (".lora_" in key)
    # Under its own name or the native one, of which the layer and the kind stay.
    assert "missing: none" not in caught.value.evidence
    assert caught.value.evidence.startswith("missing: ")


@pytest.mark.parametrize("key", KEYS)
def test_a_tensor_of_another_shape_is_named(
    key: str, small_copy: Path, opened: Open, edit_weights: Callable[..., None]
) -> None:
    def reshape(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.cat([tensors[key], tensors[key][-1:]])

    edit_weights(small_copy, reshape)
    with pytest.raises((StateDictError, AdapterError)) as caught:
        opened(small_copy, "separation")
    assert isinstance(caught.value, AdapterError) == (".lora_" in key)


@pytest.mark.parametrize(
    "name",
    [
        "roberta.encoder.layers.2.norm1.weight",
        "roberta.encoder.layers.0.norm1.scale",
        "roberta.encoder.layers.0.weight",
        "roberta.encoder.layers.bias",
        "roberta.emb_ln.weight.extra",
        "roberta.other.0.mixer.Wqkv.bias",
        "roberta.encoder.layers.0.more.mixer.Wqkv.bias",
        "mixer.Wqkv.bias",
        "lm_head.bias",
        "classifier.weight",
        "roberta.pooler.more.weight",
        "emb_ln.weight",
        "roberta.embeddings.LayerNorm.weight",
        "roberta.encoder.layers.0.mlp.fc1.weight",
        "roberta.encoder.layers.0.norm1.parametrizations.weight.0.lora_A",
        "roberta.encoder.layers.9.mlp.fc1.parametrizations.weight.0.lora_A",
        "embeddings.word_embeddings.parametrizations.weight.0.lora_A",
    ],
)
def test_one_tensor_too_many_is_named(
    name: str, small_copy: Path, opened: Open, edit_weights: Callable[..., None]
) -> None:
    edit_weights(small_copy, lambda tensors: {**tensors, name: torch.zeros(64)})
    with pytest.raises((StateDictError, AdapterError)) as caught:
        opened(small_copy, "separation")
    assert "expected: none" not in caught.value.evidence


def test_a_renamed_tensor_is_missing_and_unexpected(
    small_copy: Path, opened: Open, edit_weights: Callable[..., None]
) -> None:
    """As many tensors as there should be, of the right shapes."""
    old, new = "layers.1.norm1", "layers.7.norm1"
    edit_weights(small_copy, lambda ts: {name.replace(old, new): t for name, t in ts.items()})
    with pytest.raises(StateDictError) as caught:
        opened(small_copy)
    assert "missing: layers.1.post_attention_layernorm.bias" in caught.value.evidence
    assert "unexpected: layers.7.post_attention_layernorm.bias" in caught.value.evidence


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", [k for k in KEYS if k.endswith((".original", ".bias"))][:4])
def test_a_value_of_the_base_that_is_not_finite_is_an_error(
    value: float, key: str, small_copy: Path, opened: Open, edit_weights: Callable[..., None]
) -> None:
    edit_weights(small_copy, lambda tensors: tensors[key].view(-1)[-1:].fill_(value))
    model = opened(small_copy)
    with pytest.raises(NotFiniteError, match="NaN or an infinity") as caught:
        model.assemble(model.weights)
    assert "1 of " in caught.value.evidence


def poison(tensors: dict[str, torch.Tensor]) -> None:
    """A NaN in one factor of the third adapter."""
    tensors[f"roberta.encoder.layers.1.mlp.fc2{STACK}.0.lora_B"][2, 0, 0] = math.nan


def test_a_nan_counts_in_the_adapter_that_is_read_only(
    small_copy: Path,
    opened: Open,
    edit_weights: Callable[..., None],
    texts: list[str],
    reference_vectors: Vectors,
    merged_vectors: Vectors,
) -> None:
    edit_weights(small_copy, poison)
    model = opened(small_copy, TASKS[2])
    merged = merge.run(model)
    with pytest.raises(NotFiniteError, match="NaN"):
        merged.assemble(merged.weights)
    with pytest.raises(NotFiniteError, match="NaN"), model.reference():
        pass
    # Another task's numbers are never read: no error, and the same vectors as before.
    for vectors in (reference_vectors, merged_vectors):
        assert (
            np.abs(vectors(opened(small_copy, TASKS[1]), texts) - authors(TASKS[1])).max() <= 1e-6
        )


def test_an_adapter_of_another_rank_is_refused(
    small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    edit_json(small_copy / "config.json", lora_rank=8)
    with pytest.raises(AdapterError, match="another shape or rank") as caught:
        opened(small_copy, "separation")
    assert "lora_rank" in caught.value.evidence


@pytest.mark.parametrize("listed", [list(TASKS[:4]), [*TASKS, "clustering"]])
def test_another_number_of_adapters_is_refused(
    listed: list[str], small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    edit_json(small_copy / "config.json", lora_adaptations=listed)
    with pytest.raises(AdapterError, match="another shape or rank"):
        opened(small_copy, "separation")


def merge_all(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first adapter merged in, plain names: what fine-tuners publish."""
    made = {}
    for name, tensor in tensors.items():
        if name.endswith(".original"):
            stem = name.removesuffix(".original")
            a, b = (tensors[f"{stem}.0.lora_{which}"][0].float() for which in "AB")
            delta = a @ b if "embeddings" in name else b @ a
            made[name.replace(f"{STACK}.original", ".weight")] = tensor.float() + 0.25 * delta
        elif ".lora_" not in name:
            made[name] = tensor.float()
    return made


@pytest.mark.parametrize("keep_lora_keys", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_merged_checkpoint_offers_none_only(
    keep_lora_keys: bool,
    prefix: bool,
    small_copy: Path,
    opened: Open,
    texts: list[str],
    edit_weights: Callable[..., None],
    edit_json: Callable[..., None],
    reference_vectors: Vectors,
) -> None:
    edit_weights(small_copy, merge_all)
    if not prefix:
        edit_weights(small_copy, lambda ts: {n.removeprefix("roberta."): t for n, t in ts.items()})
    if not keep_lora_keys:
        gone = ("lora_adaptations", "lora_rank", "lora_alpha", "auto_map", "task_instructions")
        edit_json(small_copy / "config.json", **dict.fromkeys(gone, ...))
    with pytest.raises(UnknownTaskError) as caught:
        opened(small_copy, "retrieval.query")
    assert caught.value.evidence == "this checkpoint has: none"
    model = opened(small_copy)
    prompt = "Represent the query for retrieving evidence documents: "
    found = reference_vectors(model, [prompt + text for text in texts])
    assert np.abs(found - authors("retrieval.query")).max() <= 1e-6


def test_an_early_fork_without_names_has_the_usual_tasks(
    small_copy: Path,
    opened: Open,
    edit_json: Callable[..., None],
    texts: list[str],
    reference_vectors: Vectors,
) -> None:
    gone = ("model_type", "task_instructions", "lora_adaptations", "type_vocab_size")
    edit_json(small_copy / "config.json", **dict.fromkeys(gone, ...))
    found = reference_vectors(opened(small_copy, "retrieval.passage"), texts)
    assert np.abs(found - authors("retrieval.passage")).max() <= 1e-6


def test_tasks_of_ones_own_need_no_instruction(
    small_copy: Path,
    opened: Open,
    edit_json: Callable[..., None],
    texts: list[str],
    reference_vectors: Vectors,
) -> None:
    edit_json(small_copy / "config.json", lora_adaptations=["a", "b", "c", "d", "e"])
    model = opened(small_copy, "c")
    assert model.embedding.prompt == ""
    assert np.abs(reference_vectors(model, texts) - authors(TASKS[2])).max() <= 1e-6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_emb_interleaved", True),
        ("rotary_emb_scale_base", 512),
        ("rotary_emb_dim", 8),
        ("pad_vocab_size_multiple", 8),
        ("position_embedding_type", "alibi"),
        ("emb_pooler", "max"),
        ("hidden_act", "swiglu"),
    ],
)
def test_an_option_that_the_native_class_lacks_is_refused(
    key: str, value: Any, small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    edit_json(small_copy / "config.json", **{key: value})
    with pytest.raises(UnsupportedCheckpointError) as caught:
        opened(small_copy)
    assert f"{key} = {value!r}" in caught.value.evidence


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, bad) for key in SIZES for bad in (..., None, "64", -1, 2.5, True)],
        ("type_vocab_size", 0),
        ("num_attention_heads", 3),
        ("num_attention_heads", 64),
        ("layer_norm_eps", "small"),
        ("pad_token_id", 400),
        ("pad_token_id", -1),
        ("max_position_embeddings", "long"),
        ("rotary_emb_base", "20000"),
        ("rotary_emb_base", 0),
        ("rotary_emb_base", math.nan),
        ("lora_adaptations", "retrieval.query"),
        ("lora_adaptations", ["a", "a", "b", "c", "d"]),
        ("lora_rank", ...),
        ("lora_rank", 0),
        ("task_instructions", ["a"]),
        ("matryoshka_dimensions", ["small"]),
        ("matryoshka_dimensions", 32),
    ],
)
def test_a_config_that_cannot_be_used_is_a_checkpoint_error(
    key: str, value: Any, small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    edit_json(small_copy / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        opened(small_copy, "separation")


@pytest.mark.parametrize("alpha", [..., None, "1", math.inf])
def test_an_adapter_without_a_scale_is_refused(
    alpha: Any, small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    edit_json(small_copy / "config.json", lora_alpha=alpha)
    with pytest.raises(AdapterError, match="scaled"):
        opened(small_copy, "separation")


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"]
)
def test_a_config_of_another_model_is_refused(
    key: str, small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    size = json.loads((small_copy / "config.json").read_text())[key]
    edit_json(small_copy / "config.json", **{key: size * 2})
    with pytest.raises(StateDictError):
        opened(small_copy, "separation")


def test_emb_pooler_is_followed(
    small_copy: Path, opened: Open, edit_json: Callable[..., None], texts: list[str]
) -> None:
    edit_json(small_copy / "config.json", emb_pooler="cls")
    with pytest.raises(UnsupportedCheckpointError, match="two things about its pooling"):
        opened(small_copy)
    (small_copy / "modules.json").unlink()
    assert opened(small_copy).embedding.pooling == "cls"
    edit_json(small_copy / "config.json", emb_pooler=None)
    assert opened(small_copy).embedding.pooling == "mean"


def test_modules_of_a_fine_tune_are_followed(
    small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    pooling = small_copy / "1_Pooling" / "config.json"
    edit_json(pooling, pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    modules = json.loads((small_copy / "modules.json").read_text())
    (small_copy / "modules.json").write_text(json.dumps(modules[:2]))
    how = opened(small_copy).embedding
    assert (how.pooling, how.normalize) == ("cls", False)
    modules[2] |= {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
    (small_copy / "modules.json").write_text(json.dumps(modules))
    (small_copy / "2_Dense").mkdir()
    width = json.loads(pooling.read_text())["word_embedding_dimension"]
    Dense(width, 16).save(str(small_copy / "2_Dense"))
    with pytest.raises(UnsupportedCheckpointError, match="modules after the pooling of a jina"):
        opened(small_copy)


SENTENCE = "config_sentence_transformers.json"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pooling_method": "cls"}, "pooling_method"),
        ({"model_type": "SparseEncoder"}, "model_type"),
        ({"default_prompt_name": "retrieval.passage"}, "default_prompt_name"),
        ({"prompts": {"separation": "Separate: "}}, "prompts.separation"),
        ({"default_prompt_name": "x", "prompts": {"x": "y: "}}, "default_prompt_name = 'x'"),
    ],
)
def test_what_sentence_transformers_settings_would_change_is_refused(
    settings: dict[str, Any],
    named: str,
    small_copy: Path,
    opened: Open,
    edit_json: Callable[..., None],
) -> None:
    edit_json(small_copy / SENTENCE, **settings)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        opened(small_copy, "separation")
    assert named in str(caught.value)


def test_sentence_transformers_settings_are_followed(
    small_copy: Path, opened: Open, edit_json: Callable[..., None]
) -> None:
    prompts = json.loads((SMALL / SENTENCE).read_text())["prompts"]
    edit_json(
        small_copy / SENTENCE,
        prompts={**prompts, "code": "Represent the code: "},
        default_prompt_name="retrieval.query",
        similarity_fn_name="dot",
        truncate_dim=16,
    )
    how = opened(small_copy, "retrieval.query").embedding
    assert (how.similarity, how.truncate_dim) == ("dot", 16)
    assert how.prompts["code"] == "Represent the code: "
    assert how.prompt == prompts["retrieval.query"] == how.prompts["query"]
    asked = {"separation": "Separate: "}
    assert opened(small_copy, "separation", prompts=asked).embedding.prompt == "Separate: "
