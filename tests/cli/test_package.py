"""`jexport package`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_paths_on_stdout_and_notes_on_stderr(
    artifact: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("package", "--layout", "triton", artifact, "--out", tmp_path / "models")
    answer = cli(*words)
    version = tmp_path / "models" / "small_retrieval.query" / "1"
    assert (answer.code, answer.out) == (0, f"{version}\n")
    assert "small_retrieval.query, version 1: written" in answer.err
    assert "onnxruntime must be >=1.27" in answer.err
    again = cli(*words)
    assert "version 1: there already" in again.err
    assert again.out == answer.out
    quiet = cli(*words, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, answer.out, "")
    assert cli("verify", version).code == 0


def test_options(artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    answer = cli(
        *("package", "--layout", "triton", artifact, "--out", tmp_path),
        *("--device", "gpu", "--max-batch", 5),
    )
    config = (answer.path.parent / "config.pbtxt").read_text()
    assert "KIND_GPU" in config
    assert "max_batch_size: 5\n" in config


def test_wrong_words(artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "models")
    assert cli("package", "--layout", "tritn", artifact, *out).code == 2
    assert cli("package", artifact, *out).code == 2
    assert cli("package", "--layout", "triton", *out).code == 2
    assert cli("package", "--layout", "triton", artifact, *out, "--max-batch", 0).code == 2
    nowhere = cli("package", "--layout", "triton", tmp_path / "nowhere", *out)
    assert (nowhere.code, nowhere.out) == (13, "")
    twice = cli("package", "--layout", "triton", artifact, artifact, *out)
    assert twice.code == 30
    assert "  fix: give one artifact a task" in twice.err
    assert not (tmp_path / "models").exists()
