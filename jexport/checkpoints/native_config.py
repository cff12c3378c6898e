"""config.json of both jina-embeddings-v3 layouts -> the config of transformers' native class.

Says which options of the authors' code that class does not have. Knows no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jexport.checkpoints.transformer_files import count, quiet_transformers
from jexport.errors import CheckpointError, UnsupportedCheckpointError

NATIVE_THETA, ORIGINAL_THETA = 20_000.0, 10_000.0
"""RoPE bases that the native and the authors' config class take when config.json names none."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Keys that both layouts and the native class have in common."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config.json that the native class cannot be built for.

    Args:
        config: of either layout.

    Raises:
        CheckpointError: a size is missing, or does not go with the others.
        UnsupportedCheckpointError: an option of the authors' code that the native class lacks.
    """
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    count(config, "type_vocab_size", 1)
    for key in ("vocab_size", "intermediate_size", "num_hidden_layers"):
        count(config, key)
    if hidden % (2 * heads):
        raise _wrong(f"hidden_size {hidden} is not {heads} heads of an even width, as RoPE needs")
    _refuse_options(config)
    native = native_config(config)
    if native.pad_token_id is not None and not 0 <= native.pad_token_id < native.vocab_size:
        raise _wrong(f"pad_token_id {native.pad_token_id}, vocab_size {native.vocab_size}")


def native_config(config: Mapping[str, Any]) -> Any:
    """The native class's config, with what config.json says of sizes and RoPE.

    Args:
        config: of either layout.

    Returns:
        A JinaEmbeddingsV3Config.

    Raises:
        CheckpointError: a value that the class does not take.
        UnsupportedCheckpointError: RoPE of another type.
    """
    from transformers import JinaEmbeddingsV3Config

    given = {key: config[key] for key in SIZES if key in config}
    rope = _rope(config)
    try:
        with quiet_transformers():
            return JinaEmbeddingsV3Config(**given, rope_parameters=rope)
    except Exception as error:  # huggingface_hub's strict dataclasses have errors of their own
        raise _wrong(" ".join(str(error).split())) from error


def merged_json(
    config: Mapping[str, Any], matryoshka: tuple[int, ...], dtype: str
) -> dict[str, Any]:
    """config.json of a merged checkpoint for transformers >= 5.4, no code beside it.

    rope_parameters is always written: the native class ignores `rotary_emb_base`.

    Args:
        config: of either layout, that it is derived from.
        matryoshka: smaller sizes of a vector, () to write none.
        dtype: torch's name of it ('float32'), under the key that every transformers reads.

    Returns:
        What is written as JSON.

    Raises:
        CheckpointError, UnsupportedCheckpointError: as `native_config`.
    """
    native = native_config(config)
    return {
        "architectures": ["JinaEmbeddingsV3Model"],
        "model_type": "jina_embeddings_v3",
        **{key: getattr(native, key) for key in SIZES},
        "rope_parameters": _rope(config),
        **({"matryoshka_dimensions": list(matryoshka)} if matryoshka else {}),
        "torch_dtype": dtype,
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of RoPE, as the native class wants to be told.

    The native config class ignores `rotary_emb_base`, which is all that the original layout has; a
    native config.json that says nothing else would run at 20,000 there, whatever it names.
    """
    named = config.get("rotary_emb_base")
    if config.get("model_type") != "jina_embeddings_v3":
        theta = ORIGINAL_THETA if named is None else named
        return {"rope_theta": _theta(theta), "rope_type": "default"}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise _wrong(f"rope_parameters = {rope!r} is no table")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta")
    if kind != "default":
        raise UnsupportedCheckpointError(
            f"jexport does not have RoPE of type '{kind}'",
            evidence=f"config.json: rope_parameters = {dict(rope)!r}",
            fix="give a checkpoint with plain RoPE",
        )
    if theta is None and named not in (None, NATIVE_THETA):
        raise UnsupportedCheckpointError(
            f"config.json names a RoPE base ({named}) that transformers would ignore",
            evidence="it has rotary_emb_base, of the original layout, and no rope_parameters",
            fix='write what is meant: "rope_parameters": {"rope_type": "default", "rope_theta": N}',
        )
    return {"rope_theta": _theta(theta or NATIVE_THETA), "rope_type": "default"}


def _theta(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 < value < 1e12:
        raise _wrong(f"the RoPE base {value!r} is not a number above 1")
    return float(value)


def _wrong(evidence: str) -> CheckpointError:
    return CheckpointError(
        "config.json has a value that the model cannot take",
        evidence=evidence,
        fix="give the config.json that belongs to these weights",
    )


def _refuse_options(config: Mapping[str, Any]) -> None:
    """Options of the original code that the native class does not have."""
    head = count(config, "hidden_size") // count(config, "num_attention_heads")
    neutral = {
        "rotary_emb_interleaved": (False, None),
        "rotary_emb_scale_base": (None,),
        "rotary_emb_dim": (None, head),
        "pad_vocab_size_multiple": (1, None),
        "position_embedding_type": ("rotary", None),
        "emb_pooler": (None, "mean", "cls"),
        "hidden_act": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
        "partial_rotary_factor": (1, None),
    }
    odd = [key for key, allowed in neutral.items() if key in config and config[key] not in allowed]
    if odd:
        raise UnsupportedCheckpointError(
            "this variant of jina-embeddings-v3 cannot run in transformers' native class",
            evidence=", ".join(f"{key} = {config[key]!r}" for key in odd),
            fix="give a checkpoint without these options (jexport exports this layout through the "
            "native class, also with --trust-remote-code)",
        )
