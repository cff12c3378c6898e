"""Copies of outlier channels: the same sums in float, finer steps in int8, nothing else touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from jexport.graph import edit, storage
from jexport.quantization import config, layer_quantization, layers, observers, outlier_splitting
from jexport.quantization.observers import ActivationStats

WIDE, HIDDEN, FAR = 64, 320, 17
RNG = np.random.default_rng(3)
UP = (RNG.normal(size=(WIDE, HIDDEN)) / 8).astype(np.float32)
DOWN = (RNG.normal(size=(HIDDEN, WIDE)) / 12).astype(np.float32)
BIAS = RNG.normal(size=HIDDEN).astype(np.float32)
SHIFT = RNG.normal(size=WIDE).astype(np.float32)
ROWS = RNG.normal(size=(40, 30, WIDE)).astype(np.float32)
LAYERS = ("mlp/up/MatMul", "mlp/down/MatMul")

Nodes = list[Any]


def far_weights() -> dict[str, np.ndarray]:
    """One channel reaches eight times beyond the rest, and so does its row of the second matrix."""
    up, down = UP.copy(), DOWN.copy()
    up[:, FAR] *= 8
    down[FAR] *= 8
    return {"up": up, "down": down, "bias": BIAS, "shift": SHIFT}


def model(
    activation: str = "Gelu",
    change: Callable[[Nodes], Nodes] = lambda nodes: nodes,
    *,
    weights: dict[str, np.ndarray] | None = None,
    bias: bool = True,
) -> ir.Model:
    """act(x up + bias) down + shift."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "up"], ["upped"], name=LAYERS[0]),
        node("Add", ["bias", "upped"], ["biased"], name="mlp/up/Add"),
        node(activation, ["biased" if bias else "upped"], ["act"], name="mlp/act"),
        node("MatMul", ["act", "down"], ["downed"], name=LAYERS[1]),
        node("Add", ["downed", "shift"], ["y"], name="mlp/down/Add"),
    ]
    if not bias:
        del nodes[1]
    made = helper.make_graph(
        change(nodes),
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", WIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", None])],
        [numpy_helper.from_array(a, name) for name, a in (weights or far_weights()).items()],
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    read: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(whole))
    return read


