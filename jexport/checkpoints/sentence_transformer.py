"""Any sentence-transformers encoder (BERT, XLM-R, MiniLM ...) with a Pooling module.

Its only task is `none`. Weights go through transformers' own from_pretrained, which knows each
architecture's history of names; what it reports as missing, unexpected or mismatched is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.checkpoints import shards
from jexport.checkpoints.native_class import beside, mismatch
from jexport.checkpoints.transformer_files import quiet_transformers
from jexport.errors import CheckpointError, UnsupportedCheckpointError
from jexport.types import LowRank, WeightReader

if TYPE_CHECKING:
    import torch

POOLER = ("pooler.",)
HEADS = ("pooler.dense.", "cls.", "lm_head.")
"""What a last hidden state does not depend on: a pooler may be missing, these may be left over."""

POSITIONS = ("position_embeddings.weight", "wpe.weight", "embed_positions.weight")
"""Learned tables of absolute positions."""

ROBERTA = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "xmod",
    "longformer",
    "luke",
    "ibert",
    "data2vec-text",
    "markuplm",
    "lilt",
)
"""Architectures whose learned positions begin at pad_token_id + 1 (transformers 5.23)."""

BART = ("bart", "mbart", "plbart", "opt", "biogpt", "blenderbot")
"""Architectures whose table has two rows before the first position (transformers 5.23)."""

ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
"""Encoder-decoders of which sentence-transformers takes the encoder alone, and its class."""

DECODER = ("decoder.", "lm_head.")
"""What such a file may hold beside the encoder."""

COUNTERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Buffers that transformers 4 wrote into the file and version 5 makes itself: 0, 1, 2 ..."""


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class of its own for the model, whatever auto_map names.

    Args:
        config: its config.json.

    Returns:
        Whether the installed transformers knows its model_type.
    """
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def check_native(config: Mapping[str, Any]) -> None:
    """Refuse a config.json whose keys transformers' class would leave unread.

    nomic_bert had code of its own before transformers had the class: no experts, other names.

    Args:
        config: config.json of a native architecture.

    Raises:
        UnsupportedCheckpointError: the class would build another network, without an error.
    """
    if config.get("model_type") != "nomic_bert":
        return
    from transformers import NomicBertConfig

    with quiet_transformers():
        native = NomicBertConfig(**{k: v for k, v in config.items() if k != "model_type"})
    odd = [
        f"{key} = {config[key]!r}, and the class has {value!r}"
        for key, value in _nomic_values(native).items()
        if key in config and config[key] != value
    ]
    if config.get("num_experts") and config.get("moe_every_n_layers"):
        odd.append(f"num_experts = {config['num_experts']}, and the class has no experts")
    if odd:
        raise UnsupportedCheckpointError(
            "transformers' nomic_bert is another network than this checkpoint's",
            evidence=f"config.json: {'; '.join(odd)}",
            fix="let it run its own code: --trust-remote-code, with the .py files beside the "
            "weights or a pinned revision",
        )


def _nomic_values(native: Any) -> dict[str, Any]:
    """What transformers' class has for each key of the authors' own config.json."""
    return {
        "n_embd": native.hidden_size,
        "n_head": native.num_attention_heads,
        "n_inner": native.intermediate_size,
        "n_layer": native.num_hidden_layers,
        "layer_norm_epsilon": native.layer_norm_eps,
        "rotary_emb_base": native.rope_parameters["rope_theta"],
        "activation_function": {"silu": "swiglu"}.get(native.hidden_act, native.hidden_act),
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "prenorm": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    }


def read(
    folder: Path, config: Mapping[str, Any], task: str
) -> tuple[dict[str, WeightReader], dict[str, LowRank], list[Path]]:
    """The weights as they are in the file, without a decoder and buffers that only count.

    Args:
        folder: of the weights.
        config: its model_type says whether there may be a decoder.
        task: not looked at: `known_tasks` has none.

    Returns:
        Weights under the names in the file, no adapter, and the files that hold them.

    Raises:
        CheckpointError: a file is missing or broken, or a dtype holds no weights.
    """
    entries = shards.tensors(folder)
    weights = {
        name: shards.reader(name, entry)
        for name, entry in entries.items()
        if not name.endswith(COUNTERS)
        and not (config.get("model_type") in ENCODERS and name.startswith(DECODER))
    }
    return weights, {}, shards.files(folder, entries)


def positions(folder: Path, config: Mapping[str, Any]) -> int:
    """Tokens that the model's learned table of positions has rows for.

    Models of the RoBERTa family count from pad_token_id + 1, those of the BART family from 2.

    Args:
        folder: of the weights, whose shapes say it.
        config: its model_type says the family, and its pad_token_id the start.

    Returns:
        The longest text, special tokens included; 0 where there is no such table.

    Raises:
        CheckpointError: a weight file is missing or broken.
    """
    rows = [
        entry.shape[0]
        for name, entry in shards.tensors(folder).items()
        if name.endswith(POSITIONS) and len(entry.shape) == 2
    ]
    if not rows:
        return 0
    kind, pad = config.get("model_type"), config.get("pad_token_id")
    if kind in ROBERTA:
        return min(rows) - (pad if isinstance(pad, int) else 1) - 1
    return min(rows) - 2 if kind in BART else min(rows)


def stated_positions(folder: Path, arguments: Mapping[str, Any]) -> int:
    """max_position_embeddings of the config, also under its architecture's own name.

    Args:
        folder: of config.json.
        arguments: for AutoConfig, over what config.json says.

    Returns:
        The number, 0 for none.

    Raises:
        UnsupportedCheckpointError: an architecture that transformers lacks.
        CheckpointError: a config.json that its class does not take.
    """
    with quiet_transformers():
        config = _config(folder, arguments)
    size = getattr(config, "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else 0


def given_config(
    folder: Path, config: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json with the arguments that take effect.

    Args:
        folder: of config.json.
        config: its content.
        arguments: for AutoConfig, over what config.json says.

    Returns:
        The config, and those of the arguments that its class knows.

    Raises:
        UnsupportedCheckpointError: an architecture that transformers lacks.
        CheckpointError: a config.json, or arguments, that its class does not take.
    """
    if not arguments:
        return dict(config)
    with quiet_transformers():
        effective = _config(folder, arguments)
    known = {key: value for key, value in arguments.items() if hasattr(effective, key)}
    return {**config, **known}


