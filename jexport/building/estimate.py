"""What a build will need, from the checkpoint's headers: seconds, memory, disk.

Knows no target and opens no weights. The rates are those of one measured full-size build.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from jexport.checkpoints import shards
from jexport.checkpoints.sentence_files import transformer_home
from jexport.errors import JexportError, MemoryNeedError
from jexport.workspace.memory import available_bytes
from jexport.workspace.run import resident_mib

GIB = 1 << 30
FLOAT_BYTES = 4
OVERHEAD_BYTES = 800 << 20
"""Python, torch, transformers and an engine, before any weight: 0.6 GiB seen with a toy model."""

MEMORY_PER_WEIGHT = {"quantize": 11.4, "validate": 10.2}
"""Peak bytes a weight, the whole process: BENCHMARKS.md, 559 M weights: 5.72 GB (validate of fp32,
the checkpoint's own forward pass beside the engine's), 6.39 GB (quantize)."""

SECONDS_PER_WEIGHT = {
    "load": 38e-9,
    "export": 139e-9,
    "quantize": 1850e-9,
    "compile": 9e-9,
    "validate": 152e-9,
    "package": 12e-9,
}
"""BENCHMARKS.md, 559 M weights on two cores: 21, 78, 5, 85 and 7 s; quantize is 0.85 s a
calibration text and 163 s, of 1,024 texts."""

SECONDS_AT_LEAST = 8.0
"""Starting, and tracing a graph, whatever its size."""

BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.05, "int8-weights": 1.05}
"""Of an artifact: BENCHMARKS.md has 0.253 to 0.262 of fp32 for int8."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """About what one build needs.

    Args:
        seconds: on two cores, of the stages that are not finished.
        memory_bytes: the most of the whole process.
        disk_bytes: the artifact and what the cache keeps of it.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int


def weights(model: str) -> int | None:
    """How many weights a checkpoint has, adapters included.

    Args:
        model: its folder, or a hub id.

    Returns:
        The number; None where the checkpoint is not here or cannot be read.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    try:
        return sum(
            math.prod(entry.shape) for entry in shards.tensors(transformer_home(folder)).values()
        )
    except (JexportError, OSError):
        return None  # whoever opens it says what is wrong with it


def of(count: int, precision: str, *, graph: bool, finished: Collection[str] = ()) -> Estimate:
    """A build of so many weights.

    Args:
        count: weights of the checkpoint, adapters included.
        precision: of the artifact.
        graph: whether the build goes through ONNX.
        finished: stages whose results are in the cache.

    Returns:
        The estimate.
    """
    is_int8 = precision.startswith("int8")
    stages = [
        "load",
        *(["export"] if graph else []),
        *(["quantize"] if is_int8 else []),
        "compile",
        "validate",
        "package",
    ]
    todo = [stage for stage in stages if stage not in finished]
    own = BYTES_PER_WEIGHT.get(precision, FLOAT_BYTES) * count
    cache_bytes = [
        own if stage == "compile" else own if stage == "quantize" else FLOAT_BYTES * count
        for stage in todo
        if stage in ("export", "quantize", "compile")
    ]
    return Estimate(
        seconds=SECONDS_AT_LEAST + count * sum(SECONDS_PER_WEIGHT[stage] for stage in todo),
        memory_bytes=memory(count, is_int8=is_int8),
        disk_bytes=int(own + sum(cache_bytes)),
    )


def memory(count: int, *, is_int8: bool) -> int:
    """Peak bytes of a build of so many weights.

    Args:
        count: weights of the checkpoint, adapters included.
        is_int8: whether there is a quantize stage.

    Returns:
        Bytes of the whole process.
    """
    return OVERHEAD_BYTES + int(count * MEMORY_PER_WEIGHT["quantize" if is_int8 else "validate"])


def check_memory(model: str, *, is_int8: bool, limit_bytes: int | None = None) -> None:
    """Refuse a build that would not fit, before any weight is read.

    A checkpoint that is not here yet, and a machine that does not say what it has, pass.

    Args:
        model: its folder, or a hub id.
        is_int8: whether there is a quantize stage.
        limit_bytes: what it may use; None for what this machine has.

    Raises:
        MemoryNeedError: the build would not fit.
    """
    count = weights(model)
    # What this process holds already (libraries, an earlier build's) is part of the overhead.
    held = min(int(resident_mib()) << 20, OVERHEAD_BYTES) if limit_bytes is None else 0
    free = available_bytes() if limit_bytes is None else limit_bytes
    if count is None or free is None:
        return
    need = memory(count, is_int8=is_int8) - held
    if need > free:
        raise MemoryNeedError(
            f"the build needs about {need / GIB:.1f} GiB of memory",
            evidence=f"{free / GIB:.1f} GiB may be used; the checkpoint has {count / 1e6:,.0f} "
            "million weights",
            fix="free memory, raise the limit, or build on a larger machine",
        )
