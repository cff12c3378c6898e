"""Rules on shapes: inputs, dynamic axes, profiles, shapes made of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

NODE = helper.make_node


def of(findings: Any, rule: str) -> list[tuple[str, str]]:
    return [(one.severity, one.what) for one in findings if one.rule == rule]


def plain(graphs: Any, **options: Any) -> onnx.ModelProto:
    made = graphs.model([NODE("Relu", ["x"], ["out"], name="relu")], **options)
    assert isinstance(made, onnx.ModelProto)
    return made


def test_other_inputs(graphs: Any, linted: Callable[..., Any]) -> None:
    more = graphs.VALUE("token_type_ids", graphs.INT64, ["batch", "sequence"])
    ((severity, what),) = of(linted(plain(graphs, given=graphs.inputs(more))), "input")
    assert severity == "error"
    assert "token_type_ids" in what


@pytest.mark.parametrize("dims", [[], [1]])
def test_the_published_graphs_task_id(
    dims: list[int], graphs: Any, linted: Callable[..., Any]
) -> None:
    more = graphs.VALUE("task_id", graphs.INT64, dims)
    (found,) = linted(plain(graphs, given=graphs.inputs(more)))
    assert (found.rule, found.severity) == ("task-input", "error")
    assert "rebuilds a LoRA delta at each call" in found.evidence
    assert "one artifact per task" in found.fix


def test_missing_inputs_and_types(graphs: Any, linted: Callable[..., Any]) -> None:
    only = plain(graphs, given=graphs.inputs()[:1])
    assert "attention_mask" in of(linted(only), "input")[0][1]
    narrow = of(linted(plain(graphs, given=graphs.inputs(dtype=6))), "input")
    assert [severity for severity, _ in narrow] == ["error", "error"]
    assert "INT32, not int64" in narrow[0][1]
    flat = of(linted(plain(graphs, given=graphs.inputs(dims=["batch"]))), "input")
    assert "is not [batch, sequence]" in flat[0][1]


def test_dynamic_axes_elsewhere(graphs: Any, linted: Callable[..., Any]) -> None:
    given = graphs.inputs(dims=["batch", "sequence", "third"])
    found = of(linted(plain(graphs, given=given)), "dynamic-axis")
    assert ("error", "axis 2 of input 'input_ids' is dynamic") in found
    made = plain(graphs)
    made.graph.output[0].CopyFrom(graphs.VALUE("out", 1, ["batch", "sequence", "hidden"]))
    ((severity, what),) = of(linted(made), "dynamic-axis")
    assert (severity, what) == ("warning", "output 'out' has an axis of unknown size")
    made.graph.output[0].CopyFrom(graphs.VALUE("out", 1, ["batch", "sequence", 4]))
    assert linted(made) == []


def test_two_names_for_one_axis(graphs: Any, linted: Callable[..., Any]) -> None:
    ids, mask = graphs.inputs()
    mask.type.tensor_type.shape.dim[1].dim_param = "mask_sequence"
    ((severity, what),) = of(linted(plain(graphs, given=[ids, mask])), "dynamic-axis")
    assert severity == "warning"
    assert "sequence axis" in what


GOOD = {"batch": [(1, 8), (9, 64)], "sequence": [(1, 128), (128, 512)]}


@pytest.mark.parametrize(
    ("dims", "max_tokens", "told"),
    [
        (None, 8192, []),
        (GOOD, 512, []),
        (GOOD, None, []),
        ({"batch": GOOD["batch"]}, 512, [("error", "no profile covers the sequence axis")]),
        ({**GOOD, "batch": []}, 512, [("error", "no profile covers the batch axis ('batch')")]),
        ({}, None, [("error", "no profile covers the batch"), ("error", "no profile covers")]),
        (GOOD, 513, [("error", "no profile covers texts of 513 to 513 tokens")]),
        (
            {**GOOD, "sequence": [(1, 32), (64, 512)]},
            512,
            [("warning", "no profile covers sequence sizes 33 to 63")],
        ),
        (
            {**GOOD, "sequence": [(16, 512)]},
            512,
            [("warning", "no profile covers sequence sizes 1 to 15")],
        ),
        (
            {**GOOD, "batch": [(1, 4), (6, 8)]},
            512,
            [("warning", "no profile covers batch sizes 5 to 5")],
        ),
    ],
)
def test_profiles(
    dims: Any, max_tokens: int | None, told: Any, graphs: Any, linted: Callable[..., Any]
) -> None:
    found = of(linted(plain(graphs), dims, max_tokens=max_tokens), "profile")
    assert len(found) == len(told)
    for (severity, what), (wanted, words) in zip(found, told, strict=True):
        assert severity == wanted
        assert what.startswith(words)


def test_profiles_by_the_files_own_axis_names(graphs: Any, linted: Callable[..., Any]) -> None:
    given = graphs.inputs(dims=["b", "s"])
    made = plain(graphs, given=given)
    assert linted(made, {"b": [(1, 2)], "s": [(1, 2)]}) == []
    assert linted(made, GOOD) == []
    assert linted(made, {"b": [(1, 2)]})[0].rule == "profile"


def test_fixed_axes(graphs: Any, linted: Callable[..., Any]) -> None:
    made = plain(graphs, given=graphs.inputs(dims=["batch", 128]))
    ((severity, what),) = of(linted(made, max_tokens=512), "profile")
    assert (severity, what) == ("error", "the graph takes 128 tokens and nothing else")
    ((severity, _),) = of(linted(made, max_tokens=128), "profile")
    assert severity == "warning"


def shaped(*nodes: Any) -> list[Any]:
    """Shape -> Gather -> Concat, as exporters write it; makes `dims` and `batch`."""
    return [
        NODE("Shape", ["x"], ["s"], name="shape"),
        NODE("Gather", ["s", "zero"], ["batch"], name="pick"),
        NODE("Concat", ["batch", "rest"], ["dims"], axis=0, name="cat"),
        *nodes,
    ]


def valued(*nodes: Any) -> list[Any]:
    """The same names, computed from what the text says."""
    return [
        NODE("ReduceMax", ["input_ids"], ["top"], name="top"),
        NODE("Reshape", ["top", "zero"], ["batch"], name="flat"),
        NODE("Concat", ["batch", "rest"], ["dims"], axis=0, name="cat"),
        *nodes,
    ]


MAKERS = [
    NODE("Reshape", ["x", "dims"], ["out"], name="n"),
    NODE("Expand", ["x", "dims"], ["out"], name="n"),
    NODE("ConstantOfShape", ["dims"], ["out"], name="n"),
    NODE("Slice", ["x", "zero", "batch"], ["out"], name="n"),
    NODE("Range", ["zero", "batch", "zero"], ["out"], name="n"),
    NODE("Tile", ["x", "dims"], ["out"], name="n"),
    NODE("Pad", ["x", "dims"], ["out"], name="n"),
    NODE("Split", ["x", "dims"], ["out"], name="n"),
]


@pytest.mark.parametrize("node", MAKERS, ids=lambda node: node.op_type)
def test_shapes_made_of_shapes_are_fine_and_of_values_are_not(
    node: Any, graphs: Any, linted: Callable[..., Any]
) -> None:
    weights = [graphs.tensor("zero", [0], np.int64), graphs.tensor("rest", [-1], np.int64)]
    assert of(linted(graphs.model(shaped(node), weights)), "data-dependent-shape") == []
    found = linted(graphs.model(valued(node), weights))
    ((severity, what),) = of(found, "data-dependent-shape")
    assert severity == "error"
    assert node.op_type in what


def test_a_shape_of_a_value_is_a_shape_again(graphs: Any, linted: Callable[..., Any]) -> None:
    nodes = [
        NODE("Mul", ["input_ids", "attention_mask"], ["m"], name="m"),
        NODE("Shape", ["m"], ["s"], name="s"),
        NODE("ConstantOfShape", ["s"], ["out"], name="n"),
    ]
    assert linted(graphs.model(nodes)) == []


@pytest.mark.parametrize("op", ["NonZero", "NonMaxSuppression", "Compress", "Unique"])
def test_operators_whose_size_is_in_the_text(
    op: str, graphs: Any, linted: Callable[..., Any]
) -> None:
    found = linted(graphs.model([NODE(op, ["x", "x"], ["out"], name="n")]))
    assert [severity for severity, _ in of(found, "data-dependent-shape")] == ["error"]


@pytest.mark.parametrize("count", ["values", "constant"])
@pytest.mark.parametrize("collects", [True, False])
def test_loops(count: str, collects: bool, graphs: Any, linted: Callable[..., Any]) -> None:
    outputs = ["go", "next", *(["seen"] if collects else [])]
    body = helper.make_graph(
        [
            NODE("Identity", ["keep"], ["go"], name="i"),
            NODE("Abs", ["state"], ["next"], name="a"),
            NODE("Neg", ["state"], ["seen"], name="b"),
        ],
        "body",
        [
            graphs.VALUE("step", graphs.INT64, []),
            graphs.VALUE("keep", graphs.BOOL, []),
            graphs.VALUE("state", graphs.FLOAT, None),
        ],
        [
            graphs.VALUE(name, graphs.BOOL if name == "go" else graphs.FLOAT, None)
            for name in outputs
        ],
    )
    nodes = [
        NODE("ReduceMax", ["input_ids"], ["values"], keepdims=0, name="top"),
        NODE("Loop", [count, "yes", "x"], ["out", "all"][: len(outputs) - 1], body=body, name="L"),
    ]
    weights = [graphs.tensor("yes", True, bool), graphs.tensor("constant", 3, np.int64)]
    found = of(linted(graphs.model(nodes, weights)), "data-dependent-shape")
    assert len(found) == int(collects and count == "values")