def run(graph: ir.Model, folder: Path, *outputs: str) -> list[np.ndarray]:
    """What onnxruntime gives for ROWS: y, then other values by name."""
    folder.mkdir(exist_ok=True)
    values = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.extend(values[name] for name in outputs)
    storage.save(graph, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    made: list[np.ndarray] = session.run(None, {"x": ROWS})
    return made


def weight_of(graph: ir.Model) -> Callable[[str], np.ndarray]:
    def read(name: str) -> np.ndarray:
        tensor = graph.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    return read


def observed(rows: np.ndarray) -> ActivationStats:
    flat = rows.reshape(-1, rows.shape[-1])
    made = ActivationStats.empty(flat.shape[1])
    made.update(flat, observers.SAMPLE_ROWS)
    return made


def stats(folder: Path, graph: ir.Model) -> dict[str, ActivationStats]:
    return {"x": observed(ROWS), "act": observed(run(graph, folder, "act")[1])}


def error(
    graph: ir.Model, known: dict[str, ActivationStats], folder: Path, **options: Any
) -> float:
    """What int8 loses of the second layer, after SmoothQuant and GPTQ."""
    chosen = config.QuantizationConfig(**{"scheme": "uint8", "smoothing": 0.85, **options})
    made = layer_quantization.quantize_layers(
        layers.find_linear_layers(graph),
        weight_of(graph),
        known,
        chosen,
        out_dir=folder / "weights",
    )
    return made[LAYERS[1]].error()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", outlier_splitting.ACTIVATIONS)
def test_the_same_sums(activation: str, bias: bool, tmp_path: Path) -> None:
    plain = run(model(activation, bias=bias), tmp_path / "plain")[0]
    copies = RNG.integers(1, 5, HIDDEN)
    graph = model(activation, bias=bias)
    outlier_splitting.split_channels(
        graph, [outlier_splitting.ChannelSplit(activation="mlp/act", copies=copies)], {}
    )
    names = [item.name for item in layers.find_linear_layers(graph)]
    after = run(graph, tmp_path / "copied")[0]
    assert tuple(names) == LAYERS
    assert np.abs(after - plain).max() < 2e-6 * np.abs(plain).max()
    assert weight_of(graph)("down.copied").shape == (copies.sum(), WIDE)
    assert not {"up", "down", "bias"} & set(graph.graph.initializers)


def test_found_is_what_is_far_and_only_that(tmp_path: Path) -> None:
    graph = model()
    known = stats(tmp_path / "far", model())
    (found,) = outlier_splitting.find_outlier_channels(graph, known, weight_of(graph))
    assert found.activation == "mlp/act"
    assert found.copies.argmax() == FAR
    assert found.copies.max() >= outlier_splitting.MIN_COPIES
    assert found.copies.sum() - HIDDEN == outlier_splitting.MULTIPLE
    report = found.report()
    assert report["activation"] == "mlp/act"
    assert report["channels"][str(FAR)] == found.copies.max()
    assert sum(many - 1 for many in report["channels"].values()) == outlier_splitting.MULTIPLE
    even = {"up": UP, "down": DOWN, "bias": BIAS, "shift": SHIFT}
    graph = model(weights=even)
    known = stats(tmp_path / "even", model(weights=even))
    assert outlier_splitting.find_outlier_channels(graph, known, weight_of(graph)) == ()
    assert outlier_splitting.find_outlier_channels(graph, {"x": known["x"]}, weight_of(graph)) == ()


@pytest.mark.parametrize(("channels", "extra"), [(64, 16), (1024, 16), (1025, 32), (4096, 64)])
def test_no_other_share_of_the_copies_reaches_less_far(channels: int, extra: int) -> None:
    reach = np.exp(np.random.default_rng(channels).normal(size=channels) * 1.5)
    copies = outlier_splitting._copies(reach)
    assert copies.sum() == channels + extra
    left = (reach / copies).max()
    # One copy less anywhere, given to the furthest, and another channel is at least as far.
    fewer = np.maximum(copies - 1, 1)
    assert (reach / fewer)[copies > 1].min() >= left


def test_statistics_are_those_of_the_copies(tmp_path: Path) -> None:
    graph, known = model(), stats(tmp_path / "plain", model())
    splits = outlier_splitting.find_outlier_channels(graph, known, weight_of(graph))
    outlier_splitting.split_channels(graph, splits, known)
    again = stats(tmp_path / "again", graph)["act"]
    for name in ("minimum", "maximum", "samples"):
        np.testing.assert_array_equal(getattr(known["act"], name), getattr(again, name))
    # float32 rounds a sum of products by a share of both channels' energies, however small the sum:
    # some kernels add up a column at a block's edge in another order.
    energy = np.sqrt(np.diag(again.gram))
    apart = np.abs(known["act"].gram - again.gram) / np.outer(energy, energy)
    assert apart.max() < 1e-5
    assert known["act"].tokens == again.tokens


@pytest.mark.parametrize("scheme", ["uint8", "symmetric"])
def test_int8_loses_less(scheme: str, tmp_path: Path) -> None:
    graph, known = model(), stats(tmp_path / "plain", model())
    before = error(graph, known, tmp_path / "before", scheme=scheme)
    splits = outlier_splitting.find_outlier_channels(graph, known, weight_of(graph))
    outlier_splitting.split_channels(graph, splits, known)
    after = error(graph, known, tmp_path / "after", scheme=scheme)
    assert after < 0.6 * before


MASSIVE = 300
"""How far beyond the rest a massive activation is: Qwen3 has some of that size and more."""


def swiglu(
    change: Callable[[Nodes], Nodes] = lambda nodes: nodes,
    *,
    bias: bool = True,
    reach: float = MASSIVE,
) -> ir.Model:
    """(silu(x gate) * (x up)) down with one matrix for gate and up, as exports have it.

    One channel is massive at the few tokens that its gate opens for.
    """
    gate, up = UP.copy(), np.roll(UP, 5, axis=1).copy()
    gate[:, FAR] = 4 * gate[:, FAR]
    up[:, FAR] *= reach
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "gate_up"], ["both"], name=LAYERS[0]),
        node("Add", ["both", "bias"], ["biased"], name="mlp/up/Add"),
        node("Split", ["biased" if bias else "both", "halves"], ["g", "u"], name="split", axis=-1),
        node("Sigmoid", ["g"], ["open"], name="sigmoid"),
        node("Mul", ["g", "open"], ["silu"], name="silu"),
        node("Mul", ["silu", "u"], ["act"], name="mlp/act"),
        node("MatMul", ["act", "down"], ["y"], name=LAYERS[1]),
    ]
    if not bias:
        del nodes[1]
    tensors = {
        "gate_up": np.concatenate([gate, up], axis=1),
        "bias": np.tile(BIAS / 9, 2),
        "halves": np.array([HIDDEN, HIDDEN], np.int64),
        "down": DOWN,
        "gain": np.ones(HIDDEN, np.float32),
    }
    made = helper.make_graph(
        change(nodes),
        "swiglu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", WIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", WIDE])],
        [numpy_helper.from_array(a, name) for name, a in tensors.items()],
    )
    whole = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    read: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(whole))
    return read


@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_mlp_gives_the_same_sums(bias: bool, tmp_path: Path) -> None:
    plain = run(swiglu(bias=bias), tmp_path / "plain")[0]
    graph, copies = swiglu(bias=bias), RNG.integers(1, 5, HIDDEN)
    outlier_splitting.split_channels(
        graph, [outlier_splitting.ChannelSplit(activation="mlp/act", copies=copies)], {}
    )
    after = run(graph, tmp_path / "copied")[0]
    assert np.abs(after - plain).max() < 2e-6 * np.abs(plain).max()
    assert weight_of(graph)("down.copied").shape == (copies.sum(), WIDE)
    assert weight_of(graph)("gate_up.copied").shape == (WIDE, 2 * copies.sum())


