"""float32 graph -> mixed graph: matrix products in float16, the delicate rest in float32.

float16: MatMul, the Add of its bias, Gelu, table lookups, and data movement between them. float32:
LayerNormalization, Softmax and its mask, RoPE, residual sums, pooling, and every graph output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from jexport.errors import OverflowRangeError
from jexport.graph import edit

FP16_MAX = float(np.finfo(np.float16).max)
HALF_OPS = ("MatMul", "Gelu")
MOVES = ("Reshape", "Transpose", "Split", "Slice", "Concat", "Neg", "Unsqueeze", "Squeeze")


def to_float16(model: ir.Model, keep: Callable[[str], bool]) -> None:
    """Convert in place. keep(name): nodes whose module name stays float32.

    Raises OverflowRangeError, naming the weight, when one does not fit float16.
    """
    graph = model.graph
    work = edit.Edit(graph)
    half: set[int] = set()
    casts: dict[tuple[int, str], ir.Value] = {}
    for node in list(graph):
        kind = _kind(node, half, keep)
        for position, value in enumerate(node.inputs):
            if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            if kind == "half" and value.is_initializer():
                node.replace_input_with(position, _half_weight(work, value))
            elif kind == "half" and id(value) not in half:
                cast = _cast(work, node, value, ir.DataType.FLOAT16, casts)
                half.add(id(cast))
                node.replace_input_with(position, cast)
            elif kind == "full" and id(value) in half:
                node.replace_input_with(
                    position, _cast(work, node, value, ir.DataType.FLOAT, casts)
                )
        if kind == "half":
            for output in node.outputs:
                output.type = ir.TensorType(ir.DataType.FLOAT16)
                half.add(id(output))
    _outputs_in_float32(work, half)
    work.drop_dead()
    graph.sort()


def _kind(node: ir.Node, half: set[int], keep: Callable[[str], bool]) -> str:
    """'half', 'full', or 'other' for nodes that touch no float at all."""
    floats = [v for v in node.inputs if v is not None and v.dtype is not None
              and v.dtype.is_floating_point()]  # fmt: skip
    if not floats:
        return "other"
    if keep(str(node.name).replace("/", ".")):
        return "full"
    flowing = [v for v in floats if not v.is_initializer()]
    all_half = bool(flowing) and all(id(v) in half for v in flowing)
    if node.op_type in HALF_OPS:
        return "half"
    if node.op_type == "Gather" and floats[0].is_initializer():
        return "half"
    if node.op_type in MOVES and all_half:
        return "half"
    with_constant = len(flowing) == 1 and len(floats) == 2 and all_half
    if node.op_type == "Add" and with_constant and flowing[0].producer() is not None:
        producer: Any = flowing[0].producer()
        return "half" if producer.op_type == "MatMul" else "full"
    if node.op_type == "Mul" and with_constant:
        constant = next(v for v in floats if v.is_initializer())
        return "half" if edit.scalar(constant) is not None else "full"
    return "full"


def _half_weight(work: edit.Edit, value: ir.Value) -> ir.Value:
    name = f"{value.name}.fp16"
    if name in work.graph.initializers:
        return work.graph.initializers[name]
    tensor: Any = value.const_value
    largest = float(np.abs(tensor.numpy()).max(initial=0.0))
    if largest > FP16_MAX:
        raise OverflowRangeError(
            f"weight '{value.name}' does not fit float16",
            evidence=f"its largest value is {largest:.6g}; float16 ends at {FP16_MAX:.0f}",
            fix="list its module in export.keep_fp32 of the recipe, or build --precision fp32",
        )
    return work.lazy_typed(
        name, ir.DataType.FLOAT16, tuple(tensor.shape), lambda: tensor.numpy().astype(np.float16)
    )


def _cast(
    work: edit.Edit,
    before: ir.Node,
    value: ir.Value,
    dtype: ir.DataType,
    casts: dict[tuple[int, str], ir.Value],
) -> ir.Value:
    key = (id(value), dtype.name)
    if key not in casts:
        short = "fp16" if dtype == ir.DataType.FLOAT16 else "fp32"
        node = work.insert(
            before, "Cast", [value], {"to": int(dtype)}, name=f"{value.name}/{short}", like=value
        )
        node.outputs[0].type = ir.TensorType(dtype)
        node.outputs[0].name = f"{value.name}/{short}"
        casts[key] = node.outputs[0]
    return casts[key]


def _outputs_in_float32(work: edit.Edit, half: set[int]) -> None:
    for position, value in enumerate(list(work.graph.outputs)):
        if id(value) not in half:
            continue
        name = str(value.name)
        value.name = f"{name}/fp16"
        node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}/Cast")
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = value.shape
        work.graph.append(node)
        work.graph.outputs[position] = node.outputs[0]
