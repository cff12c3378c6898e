"""What vLLM 0.32 and TEI 1.9.3 (candle) read of an architecture: names, keys, poolings.

Sources: vLLM's model_executor/models/{registry,config,adapters,bert_with_rope,modernbert,gemma3}.py
of the wheel 0.32.0, TEI's backends/candle/src/models/*.rs. Neither takes all that the other does:
an artifact says which of them serves it. Nothing is read from a weight here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jexport.checkpoints.nomic_bert import stacked
from jexport.checkpoints.sentence_transformer import plain_names
from jexport.checkpoints.transformer_files import quiet_transformers
from jexport.types import LoadedModel, WeightReader

VLLM, TEI = "vllm", "tei"
Weights = Mapping[str, WeightReader]
ALL = ("mean", "cls", "last")
PADDED = ("mean", "cls")
"""Poolings of TEI's encoders: most refuse the last token."""

HEADS = ("pooler.", "lm_head.", "cls.", "classifier.", "head.", "decoder.")
"""What no embedding depends on; vLLM's BertWithRope stops at a tensor that it has no place for."""

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True, kw_only=True)
class ServerLayout:
    """How one architecture is written.

    Args:
        architecture: under `architectures` in config.json.
        poolings: that each server has for it; a server that is no key does not take it.
        names: the weights under the names that the servers look for.
        required: keys of config.json that are written where the checkpoint leaves them to the
            class's defaults.
        more: further keys, from the native config.
        unmet: why a server does not take a config, by server.
        notes: what else to know, by server.
    """

    architecture: str
    poolings: Mapping[str, tuple[str, ...]]
    names: Callable[[Weights], dict[str, WeightReader]]
    required: tuple[str, ...] = ()
    more: Callable[[Any], dict[str, Any]] = lambda native: {}
    unmet: Callable[[Any, int], dict[str, str]] = lambda native, max_tokens: {}
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Names:
    """Renames a checkpoint's weights, whichever version of transformers saved them.

    Args:
        prefix: what the file may put before each name, as a pattern.
        put: what the servers put there.
        dropped: beginnings of names that are left out.
        renames: patterns and what they become, in order.
        fused: name of a stacked matrix, and its parts, by name after the renames.
    """

    prefix: str = ""
    put: str = ""
    dropped: tuple[str, ...] = HEADS
    renames: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, weights: Weights) -> dict[str, WeightReader]:
        """The same readers, and some of several matrices one below the other.

        Args:
            weights: under the names in the file.

        Returns:
            By the servers' names.
        """
        short = {re.sub(rf"^(?:{self.prefix})", "", name): one for name, one in weights.items()}
        named: dict[str, WeightReader] = {}
        for name, one in short.items():
            if not name.startswith(self.dropped):
                for pattern, new in self.renames:
                    name = re.sub(pattern, new, name)
                named[f"{self.put}{name}"] = one
        for whole, parts in self.fused.items():
            for name in [one for one in named if f".{parts[0]}." in one]:
                pieces = [name.replace(parts[0], part) for part in parts]
                named[name.replace(parts[0], whole)] = stacked([named.pop(one) for one in pieces])
        return named


def _windowed(native: Any, max_tokens: int) -> dict[str, str]:
    """Decoders of which the servers leave the window out."""
    window = getattr(native, "sliding_window", None)
    if window and window < max_tokens:
        reason = f"sliding_window = {window}, and texts of up to {max_tokens} tokens"
        return {VLLM: reason, TEI: reason}
    rope = (native.rope_parameters or {}).get("rope_type", "default")
    return {TEI: f"rope_type = {rope!r}"} if rope != "default" else {}


def _causal(native: Any, max_tokens: int) -> dict[str, str]:
    both_ways = not getattr(native, "is_causal", True)
    return {TEI: "is_causal = false"} if both_ways else _windowed(native, max_tokens)


