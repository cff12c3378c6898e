"""Products in OpenVINO's forms: the same numbers, fewer copies, other places left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from jexport.targets.openvino import matmul_forms

RNG = np.random.default_rng(7)
WIDTH, HEADS = 24, 3
ROWS = RNG.standard_normal((2, 5, WIDTH)).astype(np.float32)
UNTOUCHED = {"products_split": 0, "keys_as_rows": 0, "divisors_in_norm": 0, "biases_joined": 0}


def floats(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def given() -> Any:
    return ops.parameter([-1, -1, WIDTH], np.float32, name="rows")


def graph_of(rows: Any, *outputs: Any) -> Any:
    return openvino.Model([ops.result(output) for output in outputs], [rows], "some")


def answers(graph: Any) -> list[Any]:
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(graph, "CPU", exact).create_infer_request()
    request.infer([ROWS])
    return [np.array(request.get_output_tensor(n).data) for n in range(len(graph.outputs))]


def kinds(graph: Any) -> list[str]:
    return [node.get_type_name() for node in graph.get_ordered_ops()]


def settled(graph: Any, expected: dict[str, int]) -> Any:
    """The graph after it, having given the same numbers."""
    before = answers(graph)
    assert matmul_forms.settle(graph) == UNTOUCHED | expected
    after = answers(graph)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    return graph


def parts_of(product: Any, axis: int = 2, sizes: tuple[int, ...] = (24, 16, 8)) -> list[Any]:
    lengths = ops.constant(np.array(sizes, np.int64))
    split = ops.variadic_split(product, ops.constant(np.int64(axis)), lengths)
    return list(split.outputs())


def int8_weight(columns: int, *, shift: bool = False) -> Any:
    steps = RNG.integers(-127, 128, (WIDTH, columns)).astype(np.int8)
    value = ops.convert(ops.constant(steps), np.float32)
    if shift:
        value = ops.subtract(value, ops.constant(np.float32(3)))
    scales = np.abs(floats(columns)) / 100
    turned = ops.reshape(ops.constant(scales), ops.constant(np.array([1, columns])), False)
    return ops.multiply(value, turned)


@pytest.mark.parametrize(
    "weight",
    [
        lambda: ops.constant(floats(WIDTH, 48)),
        lambda: ops.convert(ops.constant(floats(WIDTH, 48).astype(np.float16)), np.float32),
        lambda: int8_weight(48),
        lambda: int8_weight(48, shift=True),
    ],
)
@pytest.mark.parametrize("axis", [2, -1])
def test_one_product_becomes_one_for_each_part(weight: Callable[[], Any], axis: int) -> None:
    rows = given()
    product = ops.add(ops.matmul(rows, weight(), False, False), ops.constant(floats(48)))
    graph = settled(graph_of(rows, *parts_of(product, axis)), {"products_split": 1})
    assert kinds(graph).count("MatMul") == 3
    assert "VariadicSplit" not in kinds(graph)


def test_the_two_products_of_a_wide_one_are_split_alike() -> None:
    rows = given()
    weight = int8_weight(48)
    twice = ops.add(
        ops.matmul(rows, weight, False, False),
        ops.matmul(ops.multiply(rows, ops.constant(np.float32(0.01))), weight, False, False),
    )
    product = ops.add(twice, ops.constant(floats(48)))
    graph = settled(graph_of(rows, *parts_of(product)), {"products_split": 1})
    assert kinds(graph).count("MatMul") == 6


@pytest.mark.parametrize(
    "build",
    [
        lambda rows: parts_of(
            ops.relu(ops.matmul(rows, ops.constant(floats(24, 48)), False, False))
        ),
        lambda rows: parts_of(ops.matmul(rows, ops.constant(floats(48, 24)), False, True)),
        lambda rows: parts_of(ops.matmul(rows, rows, False, True), sizes=(2, 2, 1)),
        lambda rows: parts_of(
            ops.add(ops.matmul(rows, ops.constant(floats(24, 48)), False, False), rows_of_48(rows))
        ),
    ],
)
def test_splits_of_other_values_stay(build: Callable[[Any], list[Any]]) -> None:
    rows = given()
    graph = settled(graph_of(rows, *build(rows)), {})
    assert kinds(graph).count("VariadicSplit") == 1


def rows_of_48(rows: Any) -> Any:
    return ops.concat([rows, rows], 2)


def heads(rows: Any, order: list[int]) -> Any:
    apart = ops.reshape(rows, ops.constant(np.array([0, 0, HEADS, WIDTH // HEADS])), True)
    return ops.transpose(apart, ops.constant(np.array(order)))


def test_keys_lie_in_rows() -> None:
    rows = given()
    scores = ops.matmul(heads(rows, [0, 2, 1, 3]), heads(rows, [0, 2, 3, 1]), False, False)
    graph = settled(graph_of(rows, scores), {"keys_as_rows": 1})
    product = next(n for n in graph.get_ordered_ops() if n.get_type_name() == "MatMul")
    assert product.get_attributes()["transpose_b"]


@pytest.mark.parametrize("port", [0, 1])
def test_divisors_go_into_the_norm(port: int) -> None:
    """The norm itself is read elsewhere too, and stays for that."""
    rows = given()
    norm = ops.mvn(rows, ops.constant(np.array([2])), True, 1e-5, "INSIDE_SQRT")
    gain, bias, factor = (ops.constant(floats(WIDTH)) for _ in range(3))
    whole = ops.add(ops.multiply(norm, gain), bias)
    sides = [whole, factor]
    divided = ops.multiply(sides[port], sides[1 - port])
    graph = settled(graph_of(rows, whole, divided), {"divisors_in_norm": 1})
    # Both are a product and a sum on the norm; neither waits for the other.
    sums = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Add"]
    assert len(sums) == 2
    assert all(
        node.input_value(0).get_node().input_value(0).get_node().get_type_name() == "MVN"
        for node in sums
    )


def test_divisors_of_anything_else_stay() -> None:
    rows = given()
    summed = ops.add(ops.multiply(rows, ops.constant(floats(WIDTH))), ops.constant(floats(WIDTH)))
    settled(graph_of(rows, ops.multiply(summed, ops.constant(floats(WIDTH)))), {})


@pytest.mark.parametrize("port", [0, 1])
def test_the_bias_of_a_residual_joins_the_products(port: int) -> None:
    rows = given()
    residual = ops.add(ops.multiply(rows, ops.constant(floats(WIDTH))), ops.constant(floats(WIDTH)))
    product = ops.matmul(rows, ops.constant(floats(WIDTH, WIDTH)), False, False)
    sides = [residual, ops.add(product, ops.constant(floats(WIDTH)))]
    # The residual's own sum is read elsewhere, too.
    graph = settled(
        graph_of(rows, ops.add(sides[port], sides[1 - port]), residual), {"biases_joined": 1}
    )
    assert kinds(graph).count("Add") == 3


def test_sums_of_anything_else_stay() -> None:
    rows = given()
    scaled = ops.multiply(rows, ops.constant(floats(WIDTH)))
    product = ops.matmul(rows, ops.constant(floats(WIDTH, WIDTH)), False, False)
    biased = ops.add(product, ops.constant(floats(WIDTH)))
    shifted = ops.add(scaled, ops.constant(floats(WIDTH)))
    settled(graph_of(rows, ops.add(scaled, biased)), {})  # no bias to take
    settled(graph_of(rows, ops.add(shifted, product)), {})  # none to give it to
    settled(graph_of(rows, ops.add(shifted, biased), biased), {})  # read as it is
