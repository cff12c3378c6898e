"""Linear layers of a standard graph that can be int8: MatMuls with a weight of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jexport.errors import PrecisionError, UnsupportedGraphError

if TYPE_CHECKING:
    import onnx_ir as ir

MIN_FEATURES = 64
"""Input and output features from which int8 pays; smaller layers (a pooler's head) stay float."""

LARGE_TABLE_ROWS = 1024
"""Rows from which an embedding table is stored as int8; positions and types stay float."""

QUANTIZED_OPS = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "MatMulInteger",
    "QLinearMatMul",
    "MatMulNBits",
    "MatMulIntegerToFloat",
)


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """One MatMul: float32 [..., in_features] times a weight [in_features, out_features].

    Args:
        name: of the MatMul node.
        input: name of the activation that it reads.
        weight: name of its initializer.
        in_features: rows of the weight.
        out_features: columns of the weight.
        share: of the multiply-adds of all linear layers, 0 to 1 (attention's own products aside:
            their number depends on the text).
        block: number of the transformer block in the node's name, -1 without one.
    """

    name: str
    input: str
    weight: str
    in_features: int
    out_features: int
    share: float
    block: int


def find_linear_layers(model: ir.Model) -> tuple[LinearLayer, ...]:
    """The linear layers that are large enough for int8, in graph order.

    Args:
        model: a float graph.

    Returns:
        At least one layer.

    Raises:
        PrecisionError: the graph is quantized already.
        UnsupportedGraphError: no MatMul has a large enough weight.
    """
    quantized = next((n for n in model.graph.all_nodes() if n.op_type in QUANTIZED_OPS), None)
    if quantized is not None:
        raise PrecisionError(
            "the model is quantized already",
            evidence=f"its graph has {quantized.op_type} ({quantized.name})",
            fix="start from a float checkpoint or graph",
        )
    nodes = [(node, shape) for node in model.graph if (shape := _weight_shape(node)) is not None]
    if not nodes:
        raise UnsupportedGraphError(
            "nothing to quantize: no linear layer (MatMul with a weight)",
            evidence=f"{len(list(model.graph))} nodes; none is a MatMul with an initializer of "
            f"{MIN_FEATURES} x {MIN_FEATURES} or more",
            fix="use --precision fp32 or fp16",
        )
    multiply_adds = sum(rows * columns for _, (rows, columns) in nodes)
    return tuple(
        LinearLayer(
            name=str(node.name),
            input=_name(node.inputs[0]),
            weight=_name(node.inputs[1]),
            in_features=rows,
            out_features=columns,
            share=rows * columns / multiply_adds,
            block=_block(str(node.name)),
        )
        for node, (rows, columns) in nodes
    )


def find_embedding_tables(model: ir.Model) -> list[ir.Node]:
    """The Gather nodes that look up rows of a large float table by id.

    Args:
        model: the float graph.

    Returns:
        The nodes, in the graph's order; a table has LARGE_TABLE_ROWS rows or more.
    """
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


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _weight_shape(node: ir.Node) -> tuple[int, int] | None:
    import onnx_ir as ir

    from jexport.graph import edit

    if node.op_type != "MatMul" or node.domain:
        return None
    tensor = edit.weight(node.inputs[1])
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    rows, columns = edit.sizes(tensor)
    return (rows, columns) if min(rows, columns) >= MIN_FEATURES else None


def _block(name: str) -> int:
    number = re.search(r"(?:^|[./])(\d+)[./]", name)
    return int(number.group(1)) if number else -1
