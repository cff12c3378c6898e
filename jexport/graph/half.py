"""float32 graph -> mixed graph: matrix products in float16, the delicate rest in float32.

float16: MatMul, the Add of its bias, Gelu, table lookups, and data movement between them; in a
quantized graph also QuantizeLinear and DequantizeLinear, both of a pair, so that a product reads
them without a cast between. float32: LayerNormalization, Softmax and its mask, RoPE, residual sums,
pooling, and every graph output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from jexport.errors import OverflowRangeError, RecipeError
from jexport.graph import edit

FP16_MAX = float(np.finfo(np.float16).max)
HALF_OPS = ("MatMul", "Gelu")
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
MOVES = ("Reshape", "Transpose", "Split", "Slice", "Concat", "Neg", "Unsqueeze", "Squeeze")

SCALE_ERROR = 1e-3
"""A factor or scale is stored in float16 when that changes it by no more than this share."""


class Keep:
    """export.keep_fp32: which modules and nodes stay float32.

    A listed part fits a name when its words stand in it, in order and whole: 'layers.1' is not in
    'layers.10'. A word may be one of several that a fused node joins: 'k_proj' in
    'q_proj_k_proj_v_proj', 'MatMul' in 'MatMul_2'.
    """

    def __init__(self, listed: Sequence[str]) -> None:
        self.listed = tuple(listed)
        self.used: set[str] = set()

    def __call__(self, name: str) -> bool:
        """Whether a module ('layers.3.mlp.fc1') or node ('layers/3/mlp/fc1/MatMul') is listed."""
        words = name.replace("/", ".").split(".")
        matches = {part for part in self.listed if _stands_in(part.split("."), words)}
        self.used |= matches
        return bool(matches)

    def check_used(self) -> None:
        """Refuse a list with a part that fits no name at all.

        Raises:
            RecipeError: a listed part fitted no name that was asked for.
        """
        unused = [part for part in self.listed if part not in self.used]
        if unused:
            raise RecipeError(
                f"export.keep_fp32 names what this model does not have: {', '.join(unused)}",
                evidence="no matrix product, Gelu or table lookup of the graph has such a name",
                fix="name a module such as 'layers.3.mlp.fc2', or leave the entry out",
            )


def _stands_in(part: Sequence[str], words: Sequence[str]) -> bool:
    starts = range(len(words) - len(part) + 1)
    return any(
        all(f"_{p}_" in f"_{word}_" for p, word in zip(part, words[start:], strict=False))
        for start in starts
    )


def to_float16(model: ir.Model, keep: Keep) -> None:
    """Convert in place.

    Args:
        model: a float32 graph.
        keep: which nodes stay float32.

    Raises:
        OverflowRangeError: a weight does not fit float16; it is named.
        RecipeError: `keep` lists something that is not there.
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
                node.replace_input_with(position, _half_weight(work, node, value))
            elif kind == "half" and id(value) not in half:
                cast = _cast(work, node, value, ir.DataType.FLOAT16, casts)
                half.add(id(cast))
                node.replace_input_with(position, cast)
            elif kind == "full" and id(value) in half:
                node.replace_input_with(
                    position, _cast(work, node, value, ir.DataType.FLOAT, casts)
                )
        if kind == "half" and node.op_type != "QuantizeLinear":
            for output in node.outputs:
                output.type = ir.TensorType(ir.DataType.FLOAT16)
                half.add(id(output))
    keep.check_used()
    _outputs_in_float32(work, half)
    work.drop_dead()
    graph.sort()


def _kind(node: ir.Node, half: set[int], keep: Keep) -> str:
    """'half', 'full', or 'other' for nodes that touch no float at all."""
    floats = [
        v
        for v in node.inputs
        if v is not None and v.dtype is not None and v.dtype.is_floating_point()
    ]
    if not floats:
        return "other"
    if keep(str(node.name)):
        return "full"
    if node.op_type in QUANTIZERS:
        return "half" if _fits(node.inputs[1]) else "full"
    activations = [v for v in floats if not v.is_initializer()]
    all_half = bool(activations) and all(id(v) in half for v in activations)
    if node.op_type in HALF_OPS:
        return "half"
    if node.op_type == "Gather" and floats[0].is_initializer():
        return "half"
    if node.op_type in MOVES and all_half:
        return "half"
    with_constant = len(activations) == 1 and len(floats) == 2 and all_half
    if node.op_type == "Add" and with_constant and activations[0].producer() is not None:
        producer: Any = activations[0].producer()
        return "half" if producer.op_type == "MatMul" else "full"
    if node.op_type == "Mul" and with_constant:
        factor = next(v for v in floats if v.is_initializer())
        return "half" if edit.scalar(factor) is not None and _fits(factor) else "full"
    return "full"


def _fits(value: ir.Value | None) -> bool:
    """Whether every number of a constant is about the same in float16."""
    numbers = edit.array(value)
    if numbers is None:
        return False
    with np.errstate(over="ignore"):
        there = numbers.astype(np.float16).astype(np.float32)
    return bool((np.abs(there - numbers) <= SCALE_ERROR * np.abs(numbers)).all())


def _half_weight(work: edit.Edit, node: ir.Node, value: ir.Value) -> ir.Value:
    name = f"{value.name}.fp16"
    if name in work.graph.initializers:
        return work.graph.initializers[name]
    tensor: Any = value.const_value
    largest = float(np.abs(tensor.numpy()).max(initial=0.0))
    if largest > FP16_MAX:
        module = str(node.name).rpartition("/")[0].replace("/", ".")
        raise OverflowRangeError(
            f"weight '{value.name}' does not fit float16",
            evidence=f"its largest value is {largest:.6g}; float16 ends at {FP16_MAX:.0f}",
            fix=f'set export.keep_fp32 = ["{module}"] in the recipe, or build --precision fp32',
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
