"""`jexport lint`: through a target's own function, exit code of the error, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from jexport import targets
from jexport.errors import UnsupportedGraphError
from jexport.graph.diagnostics import Diagnostic
from jexport.targets.trt.lint import lint


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> str:
    """A target with TensorRT's lint, under a name that no file has."""

    def linted(path: Path, max_tokens: int | None) -> Sequence[Diagnostic]:
        return lint(path, max_tokens=max_tokens)

    real = targets.load
    made = dataclasses.replace(real("onnx"), name="stand-in", lint=linted)
    monkeypatch.setattr(targets, "load", lambda name: made if name == "stand-in" else real(name))
    return "stand-in"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def graph(*operators: str, tokens: int | str = "sequence") -> Path:
        names = ["x", *(f"v{n}" for n in range(len(operators)))]
        nodes = [helper.make_node("Gather", ["t", "input_ids"], ["x"], name="embed")]
        nodes += [
            helper.make_node(op, [names[n]], [names[n + 1]], name=f"layers/{n}")
            for n, op in enumerate(operators)
        ]
        value = helper.make_tensor_value_info
        made = helper.make_graph(
            nodes,
            "g",
            [
                value(name, TensorProto.INT64, ["batch", tokens])
                for name in ("input_ids", "attention_mask")
            ],
            [value(names[-1], TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.ones((8, 4), np.float32), "t")],
        )
        path = tmp_path / "model.onnx"
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)]), path)
        return path

    return graph


def test_a_graph_that_is_taken(engine: str, write: Any, cli: Callable[..., Any]) -> None:
    path = write("Relu")
    for given in (path, path.parent):
        answer = cli("lint", given, "--target", engine)
        assert (answer.code, answer.err) == (0, "")
        wanted = f"{path} for target {engine}: errors: 0, warnings: 0\n"
        assert answer.out == wanted


def test_a_graph_that_is_refused(engine: str, write: Any, cli: Callable[..., Any]) -> None:
    answer = cli("lint", write("Relu", "Det", "Det"), "--target", engine)
    assert answer.code == UnsupportedGraphError.exit_code
    assert "error: TensorRT cannot take operator Det (node layers/1) [operator]" in answer.out
    assert "2 nodes; also layers/2" in answer.out
    assert answer.out.endswith("errors: 1, warnings: 0\n")
    assert "TensorRT cannot take operator Det (node layers/1)" in answer.err
    assert "fix: " in answer.err


def test_warnings_do_not_fail(engine: str, write: Any, cli: Callable[..., Any]) -> None:
    path = write("Relu", tokens=128)
    answer = cli("lint", path, "--target", engine, "--max-tokens", 128)
    assert (answer.code, answer.err) == (0, "")
    assert "warning: the sequence axis has the fixed size 128 [profile]" in answer.out
    answer = cli("lint", path, "--target", engine, "--max-tokens", 129)
    assert answer.code == UnsupportedGraphError.exit_code
    assert "the graph takes 128 tokens and nothing else" in answer.err


def test_as_json(engine: str, write: Any, cli: Callable[..., Any]) -> None:
    answer = cli("lint", write("Det"), "--target", engine, "--json")
    assert answer.code == UnsupportedGraphError.exit_code
    told = json.loads(answer.out)
    assert (told["target"], told["errors"], told["warnings"]) == (engine, 1, 0)
    (found,) = told["findings"]
    assert Diagnostic(**found).operator == "Det"
    assert found["count"] == 1
    answer = cli("lint", write("Relu"), "--target", engine, "--json")
    assert answer.code == 0
    assert json.loads(answer.out)["findings"] == []


def test_no_graph(engine: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for given in (tmp_path / "notes.txt", tmp_path / "gone.onnx", tmp_path):
        answer = cli("lint", given, "--target", engine)
        assert answer.code == UnsupportedGraphError.exit_code
        assert "is not an ONNX graph" in answer.err


def test_a_target_without_a_lint(write: Any, cli: Callable[..., Any]) -> None:
    answer = cli("lint", write("Relu"), "--target", "onnx")
    assert answer.code == 2
    assert "target 'onnx' has no lint" in answer.err
    answer = cli("lint", write("Relu"), "--target", "nonsense")
    assert answer.code == 4
    assert cli("lint", write("Relu")).code == 2