def _qwen3_keys(native: Any) -> dict[str, Any]:
    both_ways = not getattr(native, "is_causal", True)
    return {
        "rope_theta": native.rope_parameters["rope_theta"],
        **({"is_causal": False, "use_bidirectional_attention": True} if both_ways else {}),
    }


def _modernbert_keys(native: Any) -> dict[str, Any]:
    rope = native.rope_parameters
    return {
        "global_attn_every_n_layers": _every(native),
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
        "layer_types": list(native.layer_types),
    }


def _every(native: Any) -> int:
    """Which layers see the whole text: each nth; 0 for another pattern."""
    kinds = list(native.layer_types)
    for n in range(1, len(kinds) + 1):
        if kinds == [
            ("sliding" if place % n else "full") + "_attention" for place in range(len(kinds))
        ]:
            return n
    return 0


def _modernbert_unmet(native: Any, max_tokens: int) -> dict[str, str]:
    if native.norm_bias:
        return {TEI: "norm_bias = true"}
    return {} if _every(native) else {TEI: f"layer_types = {native.layer_types}"}


def _gemma3_keys(native: Any) -> dict[str, Any]:
    rope = native.rope_parameters
    return {
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "_sliding_window_pattern": native._sliding_window_pattern,
    }


def _gemma3_unmet(native: Any, max_tokens: int) -> dict[str, str]:
    both_ways = native.use_bidirectional_attention
    return {} if both_ways else {TEI: "it has gemma3_text with attention both ways only"}


def _rope_keys(native: Any) -> dict[str, Any]:
    return {
        "position_embedding_type": "rope",
        "layer_norm_type": "layer_norm",
        "rope_theta": native.rope_parameters["rope_theta"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": native.rope_parameters["rope_theta"],
        },
        "rope_scaling": None,
    }


def _rope_unmet(activation: str) -> Callable[[Any, int], dict[str, str]]:
    def unmet(native: Any, max_tokens: int) -> dict[str, str]:
        rope = native.rope_parameters.get("rope_type", "default")
        if rope != "default":
            return dict.fromkeys((VLLM, TEI), f"rope_type = {rope!r}")
        if native.hidden_act != activation:
            return dict.fromkeys((VLLM, TEI), f"hidden_act = {native.hidden_act!r}")
        return {}

    return unmet


def _nomic_keys(native: Any) -> dict[str, Any]:
    theta = native.rope_parameters["rope_theta"]
    return {
        "n_embd": native.hidden_size,
        "n_head": native.num_attention_heads,
        "n_inner": native.intermediate_size,
        "n_layer": native.num_hidden_layers,
        "n_positions": native.max_position_embeddings,
        "max_trained_positions": native.max_position_embeddings,
        "activation_function": "swiglu",
        "layer_norm_epsilon": native.layer_norm_eps,
        "prenorm": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "rotary_emb_base": theta,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
    }


def _deberta_unmet(native: Any, max_tokens: int) -> dict[str, str]:
    size = getattr(native, "conv_kernel_size", 0)
    return {TEI: f"conv_kernel_size = {size}"} if size else {}


def _absolute(native: Any, max_tokens: int) -> dict[str, str]:
    kind = getattr(native, "position_embedding_type", "absolute") or "absolute"
    reason = f"position_embedding_type = {kind!r}"
    return {} if kind == "absolute" else {VLLM: reason, TEI: reason}


def _bert(architecture: str) -> ServerLayout:
    return ServerLayout(
        architecture=architecture,
        poolings={VLLM: ALL, TEI: PADDED},
        names=plain_names,
        more=lambda native: {"position_embedding_type": "absolute"},
        unmet=_absolute,
    )


DECODER_NAMES = Names(prefix=r"model\.", dropped=("lm_head.",))
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
)
DECODER_KEYS = (*SIZES, "num_key_value_heads", "rms_norm_eps", "hidden_act", "eos_token_id")
FLASH = {TEI: "TEI takes it on CUDA in float16 only, with flash attention"}


