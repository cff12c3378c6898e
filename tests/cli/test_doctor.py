"""`jexport doctor`: what is installed, what can be built and run here, one remedy each."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest

from jexport import targets


def test_everything_is_there(cli: Callable[..., Any]) -> None:
    answer = cli("doctor")
    assert answer.code == 0
    assert f"onnxruntime       {metadata.version('onnxruntime')}" in answer.out
    assert "target onnx       build: yes  run: yes" in answer.out
    remedies = [line for line in answer.out.splitlines() if "fix:" in line]
    assert all("jexport[trt]" in line or "--until compile" in line for line in remedies)
    assert all(f"target {name}" in answer.out for name in targets.names())


def test_as_json(cli: Callable[..., Any]) -> None:
    content = json.loads(cli("doctor", "--json").out)
    assert [row["target"] for row in content["targets"]] == targets.names()
    assert content["tools"]["torch"] == metadata.version("torch")
    assert int(content["machine"]["cores"]) >= 1


def test_what_is_missing_has_its_remedy(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("torch", "onnxruntime") else find(name, *rest),
    )
    answer = cli("doctor")
    assert answer.code == 0
    assert "target onnx       build: no   run: no" in answer.out
    told = answer.out[answer.out.index("target onnx") : answer.out.index("target openvino")]
    remedies = [line.strip() for line in told.splitlines() if "fix:" in line]
    assert remedies == [
        'fix: to build: pip install "jexport[build]" (missing: torch, onnxruntime)',
        'fix: to run: pip install "jexport[onnx]" (missing: onnxruntime)',
    ]
    merged = answer.out[answer.out.index("target hf") : answer.out.index("target onnx")]
    assert 'to run: pip install "jexport[hf]" (missing: torch)' in merged


def test_a_target_that_this_machine_cannot_compile_for(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jexport.targets.trt import device

    monkeypatch.setattr(device, "_installed", lambda name: name != "tensorrt")
    answer = cli("doctor")
    assert "target trt        build: no   run: no" in answer.out
    assert "to build here: TensorRT engines need tensorrt" in answer.out
    assert "jexport compile ARTIFACT" in answer.out
