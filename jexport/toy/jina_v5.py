"""A toy of jina-embeddings-v5-text: what it holds, in the names, dtypes and files of the hub's.

Both models: small (Qwen3, causal) and nano (EuroBERT, bidirectional), each with one PEFT adapter
per task. Only their own sizes differ from the real ones, and not even those at full size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jexport.errors import TokenizerError
from jexport.tasks import JINA_V5, JINA_V5_PROMPTS
from jexport.toy import tokenizer as toy_tokenizer
from jexport.toy.weights import Drawing, Shape, draw, write_tensors

LORA_RANK = LORA_ALPHA = 32
SPECIAL_TOKENS = {
    "qwen3": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "eurobert": ("<|begin_of_text|>", "<|end_of_text|>", "<|mask|>"),
}
"""After the vocabulary, in the order of their ids; the pad token is named in tokenizer_config."""

PAD = {"qwen3": "<|endoftext|>", "eurobert": "<|end_of_text|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
)
"""Qwen3's tokenizer has one; it is not for embeddings, and none may go through it."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One of the two models, at one size.

    Args:
        kind: model_type of the native model, 'qwen3' or 'eurobert'.
        repository: on the hub.
        layers: transformer blocks.
        hidden: width of a token's vector.
        heads: of the queries.
        kv_heads: of keys and values.
        head_dim: width of a head; the heads together may be wider than `hidden`.
        intermediate: width between the matrices of a block's MLP.
        vocabulary: rows of the table; None for as many as the tokenizer needs.
        positions: the longest text, in tokens.
        tokenizer_limit: model_max_length of the tokenizer.
        theta: base of RoPE.
        epsilon: of RMSNorm.
    """

    kind: str
    repository: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int | None
    positions: int
    tokenizer_limit: int
    theta: int
    epsilon: float


FULL = {
    "jina-v5-small": Model(
        kind="qwen3",
        repository="jinaai/jina-embeddings-v5-text-small",
        layers=28,
        hidden=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        intermediate=3072,
        vocabulary=151_936,
        positions=32_768,
        tokenizer_limit=131_072,
        theta=1_000_000,
        epsilon=1e-6,
    ),
    "jina-v5-nano": Model(
        kind="eurobert",
        repository="jinaai/jina-embeddings-v5-text-nano",
        layers=12,
        hidden=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        intermediate=3072,
        vocabulary=128_256,
        positions=8192,
        tokenizer_limit=8192,
        theta=250_000,
        epsilon=1e-5,
    ),
}
LAYOUTS = tuple(FULL)
SCALED_DOWN: Mapping[str, Mapping[str, Any]] = {
    "jina-v5-small": {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64},
    "jina-v5-nano": {"layers": 2, "hidden": 128, "heads": 2, "kv_heads": 2},
}
"""As in the real ones, small's heads are together twice as wide as its hidden states."""


def size(layout: str, *, full_size: bool) -> Model:
    """The sizes of a toy.

    Args:
        layout: one of LAYOUTS.
        full_size: those of the real model.

    Returns:
        The model.
    """
    full = FULL[layout]
    if full_size:
        return full
    return replace(full, **SCALED_DOWN[layout], intermediate=320, vocabulary=None)


def write_files(
    folder: Path, layout: str, *, full_size: bool, tokenizer: Path | None, seed: int
) -> None:
    """Write the files of a checkpoint, one tensor in memory at a time.

    Args:
        folder: empty.
        layout: one of LAYOUTS.
        full_size: the sizes of the real model.
        tokenizer: a tokenizer.json to copy; None for the built-in one.
        seed: of every number.

    Raises:
        TokenizerError: the tokenizer cannot be read, lacks the pad token, or has too many tokens.
    """
    model = size(layout, full_size=full_size)
    specials = SPECIAL_TOKENS[model.kind]
    content = (
        toy_tokenizer.train_byte_level(specials)
        if tokenizer is None
        else toy_tokenizer.read(tokenizer)
    )
    ids = toy_tokenizer.ids(content, tokenizer)
    tokens = 1 + max(ids.values())
    rows = model.vocabulary or tokens
    if PAD[model.kind] not in ids or tokens > rows:
        raise TokenizerError(
            "toy: the tokenizer does not fit",
            evidence=f"{tokenizer} has {tokens} tokens, the table {rows} rows; pad token "
            f"{PAD[model.kind]}: {ids.get(PAD[model.kind])}",
            fix="take a tokenizer.json of this model's kind, or none for the built-in one",
        )
    (folder / "tokenizer.json").write_bytes(content)
    _write_json(folder / "config.json", _config(model, rows, ids))
    _write_companions(folder, model)
    shapes = {"embed_tokens": (rows, model.hidden), **_matrices(model)}
    write_tensors(folder / "model.safetensors", _base(model, shapes, seed))
    for task in JINA_V5:
        home = folder / "adapters" / task
        home.mkdir(parents=True)
        _write_json(home / "adapter_config.json", _adapter_config(model))
        tensors = _adapter(model, f"{seed}/{task}")
        write_tensors(home / "adapter_model.safetensors", tensors)


