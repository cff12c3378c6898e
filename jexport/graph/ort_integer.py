"""Q/DQ products of a standard graph -> onnxruntime's MatMulIntegerToFloat (domain com.microsoft).

onnxruntime 1.32 does not make the fusion by itself for a weight with one scale per column: it
restores both sides to float and multiplies those (BENCHMARKS.md). Only uint8 activations are taken:
its int8 x int8 product is slow on most processors. Contract: onnxruntime docs/ContribOperators.md.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jexport.graph import edit

MS = "com.microsoft"


def fuse(work: edit.Edit) -> int:
    """MatMul(DequantizeLinear(q), DequantizeLinear(W)) [+ bias] -> one node.

    Args:
        work: an edit of a quantized graph.

    Returns:
        How many.
    """
    count = 0
    for node in list(work.graph):
        if node.op_type != "MatMul" or node.domain:
            continue
        left, right = (_restored(value) for value in node.inputs)
        if left is None or right is None or not _takes(left, right):
            continue
        weight, columns = right.inputs[0], right.inputs[1]
        assert weight is not None
        assert columns is not None
        zeros = np.zeros(edit.sizes(columns), np.int8)
        inputs = [left.inputs[0], weight, left.inputs[1], columns, left.inputs[2]]
        inputs.append(work.constant(f"{weight.name}.zero", zeros))
        last, match = node, edit.bias_add(node.outputs[0])
        if match is not None:
            last = match[0]
            inputs.append(match[1])
        fused = work.insert(
            last,
            "MatMulIntegerToFloat",
            inputs,
            name=f"{node.name}/integer",
            like=last.outputs[0],
            domain=MS,
        )
        work.replace(last.outputs[0], fused.outputs[0])
        count += 1
    return count


def unfuse_weights(work: edit.Edit) -> int:
    """MatMul(x, DequantizeLinear(W)) with float x -> MatMul(x, Cast(W) * scales).

    onnxruntime makes MatMulNBits of the first, which rounds x to 8 bits unless a session option
    forbids it: largest error 6e-3 of the largest value against 4e-7 (384 x 1536). Servers do not
    set that option. The second is folded into a float weight at load.

    Args:
        work: an edit of a quantized graph.

    Returns:
        How many.
    """
    count = 0
    for node in list(work.graph):
        right = _restored(node.inputs[1]) if node.op_type == "MatMul" else None
        if right is None or _restored(node.inputs[0]) is not None:
            continue
        like, name = right.outputs[0], str(right.name)
        cast = work.insert(
            node,
            "Cast",
            [right.inputs[0]],
            {"to": int(ir.DataType.FLOAT)},
            name=f"{name}/cast",
            like=like,
        )
        scaled = work.insert(
            node, "Mul", [cast.outputs[0], right.inputs[1]], name=f"{name}/scaled", like=like
        )
        node.replace_input_with(1, scaled.outputs[0])
        count += 1
    return count


def _restored(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.domain:
        return None
    return node


def _takes(left: ir.Node, right: ir.Node) -> bool:
    """uint8 activations with one scale; int8 weights [rows, columns] with a scale per column."""
    zero = edit.array(left.inputs[2]) if len(left.inputs) > 2 else None
    scale = edit.array(left.inputs[1])
    if zero is None or zero.dtype != np.uint8 or scale is None or scale.size != 1:
        return False
    tensor, scales = edit.weight(right.inputs[0]), right.inputs[1]
    if tensor is None or tensor.dtype != ir.DataType.INT8 or scales is None:
        return False
    if len(right.inputs) > 2 or scales.const_value is None:
        return False
    axis = right.attributes.get("axis")
    columns = edit.sizes(tensor)[1]
    along = (1 if axis is None else axis.as_int()) in (1, -1)
    return along and edit.sizes(scales.const_value) == (columns,)
