"""What float16 cannot hold, and masks that overflow there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

NODE = helper.make_node
FLOAT, HALF = 1, 10
LOWEST = float(np.finfo(np.float32).min)


def told(findings: Any) -> list[tuple[str, str]]:
    return [(one.rule, one.severity) for one in findings]


def masked(
    graphs: Any, value: float, *, half: bool, bounded: bool = False, dtype: Any = np.float32
) -> onnx.ModelProto:
    """(1 - mask) * value + x -> [Cast to float16 ->] Softmax; the graph has float16 in any case."""
    nodes = [
        NODE("Sub", ["one", "mask"], ["hidden"], name="sub"),
        NODE("Unsqueeze", ["hidden", "last"], ["column"], name="u"),
        NODE("Mul", ["column", "low"], ["additive"], name="mask/Mul"),
        NODE("Add", ["x", "additive"], ["scores"], name="add"),
    ]
    name = "scores"
    if bounded:
        nodes.append(NODE("Softmax", [name], ["soft"], name="soft"))
        name = "soft"
    nodes.append(NODE("Cast", [name], ["narrow"], to=HALF, name="narrow"))
    nodes.append(NODE("Softmax", ["narrow" if half else "scores"], ["p"], name="last"))
    nodes.append(NODE("Cast", ["p"], ["out"], to=FLOAT, name="wide"))
    if not half and not bounded:
        nodes[-3] = NODE("Cast", ["x"], ["narrow"], to=HALF, name="narrow")
    weights = [
        graphs.tensor("one", 1.0),
        graphs.tensor("low", value, dtype),
        graphs.tensor("last", [2], np.int64),
    ]
    made = graphs.model(nodes, weights)
    assert isinstance(made, onnx.ModelProto)
    return made


@pytest.mark.parametrize(
    ("value", "half", "bounded", "wanted"),
    [
        (-10_000.0, True, False, []),
        (-65_504.0, True, False, []),
        (-70_000.0, True, False, [("mask-overflow", "error")]),
        (LOWEST, True, False, [("mask-overflow", "error")]),
        (-np.inf, True, False, [("mask-overflow", "error")]),
        (70_000.0, True, False, [("fp16-range", "error")]),
        (np.nan, True, False, [("fp16-range", "error")]),
        (LOWEST, False, False, [("mask-overflow", "warning")]),
        (LOWEST, False, True, [("mask-overflow", "warning")]),  # softmax bounds it before the cast
        (-1e9, False, False, []),
        (-10_000.0, False, False, []),
    ],
)
def test_masks(
    value: float, half: bool, bounded: bool, wanted: Any, graphs: Any, linted: Callable[..., Any]
) -> None:
    found = linted(masked(graphs, value, half=half, bounded=bounded))
    assert told(found) == wanted
    assert all("'low' has" in one.evidence for one in found)
    assert all("narrow" in one.evidence for one in found if one.severity == "error")


def test_a_float32_graph_holds_them(graphs: Any, linted: Callable[..., Any]) -> None:
    nodes = [NODE("Add", ["x", "low"], ["s"], name="a"), NODE("Softmax", ["s"], ["out"], name="b")]
    assert linted(graphs.model(nodes, [graphs.tensor("low", LOWEST)])) == []


def in_half(graphs: Any, values: Sequence[float], how: str) -> onnx.ModelProto:
    stored = graphs.tensor("c", values, np.float16)
    if how == "fields":
        whole = np.asarray(values, np.float16).view(np.uint16).astype(int).tolist()
        stored = helper.make_tensor("c", HALF, [len(values)], whole, raw=False)
        stored.ClearField("raw_data")
        del stored.int32_data[:]
        stored.int32_data.extend(whole)
    nodes = [
        NODE("Cast", ["x"], ["h"], to=HALF, name="narrow"),
        NODE("Add", ["h", "c"], ["sum"], name="add"),
        NODE("Softmax", ["sum"], ["p"], name="soft"),
        NODE("Cast", ["p"], ["out"], to=FLOAT, name="wide"),
    ]
    if how == "Constant":
        nodes.insert(0, NODE("Constant", [], ["c"], value=stored, name="const"))
    made = graphs.model(nodes, [] if how == "Constant" else [stored])
    assert isinstance(made, onnx.ModelProto)
    return made


@pytest.mark.parametrize("how", ["raw", "fields", "Constant"])
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1.0, 2.0, 3.0, 65504.0], []),
        ([1.0, np.inf, 0.0, 0.0], [("fp16-range", "error")]),
        ([1.0, -np.inf, 0.0, 0.0], [("fp16-range", "error")]),
        ([np.nan, 0.0, 0.0, 0.0], [("fp16-range", "error")]),
        ([-65504.0, 0.0, 0.0, 0.0], [("mask-overflow", "warning")]),
    ],
)
def test_float16_constants(
    values: list[float], wanted: Any, how: str, graphs: Any, linted: Callable[..., Any]
) -> None:
    found = linted(in_half(graphs, values, how))
    assert told(found) == wanted
    assert all(one.node == ("const" if how == "Constant" else "add") for one in found)


def test_a_mask_filled_by_constant_of_shape(graphs: Any, linted: Callable[..., Any]) -> None:
    nodes = [
        NODE("Shape", ["x"], ["s"], name="s"),
        NODE("ConstantOfShape", ["s"], ["low"], value=graphs.tensor("v", [-1e5]), name="fill"),
        NODE("Cast", ["low"], ["h"], to=HALF, name="narrow"),
        NODE("Cast", ["h"], ["out"], to=FLOAT, name="wide"),
    ]
    (found,) = linted(graphs.model(nodes))
    assert (found.rule, found.severity, found.node) == ("mask-overflow", "error", "fill")