def _matrices(model: Model) -> dict[str, Shape]:
    """Every matrix with an adapter, as (rows, columns), by module name."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, Shape] = {}
    for n in range(model.layers):
        attention, network = f"layers.{n}.self_attn", f"layers.{n}.mlp"
        shapes[f"{attention}.q_proj"] = (queries, model.hidden)
        shapes[f"{attention}.k_proj"] = (keys, model.hidden)
        shapes[f"{attention}.v_proj"] = (keys, model.hidden)
        shapes[f"{attention}.o_proj"] = (model.hidden, queries)
        shapes[f"{network}.gate_proj"] = (model.intermediate, model.hidden)
        shapes[f"{network}.up_proj"] = (model.intermediate, model.hidden)
        shapes[f"{network}.down_proj"] = (model.hidden, model.intermediate)
    return shapes


def _base(model: Model, shapes: Mapping[str, Shape], seed: int) -> dict[str, Drawing]:
    """The base's tensors by name, not drawn yet.

    Residuals are added and not normalised, so that the two matrices that end a branch are small.
    """
    drawings: dict[str, Drawing] = {}

    def add(name: str, shape: Shape, mean: float, deviation: float) -> None:
        drawings[f"{name}.weight"] = (
            shape,
            partial(draw, f"{seed}/{name}", shape, mean, deviation),
        )

    for name, shape in shapes.items():
        gain = 1.0
        if name.endswith(("q_proj", "k_proj")):
            gain = 2.0  # sharper attention: a wrong mask or position shows
        elif name.endswith(("o_proj", "down_proj")):
            gain = 0.7 / math.sqrt(model.layers)
        add(name, shape, 0.0, 0.5 if name == "embed_tokens" else gain / math.sqrt(shape[-1]))
    for n in range(model.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"layers.{n}.{norm}", (model.hidden,), 1.0, 0.1)
        if model.kind == "qwen3":
            for norm in ("q_norm", "k_norm"):
                add(f"layers.{n}.self_attn.{norm}", (model.head_dim,), 1.0, 0.1)
    add("norm", (model.hidden,), 1.0, 0.1)
    return drawings


def _adapter(model: Model, key: str) -> dict[str, Drawing]:
    """One task's factors by PEFT's names, not drawn yet."""
    drawings: dict[str, Drawing] = {}
    for module, (rows, columns) in _matrices(model).items():
        factors = {"A": ((LORA_RANK, columns), 1.0), "B": ((rows, LORA_RANK), 0.5)}
        for side, (shape, gain) in factors.items():
            name = f"base_model.model.{module}.lora_{side}.weight"
            if side == "B" and module.endswith(("o_proj", "down_proj")):
                gain *= 0.7 / math.sqrt(model.layers)
            deviation = gain / math.sqrt(columns if side == "A" else LORA_RANK)
            make: Callable[[], Any] = partial(draw, f"{key}/{name}", shape, 0.0, deviation)
            drawings[name] = (shape, make)
    return drawings


# --- companion files ---------------------------------------------------------------------------


def _config(model: Model, rows: int, ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json as on the hub; auto_map names code that a toy does not have."""
    code = "configuration_jina_embeddings_v5.JinaEmbeddingsV5Config"
    own: dict[str, Any] = {
        "head_dim": model.head_dim,
        "layer_types": ["full_attention"] * model.layers,
        "max_window_layers": model.layers,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids[PAD[model.kind]],
    }
    if model.kind == "eurobert":
        own = {
            "head_dim": model.head_dim,
            "is_decoder": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "clf_pooling": "late",
            "tie_word_embeddings": False,
            "bos_token_id": ids.get("<|begin_of_text|>", 0),
            "eos_token_id": ids[PAD[model.kind]],
            "mask_token_id": ids.get("<|mask|>", 0),
        }
    return {
        "architectures": ["JinaEmbeddingsV5Model"],
        "model_type": "jina_embeddings_v5",
        "auto_map": {
            "AutoConfig": code,
            "AutoModel": "modeling_jina_embeddings_v5.JinaEmbeddingsV5Model",
        },
        "task_names": list(JINA_V5),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "initializer_range": 0.02,
        "intermediate_size": model.intermediate,
        "max_position_embeddings": model.positions,
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.epsilon,
        "rope_scaling": None,
        "rope_theta": model.theta,
        "pad_token_id": ids[PAD[model.kind]],
        "use_cache": True,
        "vocab_size": rows,
        **own,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.3",
    }


def _write_companions(folder: Path, model: Model) -> None:
    """The tokenizer's settings and the files for sentence-transformers, with its one module."""
    pad = PAD[model.kind]
    settings: dict[str, Any] = {
        "eos_token": pad,
        "pad_token": pad,
        "model_max_length": model.tokenizer_limit,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if model.kind == "qwen3":
        settings |= {
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "unk_token": None,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "chat_template": CHAT_TEMPLATE,
        }
    modules = [
        {
            "idx": 0,
            "name": "transformer",
            "path": "",
            "type": "custom_st.Transformer",
            "kwargs": ["task", "truncate_dim"],
        }
    ]
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", {"eos_token": pad, "pad_token": pad})
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": dict(JINA_V5_PROMPTS),
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine",
        },
    )


def _adapter_config(model: Model) -> dict[str, Any]:
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": model.repository,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": LORA_ALPHA,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": LORA_RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in _matrices(model)}),
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": False,
        "use_rslora": False,
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
