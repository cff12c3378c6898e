"""The onnx target: what it refuses, which device it takes, and that it lets go."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from jexport.errors import UnsupportedGraphError
from jexport.targets import onnx as target
from jexport.types import CompiledModel, OnnxModel

FEED = {
    "input_ids": np.full((1, 3), 5, dtype=np.int64),
    "attention_mask": np.ones((1, 3), dtype=np.int64),
}


# --- check --------------------------------------------------------------------------------------


def rewrite(model: OnnxModel, edit: Callable[[onnx.ModelProto], None]) -> None:
    proto = onnx.load(model.path, load_external_data=False)
    edit(proto)
    model.path.write_bytes(proto.SerializeToString())


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[3].op_type = "Bogus"


def dangling(proto: onnx.ModelProto) -> None:
    proto.graph.node[3].input[0] = "nowhere"


def outside(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.external_data:
            tensor.external_data[0].value = "../model.onnx_data"


def own_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[3].domain = "my.domain"
    proto.opset_import.append(onnx.helper.make_opsetid("my.domain", 1))


def test_a_good_graph_passes(exported: OnnxModel) -> None:
    target.check(exported)


@pytest.mark.parametrize("edit", [unknown_operator, dangling, outside])
def test_a_broken_graph_is_refused(edit: Any, exported: OnnxModel) -> None:
    rewrite(exported, edit)
    with pytest.raises(UnsupportedGraphError, match=r"not valid ONNX|one plain file") as caught:
        target.check(exported)
    assert caught.value.exit_code == 16
    assert caught.value.evidence.strip()


def test_another_domains_operator_is_named_with_its_node(exported: OnnxModel) -> None:
    node = onnx.load(exported.path, load_external_data=False).graph.node[3]
    rewrite(exported, own_operator)
    with pytest.raises(UnsupportedGraphError) as caught:
        target.check(exported)
    assert f"my.domain.{node.op_type} (node {node.name})" in str(caught.value)


def test_an_opset_beyond_onnxruntimes_is_refused(exported: OnnxModel) -> None:
    target.check(dataclasses.replace(exported, opset=target.MAX_OPSET))
    with pytest.raises(UnsupportedGraphError, match="opset 24") as caught:
        target.check(dataclasses.replace(exported, opset=24))
    assert "export.opset" in caught.value.fix


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
@pytest.mark.parametrize("size", [None, 0, 1000])
def test_a_file_that_is_cut_or_gone_is_refused(
    name: str, size: int | None, exported: OnnxModel
) -> None:
    path = exported.path.with_name(name)
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UnsupportedGraphError):
        target.check(exported)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("offset", "-4", "outside its file"),
        ("offset", "x", "outside its file"),
        ("offset", "9223372036854775807", "outside its file"),
        ("length", "-4", "outside its file"),
        ("length", "4", "not whole"),
        ("location", "../model.onnx_data", "one plain file"),
        ("location", "sub/../model.onnx_data", "one plain file"),
        ("location", "model.onnx_data\0", "one plain file"),
        ("location", "/etc/hostname", "one plain file"),
    ],
)
def test_weights_that_lie_elsewhere_are_refused(
    key: str, value: str, told: str, exported: OnnxModel
) -> None:
    path = exported.path
    (path.parent / "sub").mkdir()
    weights = path.parent / "model.onnx_data"
    (path.parent.parent / weights.name).write_bytes(weights.read_bytes())
    graph = onnx.load(str(path), load_external_data=False)
    weight = max(graph.graph.initializer, key=lambda one: len(one.external_data))
    said = {entry.key: entry for entry in weight.external_data}
    said[key].value = value
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(UnsupportedGraphError, match=told):
        target.check(exported)


# --- runner -------------------------------------------------------------------------------------


def test_the_session_is_freed(compiled: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Any]] = []
    make = onnxruntime.InferenceSession

    def remember(*words: Any, **options: Any) -> Any:
        session = make(*words, **options)
        kept.append(weakref.ref(session))
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", remember)
    with target.runner(compiled, "cpu", 1) as run:
        assert run(FEED)
        assert kept[0]() is not None
    gc.collect()
    assert kept[0]() is None  # although `run` is still held
    with pytest.raises(RuntimeError, match="closed"):
        run(FEED)

    with pytest.raises(KeyError), target.runner(compiled, "cpu", 1) as run:
        raise KeyError("stop")
    gc.collect()
    assert kept[1]() is None


def test_an_artifact_reached_through_a_link(compiled: CompiledModel, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(compiled.folder, target_is_directory=True)
    with target.runner(dataclasses.replace(compiled, folder=link), "cpu", 1) as run:
        assert run(FEED)


def test_only_outputs_that_the_graph_has_are_given(compiled: CompiledModel) -> None:
    signature = compiled.signature
    more = dataclasses.replace(signature.outputs[0], name="logits")
    wide = dataclasses.replace(signature, outputs=(*signature.outputs, more))
    claiming = dataclasses.replace(compiled, signature=wide)
    with target.runner(claiming, "cpu", 1) as run:
        assert list(run(FEED)) == ["last_hidden_state", "sentence_embedding"]


def test_version_names_the_package() -> None:
    assert onnxruntime.__version__ in target.version()
