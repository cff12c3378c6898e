"""Rules on operators: each with a graph it names and one it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from jexport.graph.lint.onnx_types import IN_SCHEMAS, TYPES
from jexport.targets.trt.support import table

NODE = helper.make_node


def of(findings: Any, rule: str, severity: str = "error") -> list[Any]:
    return [one for one in findings if (one.rule, one.severity) == (rule, severity)]


def relu(source: str = "x") -> Any:
    return NODE("Relu", [source], ["out"], name="relu")


def test_a_plain_graph_has_no_finding(graphs: Any, linted: Callable[..., Any]) -> None:
    assert linted(graphs.model([relu()])) == []


@pytest.mark.parametrize(
    ("op", "given"),
    [
        ("DynamicQuantizeLinear", ["x"]),
        ("QLinearMatMul", ["x"] * 8),
        ("Unique", ["x"]),
        ("BitwiseNot", ["input_ids"]),
        ("Det", ["x"]),
    ],
)
def test_refused_by_the_table(
    op: str, given: list[str], graphs: Any, linted: Callable[..., Any]
) -> None:
    found = of(linted(graphs.model([NODE(op, given, ["out"], name="layers/0/odd")])), "operator")
    assert [one.operator for one in found] == [op]
    assert found[0].node == "layers/0/odd"
    assert op in found[0].what
    assert "onnx/onnx-tensorrt docs/operators.md, TensorRT 10.15: not taken" in found[0].evidence


def test_an_operator_that_nobody_lists(graphs: Any, linted: Callable[..., Any]) -> None:
    found = of(linted(graphs.model([NODE("Frobnicate", ["x"], ["out"], name="n")])), "operator")
    assert "does not list it" in found[0].evidence


@pytest.mark.parametrize("op", ["MatMulNBits", "FastGelu", "MatMulIntegerToFloat"])
def test_another_engines_domain(op: str, graphs: Any, linted: Callable[..., Any]) -> None:
    node = NODE(op, ["x"], ["out"], name="n", domain="com.microsoft")
    (found,) = linted(graphs.model([node], domains=["com.microsoft"]))
    assert (found.rule, found.severity) == ("operator", "error")
    assert found.operator == f"com.microsoft.{op}"
    assert ("symmetric" in found.fix) == (op != "FastGelu")


@pytest.mark.parametrize("depth", [1, 2])
def test_inside_branches(depth: int, graphs: Any, linted: Callable[..., Any]) -> None:
    def branch(name: str, level: int) -> Any:
        nodes = [NODE("Hardmax" if level else "Det", ["x"], [f"{name}o"], name=f"{name}/odd")]
        if level:
            nodes = [switch(level, f"{name}o", name)]
        return helper.make_graph(nodes, name, [], [graphs.VALUE(f"{name}o", graphs.FLOAT, None)])

    def switch(level: int, result: str, name: str) -> Any:
        return NODE(
            "If",
            ["yes"],
            [result],
            name=f"{name}/If",
            then_branch=branch(f"{name}t", level - 1),
            else_branch=branch(f"{name}e", level - 1),
        )

    made = graphs.model([switch(depth, "out", "n")], [graphs.tensor("yes", True, bool)])
    (found,) = of(linted(made), "operator")
    assert found.operator == "Det"
    assert found.count == 2**depth
    assert found.node.endswith(" in else_branch of n/If")
    assert "then_branch of n/If" in found.evidence


def test_inside_local_functions(graphs: Any, linted: Callable[..., Any]) -> None:
    def made(op: str, called: str = "Inner") -> onnx.ModelProto:
        standard = [helper.make_opsetid("", 20)]
        function = helper.make_function(
            "own", "Inner", ["a"], ["b"], [NODE(op, ["a"], ["b"], name="inside")], standard
        )
        node = NODE(called, ["x"], ["out"], name="call", domain="own")
        model = graphs.model([node], functions=[function], domains=["own"])
        assert isinstance(model, onnx.ModelProto)
        return model

    assert linted(made("Relu")) == []
    (found,) = linted(made("Det"))
    assert (found.operator, found.node) == ("Det", "inside in function Inner")
    (found,) = linted(made("Det", called="Missing"))  # the function is there, nobody calls it
    assert found.operator == "own.Missing"


@pytest.mark.parametrize(
    ("opset", "severity"),
    [(9, ""), (20, ""), (24, ""), (25, "warning"), (26, "error"), (8, "error")],
)
def test_opset(opset: int, severity: str, graphs: Any, linted: Callable[..., Any]) -> None:
    found = [one for one in linted(graphs.model([relu()], opset=opset)) if one.rule == "opset"]
    assert [one.severity for one in found] == ([severity] if severity else [])
    assert all(str(opset) in one.what for one in found)


def test_no_opset(graphs: Any, linted: Callable[..., Any]) -> None:
    made = graphs.model([relu()])
    del made.opset_import[:]
    assert of(linted(made), "opset")


def cast(to: int, name: str = "c") -> Any:
    return NODE("Cast", ["x"], [name], to=to, name=f"{name}/Cast")


@pytest.mark.parametrize(
    ("to", "rule", "severity"),
    [
        (1, "", ""),
        (10, "", ""),
        (16, "", ""),
        (11, "double", "warning"),
        (7, "type", "error"),
        (2, "uint8", "error"),
        (9, "type", "error"),
    ],
)
def test_types_of_an_operator(
    to: int, rule: str, severity: str, graphs: Any, linted: Callable[..., Any]
) -> None:
    nodes = [cast(to), NODE("Softmax", ["c"], ["out"], name="soft")]
    found = [one for one in linted(graphs.model(nodes)) if one.operator == "Softmax"]
    assert [(one.rule, one.severity) for one in found] == ([(rule, severity)] if rule else [])
    assert all(one.node == "soft" and "'c' is " in one.evidence for one in found)


def test_types_follow_data_through_operators_and_branches(
    graphs: Any, linted: Callable[..., Any]
) -> None:
    branches = {
        name: helper.make_graph(
            [NODE("Transpose", ["c"], [name], name=f"{name}/T")],
            name,
            [],
            [graphs.VALUE(name, graphs.INT64, None)],
        )
        for name in ("then_branch", "else_branch")
    }
    nodes = [
        cast(7),
        NODE("If", ["yes"], ["either"], name="If", **branches),
        NODE("Concat", ["either", "either"], ["both"], axis=0, name="cat"),
        NODE("Exp", ["both"], ["out"], name="exp"),
    ]
    (found,) = linted(graphs.model(nodes, [graphs.tensor("yes", True, bool)]))
    assert (found.rule, found.operator) == ("type", "Exp")
    assert "'both' is INT64" in found.evidence


def test_two_types_in_one_sum(graphs: Any, linted: Callable[..., Any]) -> None:
    add = NODE("Add", ["x", "c"], ["out"], name="add")
    assert linted(graphs.model([cast(1), add])) == []
    (found,) = linted(graphs.model([cast(10), add]))
    assert (found.rule, found.severity, found.node) == ("mixed-types", "error", "add")
    assert found.what == "Add is given FP32 and FP16"
    where = NODE("Where", ["yes", "x", "x"], ["out"], name="where")  # bool beside float is right
    assert linted(graphs.model([where], [graphs.tensor("yes", True, bool)])) == []
    power = NODE("Pow", ["x", "c"], ["out"], name="pow")  # its exponent has a type of its own
    assert linted(graphs.model([cast(10), power])) == []


def test_a_type_beyond_the_parsers_table_is_a_warning(
    graphs: Any, linted: Callable[..., Any]
) -> None:
    table8 = graphs.tensor("t8", np.ones((8, 4)), np.int8)
    nodes = [
        NODE("Gather", ["t8", "input_ids"], ["g"], name="look"),
        NODE("Cast", ["g"], ["out"], to=1, name="wide"),
    ]
    found = linted(graphs.model(nodes, [table8]))
    assert [(one.severity, one.rule) for one in found] == [("warning", "type")] * 2
    assert {one.operator for one in found} == {"Gather", "Cast"}
    nodes[1] = NODE("Neg", ["g"], ["out"], name="neg")  # in no reference at all
    assert [one.operator for one in of(linted(graphs.model(nodes, [table8])), "type")] == ["Neg"]


def test_types_that_tensorrt_does_not_have(graphs: Any, linted: Callable[..., Any]) -> None:
    text = graphs.VALUE("text", onnx.TensorProto.STRING, ["batch"])
    made = graphs.model([relu()], given=[*graphs.inputs(), text])
    assert any("STRING" in one.what for one in of(linted(made), "type"))


REDUCED = [op for op in table().operators if op.startswith("Reduce")]


@pytest.mark.parametrize("op", REDUCED)
def test_reduce_axes(op: str, graphs: Any, linted: Callable[..., Any]) -> None:
    axes = graphs.tensor("axes", [1], np.int64)
    opset = 20 if op != "ReduceSum" else 13
    node = NODE(op, ["x", "axes"], ["out"], name="reduce")
    assert of(linted(graphs.model([node], [axes], opset=opset)), "reduce-axes") == []
    constant = NODE("Constant", [], ["axes"], value=axes, name="c")
    assert of(linted(graphs.model([constant, node], opset=opset)), "reduce-axes") == []
    shaped = [
        NODE("Shape", ["x"], ["s"], name="s"),
        NODE("Size", ["s"], ["axes"], name="size"),
        node,
    ]
    (found,) = of(linted(graphs.model(shaped, opset=opset)), "reduce-axes")
    assert (found.operator, found.node) == (op, "reduce")


def test_every_reduction_is_tested() -> None:
    assert len(REDUCED) == 10


@pytest.mark.parametrize(
    ("node", "weights", "told"),
    [
        (
            NODE("LayerNormalization", ["x", "w"], ["out", "mean"], name="n"),
            {"w": [1.0] * 4},
            "only the first 1 of its outputs",
        ),
        (NODE("LayerNormalization", ["x", "w"], ["out"], name="n"), {"w": [1.0] * 4}, ""),
        (NODE("LayerNormalization", ["x", "w"], ["out", ""], name="n"), {"w": [1.0] * 4}, ""),
        (NODE("CumSum", ["x", "where"], ["out"], name="n"), {}, "input 1 must be a constant"),
        (NODE("CumSum", ["x", "one"], ["out"], name="n"), {"one": np.int64(1)}, ""),
        (
            NODE("TopK", ["x", "k"], ["out", "i"], sorted=0, name="n"),
            {"k": np.array([2])},
            "attribute sorted only 1",
        ),
        (
            NODE("TopK", ["x", "k"], ["out", "i"], name="n"),
            {"k": np.array([3840])},
            "input 1 must be below 3840",
        ),
        (NODE("TopK", ["x", "k"], ["out", "i"], name="n"), {"k": np.array([3839])}, ""),
        (
            NODE("Dropout", ["x", "", "t"], ["out"], name="n"),
            {"t": np.bool_(True)},
            "input 2 must be a constant and false",
        ),
        (NODE("Dropout", ["x", "", "t"], ["out"], name="n"), {"t": np.bool_(False)}, ""),
        (
            NODE("ScatterND", ["x", "i", "x"], ["out"], reduction="add", name="n"),
            {"i": np.array([[0]])},
            "attribute reduction only none",
        ),
        (NODE("AveragePool", ["x"], ["out"], kernel_shape=[1], name="n"), {}, "2-D or 3-D only"),
        (
            NODE("AveragePool", ["x"], ["out"], kernel_shape=[1, 1], dilations=[2, 1], name="n"),
            {},
            "attribute dilations only ones",
        ),
        (
            NODE("Attention", ["x", "x", "x"], ["out"], q_num_heads=2, name="n"),
            {},
            "no attribute q_num_heads",
        ),
        (NODE("Attention", ["x", "x", "x"], ["out"], name="n"), {}, ""),
        (NODE("Attention", ["x", "x", "x", "", "x"], ["out"], name="n"), {}, "no input 4"),
        (
            NODE("RotaryEmbedding", ["x", "x", "x", "ids32"], ["out"], name="n"),
            {"ids32": np.int32([1])},
            "input 3 must be INT64",
        ),
        (NODE("RotaryEmbedding", ["x", "x", "x", "input_ids"], ["out"], name="n"), {}, ""),
        (
            NODE("Constant", [], ["out"], value_string="word", name="n"),
            {},
            "no attribute value_string",
        ),
        (
            NODE("GridSample", ["w", "x"], ["out"], name="n"),
            {"w": [[1.0]]},
            "input 0 must have 4 dimensions",
        ),
    ],
)
def test_restrictions(
    node: Any, weights: dict[str, Any], told: str, graphs: Any, linted: Callable[..., Any]
) -> None:
    stored = []
    for name, values in weights.items():
        array = np.asarray(values)
        stored.append(
            graphs.tensor(name, array, np.float32 if array.dtype.kind == "f" else array.dtype)
        )
    computed = [NODE("Shape", ["x"], ["s"], name="s"), NODE("Size", ["s"], ["where"], name="size")]
    findings = of(linted(graphs.model([*computed, node], stored, opset=23)), "restriction")
    assert [one.what.split(": ", 1)[1] for one in findings] == ([told] if told else [])


def test_sparse_weights(graphs: Any, linted: Callable[..., Any]) -> None:
    made = graphs.model([NODE("Add", ["x", "thin"], ["out"], name="n")])
    made.graph.sparse_initializer.add().values.CopyFrom(graphs.tensor("thin", [1.0]))
    (found,) = linted(made)
    assert "sparse" in found.what


def test_the_table_is_whole() -> None:
    support = table()
    assert len(support.operators) == 158
    assert len(support.refused) == 42
    assert not support.refused & set(support.operators)
    named = {s.name for s in onnx.defs.get_all_schemas() if not s.domain}
    old = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # in the table, no more in ONNX
    assert {*support.operators, *support.refused} - named == old
    for more in (support.restrictions, support.beyond):
        assert set(more) <= set(support.operators)
    known = set(TYPES.values())
    assert all(types <= support.network_types <= known for types in support.operators.values())
    assert set(IN_SCHEMAS.values()) <= known
    assert all(not types & support.operators[op] for op, types in support.beyond.items())