def test_outliers_of_a_gated_mlp_are_split(tmp_path: Path) -> None:
    graph, known = swiglu(reach=12), stats(tmp_path / "plain", swiglu(reach=12))
    before = error(graph, known, tmp_path / "before")
    (found,) = outlier_splitting.find_outlier_channels(graph, known, weight_of(graph))
    assert found.copies.argmax() == FAR
    outlier_splitting.split_channels(graph, [found], known)
    assert error(graph, known, tmp_path / "after") < 0.7 * before


def test_two_int8_terms_leave_the_weight_of_massive_activations_its_steps(tmp_path: Path) -> None:
    graph, known = swiglu(), stats(tmp_path / "plain", swiglu())
    errors = {}
    for precision in (config.INT8, config.INT8_RESIDUAL):
        chosen = config.QuantizationConfig(scheme="uint8", smoothing=0.85, precision=precision)
        made = layer_quantization.quantize_layers(
            layers.find_linear_layers(graph),
            weight_of(graph),
            known,
            chosen,
            out_dir=tmp_path / precision,
        )
        errors[precision] = made[LAYERS[1]].error(config.INT8_RESIDUAL)
    # The same two terms, but the factors of one have used up most of the weight's steps.
    assert errors[config.INT8_RESIDUAL] < 0.2 * errors[config.INT8]


def gated_by_numbers(nodes: Nodes) -> Nodes:
    """A number a channel on the way, which would have to be repeated."""
    nodes[5].input[1] = "scaled"
    nodes.insert(5, helper.make_node("Mul", ["u", "gain"], ["scaled"], name="scaled"))
    return nodes


def gate_read_twice(nodes: Nodes) -> Nodes:
    nodes[-1].output[0] = "downed"
    first = helper.make_node("Gather", ["g", "halves"], ["some"], name="some", axis=0)
    total = helper.make_node("ReduceSum", ["some"], ["all"], name="all", keepdims=0)
    return [*nodes, first, total, helper.make_node("Add", ["downed", "all"], ["y"], name="y")]


def rows_are_split(nodes: Nodes) -> Nodes:
    nodes[2].attribute[0].i = 1
    return nodes


@pytest.mark.parametrize("change", [gated_by_numbers, gate_read_twice, rows_are_split])
def test_other_gates_are_left_alone(change: Callable[[Nodes], Nodes]) -> None:
    graph = swiglu(change)
    assert "mlp/act" not in {str(mlp.activation.name) for mlp in outlier_splitting._mlps(graph)}


def read_twice(nodes: Nodes) -> Nodes:
    return [*nodes[:-1], helper.make_node("Add", ["downed", "act"], ["y"], name="both")]


def same_weight_twice(nodes: Nodes) -> Nodes:
    """The second matrix is read by another product, too."""
    first, *rest, _ = nodes
    turned = helper.make_node("MatMul", ["act_2", "down"], ["other"], name="other/MatMul")
    held = helper.make_node("Relu", ["biased"], ["act_2"], name="other/act")
    total = helper.make_node("Add", ["downed", "other"], ["y"], name="both")
    return [first, *rest, held, turned, total]


def gated(nodes: Nodes) -> Nodes:
    """act(x up) * (x up): what lies between is read by a product of values."""
    nodes[3].input[0] = "gated"
    return [
        *nodes[:3],
        helper.make_node("Mul", ["act", "biased"], ["gated"], name="gate"),
        *nodes[3:],
    ]


def no_linear_layer_before(nodes: Nodes) -> Nodes:
    nodes[1].input[1] = "turned"
    between = helper.make_node("Neg", ["upped"], ["turned"], name="neg")
    return [nodes[0], between, *nodes[1:]]


def another_function(nodes: Nodes) -> Nodes:
    nodes[2].op_type = "Sin"
    return nodes


@pytest.mark.parametrize(
    "change", [read_twice, same_weight_twice, gated, no_linear_layer_before, another_function]
)
def test_other_places_are_left_alone(change: Callable[[Nodes], Nodes]) -> None:
    square = dict(far_weights())
    if change is read_twice:
        square["down"] = np.zeros((HIDDEN, HIDDEN), np.float32)
    graph = model(change=change, weights=square)
    known = {
        "x": observed(ROWS),
        "act": observed(np.float32(1e3) ** np.eye(HIDDEN, dtype=np.float32)[:40]),
    }
    names = {node.name for node in graph.graph}
    assert "mlp/act" not in {
        one.activation
        for one in outlier_splitting.find_outlier_channels(graph, known, weight_of(graph))
    }
    outlier_splitting.split_channels(
        graph,
        [outlier_splitting.ChannelSplit(activation="mlp/act", copies=np.full(HIDDEN, 2))],
        known,
    )
    assert {node.name for node in graph.graph} == names
    assert edit.sizes(graph.graph.initializers["up"].const_value) == (WIDE, HIDDEN)
