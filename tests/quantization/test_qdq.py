"""Q/DQ graphs and what onnxruntime makes of them, against numpy, on small seeded graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from jexport.errors import PrecisionError, UnsupportedGraphError
from jexport.graph import edit, half, ort_fusion, ort_integer, storage
from jexport.quantization import layers, observers, quant_params
from jexport.quantization.config import INT8, INT8_RESIDUAL, INT8_WEIGHTS, QuantizationConfig
from jexport.quantization.layer_quantization import LayerQuantization, quantize_layers
from jexport.quantization.qdq import insert_qdq, row_scales

ROWS, WIDE, INNER = 1100, 64, 160
MS = "com.microsoft"
RNG = np.random.default_rng(11)
TABLE = (RNG.normal(size=(ROWS, WIDE)) * np.exp(RNG.normal(size=WIDE))).astype(np.float32)
UP = (RNG.normal(size=(WIDE, INNER)) / 8).astype(np.float32)
DOWN = (RNG.normal(size=(INNER, WIDE)) / 12).astype(np.float32)
BIAS = RNG.normal(size=INNER).astype(np.float32)
SHIFT = RNG.normal(size=WIDE).astype(np.float32)
IDS = RNG.integers(0, ROWS, (6, 32)).astype(np.int64)


def graph(*, table: bool = True, both: bool = True) -> ir.Model:
    """[table ->] x -> Relu(x up + bias) [-> y = .. down + shift]."""
    weights = {"up": UP, "bias": BIAS}
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", WIDE])
    nodes = []
    if table:
        weights["table"] = TABLE
        given = helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "s"])
        nodes.append(helper.make_node("Gather", ["table", "ids"], ["x"], name="embeddings/Gather"))
    nodes.append(helper.make_node("MatMul", ["x", "up"], ["upped"], name="layers/0/fc1/MatMul"))
    nodes.append(helper.make_node("Add", ["upped", "bias"], ["biased"], name="layers/0/fc1/Add"))
    nodes.append(helper.make_node("Relu", ["biased"], ["act"], name="layers/0/Relu"))
    if both:
        weights["down"] = DOWN
        weights["shift"] = SHIFT
        nodes.append(
            helper.make_node("MatMul", ["act", "down"], ["downed"], name="layers/0/fc2/MatMul")
        )
        nodes.append(helper.make_node("Add", ["downed", "shift"], ["y"], name="layers/0/fc2/Add"))
    last = ("y", WIDE) if both else ("act", INNER)
    made = helper.make_graph(
        nodes,
        "small",
        [given],
        [helper.make_tensor_value_info(last[0], TensorProto.FLOAT, ["b", "s", last[1]])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    read: ir.Model = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    return read


def values(ids: np.ndarray = IDS) -> dict[str, np.ndarray]:
    """What a float graph computes."""
    x = TABLE[ids]
    act = np.maximum(x @ UP + BIAS, 0)
    return {"x": x, "act": act, "y": act @ DOWN + SHIFT}


def quantizations(
    model: ir.Model,
    folder: Path,
    *,
    scheme: str = quant_params.UINT8,
    smoothing: float = 0.5,
    precision: str,
) -> dict[str, LayerQuantization]:
    """As quantize makes them, from texts that the tests do not use."""
    items = layers.find_linear_layers(model)
    ids = np.random.default_rng(5).integers(0, ROWS, (40, 24))
    stats = observers.collect_stats(
        lambda feeds: values(feeds["input_ids"]),
        {item.input: item.in_features for item in items},
        ids.tolist(),
        pad=lambda some: {
            "input_ids": np.array(some),
            "attention_mask": np.ones_like(np.array(some)),
        },
    )
    chosen = QuantizationConfig(
        scheme=scheme,
        smoothing=smoothing,
        precision=INT8_WEIGHTS if precision == INT8_WEIGHTS else INT8,
    )
    made = quantize_layers(
        items, {"up": UP, "down": DOWN}.__getitem__, stats, chosen, out_dir=folder / "weights"
    )
    found = {}
    for name, one in made.items():
        assert one.error() < one.error_naive
        assert one.errors[INT8_WEIGHTS] <= one.errors[INT8_RESIDUAL] * 1.01 < one.errors[INT8]
        found[name] = LayerQuantization(**{**vars(one.quantization), "precision": precision})
    return found


def quantized(
    folder: Path,
    precision: str = INT8,
    *,
    table: bool = True,
    both: bool = True,
    tables: bool = True,
    **options: Any,
) -> ir.Model:
    model = graph(table=table, both=both)
    insert_qdq(model, quantizations(model, folder, precision=precision, **options), tables=tables)
    return model


def run(
    model: ir.Model, folder: Path, given: Mapping[str, np.ndarray], *, plain: bool = False
) -> np.ndarray:
    """plain: onnxruntime with every optimisation off; else its default options."""
    folder.mkdir(exist_ok=True)
    storage.save(model, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    made: np.ndarray = session.run(None, dict(given))[0]
    return made


def off(made: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(made - truth).max() / np.abs(truth).max())


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
@pytest.mark.parametrize("precision", [INT8, INT8_RESIDUAL, INT8_WEIGHTS])
def test_close_to_float_in_standard_operators(
    precision: str, scheme: str, smoothing: float, tmp_path: Path
) -> None:
    model = quantized(tmp_path, precision, scheme=scheme, smoothing=smoothing)
    made = run(model, tmp_path, {"ids": IDS}, plain=True)
    truth = values()["y"]
    assert made.shape == truth.shape
    assert 1e-6 < off(made, truth) < 0.05
    assert {node.domain for node in model.graph} == {""}
    assert set(model.opset_imports) == {""}
    rounding = {INT8: 2, INT8_RESIDUAL: 4, INT8_WEIGHTS: 0}[precision]
    assert operators(model).count("QuantizeLinear") == rounding
    assert operators(model).count("DequantizeLinear") == rounding + 2
    assert operators(model).count("MatMul") == (4 if precision == INT8_RESIDUAL else 2)


def test_weights_and_table_are_stored_as_int8(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    run(model, tmp_path, {"ids": IDS})
    stored = {w.name: w for w in onnx.load(tmp_path / "model.onnx").graph.initializer}
    large = {name: w.data_type for name, w in stored.items() if np.prod(w.dims) > 2 * ROWS}
    assert large == dict.fromkeys(("up.int8", "down.int8", "table.int8"), TensorProto.INT8)
    for name in ("up", "down"):
        steps = numpy_helper.to_array(stored[f"{name}.int8"])
        scale = numpy_helper.to_array(stored[f"{name}.scale"])
        assert scale.shape == (steps.shape[1],)
        assert -127 <= steps.min() < steps.max() <= 127
    assert numpy_helper.to_array(stored["table.scale"]).shape == (ROWS, 1)


def test_table_rows_are_half_a_step_off_at_most(tmp_path: Path) -> None:
    model = graph(both=False)
    model.graph.outputs[:] = [node.outputs[0] for node in model.graph][:1]  # the rows themselves
    insert_qdq(model, {})
    made = run(model, tmp_path, {"ids": IDS}, plain=True)
    truth, step = TABLE[IDS], row_scales(TABLE)[IDS]
    assert (np.abs(made - truth) <= step * 0.501).all()
    assert off(made, truth) > 1e-5


def test_a_residual_leaves_the_error_of_the_weights_alone(tmp_path: Path) -> None:
    x = {"x": values()["x"]}
    made = {}
    for precision in (INT8, INT8_RESIDUAL):
        model = quantized(tmp_path / precision, precision, table=False, both=False, smoothing=0.5)
        made[precision] = run(model, tmp_path / precision, x, plain=True)
    found = quantizations(graph(both=False), tmp_path, precision=INT8)["layers/0/fc1/MatMul"]
    assert found.smoothing_factors is not None
    restored = found.qweight() * found.scales / found.smoothing_factors[:, None]
    truth = np.maximum(x["x"] @ restored + BIAS, 0)
    assert 50 * off(made[INT8_RESIDUAL], truth) < off(made[INT8], truth)


def test_a_residual_also_where_the_layer_is_the_graphs_output(tmp_path: Path) -> None:
    model = graph(both=False)
    model.graph.outputs[:] = [n.outputs[0] for n in model.graph if n.op_type == "MatMul"]
    insert_qdq(model, quantizations(model, tmp_path, precision=INT8_RESIDUAL))
    assert operators(model).count("QuantizeLinear") == 2


def test_a_weight_that_is_used_twice_is_stored_once(tmp_path: Path) -> None:
    model = graph(both=False)
    act, x = model.graph.outputs[0], next(iter(model.graph)).outputs[0]
    second = ir.node("MatMul", [x, model.graph.initializers["up"]], name="layers/1/fc1/MatMul")
    total = ir.node("Add", [act, second.outputs[0]], name="total")
    total.outputs[0].type, total.outputs[0].shape = act.type, act.shape
    second.outputs[0].name, total.outputs[0].name = "again", "total"
    model.graph.extend([second, total])
    model.graph.outputs[:] = [total.outputs[0]]
    insert_qdq(model, quantizations(model, tmp_path, precision=INT8))
    made = run(model, tmp_path, {"ids": IDS}, plain=True)
    assert off(made, values()["act"] + values()["x"] @ UP) < 0.03
    assert sum(name.endswith("up.int8") for name in model.graph.initializers) == 1


def test_a_graph_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="quantized already"):
        layers.find_linear_layers(quantized(tmp_path))


def test_a_graph_without_linear_layers_is_refused() -> None:
    model = graph(both=False)
    for node in model.graph:
        if node.op_type == "MatMul":
            node.op_type = "Gemm"
    with pytest.raises(UnsupportedGraphError, match="nothing to quantize"):
        layers.find_linear_layers(model)


def test_linear_layers_and_their_shares() -> None:
    first, second = layers.find_linear_layers(graph())
    assert (first.input, first.weight, first.in_features, first.out_features) == (
        "x",
        "up",
        WIDE,
        INNER,
    )
    assert (second.input, second.block) == ("act", 0)
    assert first.share == second.share == 0.5


@pytest.mark.parametrize("precision", [INT8, INT8_RESIDUAL])
def test_fused_gives_the_numbers_of_the_standard_graph(precision: str, tmp_path: Path) -> None:
    # One layer: behind a second rounding a difference of 1e-7 may be a whole step.
    x = {"x": values()["x"]}
    plain = run(quantized(tmp_path, precision, table=False, both=False), tmp_path, x, plain=True)
    model = quantized(tmp_path, precision, table=False, both=False)
    counts = ort_fusion.fuse(model, max_tokens=64)
    assert counts["MatMulIntegerToFloat"] == operators(model).count("MatMulIntegerToFloat")
    assert counts["MatMulIntegerToFloat"] == (2 if precision == INT8_RESIDUAL else 1)
    assert "MatMul" not in operators(model)
    assert off(run(model, tmp_path / "fused", x), plain) < 1e-5


def test_a_bias_becomes_part_of_the_layer(tmp_path: Path) -> None:
    model = quantized(tmp_path, table=False, both=False)
    ort_fusion.fuse(model, max_tokens=64)
    assert "Add" not in operators(model)
    assert "DequantizeLinear" not in operators(model)
    product = next(node for node in model.graph if node.op_type == "MatMulIntegerToFloat")
    assert product.domain == MS
    assert product.inputs[6] is not None
    assert product.inputs[6].name == "bias"


def test_both_layers_fused_are_close_to_float(tmp_path: Path) -> None:
    model = quantized(tmp_path)
    assert ort_fusion.fuse(model, max_tokens=64)["MatMulIntegerToFloat"] == 2
    assert off(run(model, tmp_path, {"ids": IDS}), values()["y"]) < 0.05


def test_int8_activations_are_left_alone(tmp_path: Path) -> None:
    model = quantized(tmp_path, scheme=quant_params.SYMMETRIC)
    before = operators(model)
    assert ort_integer.fuse(edit.Edit(model.graph)) == 0
    assert operators(model) == before


def test_float_activations_are_not_taken_for_integers(tmp_path: Path) -> None:
    model = quantized(tmp_path, INT8_WEIGHTS)
    assert ort_integer.fuse(edit.Edit(model.graph)) == 0
    model = quantized(tmp_path)
    assert ort_integer.unfuse_weights(edit.Edit(model.graph)) == 0


def test_unfused_weights_keep_float_activations(tmp_path: Path) -> None:
    x = {"x": values()["x"]}
    model = quantized(tmp_path, INT8_WEIGHTS, table=False, both=False)
    found = quantizations(graph(both=False), tmp_path, precision=INT8_WEIGHTS)[
        "layers/0/fc1/MatMul"
    ]
    assert found.smoothing_factors is None
    truth = np.maximum(x["x"] @ (found.qweight() * found.scales) + BIAS, 0)
    work = edit.Edit(model.graph)
    assert ort_integer.unfuse_weights(work) == 1
    work.drop_dead()
    model.graph.sort()
    assert "DequantizeLinear" not in operators(model)
    assert off(run(model, tmp_path, x), truth) < 1e-5  # onnxruntime's default options
    stored = {w.name: w.data_type for w in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert stored["up.int8"] == TensorProto.INT8


@pytest.mark.parametrize("precision", [INT8, INT8_RESIDUAL, INT8_WEIGHTS])
def test_the_rest_in_float16_leaves_layers_between_their_quantizers(
    precision: str, tmp_path: Path
) -> None:
    truth = values()["y"]
    model = quantized(tmp_path, precision, scheme=quant_params.SYMMETRIC, tables=False)
    half.to_float16(model, half.Keep(()))
    assert off(run(model, tmp_path / "fp16", {"ids": IDS}, plain=True), truth) < 0.03
    for node in model.graph:
        if node.op_type == "MatMul":
            assert {value.dtype for value in node.inputs} == {ir.DataType.FLOAT16}
            weight = node.inputs[1].producer()
            assert weight.op_type == "DequantizeLinear"  # no cast between
            if precision != INT8_WEIGHTS:
                assert node.inputs[0].producer().op_type == "DequantizeLinear"
        if node.op_type == "QuantizeLinear":
            assert {value.dtype for value in node.inputs[:2]} == {ir.DataType.FLOAT16}
            assert node.outputs[0].dtype == ir.DataType.INT8
    tables = [n for n in model.graph if n.op_type == "Gather"]
    assert [node.inputs[0].dtype for node in tables] == [ir.DataType.FLOAT16]


def test_scales_that_float16_does_not_hold_stay_float32(tmp_path: Path) -> None:
    made = quantizations(graph(), tmp_path, precision=INT8, scheme=quant_params.SYMMETRIC)
    name = next(iter(made))
    made[name] = replace(made[name], scales=made[name].scales * np.float32(1e-6))
    model = graph()
    insert_qdq(model, made)
    half.to_float16(model, half.Keep(()))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    kinds = {
        str(n.name): n.outputs[0].dtype
        for n in model.graph
        if "/weight" in str(n.name) and n.op_type == "DequantizeLinear"
    }
    assert set(kinds.values()) == {ir.DataType.FLOAT, ir.DataType.FLOAT16}