def _decoder(architecture: str) -> ServerLayout:
    return ServerLayout(
        architecture=architecture,
        poolings={VLLM: ALL, TEI: ALL},
        names=DECODER_NAMES,
        required=(*DECODER_KEYS, "sliding_window"),
        more=lambda native: {"rope_theta": native.rope_parameters["rope_theta"]},
        unmet=_causal,
        notes=FLASH,
    )


EUROBERT = "eurobert"
LAYOUTS: Mapping[str, ServerLayout] = {
    EUROBERT: ServerLayout(
        architecture="LlamaModel",
        poolings={VLLM: ALL},
        names=DECODER_NAMES,
        more=lambda native: {
            "model_type": "llama",
            "is_causal": False,
            "rope_theta": native.rope_parameters["rope_theta"],
        },
    ),
    "bert": _bert("BertModel"),
    "roberta": _bert("RobertaModel"),
    "xlm-roberta": _bert("XLMRobertaModel"),
    "qwen2": _decoder("Qwen2Model"),
    "llama": _decoder("LlamaModel"),
    "mistral": _decoder("MistralModel"),
    "qwen3": ServerLayout(
        architecture="Qwen3Model",
        poolings={VLLM: ALL, TEI: ALL},
        names=DECODER_NAMES,
        required=(*DECODER_KEYS, "attention_bias", "head_dim", "use_sliding_window"),
        more=_qwen3_keys,
        unmet=_windowed,
    ),
    "gemma3_text": ServerLayout(
        architecture="Gemma3TextModel",
        poolings={VLLM: ALL, TEI: ("mean",)},
        names=DECODER_NAMES,
        required=(
            *(key for key in DECODER_KEYS if key not in ("hidden_act", "eos_token_id")),
            "attention_bias",
            "head_dim",
            "hidden_activation",
            "pad_token_id",
            "query_pre_attn_scalar",
            "use_bidirectional_attention",
        ),
        more=_gemma3_keys,
        unmet=_gemma3_unmet,
        notes={
            TEI: "TEI takes it in float32 only, and leaves the window out in a batch of texts that "
            "are equally long"
        },
    ),
    "modernbert": ServerLayout(
        architecture="ModernBertModel",
        poolings={VLLM: ALL, TEI: PADDED},
        names=Names(prefix=r"model\."),
        required=(
            *SIZES,
            "hidden_activation",
            "initializer_range",
            "initializer_cutoff_factor",
            "norm_eps",
            "norm_bias",
            "attention_bias",
            "attention_dropout",
            "local_attention",
            "classifier_activation",
            "pad_token_id",
            "eos_token_id",
            "bos_token_id",
            "cls_token_id",
            "sep_token_id",
        ),
        more=_modernbert_keys,
        unmet=_modernbert_unmet,
    ),
    "nomic_bert": ServerLayout(
        architecture="NomicBertModel",
        poolings={VLLM: ALL, TEI: PADDED},
        names=Names(
            prefix=r"bert\.|nomic_bert\.",
            renames=(
                (r"^embeddings\.LayerNorm", "emb_ln"),
                (r"^layers\.", "encoder.layers."),
                (r"self_attn\.o_proj", "attn.out_proj"),
                (r"post_attention_layernorm", "norm1"),
                (r"post_mlp_layernorm", "norm2"),
                (r"mlp\.up_proj", "mlp.fc11"),
                (r"mlp\.gate_proj", "mlp.fc12"),
                (r"mlp\.down_proj", "mlp.fc2"),
            ),
            fused={"attn.Wqkv": QKV},
        ),
        required=(*SIZES, "type_vocab_size", "pad_token_id"),
        more=_nomic_keys,
        unmet=_rope_unmet("silu"),
    ),
    "gte": ServerLayout(
        architecture="GteModel",
        poolings={VLLM: ALL, TEI: PADDED},
        names=Names(
            prefix=r"new\.|gte\.",
            renames=(
                (r"^layers\.", "encoder.layer."),
                (r"self_attn\.o_proj", "attention.o_proj"),
                (r"post_attention_layernorm", "attn_ln"),
                (r"post_mlp_layernorm", "mlp_ln"),
            ),
            fused={
                "attention.qkv_proj": QKV,
                "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
            },
        ),
        required=(*SIZES, "hidden_act", "type_vocab_size", "layer_norm_eps"),
        more=_rope_keys,
        unmet=_rope_unmet("gelu"),
    ),
    "mpnet": ServerLayout(
        architecture="MPNetModel",
        poolings={TEI: PADDED},
        names=Names(prefix=r"mpnet\."),
        required=(*SIZES, "hidden_act", "layer_norm_eps", "relative_attention_num_buckets"),
    ),
    "distilbert": ServerLayout(
        architecture="DistilBertModel",
        poolings={TEI: PADDED},
        # Its loader asks for `encoder.`, which no checkpoint has, or `distilbert.transformer.`.
        names=Names(prefix=r"distilbert\.", put="distilbert.", dropped=("vocab_", "classifier.")),
        required=("dim", "n_heads", "n_layers", "hidden_dim", "activation", "sinusoidal_pos_embds"),
        more=lambda native: {
            "vocab_size": native.vocab_size,
            "max_position_embeddings": native.max_position_embeddings,
        },
    ),
    "deberta-v2": ServerLayout(
        architecture="DebertaV2Model",
        poolings={TEI: PADDED},
        names=Names(prefix=r"deberta\.", dropped=(*HEADS, "lm_predictions.", "mask_predictions.")),
        required=(
            *SIZES,
            "hidden_act",
            "layer_norm_eps",
            "type_vocab_size",
            "relative_attention",
            "max_relative_positions",
            "position_biased_input",
            "pos_att_type",
        ),
        unmet=_deberta_unmet,
    ),
}
"""By model_type."""