def assemble(
    folder: Path,
    weights: Mapping[str, WeightReader],
    arguments: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """A model of transformers' class for this config, with exactly these weights.

    Args:
        folder: of config.json; its weight files are not read.
        weights: all of them, under the names in the file.
        arguments: for AutoConfig, over what config.json says.

    Returns:
        float32, on the CPU, in eval mode, without gradients.

    Raises:
        StateDictError: weights are missing, too many or of another shape.
        UnsupportedCheckpointError: an architecture that transformers lacks, or an encoder-decoder.
        CheckpointError, NotFiniteError: config.json or a weight cannot be used.
    """
    with quiet_transformers():
        config = _config(folder, arguments or {})
    return assembled(config, weights)


def assembled(config: Any, weights: Mapping[str, WeightReader]) -> torch.nn.Module:
    """A model of transformers' class for this config, with exactly these weights.

    Args:
        config: of transformers.
        weights: all of them, under the names in the file.

    Returns:
        float32, on the CPU, in eval mode, without gradients.

    Raises:
        StateDictError: weights are missing, too many or of another shape.
        UnsupportedCheckpointError: an architecture that transformers lacks, or an encoder-decoder.
        CheckpointError, NotFiniteError: a weight cannot be used.
    """
    import torch

    architecture = _architecture(config)
    with quiet_transformers():
        model, report = architecture.from_pretrained(
            None,
            config=config,
            state_dict={name: read() for name, read in weights.items()},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused by check_report
        )
    check_report(report, weights, prefix=model.base_model_prefix)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def config_json(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The checkpoint's own config.json for weights written in another dtype, naming no code.

    The dtype stands under the key that every version of transformers reads.

    Args:
        config: of the checkpoint.
        dtype: torch's name of it ('bfloat16').

    Returns:
        What is written as JSON.
    """
    left_out = ("auto_map", "dtype", "torch_dtype")
    return {**{k: v for k, v in config.items() if k not in left_out}, "torch_dtype": dtype}


def plain_names(weights: Mapping[str, WeightReader]) -> dict[str, WeightReader]:
    """The weights under the names of transformers' plain encoder class.

    Without what a pretrained file puts before them (`bert.`), heads and the pooler, with a
    LayerNorm's weight and bias called so (TensorFlow's: gamma and beta).

    Args:
        weights: under the names in the file, of BERT, RoBERTa, or a decoder (`model.`).

    Returns:
        By plain name, the same readers.
    """
    plain = {}
    for name, read in weights.items():
        short = re.sub(r"^(bert|roberta|model)\.", "", name)
        short = short.replace("LayerNorm.gamma", "LayerNorm.weight")
        short = short.replace("LayerNorm.beta", "LayerNorm.bias")
        if not short.startswith((*POOLER, *HEADS)):
            plain[short] = read
    return plain


def _architecture(config: Any) -> Any:
    """The class of transformers for a config, never the checkpoint's own code."""
    try:
        return model_class(config)
    except KeyError as error:
        raise _unknown(error) from error


def model_class(config: Any) -> Any:
    """The class of transformers for a config: of some encoder-decoders that of the encoder.

    Args:
        config: as AutoConfig makes it.

    Returns:
        The class.

    Raises:
        KeyError: transformers has none.
        UnsupportedCheckpointError: another encoder-decoder.
    """
    import transformers

    if config.model_type in ENCODERS:
        return getattr(transformers, ENCODERS[config.model_type])
    architecture = transformers.AutoModel._model_mapping[type(config)]
    if config.is_encoder_decoder:
        raise UnsupportedCheckpointError(
            "jexport does not export encoder-decoder models",
            evidence=f"config.json: model_type {config.model_type!r}, is_encoder_decoder = true",
            fix="give an encoder (BERT, XLM-R, MiniLM ...), or one of which the encoder is taken: "
            f"{', '.join(ENCODERS)}",
        )
    return architecture


def _config(folder: Path, arguments: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **arguments)
    except (ValueError, KeyError) as error:
        raise _unknown(error) from error
    except Exception as error:  # huggingface_hub's strict dataclasses have errors of their own
        raise unusable_config(error) from error


def unusable_config(error: Exception) -> CheckpointError:
    """The error for a config.json that a class of transformers does not take.

    Args:
        error: what the class raised.

    Returns:
        To be raised from it.
    """
    return CheckpointError(
        "config.json has a value that the model cannot take",
        evidence=" ".join(str(error).split()),
        fix="give the config.json that belongs to these weights",
    )


def _unknown(error: Exception) -> UnsupportedCheckpointError:
    return UnsupportedCheckpointError(
        "transformers does not know this model",
        evidence=next(iter(str(error).splitlines()), repr(error)),
        fix="upgrade transformers, or --trust-remote-code if the checkpoint brings its code",
    )


def check_report(report: Mapping[str, Any], names: Iterable[str], *, prefix: str) -> None:
    """Hold what from_pretrained reports against what a last hidden state depends on.

    A pooler may be missing as a whole; heads may be left over.

    Args:
        report: its loading info (output_loading_info=True).
        names: of the weights in the file.
        prefix: what the class's own models put before an encoder's names ('bert').

    Raises:
        StateDictError: weights are missing, too many or of another shape.
    """

    def without(keys: Iterable[str], allowed: tuple[str, ...]) -> set[str]:
        return {n for n in keys if not n.removeprefix(f"{prefix}.").startswith(allowed)}

    # A file without a pooler is whole; one with half a pooler is not.
    pooler_left_out = len(without(names, POOLER)) == len(set(names))
    # Counting buffers are left out of the weights, and the class has made its own.
    asked = (name for name in report["missing_keys"] if not name.endswith(COUNTERS))
    missing = without(asked, POOLER if pooler_left_out else ())
    unexpected = without(report["unexpected_keys"], HEADS)
    mismatched = [str(entry[0]) for entry in report["mismatched_keys"]]
    failed = [str(entry) for entry in report.get("error_msgs") or ()]
    if missing or unexpected or mismatched or failed:
        raise mismatch(missing, unexpected, mismatched + failed)


def with_adapter(model: Any, adapter: Mapping[str, LowRank]) -> Any:
    """The model with an adapter beside its matrices, as PEFT runs it: nothing merged.

    Args:
        model: of transformers; it is changed.
        adapter: deltas by weight name in the file; empty for none.

    Returns:
        The same model.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, delta in adapter.items():
        module = model.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
        module.register_forward_hook(beside(delta))
    return model
