"""Rules on Q/DQ: int8, symmetric, one scale per activation, one per output channel of a weight.

What TensorRT's parser does with a pair was read in its own source (onnx-tensorrt for TensorRT 10.x,
onnxOpImporters.cpp): a uint8 zero point is taken for int8 with a warning, a missing one is int8
where ONNX says uint8, so both would be wrong numbers and no refusal. Knows no other quantization.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jexport.graph.diagnostics import Diagnostic
from jexport.graph.lint import dataflow
from jexport.graph.lint.dataflow import CONSTANT, Constness
from jexport.graph.lint.graph_view import GraphFile, Node, Scope, error
from jexport.targets.trt.operators import SYMMETRIC

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
TAKEN = ("INT8", "FP8", "FP4", "INT4")
LOOKED_THROUGH = ("Cast", "Identity")
WIDTH = 8
"""Steps from a weight to the product that reads it; more has never been seen."""


def check(file: GraphFile, constness: Constness) -> Iterator[Diagnostic]:
    """Every QuantizeLinear and DequantizeLinear.

    Args:
        file: the graph, its types inferred.
        constness: of its values.

    Yields:
        Errors in type, zero point, scale, axis and pairing.
    """
    for scope in file.scopes():
        for node in scope.nodes:
            if node.standard and node.op in (QUANTIZE, DEQUANTIZE):
                yield from _type(node, scope)
                yield from _zero_point(node, scope)
                yield from _scale(node, scope, constness)
                yield from _axis(node, scope, constness)
                yield from _pair(node, scope)


def _type(node: Node, scope: Scope) -> Iterator[Diagnostic]:
    """The quantized side."""
    given = [scope.dtype(name) for name in node.inputs]
    if node.op == QUANTIZE:
        dtype = dataflow.quantized_type(node, given)
        implied = not node.given(2) and not node.attributes.get("output_dtype")
    else:
        dtype, implied = scope.dtype(node.given(0)), False
    if implied:
        yield error(
            "zero-point",
            node,
            f"{node.op} has no zero point, which says uint8 in ONNX and int8 in TensorRT",
            "ONNX's default type is uint8; TensorRT's parser takes int8, so the vectors differ",
            f"store an int8 zero point of 0 ({SYMMETRIC})",
        )
    elif dtype == "UINT8":
        yield error(
            "uint8",
            node,
            f"TensorRT does not quantize to uint8 ({node.op})",
            "its parser refuses uint8, or reads a uint8 zero point as int8: other numbers",
            SYMMETRIC,
        )
    elif dtype and dtype not in TAKEN:
        yield error(
            "type",
            node,
            f"TensorRT does not take {node.op} in {dtype}",
            f"it takes {', '.join(TAKEN)}; a bias stays in float",
            SYMMETRIC,
        )


def _zero_point(node: Node, scope: Scope) -> Iterator[Diagnostic]:
    name = node.given(2)
    if not name:
        return
    constant, scale = scope.constant(name), scope.constant(node.given(1))
    values = constant.values() if constant is not None else None
    if values is None:
        yield error(
            "zero-point",
            node,
            f"the zero point of {node.op} is not a constant that can be read",
            f"'{name}' is {'computed' if constant is None else 'not whole'}",
            SYMMETRIC,
        )
    elif values.any():
        yield error(
            "zero-point",
            node,
            f"TensorRT takes no zero point but 0 ({node.op})",
            f"zero point '{name}' is {values[values != 0][0]}: an asymmetric range",
            SYMMETRIC,
        )
    elif scale is not None and scale.elements != len(values):
        yield error(
            "zero-point",
            node,
            f"scale and zero point of {node.op} differ in size",
            f"{scale.elements} scales, {len(values)} zero points",
            SYMMETRIC,
        )


def _scale(node: Node, scope: Scope, constness: Constness) -> Iterator[Diagnostic]:
    name = node.given(1)
    constant = scope.constant(name)
    values = constant.values() if constant is not None else None
    if dataflow.constness_of(constness, scope, name) != CONSTANT:
        yield error(
            "scale",
            node,
            f"the scale of {node.op} is computed while it runs",
            f"'{name}' is no constant: dynamic quantization",
            SYMMETRIC,
        )
    elif constant is not None and values is None:
        yield error(
            "scale",
            node,
            f"the scale of {node.op} cannot be read",
            f"'{name}' is {constant.dtype} {list(constant.dims)}, or not whole",
            "build again",
        )
    elif values is not None and (bad := values[~(np.isfinite(values) & (values > 0))]).size:
        yield error(
            "scale",
            node,
            f"a scale of {node.op} is not a positive number",
            f"'{name}' has {len(bad)} of {len(values)}, the first {bad[0]}",
            "calibrate again with texts that reach this part",
        )
    elif values is not None and not len(values):
        yield error(
            "scale", node, f"{node.op} has an empty scale", f"'{name}' has no number", SYMMETRIC
        )


def _axis(node: Node, scope: Scope, constness: Constness) -> Iterator[Diagnostic]:
    """Scales per channel: only on weights, along the output channels, as many as there are."""
    scale = scope.constant(node.given(1))
    if scale is None or scale.elements <= 1:
        return
    if dataflow.constness_of(constness, scope, node.given(0)) != CONSTANT:
        yield error(
            "per-channel-activation",
            node,
            f"TensorRT takes one scale per activation ({node.op} has one per channel)",
            f"scale '{scale.name}' has {scale.elements} numbers",
            "quantize activations per tensor (scheme 'symmetric')",
        )
        return
    dims = _weight_dims(node, scope)
    if dims is None:
        return
    if len(scale.dims) != 1:
        yield error(
            "scale-axis",
            node,
            f"TensorRT takes blocks of int8 weights with one scale each nowhere ({node.op})",
            f"scale '{scale.name}' has shape {list(scale.dims)}",
            "one scale per output channel (scheme 'symmetric')",
        )
        return
    axis = node.attributes.get("axis", 1)
    axis = axis if isinstance(axis, int) else 1
    axis += len(dims) if axis < 0 else 0
    if not 0 <= axis < len(dims) or dims[axis] != scale.elements:
        yield error(
            "scale-axis",
            node,
            f"as many scales as channels are needed ({node.op})",
            f"{scale.elements} scales for axis {axis} of a weight {list(dims)}",
            "one scale per output channel (scheme 'symmetric')",
        )
        return
    channel_axis = _channel_axes(
        scope, next(iter(node.outputs), ""), tuple(range(len(dims))), WIDTH
    )
    if channel_axis and axis not in channel_axis:
        yield error(
            "scale-axis",
            node,
            f"the scales of a weight are not along its output channels ({node.op})",
            f"axis {axis} of a weight {list(dims)}; its product has its channels on "
            f"axis {min(channel_axis)}",
            "one scale per output channel (scheme 'symmetric')",
        )


def _weight_dims(node: Node, scope: Scope) -> tuple[int, ...] | None:
    """The shape of the weight a pair stands on."""
    name = node.given(0)
    for _ in range(WIDTH):
        constant = scope.constant(name)
        if constant is not None:
            return constant.dims
        maker = scope.producer(name)
        if maker is None or maker.op not in (QUANTIZE, *LOOKED_THROUGH):
            return None
        name = maker.given(0)
    return None


def _channel_axes(scope: Scope, name: str, axes: tuple[int, ...], steps: int) -> set[int]:
    """Axes of the weight that its readers have their output channels on.

    axes: which axis of the weight each axis of this value is (a Transpose moves them).
    """
    channel_axes: set[int] = set()
    for reader, index in scope.readers.get(name, ()) if steps else ():
        result = next(iter(reader.outputs), "")
        expected: int | None = None
        if reader.op == "MatMul" and len(axes) > 1:
            expected = len(axes) - 1 if index == 1 else len(axes) - 2
        elif reader.op == "Gemm" and index < 2 and len(axes) == 2:
            swapped = bool(reader.attributes.get("transB" if index else "transA"))
            expected = int(swapped != bool(index))
        elif reader.op in ("Gather", "Conv") and index == (reader.op == "Conv"):
            expected = 0
        elif reader.op in (*LOOKED_THROUGH, QUANTIZE, DEQUANTIZE) and index == 0:
            channel_axes |= _channel_axes(scope, result, axes, steps - 1)
        elif reader.op == "Transpose":
            order = reader.attributes.get("perm") or list(reversed(range(len(axes))))
            if isinstance(order, list) and sorted(map(str, order)) == sorted(
                map(str, range(len(axes)))
            ):
                moved = tuple(axes[int(one)] for one in order)
                channel_axes |= _channel_axes(scope, result, moved, steps - 1)
        if expected is not None:
            channel_axes.add(axes[expected])
    return channel_axes


def _pair(node: Node, scope: Scope) -> Iterator[Diagnostic]:
    """DequantizeLinear must undo the QuantizeLinear before it."""
    maker = scope.producer(node.given(0)) if node.op == DEQUANTIZE else None
    if maker is None or maker.op != QUANTIZE or maker.given(1) == node.given(1):
        return
    first, second = scope.constant(maker.given(1)), scope.constant(node.given(1))
    ours = first.values() if first is not None else None
    theirs = second.values() if second is not None else None
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        yield error(
            "scale",
            node,
            "a Q/DQ pair has two different scales",
            f"'{maker.given(1)}' and '{node.given(1)}'",
            SYMMETRIC,
        )
