"""A seeded, tiny sentence-transformers checkpoint of any text model of the installed transformers.

Sizes are shrunk by the names that configs use for them; weights are far from zero, so that every
part of the model (positions, windows, biases, experts) shows in the vectors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTH = 32
MOST_PARAMETERS = 30_000_000
TOKENS = 128
"""Length limit of the checkpoints, special tokens included."""

SIZES: Mapping[str, int] = {
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "emb_dim",
            "d_embed",
            "embed_dim",
            "embed_size",
            "model_dim",
            "input_embedding_size",
            "word_embed_proj_dim",
            "projection_dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_encoder_layers",
            "num_decoder_layers",
            "encoder_num_hidden_layers",
            "decoder_num_hidden_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "encoder_num_attention_heads",
            "decoder_num_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_key_value_heads",
            "num_kv_heads",
            "multi_query_group_num",
            "encoder_num_key_value_heads",
            "decoder_num_key_value_heads",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "head_dim",
            "d_head",
            "d_kv",
            "attention_head_dim",
            "kv_channels",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "attention_head_size",
        ),
        8,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "d_inner",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "ffn_hidden_size",
            "dense_intermediate_size",
            "intermediate_size_mlp",
            "feed_forward_size",
            "n_inner",
            "dff",
        ),
        64,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
        ),
        WIDTH,
    ),
    **dict.fromkeys(
        (
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "moe_num_primary_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_top_k",
            "moe_k",
            "moe_topk",
            "top_k_experts",
        ),
        2,
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "seq_length",
            "max_sequence_length",
            "model_max_length",
            "context_length",
            "max_encoder_position_embeddings",
            "max_source_positions",
        ),
        256,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(
        (
            "sliding_window",
            "sliding_window_size",
            "local_attention",
            "local_window",
            "window_size",
            "attention_window",
        ),
        16,
    ),
    "embedding_size": 16,
    "vocab_size_per_layer_input": 640,
    "hidden_size_per_layer_input": 8,
}

TYPES = "sentence_transformers.models."
TOKEN_IDS = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "unk_token_id": 3,
    "cls_token_id": 0,
    "sep_token_id": 2,
}

KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Lists that name a kind for each layer: one layer of each kind is kept."""


class NotTinyError(Exception):
    """A class of which no small checkpoint could be made."""


def text_types() -> list[str]:
    """Model types of AutoModel whose config has a vocabulary, its own or that of a text part."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = []
    for name in MODEL_MAPPING_NAMES:
        config = CONFIG_MAPPING[name]()
        if _has_vocabulary(config):
            found.append(name)
    return found


def _has_vocabulary(config: Any) -> bool:
    try:
        own = config.get_text_config()
    except Exception:  # several text parts, or none: transformers raises what it likes
        own = config
    return any(getattr(one, "vocab_size", None) for one in (config, own))


def make(model_type: str, folder: Path, *, seed: int = 0, **overrides: Any) -> None:
    """Write a sentence-transformers folder (Transformer, mean Pooling) of a model type.

    overrides: values of the config that differ from the shrunk defaults. Raises NotTinyError.
    """
    import torch
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from jexport.toy import tokenizer as toy_tokenizer

    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    tokenizer = toy_tokenizer.train()
    (folder / "tokenizer.json").write_bytes(tokenizer)
    rows = toy_tokenizer.rows(tokenizer, None)
    try:
        config = _config(CONFIG_MAPPING[model_type], rows, overrides)
        with torch.device("meta"):
            count = sum(one.numel() for one in AutoModel.from_config(config).parameters())
        if count > MOST_PARAMETERS:
            raise NotTinyError(f"{count:,} parameters")
        model = AutoModel.from_config(config, dtype=torch.float32)
    except NotTinyError:
        raise
    except Exception as error:
        raise NotTinyError(f"{type(error).__name__}: {str(error)[:300]}") from error
    _spread(model, seed)
    model.save_pretrained(folder)
    _write_modules(folder, _width(model))


def _config(kind: type, rows: int, overrides: Mapping[str, Any]) -> Any:
    given = _shrunk(kind(), rows)
    return kind(**{**given, **overrides})


def _shrunk(usual: Any, rows: int) -> dict[str, Any]:
    """Arguments that make a config's class small: only such as it has, whole numbers by numbers."""
    from transformers import PretrainedConfig

    given: dict[str, Any] = {}
    for key, value in vars(usual).items():
        if isinstance(value, PretrainedConfig):
            given[key] = _shrunk(value, rows)
        elif key in ("vocab_size", "text_vocab_size"):
            given[key] = rows
        elif key in TOKEN_IDS:
            given[key] = TOKEN_IDS[key]
        elif key in SIZES and isinstance(value, int) and not isinstance(value, bool):
            given[key] = min(value, SIZES[key]) if value > 0 else value
        elif key in KINDS and isinstance(value, list):
            given[key] = value
    names = type(usual).attribute_map
    for alias, key in names.items():
        if alias in SIZES and key not in given and isinstance(getattr(usual, key, None), int):
            given[key] = SIZES[alias]
    kinds = given.get("layer_types") or given.get("layers_block_type")
    if kinds:
        places = sorted({kinds.index(kind) for kind in kinds})
        places = places if len(places) > 1 else [0, 1][: len(kinds)]
        for key in KINDS:
            if isinstance(given.get(key), list) and len(given[key]) >= len(kinds):
                given[key] = [given[key][place] for place in places]
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if key in given:
                given[key] = len(places)
    return given


def _spread(model: Any, seed: int) -> None:
    """Weights far enough from their usual start that no part of the model is without effect."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in model.named_parameters():
            noise = torch.randn(one.shape, generator=generator)
            if one.ndim < 2:
                one.add_(noise * 0.05)
            elif "embed" in name or "shared" in name or name.endswith(("wte.weight", "wpe.weight")):
                one.copy_(noise * 0.5)
            else:
                one.copy_(noise * 0.6 / one.shape[-1] ** 0.5)


def _width(model: Any) -> int:
    """The size of a hidden state, as the config says it or as the model gives it."""
    if hasattr(model, "embedding_projection"):  # EmbeddingGemma 2: wider than its layers
        return int(model.embedding_projection.out_features)
    try:
        size = model.config.get_text_config().hidden_size
    except Exception:
        size = getattr(model.config, "hidden_size", WIDTH)
    return size if isinstance(size, int) else WIDTH


def _write_modules(folder: Path, width: int) -> None:
    def write(name: str, content: object) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    write(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
            "model_max_length": TOKENS,
        },
    )
    write(
        "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": TYPES + "Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": TYPES + "Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": TYPES + "Normalize"},
        ],
    )
    (folder / "2_Normalize").mkdir()
    write(
        "1_Pooling/config.json",
        {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
    )
    write("sentence_bert_config.json", {"max_seq_length": TOKENS, "do_lower_case": False})
