"""Whatever a file holds, reading and linting it gives findings or a JexportError."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from jexport.errors import JexportError, UnsupportedGraphError
from jexport.graph.diagnostics import Diagnostic
from jexport.graph.lint import onnx_reader
from jexport.targets.trt.lint import lint
from jexport.types import OnnxModel

NODE = helper.make_node


def outcome(content: bytes) -> list[Diagnostic] | JexportError:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        try:
            found = lint(path, {"batch": [(1, 8)], "sequence": [(1, 64)]}, max_tokens=64)
            for one in found:
                assert one.to_text().startswith((f"{one.severity}: ", one.severity))
            assert found == lint(path, {"batch": [(1, 8)], "sequence": [(1, 64)]}, max_tokens=64)
        except JexportError as error:
            return error
        return found


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 64, b"{}", b"PK\x03\x04" * 8])
def test_what_is_no_graph(content: bytes) -> None:
    error = outcome(content)
    assert isinstance(error, UnsupportedGraphError)
    assert "is not an ONNX graph" in error.what
    assert error.fix


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.onnx", Path("a\0b")):
        with pytest.raises(UnsupportedGraphError, match="is not an ONNX graph"):
            lint(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path, graphs: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedGraphError) as caught:
        lint(tmp_path / "pipe")
    assert caught.value.evidence == "it is not a file"
    nodes, constants = graphs.pair("x")
    made = graphs.model([*nodes, NODE("Relu", ["q/out"], ["out"], name="r")], constants)
    scale = made.graph.initializer[1]
    scale.ClearField("raw_data")
    scale.data_location = onnx.TensorProto.EXTERNAL
    scale.external_data.add(key="location", value="pipe")
    assert "pipe is not a file" in {one.evidence for one in lint(graphs.save(made, tmp_path))}


def test_a_file_over_protobufs_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(UnsupportedGraphError) as caught:
        lint(path)
    assert "2 GiB" in caught.value.evidence


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes(content: bytes) -> None:
    outcome(content)


@pytest.fixture(scope="module")
def seeds(graphs: Any, own: Callable[..., OnnxModel]) -> list[bytes]:
    """Graphs with a bit of everything, and one of the project's own."""
    branch = helper.make_graph(
        [NODE("Neg", ["x"], ["b"], name="neg")], "branch", [], [graphs.VALUE("b", 1, None)]
    )
    nodes, constants = graphs.pair("x", scale=[0.1] * 4, zero=[0] * 4, axis=1)
    function = helper.make_function(
        "own", "F", ["a"], ["c"], [NODE("Exp", ["a"], ["c"])], [helper.make_opsetid("", 20)]
    )
    rich = graphs.model(
        [
            *nodes,
            NODE("If", ["yes"], ["i"], name="If", then_branch=branch, else_branch=branch),
            NODE("F", ["i"], ["f"], domain="own", name="call"),
            NODE("Cast", ["f"], ["h"], to=10, name="narrow"),
            NODE("Add", ["h", "low"], ["s"], name="add"),
            NODE("Slice", ["s", "axes", "axes", "axes"], ["t"], name="slice"),
            NODE("ReduceSum", ["t", "axes"], ["r"], name="reduce"),
            NODE("TopK", ["r", "axes"], ["out", "where"], name="top"),
        ],
        [
            *constants,
            graphs.tensor("yes", True, bool),
            graphs.tensor("axes", [1], np.int64),
            graphs.tensor("low", [-1e4], np.float16),
        ],
        functions=[function],
        domains=["own"],
    )
    return [rich.SerializeToString(), own("jina").path.read_bytes()]


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32 - 1), edits=st.integers(1, 6), which=st.integers(0, 3))
def test_mutated_files(seed: int, edits: int, which: int, seeds: list[bytes]) -> None:
    content = bytearray(seeds[which == 3])  # the rich one is the smaller: more edits hit structure
    chance = random.Random(seed)
    for _ in range(edits):
        place = chance.randrange(len(content))
        match chance.randrange(4):
            case 0:
                content[place] = chance.randrange(256)
            case 1:
                del content[place : place + chance.randrange(1, 40)]
            case 2:
                content[place:place] = content[chance.randrange(len(content)) :][:40]
            case _:
                content[place] ^= 1 << chance.randrange(8)
    outcome(bytes(content))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32 - 1))
def test_rewired_graphs(seed: int, seeds: list[bytes]) -> None:
    """Valid protobuf with nonsense in it: inputs swapped, operators renamed, attributes moved."""
    chance = random.Random(seed)
    made = onnx.ModelProto.FromString(seeds[0])
    nodes = made.graph.node
    names = [name for node in nodes for name in (*node.input, *node.output)]
    for _ in range(chance.randrange(1, 8)):
        node = chance.choice(nodes)
        match chance.randrange(6):
            case 0 if node.input:
                node.input[chance.randrange(len(node.input))] = chance.choice(names)
            case 1:
                node.op_type = chance.choice(nodes).op_type
            case 2:
                node.attribute.extend(list(chance.choice(nodes).attribute))
            case 3:
                del node.input[:]
            case 4:
                tensor = chance.choice(made.graph.initializer)
                tensor.data_type = chance.randrange(0, 30)
                tensor.dims.append(chance.choice([-1, 0, 1, 1 << 60]))
            case _:
                for attribute in node.attribute:
                    attribute.i, attribute.name = -(1 << 60), chance.choice(["axis", "to", "perm"])
    assert isinstance(outcome(made.SerializeToString()), list)


def test_a_graph_that_calls_itself(graphs: Any, tmp_path: Path) -> None:
    standard = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    function = helper.make_function(
        "own", "F", ["a"], ["b"], [NODE("F", ["a"], ["b"], domain="own", name="again")], standard
    )
    made = graphs.model(
        [NODE("F", ["x"], ["out"], domain="own", name="call")],
        functions=[function],
        domains=["own"],
    )
    assert lint(graphs.save(made, tmp_path)) == []


def test_names_that_are_not_utf_8(graphs: Any) -> None:
    made = graphs.model([NODE("Det", ["x"], ["out"], name="odd-name")])
    content = made.SerializeToString().replace(b"odd-name", b"odd\xff\xfename"[:8])
    found = outcome(content)
    assert isinstance(found, list)
    assert found[0].operator == "Det"
    assert found[0].node.startswith("odd")


def test_the_weights_of_a_graph_stay_on_disk(own: Callable[..., OnnxModel]) -> None:
    file = onnx_reader.read(own("jina").path)
    places = [one for one in file.graph.constants.values() if one.place is not None]
    assert len(places) > 8
    large = max(places, key=lambda one: one.elements)
    assert not large.tensor.raw_data
    assert large.values(limit=large.elements - 1) is None
    whole = large.values()
    assert whole is not None
    assert np.abs(whole).max() > 0
