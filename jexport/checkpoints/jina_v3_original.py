"""The original jina-embeddings-v3 layout: one safetensors file with stacked `parametrizations`.

Reads names and shapes; runs in transformers' native class (see native_class.py), because the
authors' own code does not import under transformers 5. Formula: modeling_lora.py `lora_forward`,
revision 845308d0 of jinaai/xlm-roberta-flash-implementation; scaling = lora_alpha / lora_rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.checkpoints import native_class, shards
from jexport.errors import AdapterError
from jexport.flow import LowRank, WeightReader

STACK = ".parametrizations.weight"
LORA_A, LORA_B, BASE = f"{STACK}.0.lora_A", f"{STACK}.0.lora_B", f"{STACK}.original"


def matches(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a folder holds this layout."""
    return "lora_adaptations" in config and config.get("model_type") in (None, "xlm-roberta")


def known_tasks(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """The adapters in the order of their index."""
    return tuple(config["lora_adaptations"])


def read(
    folder: Path, config: Mapping[str, Any], task: str
) -> tuple[dict[str, WeightReader], dict[str, LowRank], list[Path]]:
    """Weights under native names, the task's adapter, and the files that hold them.

    Raises CheckpointError, StateDictError, AdapterError.
    """
    paths = shards.find(folder)
    found = shards.entries(paths)
    base = {name: entry for name, entry in found.items() if not name.endswith((LORA_A, LORA_B))}
    renamed = {name.removesuffix(BASE) + ".weight" if name.endswith(BASE) else name: name
               for name in base}  # fmt: skip
    weights = native_class.native_weights(renamed, base, config)
    adapter = _adapter(found, config, task) if task != tasks.NONE else {}
    return weights, adapter, paths


def _adapter(
    found: Mapping[str, shards.Entry], config: Mapping[str, Any], task: str
) -> dict[str, LowRank]:
    index = list(config["lora_adaptations"]).index(task)
    count, rank = len(config["lora_adaptations"]), int(config["lora_rank"])
    scaling = float(config["lora_alpha"]) / rank
    adapter: dict[str, LowRank] = {}
    stripped = {name.removeprefix("roberta."): name for name in found}
    pooler = any(name.startswith("pooler.") for name in stripped)
    matrices = native_class.adapted_matrices(config, pooler=pooler)
    expected = {matrix.original + suffix for matrix in matrices for suffix in (LORA_A, LORA_B)}
    present = {name for name in stripped if name.endswith((LORA_A, LORA_B))}
    if expected != present:
        raise AdapterError(
            f"the adapters do not cover the model's {len(matrices)} matrices",
            evidence=f"missing: {shards.describe(expected - present) or 'none'}\n"
            f"not expected: {shards.describe(present - expected) or 'none'}",
            fix="give a checkpoint whose adapters were saved whole",
        )
    for matrix in matrices:
        a_name, b_name = stripped[matrix.original + LORA_A], stripped[matrix.original + LORA_B]
        rows, columns = matrix.shape
        a_shape, b_shape = (count, rank, columns), (count, rows, rank)
        if matrix.embedding:
            a_shape, b_shape = (count, rows, rank), (count, rank, columns)
        for name, shape in ((a_name, a_shape), (b_name, b_shape)):
            native_class.check_factor(name, found[name].shape, shape, what="lora_rank in config.json")
        up, down = (a_name, b_name) if matrix.embedding else (b_name, a_name)
        for native, part in matrix.parts:
            adapter[native] = LowRank(
                up=shards.reader(up, found[up], index=index, rows=part),
                down=shards.reader(down, found[down], index=index),
                scaling=scaling,
            )
    return adapter
