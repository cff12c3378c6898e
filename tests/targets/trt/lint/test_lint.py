"""The lint on whole graphs: the project's own, other engines', and the authors' published kind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from jexport.errors import UnsupportedGraphError
from jexport.graph import storage
from jexport.graph.lint import dataflow, onnx_reader
from jexport.quantization import layers, quant_params
from jexport.quantization.config import INT8, INT8_RESIDUAL, INT8_WEIGHTS
from jexport.quantization.layer_quantization import LayerQuantization
from jexport.quantization.qdq import insert_qdq
from jexport.recipe import CompileSpec
from jexport.targets import onnx as onnx_target
from jexport.targets.trt.lint import Diagnostic, lint, raise_for_errors
from jexport.targets.trt.support import table
from jexport.types import OnnxModel

NODE = helper.make_node
PROFILES = {"batch": [(1, 8)], "sequence": [(1, 64)]}
CUMSUM = ("xlm_roberta",)
"""Architectures whose positions are counted by a CumSum of int64."""


def errors(findings: list[Diagnostic]) -> list[Diagnostic]:
    return [one for one in findings if one.severity == "error"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["jina", "bert", "xlm_roberta", "modernbert"])
def test_our_own_graphs_are_taken(kind: str, precision: str, own: Callable[..., OnnxModel]) -> None:
    found = lint(own(kind, precision).path, PROFILES, max_tokens=64)
    assert errors(found) == []
    assert [one.operator for one in found] == (["CumSum"] if kind in CUMSUM else [])
    raise_for_errors(found)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_node_of_our_own_graph_was_really_looked_at(
    precision: str, own: Callable[..., OnnxModel]
) -> None:
    file = onnx_reader.read(own("jina", precision).path)
    dataflow.infer_types(file)
    assert len(file.graph.nodes) > 90
    for node in file.graph.nodes:
        assert node.op in table().operators
        assert dataflow.schema_of(node.op, file.opset) is not None
        assert all(file.graph.dtype(name) for name in node.outputs)
    found = dataflow.infer_constness(file)
    shapes = [node for node in file.graph.nodes if node.op in ("Reshape", "Slice", "Expand")]
    assert shapes
    made = {dataflow.constness_of(found, file.graph, node.given(1)) for node in shapes}
    assert made <= {dataflow.CONSTANT, dataflow.SHAPE}


def test_a_text_that_no_profile_covers(own: Callable[..., OnnxModel]) -> None:
    (found,) = lint(own("jina").path, PROFILES, max_tokens=65)
    assert found.rule == "profile"


@pytest.mark.parametrize("kind", ["jina", "bert"])
def test_what_the_target_onnx_makes_is_refused_by_name(
    kind: str, own: Callable[..., OnnxModel], tmp_path: Path
) -> None:
    onnx_target.build(own(kind), CompileSpec(), tmp_path)
    found = errors(lint(tmp_path / "model.onnx"))
    named = {one.operator for one in found if one.rule == "operator"}
    real = {
        f"com.microsoft.{node.op}"
        for scope in onnx_reader.read(tmp_path / "model.onnx").scopes()
        for node in scope.nodes
        if node.domain == "com.microsoft"
    }
    assert named == real
    assert len(named) >= 2
    with pytest.raises(UnsupportedGraphError, match=r"com\.microsoft\."):
        raise_for_errors(found)


def quantized(
    source: OnnxModel, folder: Path, *, scheme: str, precision: str, rows: int | None = None
) -> Path:
    """The graph with every linear layer as quantize writes it, from made-up ranges."""
    model = ir.load(source.path)
    items = layers.find_linear_layers(model)
    quantizations = {}
    for item in items:
        tensor = model.graph.initializers[item.weight].const_value
        assert tensor is not None
        weight = tensor.numpy().astype(np.float32)
        scales = quant_params.weight_scales(weight)
        quantizations[item.name] = LayerQuantization(
            precision=precision,
            smoothing_factors=np.full(item.in_features, 2, np.float32),
            input_params=quant_params.activation_params(-3.0, 4.0, scheme),
            qweight=lambda weight=weight, scales=scales: quant_params.round_to_nearest(
                weight, scales
            ),
            scales=scales,
        )
    insert_qdq(model, quantizations)
    storage.save(model, folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"))
    assert len(items) >= 8
    return folder / "model.onnx"


SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("precision", [INT8, INT8_RESIDUAL, INT8_WEIGHTS])
def test_int8_in_the_scheme_symmetric_is_taken(
    precision: str, own: Callable[..., OnnxModel], tmp_path: Path
) -> None:
    path = quantized(
        own("jina", **SIZES), tmp_path, scheme=quant_params.SYMMETRIC, precision=precision
    )
    found = lint(path, PROFILES, max_tokens=64)
    assert found == []
    stored = {node.op for node in onnx_reader.read(path).graph.nodes}
    assert "DequantizeLinear" in stored
    assert ("QuantizeLinear" in stored) == (precision != INT8_WEIGHTS)


def test_an_int8_table_is_a_warning(own: Callable[..., OnnxModel], tmp_path: Path) -> None:
    large = own("jina", **SIZES, vocab_size=layers.LARGE_TABLE_ROWS)
    path = quantized(large, tmp_path, scheme=quant_params.SYMMETRIC, precision=INT8)
    found = lint(path, PROFILES, max_tokens=64)
    assert errors(found) == []
    assert {(one.rule, one.operator) for one in found} == {("type", "Gather"), ("type", "Cast")}
    assert all("INT8" in one.what for one in found)


def test_int8_in_the_scheme_uint8_is_refused(own: Callable[..., OnnxModel], tmp_path: Path) -> None:
    path = quantized(own("jina", **SIZES), tmp_path, scheme=quant_params.UINT8, precision=INT8)
    found = errors(lint(path))
    assert {one.rule for one in found} == {"uint8", "zero-point"}
    assert all(one.count >= 8 and "symmetric" in one.fix for one in found)
    assert any("uint8" in one.what for one in found)
    assert len(found) <= 4  # 16 pairs, a few kinds


@pytest.fixture
def published(graphs: Any, tmp_path: Path) -> Path:
    """onnxruntime-dynamic INT8 of a graph that takes task_id: the authors' published kind."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rng = np.random.default_rng(3)
    task = graphs.VALUE("task_id", graphs.INT64, [])
    made = graphs.model(
        [
            NODE("Gather", ["loras", "task_id"], ["delta"], name="adapter/Gather"),
            NODE("Add", ["w", "delta"], ["merged"], name="adapter/Add"),
            NODE("MatMul", ["x", "merged"], ["h"], name="layers/0/fc1/MatMul"),
            NODE("MatMul", ["h", "w2"], ["out"], name="layers/0/fc2/MatMul"),
        ],
        [
            graphs.tensor("w", rng.normal(size=(4, 4))),
            graphs.tensor("loras", rng.normal(size=(5, 4, 4))),
            graphs.tensor("w2", rng.normal(size=(4, 4))),
        ],
        given=graphs.inputs(task),
    )
    quantize_dynamic(
        onnx.shape_inference.infer_shapes(made),
        tmp_path / "int8.onnx",
        weight_type=QuantType.QInt8,
    )
    return tmp_path / "int8.onnx"


def test_the_authors_published_kind_of_graph(published: Path) -> None:
    found = errors(lint(published))
    named = {one.operator for one in found if one.rule == "operator"}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= named
    (task,) = [one for one in found if one.rule == "task-input"]
    assert "task_id" in task.what
    with pytest.raises(UnsupportedGraphError) as caught:
        raise_for_errors(found)
    text = str(caught.value)
    for word in ("DynamicQuantizeLinear", "MatMulInteger", "task_id", "fix: "):
        assert word in text


def test_thousands_of_nodes_are_one_finding_and_fast(graphs: Any, tmp_path: Path) -> None:
    nodes = [
        NODE(
            "Erfc" if number % 2 else "Relu", [f"v{number}"], [f"v{number + 1}"], name=f"n{number}"
        )
        for number in range(4000)
    ]
    nodes[0].input[0], nodes[-1].output[0] = "x", "out"
    path = graphs.save(graphs.model(nodes), tmp_path)
    begin = time.perf_counter()
    (found,) = lint(path)
    assert time.perf_counter() - begin < 20
    assert found.count == 2000
    assert len(found.evidence) < 500
    assert lint(path) == [found]
