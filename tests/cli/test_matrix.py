"""`jexport matrix`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml


def test_a_matrix_on_stdout_and_notes_on_stderr(cli: Callable[..., Any]) -> None:
    words = ("matrix", "--task", "separation,classification", "--target", "onnx", "--target", "trt")
    answer = cli(*words, "--precision", "fp16", "--format", "github")
    assert answer.code == 0
    names = [entry["name"] for entry in json.loads(answer.out)["include"]]
    assert names == [
        "separation-onnx-fp16",
        "separation-trt-fp16-portable",
        "classification-onnx-fp16",
        "classification-trt-fp16-portable",
    ]
    assert "engines are left to a machine with a GPU" in answer.err
    more = cli(*words, "--precision", "fp16", "--format", "github", "--gpu", "L4,T4")
    assert len(json.loads(more.out)["include"]) == 8
    assert more.err == ""


def test_kubernetes(cli: Callable[..., Any]) -> None:
    words = (
        "matrix",
        "--format",
        "kubernetes",
        "--task",
        "separation",
        "--target",
        "trt",
        "--precision",
        "fp16",
        "--gpu",
        "L4",
        "--model",
        "/models/toy",
    )
    answer = cli(*words, "--image", "host/jexport:1", "--memory", 24)
    first, second = yaml.safe_load_all(answer.out)
    container = first["spec"]["template"]["spec"]["containers"][0]
    assert "--model /models/toy" in container["command"][-1]
    assert container["resources"]["limits"] == {"memory": "24Gi"}
    assert second["spec"]["suspend"] is True
    assert "kubectl patch" in answer.err
    only = cli(*words, "--image", "host/jexport:1", "--phase", "build")
    assert [job["spec"]["suspend"] for job in yaml.safe_load_all(only.out)] == [False]
    without = cli(*words)
    assert (without.code, without.out) == (35, "")


def test_wrong_words(cli: Callable[..., Any]) -> None:
    assert cli("matrix").code == 2
    assert cli("matrix", "--format", "gitlab").code == 2
    assert cli("matrix", "--format", "json", "--recipe", "nothing").code == 5
    assert cli("matrix", "--format", "json", "--task", "seperation").code == 3
    assert cli("matrix", "--format", "json", "--target", "onxx").code == 4
    assert cli("matrix", "--format", "json", "--target", "trt", "--gpu", "a/b").code == 35
    secret = cli("matrix", "--format", "json", "--publish", "oci://me:hunter2@host/name")
    assert (secret.code, secret.out) == (35, "")
    assert "hunter2" not in secret.err
