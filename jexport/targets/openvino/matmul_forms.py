"""The same sums in the forms for which OpenVINO's CPU kernels are fastest.

The standard graph asks one product for query, key and value, hands the keys over as columns, and
divides by SmoothQuant's factors behind the LayerNorm. OpenVINO then copies: a split of the product,
keys that are turned for its kernel once more, a pass in bfloat16 before the rounding. Each change
here leaves a place of another form as it is. Together 1.08 times as fast for int8, 1.09 for bf16
(MiniLM, one thread; DECISIONS.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Cut = Callable[[int, int], Any]
"""A value's columns from begin to end, as a new node."""


def settle(graph: Any) -> dict[str, int]:
    """Change the forms in place.

    Args:
        graph: an openvino.Model.

    Returns:
        How many places of each kind were changed.
    """
    nodes = graph.get_ordered_ops()
    counts = {
        "products_split": sum(_split(node) for node in nodes if _is(node, "VariadicSplit")),
        "keys_as_rows": sum(_rows(node) for node in nodes if _is(node, "MatMul")),
        "divisors_in_norm": sum(_into_norm(node) for node in nodes if _is(node, "Multiply")),
        "biases_joined": sum(_join(node) for node in nodes if _is(node, "Add")),
    }
    graph.validate_nodes_and_infer_types()
    return counts


def _is(node: Any, kind: str) -> bool:
    type_name: str = node.get_type_name()
    return type_name == kind


def _split(split: Any) -> bool:
    """Split(X W + b) -> X W1 + b1, X W2 + b2, ..."""
    from openvino import opset13 as ops

    source, axis, lengths = (split.input_value(port) for port in range(3))
    shape = source.get_partial_shape()
    if not (
        _constant(axis) and _constant(lengths) and shape.rank.is_static and shape[-1].is_static
    ):
        return False
    if int(axis.get_node().get_data()) not in (-1, len(shape) - 1):
        return False
    cut = _columns(source, shape[-1].get_length(), ops)
    if cut is None:
        return False
    begin = 0
    for port, length in enumerate(lengths.get_node().get_data()):
        part = cut(begin, begin + int(length))
        part.set_friendly_name(f"{split.get_friendly_name()}/{port}")
        split.output(port).replace(part.output(0))
        begin += int(length)
    return True


def _columns(source: Any, width: int, ops: Any) -> Cut | None:
    """How to make some columns of sums of products alone; None for anything else."""
    node = source.get_node()
    if _constant(source):
        return _slices(source, width, ops)
    if _is(node, "Add"):
        sides = [_columns(node.input_value(port), width, ops) for port in (0, 1)]
        left, right = sides
        if left is None or right is None or all(_constant(v) for v in node.input_values()):
            return None
        return lambda begin, end: ops.add(left(begin, end), right(begin, end))
    if not _is(node, "MatMul") or any(node.get_attributes().values()):
        return None
    rows, weight = node.input_value(0), _weight(node.input_value(1), width, ops)
    if weight is None:
        return None
    return lambda begin, end: ops.matmul(rows, weight(begin, end), False, False)


def _weight(source: Any, width: int, ops: Any) -> Cut | None:
    """Columns of a constant weight, also of one that is converted, shifted and scaled."""
    node = source.get_node()
    if _constant(source):
        return _slices(source, width, ops)
    if _is(node, "Convert"):
        inner = _weight(node.input_value(0), width, ops)
        kind = node.get_element_type()
        return inner and (lambda begin, end: ops.convert(inner(begin, end), kind))
    if _is(node, "Reshape") and all(_constant(value) for value in node.input_values()):
        held = node.input_value(0).get_node().get_data()
        shape = tuple(size.get_length() for size in node.get_output_partial_shape(0))
        return _sliced(held.reshape(shape), width, ops)
    if _is(node, "Multiply") or _is(node, "Subtract"):
        left, right = (_weight(node.input_value(port), width, ops) for port in (0, 1))
        make = ops.multiply if _is(node, "Multiply") else ops.subtract
        if left is None or right is None:
            return None
        return lambda begin, end: make(left(begin, end), right(begin, end))
    return None


