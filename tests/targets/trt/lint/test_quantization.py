"""Rules on Q/DQ: each with a pair it names and one it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

NODE = helper.make_node
SYMMETRIC = "symmetric"


def bad(findings: Any) -> list[Any]:
    return [one for one in findings if one.severity == "error"]


def on_activation(graphs: Any, **pair: Any) -> onnx.ModelProto:
    nodes, constants = graphs.pair("x", **pair)
    made = graphs.model([*nodes, NODE("Relu", ["q/out"], ["out"], name="relu")], constants)
    assert isinstance(made, onnx.ModelProto)
    return made


def test_a_symmetric_pair_is_taken(graphs: Any, linted: Callable[..., Any]) -> None:
    assert linted(on_activation(graphs)) == []
    assert linted(on_activation(graphs, scale=[0.1], zero=[0])) == []


@pytest.mark.parametrize(
    ("pair", "rules"),
    [
        ({"zero": 3}, {"zero-point"}),
        ({"zero": -1}, {"zero-point"}),
        ({"zero": 0, "dtype": np.uint8}, {"uint8"}),
        ({"zero": 128, "dtype": np.uint8}, {"uint8", "zero-point"}),
        ({"zero": None}, {"zero-point", "uint8"}),  # what it makes is uint8 to ONNX
        ({"zero": 0, "dtype": np.int16}, {"type"}),
        ({"zero": [0, 0]}, {"zero-point"}),
        ({"scale": 0.0}, {"scale"}),
        ({"scale": -0.5}, {"scale"}),
        ({"scale": np.nan}, {"scale"}),
        ({"scale": np.inf}, {"scale"}),
        ({"scale": []}, {"scale", "zero-point"}),
        ({"scale": [0.1] * 4, "zero": [0] * 4, "axis": 2}, {"per-channel-activation"}),
    ],
)
def test_what_is_refused(
    pair: dict[str, Any], rules: set[str], graphs: Any, linted: Callable[..., Any]
) -> None:
    found = bad(linted(on_activation(graphs, **pair)))
    assert {one.rule for one in found} == rules
    assert {one.operator for one in found} <= {"QuantizeLinear", "DequantizeLinear", ""}
    assert any(one.node == "q/Q" for one in found)


def test_the_type_may_stand_in_output_dtype(graphs: Any, linted: Callable[..., Any]) -> None:
    def made(dtype: int) -> onnx.ModelProto:
        quantize = NODE("QuantizeLinear", ["x", "s"], ["steps"], name="Q", output_dtype=dtype)
        back = NODE("DequantizeLinear", ["steps", "s"], ["out"], name="DQ")
        model = graphs.model([quantize, back], [graphs.tensor("s", 0.1)], opset=21)
        assert isinstance(model, onnx.ModelProto)
        return model

    assert linted(made(graphs.INT8)) == []
    assert {one.rule for one in linted(made(graphs.UINT8))} == {"uint8"}


def test_a_computed_scale_or_zero_point(graphs: Any, linted: Callable[..., Any]) -> None:
    nodes, constants = graphs.pair("x")
    top = NODE("ReduceMax", ["x"], ["q/scale"], keepdims=0, name="top")
    made = graphs.model([top, *nodes, NODE("Relu", ["q/out"], ["out"], name="relu")], constants[1:])
    (found, other) = bad(linted(made))
    assert {found.rule, other.rule} == {"scale"}
    assert "dynamic quantization" in found.evidence
    zero = NODE("Cast", ["top"], ["q/zero"], to=graphs.INT8, name="zero")
    top.output[0] = "top"
    made = graphs.model(
        [top, zero, *nodes, NODE("Relu", ["q/out"], ["out"], name="r")], constants[:1]
    )
    assert {one.rule for one in bad(linted(made))} == {"zero-point"}


def test_a_pair_with_two_scales(graphs: Any, linted: Callable[..., Any]) -> None:
    nodes, constants = graphs.pair("x")
    nodes[1].input[1] = "other"
    last = NODE("Relu", ["q/out"], ["out"], name="relu")
    twice = [*constants, graphs.tensor("other", 0.2)]
    (found,) = linted(graphs.model([*nodes, last], twice))
    assert found.rule == "scale"
    same = [*constants, graphs.tensor("other", 0.1)]
    assert linted(graphs.model([*nodes, last], same)) == []


def product(
    graphs: Any,
    *,
    scales: Any,
    axis: int | None = 1,
    op: str = "MatMul",
    turned: bool = False,
    rows: int = 4,
    **attributes: Any,
) -> onnx.ModelProto:
    """A product with W int8 [rows, 6] (turned: stored [6, rows] and transposed in the graph)."""
    shape = (6, rows) if turned else (rows, 6)
    weights = [graphs.tensor("w", np.ones(shape), np.int8), graphs.tensor("s", scales)]
    more = {} if axis is None else {"axis": axis}
    nodes = [NODE("DequantizeLinear", ["w", "s"], ["wide"], name="DQ", **more)]
    name = "wide"
    if turned:
        nodes.append(NODE("Transpose", ["wide"], ["turned"], perm=[1, 0], name="T"))
        name = "turned"
    source = "x"
    if op == "Gemm":
        nodes.append(NODE("Reshape", ["x", "flat"], ["rows"], name="R"))
        weights.append(graphs.tensor("flat", [-1, 4], np.int64))
        source = "rows"
    nodes.append(NODE(op, [source, name], ["out"], name="product", **attributes))
    made = graphs.model(nodes, weights)
    assert isinstance(made, onnx.ModelProto)
    return made


@pytest.mark.parametrize(
    "case",
    [
        {"scales": [0.1] * 6},
        {"scales": [0.1] * 6, "axis": -1},
        {"scales": [0.1] * 6, "axis": None},
        {"scales": 0.1},
        {"scales": [0.1] * 6, "axis": 0, "turned": True},
        {"scales": [0.1] * 6, "op": "Gemm"},
        {"scales": [0.1] * 6, "axis": 0, "rows": 6, "op": "Gemm", "transB": 1},
    ],
)
def test_scales_of_weights(case: Any, graphs: Any, linted: Callable[..., Any]) -> None:
    assert linted(product(graphs, **case)) == []


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ({"scales": [0.1] * 4, "axis": 0}, "not along its output channels"),
        ({"scales": [0.1] * 6, "rows": 6, "axis": 0}, "not along its output channels"),
        ({"scales": [0.1] * 4, "axis": 1, "turned": True}, "not along its output channels"),
        ({"scales": [0.1] * 6, "rows": 6, "op": "Gemm", "transB": 1}, "not along its output"),
        ({"scales": [0.1] * 4}, "as many scales as channels"),
        ({"scales": [0.1] * 6, "axis": 7}, "as many scales as channels"),
        ({"scales": [[0.1] * 6] * 2}, "blocks"),
    ],
)
def test_scales_on_a_wrong_axis(
    case: Any, told: str, graphs: Any, linted: Callable[..., Any]
) -> None:
    (found,) = linted(product(graphs, **case))
    assert (found.rule, found.node) == ("scale-axis", "DQ")
    assert told in found.what


def test_a_float_weight_may_be_quantized_per_channel_in_the_graph(
    graphs: Any, linted: Callable[..., Any]
) -> None:
    for axis, rules in ((1, []), (0, ["scale-axis"] * 2)):
        nodes, constants = graphs.pair("w", scale=[0.1] * 4, zero=[0] * 4, axis=axis)
        nodes.append(NODE("MatMul", ["x", "q/out"], ["out"], name="product"))
        made = graphs.model(nodes, [*constants, graphs.tensor("w", np.ones((4, 4)))])
        assert [one.rule for one in linted(made)] == rules


def test_a_bias_in_int32(graphs: Any, linted: Callable[..., Any]) -> None:
    nodes = [
        NODE("DequantizeLinear", ["b", "s"], ["bias"], name="DQ"),
        NODE("Add", ["x", "bias"], ["out"], name="add"),
    ]
    weights = [graphs.tensor("b", [1, 2, 3, 4], np.int32), graphs.tensor("s", 0.1)]
    (found,) = linted(graphs.model(nodes, weights))
    assert (found.rule, found.severity) == ("type", "error")
    assert "INT32" in found.what
