"""Weights whole and beside the graph, and every value made by something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from jexport.targets.trt.lint import Diagnostic, lint

NODE = helper.make_node
DATA = "model.onnx_data"


@pytest.fixture
def stored(graphs: Any, tmp_path: Path) -> Callable[..., list[Diagnostic]]:
    """`stored(location=..., offset=..., length=...)`: a weight of 16 bytes at byte 8 of 32."""

    def run(**said: str) -> list[Diagnostic]:
        made = graphs.model(
            [NODE("Add", ["x", "w"], ["out"], name="add")], [graphs.tensor("w", np.ones(4))]
        )
        weight = made.graph.initializer[1]
        assert weight.name == "w"
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": DATA, "offset": "8", "length": "16", **said}.items():
            weight.external_data.add(key=key, value=value)
        data = tmp_path / DATA
        if not data.exists() and not data.is_symlink():
            data.write_bytes(bytes(32))
        return lint(graphs.save(made, tmp_path))

    return run


def test_whole_weights_beside_the_graph(stored: Callable[..., list[Diagnostic]]) -> None:
    assert stored() == []
    assert stored(length="") == []
    assert stored(offset="16") == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"location": "../model.onnx_data"}, "one plain file"),
        ({"location": ".."}, "one plain file"),
        ({"location": "/etc/passwd"}, "one plain file"),
        ({"location": "sub/data"}, "one plain file"),
        ({"location": "sub\\data"}, "one plain file"),
        ({"location": ""}, "one plain file"),
        ({"location": "a\0b"}, "one plain file"),
        ({"location": "."}, "one plain file"),
        ({"location": "elsewhere"}, "missing"),
        ({"location": "x" * 300}, "missing"),
        ({"offset": "17"}, "outside its file"),
        ({"offset": "-1"}, "outside its file"),
        ({"length": "-1"}, "outside its file"),
        ({"offset": "nine"}, "outside its file"),
        ({"offset": "9" * 30}, "outside its file"),
        ({"offset": "9" * 5000}, "outside its file"),
        ({"offset": "+0"}, "outside its file"),
        ({"offset": " 0"}, "outside its file"),
        ({"offset": "0_0"}, "outside its file"),
        ({"offset": "٠"}, "outside its file"),
        ({"length": "12"}, "not whole"),
        ({"length": "20"}, "not whole"),
    ],
)
def test_what_is_refused(
    said: dict[str, str], told: str, stored: Callable[..., list[Diagnostic]]
) -> None:
    (found,) = stored(**said)
    assert (found.rule, found.severity) == ("weights", "error")
    assert told in found.what


def test_links_and_folders(stored: Callable[..., list[Diagnostic]], tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(bytes(32))
    (tmp_path / DATA).symlink_to(real)
    (found,) = stored()
    assert found.evidence == f"{DATA} is a link"
    (tmp_path / DATA).unlink()
    (tmp_path / DATA).mkdir()
    (found,) = stored()
    assert found.evidence == f"{DATA} is not a file"


def test_several_files(graphs: Any, tmp_path: Path) -> None:
    made = graphs.model(
        [NODE("Add", ["x", "w"], ["out"], name="add")], [graphs.tensor("w", np.ones(4))]
    )
    for number, weight in enumerate(made.graph.initializer):
        length = len(weight.raw_data)
        (tmp_path / f"data{number}").write_bytes(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": f"data{number}", "length": str(length)}.items():
            weight.external_data.add(key=key, value=value)
    (found,) = lint(graphs.save(made, tmp_path))
    assert (found.rule, found.severity) == ("weights", "warning")


def test_small_external_constants_are_looked_into_and_large_ones_are_not_read(
    graphs: Any, tmp_path: Path
) -> None:
    rows = 1 << 20
    made = graphs.model(
        [
            NODE("DequantizeLinear", ["w", "s"], ["wide"], axis=1, name="DQ"),
            NODE("MatMul", ["x", "wide"], ["out"], name="product"),
        ],
        [graphs.tensor("w", np.ones((4, 1)), np.int8), graphs.tensor("s", [-1.0])],
    )
    for weight, elements in ((made.graph.initializer[1], 4 * rows), (made.graph.initializer[2], 1)):
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        name = f"{weight.name}.bin"
        size = elements * (1 if weight.name == "w" else 4)
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # sparse: reading it would show zeros
        weight.external_data.add(key="location", value=name)
        if weight.name == "w":
            del weight.dims[:]
            weight.dims.extend([4, rows])
    (tmp_path / "s.bin").write_bytes(np.float32(-1.0).tobytes())
    found = [one for one in lint(graphs.save(made, tmp_path)) if one.severity == "error"]
    assert [one.rule for one in found] == ["scale"]
    assert "the first -1.0" in found[0].evidence


def test_weights_inside_the_graph(graphs: Any, linted: Callable[..., Any]) -> None:
    made = graphs.model(
        [NODE("Add", ["x", "w"], ["out"], name="add")], [graphs.tensor("w", np.ones(4))]
    )
    made.graph.initializer[1].raw_data = bytes(15)
    (found,) = linted(made)
    assert (found.rule, found.evidence) == ("weights", "'w' has 15 of 16 bytes")
    made.graph.initializer[1].dims[0] = -4
    (found,) = linted(made)
    assert found.what == "a weight has a negative size"


def test_empty_graphs(graphs: Any, linted: Callable[..., Any]) -> None:
    made = graphs.model([])
    del made.graph.node[:]
    assert "empty" in {one.rule for one in linted(made) if one.severity == "error"}
    made = graphs.model([NODE("Relu", ["x"], ["out"], name="r")])
    del made.graph.output[:]
    assert [one.rule for one in linted(made)] == ["empty"]


def test_values_that_nothing_makes(graphs: Any, linted: Callable[..., Any]) -> None:
    made = graphs.model([NODE("Relu", ["nowhere"], ["out"], name="r")])
    (found,) = linted(made)
    assert (found.rule, found.node) == ("dangling", "r")
    made = graphs.model([NODE("Relu", ["x"], ["other"], name="r")])
    (found,) = linted(made)
    assert found.evidence == "output 'out'"