def _slices(source: Any, width: int, ops: Any) -> Cut | None:
    return _sliced(source.get_node().get_data(), width, ops)


def _sliced(values: Any, width: int, ops: Any) -> Cut | None:
    """Columns of a constant whose last axis is as wide as the product, or that holds for all."""
    if values.size == 1:
        return lambda begin, end: ops.constant(values)
    if values.shape[-1] != width:
        return None
    return lambda begin, end: ops.constant(np.ascontiguousarray(values[..., begin:end]))


def _rows(matmul: Any) -> bool:
    """Q K with the keys as columns [b, h, d, n] -> Q K^T with the keys as rows [b, h, n, d]."""
    from openvino import opset13 as ops

    turn = matmul.input_value(1).get_node()
    if any(matmul.get_attributes().values()) or not _is(turn, "Transpose"):
        return False
    order = turn.input_value(1)
    if not _constant(order) or list(order.get_node().get_data()) != [0, 2, 3, 1]:
        return False
    keys = ops.transpose(turn.input_value(0), ops.constant([0, 2, 1, 3], dtype="int64"))
    keys.set_friendly_name(turn.get_friendly_name())
    fresh = ops.matmul(matmul.input_value(0), keys, False, True)
    fresh.set_friendly_name(matmul.get_friendly_name())
    matmul.output(0).replace(fresh.output(0))
    return True


def _into_norm(divide: Any) -> bool:
    """(N g + b) f, where the sum is needed elsewhere too -> N (g f) + (b f), nothing in between.

    As a product and a sum of its own the rounding behind it melts into them.
    """
    from openvino import opset13 as ops

    value, constants = divide.output(0), []
    for kind in ("Multiply", "Add", "Multiply"):
        node = value.get_node()
        match = _with_constant(node) if _is(node, kind) else None
        if match is None:
            return False
        value, constant = match
        constants.append(constant)
    if not _is(value.get_node(), "MVN"):
        return False
    factor, bias, gain = constants
    scaled = ops.multiply(value, ops.constant(gain * factor))
    total = ops.add(scaled, ops.constant(bias * factor))
    scaled.set_friendly_name(f"{divide.get_friendly_name()}/gain")
    total.set_friendly_name(divide.get_friendly_name())
    divide.output(0).replace(total.output(0))
    return True


def _join(total: Any) -> bool:
    """(N g + b) + (X W + c) -> N g + (X W + (b + c)): the product adds its bias for nothing."""
    from openvino import opset13 as ops

    for port in (0, 1):
        residual, matmul = total.input_value(port).get_node(), total.input_value(1 - port)
        if not _is(residual, "Add") or not _is(matmul.get_node(), "Add"):
            continue
        scaled, summed = _with_constant(residual), _with_constant(matmul.get_node())
        if scaled is None or summed is None or len(matmul.get_target_inputs()) != 1:
            continue
        if not _is(scaled[0].get_node(), "Multiply") or not _is(summed[0].get_node(), "MatMul"):
            continue
        both = ops.add(summed[0], ops.constant(summed[1] + scaled[1]))
        both.set_friendly_name(matmul.get_node().get_friendly_name())
        # In bfloat16 the sum melts into the product by g only where that is its first input.
        whole = ops.add(scaled[0], both)
        whole.set_friendly_name(total.get_friendly_name())
        total.output(0).replace(whole.output(0))
        return True
    return False


def _with_constant(node: Any) -> tuple[Any, Any] | None:
    """A two-sided node's value and the constant on its other side."""
    for port in (0, 1):
        value, other = node.input_value(1 - port), node.input_value(port)
        if _constant(other) and not _constant(value):
            return value, other.get_node().get_data()
    return None


def _constant(value: Any) -> bool:
    return _is(value.get_node(), "Constant")
