"""Which matrix products of a standard graph can be int8: x W with a weight of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jexport.errors import PrecisionError, UnsupportedGraphError

if TYPE_CHECKING:
    import onnx_ir as ir

SMALLEST = 64
"""Rows and columns from which a product is worth it; smaller ones (a pooler's head) stay float."""

LARGE_TABLE_ROWS = 1024
"""Rows from which a table that ids look up is stored as int8; positions and types stay float."""

QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearMatMul",
    "MatMulNBits",
    "MatMulIntegerToFloat",
)


@dataclass(frozen=True, kw_only=True)
class Product:
    """One MatMul: float32 [..., rows] times a weight [rows, columns].

    share: of the floating-point operations of all products here (attention products aside: their
    number depends on the text). layer: the number in its name, -1 without one.
    """

    name: str
    source: str
    weight: str
    rows: int
    columns: int
    share: float
    layer: int


def find(model: ir.Model) -> tuple[Product, ...]:
    """The products in graph order.

    Raises PrecisionError for a graph that is quantized already, UnsupportedGraphError for one
    without any product.
    """
    odd = next((node for node in model.graph.all_nodes() if node.op_type in QUANTIZED), None)
    if odd is not None:
        raise PrecisionError(
            "the model is quantized already",
            evidence=f"its graph has {odd.op_type} ({odd.name})",
            fix="start from a float checkpoint or graph",
        )
    nodes = [(node, size) for node in model.graph if (size := _size(node)) is not None]
    if not nodes:
        raise UnsupportedGraphError(
            "nothing to quantize: no product with a weight",
            evidence=f"{len(list(model.graph))} nodes; none is a MatMul with an initializer of "
            f"{SMALLEST} x {SMALLEST} or more",
            fix="use --precision fp32 or fp16",
        )
    work = sum(rows * columns for _, (rows, columns) in nodes)
    return tuple(
        Product(
            name=str(node.name),
            source=_name(node.inputs[0]),
            weight=_name(node.inputs[1]),
            rows=rows,
            columns=columns,
            share=rows * columns / work,
            layer=_layer(str(node.name)),
        )
        for node, (rows, columns) in nodes
    )


def tables(model: ir.Model) -> list[ir.Node]:
    """The Gather nodes that look up a large float table by id."""
    import onnx_ir as ir

    from jexport.graph import edit

    return [
        node
        for node in model.graph
        if node.op_type == "Gather"
        and (tensor := edit.weight(node.inputs[0])) is not None
        and tensor.dtype == ir.DataType.FLOAT
        and edit.sizes(tensor)[0] >= LARGE_TABLE_ROWS
    ]


def sources(products: Sequence[Product]) -> list[str]:
    """What the products read, each once."""
    return list(dict.fromkeys(product.source for product in products))


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _size(node: ir.Node) -> tuple[int, int] | None:
    import onnx_ir as ir

    from jexport.graph import edit

    if node.op_type != "MatMul" or node.domain:
        return None
    tensor = edit.weight(node.inputs[1])
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    rows, columns = edit.sizes(tensor)
    return (rows, columns) if min(rows, columns) >= SMALLEST else None


def _layer(name: str) -> int:
    number = re.search(r"(?:^|[./])(\d+)[./]", name)
    return int(number.group(1)) if number else -1
