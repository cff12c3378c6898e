"""Shifted channels: the same sums in float, less noise in int8, other places left alone."""

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

from jexport.graph import storage
from jexport.quantization import channel_shifting, config, layer_quantization, layers, observers
from jexport.quantization.channel_shifting import ChannelShift
from jexport.quantization.observers import ActivationStats

WIDE, HIDDEN, FAR = 64, 96, 9
LAYERS = ("self/MatMul", "up/MatMul", "down/MatMul")
RNG = np.random.default_rng(4)
ROWS = RNG.normal(size=(30, 20, WIDE)).astype(np.float32)

Nodes = list[Any]


def weights() -> dict[str, np.ndarray]:
    """A post-LN block whose first normalization has a channel that lies far to one side."""
    made = {
        name: (RNG.normal(size=shape) / 8).astype(np.float32)
        for name, shape in {
            "self": (WIDE, WIDE),
            "up": (WIDE, HIDDEN),
            "down": (HIDDEN, WIDE),
            **{f"{name}.bias": (WIDE,) for name in ("ln1", "ln2", "ln3", "self", "down")},
            "up.bias": (HIDDEN,),
        }.items()
    }
    made["ln1.bias"][FAR] -= 9
    return {**made, "gain": np.linspace(0.5, 1.5, WIDE, dtype=np.float32)}


WEIGHTS = weights()


def block(change: Callable[[Nodes], Nodes] = lambda nodes: nodes) -> ir.Model:
    """ln1 -> linear + itself -> ln2 -> up, Gelu, down + itself -> ln3."""
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "gain", "ln1.bias"], ["n1"], name="ln1", axis=-1),
        node("MatMul", ["n1", "self"], ["s"], name=LAYERS[0]),
        node("Add", ["s", "self.bias"], ["sb"], name="self/Add"),
        node("Add", ["sb", "n1"], ["r1"], name="r1"),
        node("LayerNormalization", ["r1", "gain", "ln2.bias"], ["n2"], name="ln2", axis=-1),
        node("MatMul", ["n2", "up"], ["u"], name=LAYERS[1]),
        node("Add", ["up.bias", "u"], ["ub"], name="up/Add"),
        node("Gelu", ["ub"], ["act"], name="act"),
        node("MatMul", ["act", "down"], ["d"], name=LAYERS[2]),
        node("Add", ["d", "down.bias"], ["db"], name="down/Add"),
        node("Add", ["n2", "db"], ["r2"], name="r2"),
        node("LayerNormalization", ["r2", "gain", "ln3.bias"], ["y"], name="ln3", axis=-1),
    ]
    made = helper.make_graph(
        change(nodes),
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", WIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", WIDE])],
        [numpy_helper.from_array(a, name) for name, a in WEIGHTS.items()],
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
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    made: list[np.ndarray] = session.run(None, {"x": ROWS})
    return made


def stats(folder: Path, graph: ir.Model) -> dict[str, ActivationStats]:
    names = ("n1", "n2", "act")
    made = {}
    for name, rows in zip(names, run(graph, folder, *names)[1:], strict=True):
        made[name] = ActivationStats.empty(rows.shape[-1])
        made[name].update(rows.reshape(-1, rows.shape[-1]), observers.SAMPLE_ROWS)
    return made


def test_the_same_sums_around_the_middle_of_each_channel(tmp_path: Path) -> None:
    known, graph = stats(tmp_path / "plain", block()), block()
    shifts = channel_shifting.find_shifts(graph, known)
    assert [one.normalization for one in shifts] == ["ln1", "ln2"]  # the last one is the output
    assert shifts[0].offsets[FAR] < -8
    operators = [node.op_type for node in graph.graph]
    channel_shifting.shift_channels(graph, shifts, known)
    assert [node.op_type for node in graph.graph] == operators  # at no cost
    plain = run(block(), tmp_path / "before")[0]
    after, n1, n2 = run(graph, tmp_path / "after", "n1", "n2")
    np.testing.assert_allclose(after, plain, atol=2e-5)
    for name, rows in (("n1", n1), ("n2", n2)):
        flat = rows.reshape(-1, WIDE)
        np.testing.assert_allclose(-flat.min(axis=0), flat.max(axis=0), atol=1e-4)
        np.testing.assert_allclose(known[name].maximum, flat.max(axis=0), atol=1e-4)


def test_statistics_are_those_of_the_shifted(tmp_path: Path) -> None:
    known, graph = stats(tmp_path / "plain", block()), block()
    channel_shifting.shift_channels(graph, channel_shifting.find_shifts(graph, known), known)
    again = stats(tmp_path / "again", graph)
    for name in ("n1", "n2", "act"):
        for part in ("minimum", "maximum", "samples", "total", "gram"):
            got, wanted = getattr(known[name], part), getattr(again[name], part)
            np.testing.assert_allclose(got, wanted, atol=2e-3, err_msg=f"{name} {part}")
        assert known[name].tokens == again[name].tokens == 600


@pytest.mark.parametrize("scheme", ["uint8", "symmetric"])
def test_int8_loses_less(scheme: str, tmp_path: Path) -> None:
    def error(graph: ir.Model, known: dict[str, ActivationStats], folder: Path) -> float:
        def read(name: str) -> np.ndarray:
            tensor = graph.graph.initializers[name].const_value
            assert tensor is not None
            return tensor.numpy()

        made = layer_quantization.quantize_layers(
            layers.find_linear_layers(graph),
            read,
            known,
            config.QuantizationConfig(scheme=scheme, smoothing=0.85),
            out_dir=folder,
        )
        # Of the energy of x W, which a shift changes: the energy that is lost, itself.
        energy = np.square(known["n1"].samples @ read("self")).sum(axis=1).mean()
        return float(made[LAYERS[0]].error() * energy)

    known, graph = stats(tmp_path / "plain", block()), block()
    before = error(graph, known, tmp_path / "before")
    channel_shifting.shift_channels(graph, channel_shifting.find_shifts(graph, known), known)
    assert error(graph, known, tmp_path / "after") < 0.8 * before


def read_elsewhere(nodes: Nodes) -> Nodes:
    """Something without a bias reads both normalizations."""
    changed = [*nodes]
    changed[10] = helper.make_node("Mul", ["n2", "db"], ["r2"], name="r2")
    changed[3] = helper.make_node("Mul", ["sb", "n1"], ["r1"], name="r1")
    return changed


def no_bias_on_the_way(nodes: Nodes) -> Nodes:
    """Neither linear layer that reads a normalization has a bias."""
    changed = [one for one in nodes if one.name not in ("self/Add", "up/Add")]
    for one in changed:
        one.input[:] = [
            "s" if name == "sb" else "u" if name == "ub" else name for name in one.input
        ]
    return changed


def no_bias_of_its_own(nodes: Nodes) -> Nodes:
    for one in nodes:
        if one.op_type == "LayerNormalization":
            del one.input[2]
    return nodes


@pytest.mark.parametrize("change", [read_elsewhere, no_bias_on_the_way, no_bias_of_its_own])
def test_other_places_are_left_alone(change: Callable[[Nodes], Nodes], tmp_path: Path) -> None:
    known = stats(tmp_path / "plain", block())
    graph = block(change)
    assert channel_shifting.find_shifts(graph, known) == ()
    everywhere = [
        ChannelShift(normalization=name, offsets=np.ones(WIDE, np.float32))
        for name in ("ln1", "ln2", "ln3")
    ]
    before = set(graph.graph.initializers)
    channel_shifting.shift_channels(graph, everywhere, known)
    assert set(graph.graph.initializers) <= before  # unused ones are dropped, none is changed
