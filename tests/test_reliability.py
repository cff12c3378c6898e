"""RELIABILITY.md: its numbers are those of runs; what a run did not do keeps its old line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def page(imported: Callable[[Path], Any]) -> Any:
    return imported(ROOT / "benchmarks" / "reliability.py")


def test_counts_of_several_tests_meet_in_one_line(page: Any, tmp_path: Path) -> None:
    for number, one in enumerate(
        ({"name": "b", "x": 1}, {"name": "b", "y_z": 20000}, {"name": "a", "x": 3})
    ):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    counts = page.read(tmp_path)
    assert counts == {"b": {"x": 1, "y_z": 20000}, "a": {"x": 3}}
    assert page.table(counts).splitlines()[2:] == ["| a | x 3 |", "| b | x 1 · y z 20,000 |"]


def test_other_lines_stay(page: Any) -> None:
    first = page.written(page.PREFACE, {"b": {"x": 1}, "c": {"x": 2}})
    second = page.written(first, {"b": {"x": 5}, "a": {"x": 4}})
    rows = [line for line in second.splitlines() if line.startswith("| ")][1:]
    assert rows == ["| a | x 4 |", "| b | x 5 |", "| c | x 2 |"]
    assert page.written(second, {"b": {"x": 5}}) == second


def test_the_page_has_every_kind(page: Any) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for kind in ("onnx", "openvino", "hf", "vllm", "trt"):
        assert f"| tampering: {kind} | accepted 0 · " in text
        assert "single bytes 10,000" in text