def servers(loaded: LoadedModel) -> tuple[tuple[str, ...], str]:
    """The servers that take a checkpoint, and why the others do not.

    Args:
        loaded: with its weights under names that transformers knows.

    Returns:
        Of ('vllm', 'tei') those that do; one line, '' where both do.
    """
    kind = str(loaded.config.get("model_type"))
    layout = LAYOUTS.get(kind)
    if layout is None or not loaded.weights:
        return (), f"model_type {kind!r} (layout {loaded.source.layout}); there are: " + ", ".join(
            ("jina-embeddings-v3", *LAYOUTS)
        )
    reasons = layout.unmet(native(loaded.config), loaded.embedding.max_tokens)
    pooling = loaded.embedding.pooling
    for server in (VLLM, TEI):
        if server not in layout.poolings:
            reasons[server] = f"there is no class for {kind}"
        elif pooling not in layout.poolings[server]:
            listed = ", ".join(layout.poolings[server])
            reasons.setdefault(server, f"its pooling is '{pooling}'; it has: {listed}")
    able = tuple(server for server in (VLLM, TEI) if server not in reasons)
    return able, "; ".join(f"{server}: {reason}" for server, reason in reasons.items())


def native(config: Mapping[str, Any]) -> Any:
    """The config object of transformers, with every default.

    Args:
        config: config.json of an architecture that transformers has.

    Returns:
        An instance of its class.
    """
    from transformers import CONFIG_MAPPING

    given = {key: value for key, value in config.items() if key != "model_type"}
    with quiet_transformers():
        return CONFIG_MAPPING[config["model_type"]].from_dict(given)


def keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json has beside the checkpoint's own keys.

    Args:
        config: the checkpoint's.

    Returns:
        The architecture, and keys that a server cannot do without.
    """
    layout, full = LAYOUTS[config["model_type"]], native(config)
    missing = [key for key in layout.required if key not in config]
    return {
        **{key: getattr(full, key, None) for key in missing},
        **layout.more(full),
        "architectures": [layout.architecture],
    }
