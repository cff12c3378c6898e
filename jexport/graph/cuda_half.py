"""float16 graphs for CUDA: what half.py keeps in float32 and a GPU's kernels take in float16.

On a GPU what lies between the matrix products is bound by memory: a residual sum and its norm in
float32 read and write about six times as many bytes as one float16 kernel. LayerNormalization and,
in strict mode, SkipLayerNormalization still compute mean and variance in float32. The last norm
gives float32: graph outputs stay what they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jexport.graph import edit
from jexport.graph.ort_attention import MS

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def rotary(work: edit.Edit) -> int:
    """RotaryEmbedding between casts from and to float16 -> the same in float16.

    Args:
        work: an edit of a fused float16 graph.

    Returns:
        How many.
    """
    count = 0
    for node in list(work.graph):
        if node.op_type != "RotaryEmbedding" or node.domain != MS:
            continue
        if _is_widened(node.inputs[0]):
            _halve(work, node)
            count += 1
    return count


def residual(work: edit.Edit) -> int:
    """Residual sums of a float16 product, and the norms around them, in float16.

    Args:
        work: an edit of a fused float16 graph.

    Returns:
        How many sums.
    """
    sums = [node for node in work.graph if _is_residual(node)]
    if not sums:
        return 0
    for node in list(work.graph):
        if node in sums or _is_norm(node):
            _halve(work, node)
    return len(sums)


def _is_widened(value: ir.Value | None) -> bool:
    """Whether a float32 value was cast from float16."""
    source = edit.uncast(value)
    return (
        value is not None and source is not None and value.dtype == FLOAT and source.dtype == HALF
    )


def _is_residual(node: ir.Node) -> bool:
    """A float32 sum of two activations of one shape, one of them a float16 product."""
    if node.op_type != "Add" or node.domain or node.outputs[0].dtype != FLOAT:
        return False
    one, other = node.inputs
    if one is None or other is None or one.is_initializer() or other.is_initializer():
        return False
    if one.shape != other.shape or one.shape is None or len(one.shape) != 3:
        return False
    return any(_is_widened(value) and _of_matmul(value) for value in (one, other))


def _of_matmul(value: ir.Value | None) -> bool:
    added = edit.producer(value, "Add")
    if added is None:
        return edit.producer(value, "MatMul") is not None
    return any(edit.producer(source, "MatMul") is not None for source in added.inputs)


def _is_norm(node: ir.Node) -> bool:
    """A float32 LayerNormalization of [batch, sequence, hidden], by constants."""
    if node.op_type != "LayerNormalization" or node.domain or node.inputs[0] is None:
        return False
    source = node.inputs[0]
    constants = all(value is None or value.is_initializer() for value in node.inputs[1:])
    return source.dtype == FLOAT and len(source.shape or ()) == 3 and constants


def _halve(work: edit.Edit, node: ir.Node) -> None:
    """Let a float32 node compute in float16; who used its output gets it cast back, or uncast."""
    for position, value in enumerate(node.inputs):
        if value is None or value.dtype != FLOAT:
            continue
        tensor = value.const_value
        if value.is_initializer() and tensor is not None:
            given = work.constant(f"{value.name}.fp16", tensor.numpy().astype(np.float16))
        else:
            source = edit.uncast(value)
            narrow = source is not None and source.dtype == HALF
            given = source if narrow and source is not None else work.cast(node, value, HALF)
        node.replace_input_with(position, given)
    output = node.outputs[0]
    output.type = ir.TensorType(HALF)
    users, name = list(output.uses()), str(output.name)
    last = output.is_graph_output()
    if last:
        output.name = f"{name}/fp16"
    back = ir.node("Cast", [output], {"to": int(FLOAT)}, name=work.unused(f"{node.name}/fp32"))
    cast = back.outputs[0]
    cast.name = name if last else str(back.name)
    cast.type, cast.shape = ir.TensorType(FLOAT), output.shape
    work.graph.insert_after(node, back)
    for user, position in users:
        if user.op_type == "Cast" and user.attributes["to"].as_int() == int(HALF):
            work.replace(user.outputs[0], output)
        else:
            user.replace_input_with(position, cast)
    for place, value in enumerate(list(work.graph.outputs)):
        if value is output:
            work.graph.outputs[place] = cast
