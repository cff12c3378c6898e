"""Any sentence-transformers encoder (BERT, XLM-R, MiniLM ...) with a Pooling module.

Its only task is `none`. Weights go through transformers' own from_pretrained, which knows each
architecture's history of names; what it reports as missing, unexpected or mismatched is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport.checkpoints import shards
from jexport.checkpoints.transformer_files import quiet_transformers
from jexport.errors import StateDictError, UnsupportedCheckpointError
from jexport.flow import LowRank, Runner, Tensors, WeightReader

if TYPE_CHECKING:
    import torch

UNUSED = ("pooler.", "cls.", "lm_head.", "embeddings.position_ids", "embeddings.token_type_ids")
"""Heads and buffers that an encoder's last hidden state does not depend on."""


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds this layout."""
    return (folder / "modules.json").is_file() and not config.get("auto_map", {}).get("AutoModel")


def known_tasks(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """No adapters, so no task but `none`."""
    return ()


def read(
    folder: Path, config: Mapping[str, Any], task: str
) -> tuple[dict[str, WeightReader], dict[str, LowRank], list[Path]]:
    """Weights under the names in the file; the files that hold them. Raises CheckpointError."""
    paths = shards.find(folder)
    found = shards.entries(paths)
    weights = {
        name: shards.reader(name, entry)
        for name, entry in found.items()
        if not name.endswith(("embeddings.position_ids", "embeddings.token_type_ids"))
    }
    return weights, {}, paths


def assemble(folder: Path, weights: Mapping[str, WeightReader]) -> torch.nn.Module:
    """A float32 model of transformers' class for this config, with exactly these weights.

    Raises StateDictError, UnsupportedCheckpointError (an architecture transformers lacks).
    """
    import torch
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder)
        architecture = AutoModel._model_mapping[type(config)]
    except (ValueError, KeyError) as error:
        raise UnsupportedCheckpointError(
            "transformers does not know this model",
            evidence=next(iter(str(error).splitlines()), repr(error)),
            fix="upgrade transformers, or --trust-remote-code if the checkpoint brings its code",
        ) from error
    with quiet_transformers():
        model, report = architecture.from_pretrained(
            None,
            config=config,
            state_dict={name: read() for name, read in weights.items()},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused by check_report
        )
    check_report(report)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def check_report(report: Mapping[str, Any]) -> None:
    """Raise StateDictError unless from_pretrained found every weight it needs and no other."""
    missing = {name for name in report["missing_keys"] if not _unused(name)}
    unexpected = {name for name in report["unexpected_keys"] if not _unused(name)}
    mismatched = [str(entry[0]) for entry in report["mismatched_keys"]]
    failed = [str(entry) for entry in report.get("error_msgs") or ()]
    if missing or unexpected or mismatched or failed:
        raise StateDictError(
            "the checkpoint's weights are not those of its config.json",
            evidence=f"missing: {shards.describe(missing) or 'none'}\n"
            f"unexpected: {shards.describe(unexpected) or 'none'}\n"
            f"mismatched: {shards.describe(mismatched + failed) or 'none'}",
            fix="give the config.json and the weights of one and the same checkpoint",
        )


def _unused(name: str) -> bool:
    return any(name.startswith(part) or f".{part}" in name for part in UNUSED)


@contextlib.contextmanager
def reference(folder: Path, weights: Mapping[str, WeightReader]) -> Iterator[Runner]:
    """transformers' own forward pass with sdpa attention."""
    import torch

    model: Any = assemble(folder, weights)

    def run(feed: Tensors) -> Tensors:
        with torch.inference_mode():
            out = model(
                input_ids=torch.from_numpy(feed["input_ids"]),
                attention_mask=torch.from_numpy(feed["attention_mask"]),
            )
        return {"last_hidden_state": out.last_hidden_state.numpy()}

    yield run
    model.to("meta")
