"""Writing a graph: one .onnx file and, beside it, one external-data file with every weight."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import onnx_ir as ir

INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph file."""

IN_FLIGHT_BYTES = 1 << 28
"""Weights held in memory at once while they are written."""


def save(model: ir.Model, path: Path) -> None:
    """Write a graph and its weights. Weights that are made of others are computed here.

    Args:
        model: any graph.
        path: of the graph; `<path>_data` gets the tensors of more than INLINE_BYTES.
    """
    # onnx-ir before 1.1 writes one tensor after the other and has no such limit.
    known = inspect.signature(ir.save).parameters
    limit: dict[str, Any] = (
        {"max_in_flight_bytes": IN_FLIGHT_BYTES} if "max_in_flight_bytes" in known else {}
    )
    ir.save(
        model,
        path,
        external_data=f"{path.name}_data",
        size_threshold_bytes=INLINE_BYTES,
        **limit,
    )
    data = path.with_name(f"{path.name}_data")
    if not data.exists():
        data.touch()  # a model whose every tensor is tiny; readers expect the pair
