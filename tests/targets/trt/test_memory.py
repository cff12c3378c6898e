"""GPU memory predicted from a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from jexport.targets.trt import memory
from jexport.targets.trt.profiles import Profile, Range


def shape(batch: int, tokens: int) -> Profile:
    return Profile(batch=Range(min=1, opt=1, max=batch), tokens=Range(min=1, opt=1, max=tokens))


def attention(path: Path) -> None:
    """Ids -> vectors [b, s, 4] -> scores [b, s, s] -> vectors again, with a weight of 10 x 4."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "xt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        helper.make_node("MatMul", ["shares", "x"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 4])],
        [numpy_helper.from_array(np.zeros((10, 4), np.float32), "table")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )


def test_by_hand(tmp_path: Path) -> None:
    attention(tmp_path / "a.onnx")
    found = memory.predict(tmp_path / "a.onnx", [shape(2, 100)])
    vectors, scores = 2 * 100 * 4 * 4, 2 * 100 * 100 * 4
    assert found.weights_bytes == 10 * 4 * 4
    # x is read by the last product; its transpose lives until the scores are made
    assert found.activations_bytes == 2 * vectors
    # scores and shares at one time, beside x
    assert found.unfused_bytes == vectors + 2 * scores
    assert found.unknown == 0
    assert found.total_bytes == found.weights_bytes + found.activations_bytes
    assert "GiB of weights" in str(found)


def test_the_hungriest_profile_counts(tmp_path: Path) -> None:
    attention(tmp_path / "a.onnx")
    found = memory.predict(tmp_path / "a.onnx", [shape(64, 100), shape(2, 1000)])
    alone = memory.predict(tmp_path / "a.onnx", [shape(64, 100)])
    assert found.activations_bytes == alone.activations_bytes
    assert found.profile == str(shape(64, 100))
    assert found.unfused_bytes > alone.unfused_bytes  # scores grow with the square


def test_weights_beside_the_graph_count_unread(tmp_path: Path) -> None:
    attention(tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.save(
        model,
        tmp_path / "b.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="b.onnx_data",
    )
    (tmp_path / "b.onnx_data").unlink()
    found = memory.predict(tmp_path / "b.onnx", [shape(1, 8)])
    assert found.weights_bytes == 160


def test_a_shape_that_is_not_known_is_told(tmp_path: Path) -> None:
    attention(tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    model.graph.node.insert(2, helper.make_node("NonZero", ["x"], ["found"]))
    onnx.save(model, tmp_path / "c.onnx")
    assert memory.predict(tmp_path / "c.onnx", [shape(1, 8)]).unknown == 1


def test_tiny(tiny: Any) -> None:
    found = memory.predict(tiny.path, [shape(8, 16)])
    assert found.weights_bytes == (50 * 4 + 4 * 4) * 4 + 16
    assert found.unknown == 0
    assert found.activations_bytes == found.unfused_bytes > 0
