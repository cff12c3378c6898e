"""text: what a terminal shows, however narrow it is."""

from __future__ import annotations

from typing import Any

import pytest

from jexport.artifacts.report import text
from jexport.artifacts.report.reading import columns


def test_text(quantization: Any, parity: Any, manifest: Any) -> None:
    told = text.render(quantization, parity, manifest)
    for wanted in (
        "all-MiniLM-L6-v2 · none · onnx int8 · 1.0.0-0123456789ab",
        "The gates were reached (precision int8, scheme uint8, effort full)",
        "cosine, mean     0.99670 >= 0.996      0.99712 >= 0.995",
        "shared top-10    0.9250 >= 0.92        0.9300",
        "3 of 4 layers int8; 1 of 4 layers kept at higher precision (int8_residual), 25.0 %",
        "241.8 texts/s (2.34 times fp32)",
        "worst languages  ar 0.98800, bn 0.98820",
        "dimensions       32 0.99613, 64 0.99616",
        "none: 300 texts, 20,310 tokens, aaaaaaaaaaaaaaaa",
        "3 trials; kept: the worst wide",
        "0.033 -> 0.0043     int8_residual  encoder/layer/3/output/dense/MatMul",
    ):
        assert wanted in told, wanted
    assert told.rstrip().endswith("\n" + quantization["command"])


def test_a_missed_gate_cannot_be_overlooked(quantization: Any, parity: Any, manifest: Any) -> None:
    quantization.update(reached=False, gates={"cosine_mean": 0.999, "spearman": 0.9})
    parity["gates"] = {"largest_difference": 0.01}
    told = text.render(quantization, parity, manifest)
    assert "NOT reached" in told
    assert "0.99670 MISSED 0.999" in told
    assert "Spearman         – MISSED 0.9" in told
    assert "0.0123 MISSED 0.01" in told


def test_what_a_full_search_adds(more: Any, parity: Any, manifest: Any) -> None:
    told = text.render(more, parity, manifest)
    for wanted in (
        "rankings         top-10 with retrieval.passage: int8 queries, int8 passages 0.9541;",
        "worst languages  ar 0.99100",  # of the held-out texts, not of parity's
        "dimensions       128 0.99523, 384 0.99548",
        "4 measured, the best GPTQ, clipped: top-10 0.9440",
    ):
        assert wanted in told, wanted


@pytest.mark.parametrize("width", [20, 60, 61, 80, 100, 300])
def test_no_line_is_wider_than_the_terminal(
    width: int, more: Any, parity: Any, manifest: Any
) -> None:
    manifest["name"] = "名前" * 40
    more["command"] = "jexport build"
    for matrix in more["matrices"]:
        matrix["name"] = "layer/" * 40 + matrix["name"]
    more["calibration"]["name"] = "a-name-without-end " * 20
    told = text.render(more, parity, manifest, width=width).splitlines()
    room = min(max(width, text.NARROWEST), text.WIDEST)
    assert [line for line in told if columns(line) > room] == []
    assert max(map(columns, told)) > room - 12, "it uses what there is"
    assert len(told) <= text.LINES
    assert any(line.endswith("dense/MatMul") for line in told), "the end tells matrices apart"


def test_nothing_to_tell() -> None:
    assert "NOT reached" in text.render({}, {}, {})
