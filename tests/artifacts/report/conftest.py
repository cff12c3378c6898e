"""What quantization.json, parity.json and a manifest hold, with every key that the report reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

LANGUAGES = [
    *("ar", "bn", "da", "de", "el", "en", "es", "fi", "fr", "hi", "id", "it", "ja", "ka", "ko"),
    *("lv", "mixed", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sv", "th", "tr", "uk", "ur", "vi"),
    "zh",
]
LENGTHS = ("1-2", "3-4", "5-8", "9-16", "17-32", "2049-4096", "4097-8192", "8193+")


def group(mean: float, p1: float) -> dict[str, float]:
    return {
        "texts": 10,
        "cosine_mean": mean,
        "cosine_p1": p1,
        "cosine_min": p1 - 0.001,
        "largest_difference": 0.0123,
        "spearman": 0.998,
        "top10_overlap": 0.93,
    }


def matrix(number: int, treatment: str = "int8", share: float = 0.25) -> dict[str, Any]:
    return {
        "name": f"encoder/layer/{number}/output/dense/MatMul",
        "shape": [384, 1152],
        "share": share,
        "treatment": treatment,
        "smoothing": 0.85,
        "clip": 0.97,
        "error_naive": 0.03 + number / 1000,
        "error": 0.004 + number / 10000,
    }


def attempt(what: str, wide: list[str], share: float, mean: float, passed: bool) -> dict[str, Any]:
    return {
        "what": what,
        "wide": wide,
        "floats": [],
        "share": share,
        "cosine_mean": mean,
        "cosine_p1": mean - 0.004,
        "cosine_min": mean - 0.01,
        "top10_overlap": 0.9 + share / 10,
        "passed": passed,
        "seconds": 3.1,
    }


@pytest.fixture
def made() -> SimpleNamespace:
    """The functions above, for tests that need other numbers."""
    return SimpleNamespace(
        group=group, matrix=matrix, attempt=attempt, languages=LANGUAGES, lengths=LENGTHS
    )


@pytest.fixture
def quantization() -> dict[str, Any]:
    wide = ["encoder/layer/3/output/dense/MatMul"]
    return {
        "format": 1,
        "scheme": "uint8",
        "precision": "int8",
        "effort": "full",
        "reached": True,
        "calibration": {"name": "none", "sha256": "a" * 64, "texts": 300, "tokens": 20310},
        "held_out": {"name": "none, held out", "sha256": "b" * 64, "texts": 60, "tokens": 4001},
        "gates": {"cosine_mean": 0.996, "cosine_p1": 0.99, "top10_overlap": 0.92},
        "tried": [
            attempt("all int8", [], 0.0, 0.9931, False),
            attempt("the worst wide", wide, 0.25, 0.9967, True),
            attempt("all wide", ["a", "b"], 1.0, 0.9999, True),
        ],
        "curve": [attempt("x", [], n / 10, 0.993 + n * 0.00065, n > 4) for n in range(11)],
        "matrices": [matrix(0), matrix(1), matrix(2), matrix(3, "int8x2")],
        "bytes": {"fp32": 90 << 20, "int8": 23 << 20},
        "command": "jexport build --recipe all-MiniLM-L6-v2 --precision int8",
    }


@pytest.fixture
def parity() -> dict[str, Any]:
    return {
        "passed": True,
        "failures": [],
        "precision": "int8",
        "gates": {"cosine_mean": 0.995, "cosine_p1": 0.985},
        "texts": {"set": "parity", "sha256": "c" * 64},
        "metrics": {
            "texts": 289,
            "overall": group(0.99712, 0.99034),
            "by_language": {
                name: group(0.996 + n / 10000, 0.988 + n / 5000) for n, name in enumerate(LANGUAGES)
            },
            "by_length": {name: group(0.997, 0.99 + n / 2000) for n, name in enumerate(LENGTHS)},
            "by_dimension": {str(n): group(0.9961 + n / 1e6, 0.99) for n in (32, 64, 384)},
            "tokens": {"texts": 289, "cosine_min": 0.97531, "largest_difference": 0.2},
            "batch": {"texts": 48, "cosine_min": 0.98642, "largest_difference": 0.01},
        },
    }


@pytest.fixture
def manifest() -> dict[str, Any]:
    return {
        "name": "all-MiniLM-L6-v2",
        "task": "none",
        "target": "onnx",
        "precision": "int8",
        "version": "1.0.0-0123456789ab",
        "speed": [
            {"precision": "fp32", "texts_per_second": 103.2},
            {"precision": "int8", "texts_per_second": 241.77},
        ],
    }


@pytest.fixture
def more(quantization: dict[str, Any]) -> dict[str, Any]:
    """quantization.json with all that a full search adds."""
    whats = ("round to nearest, no smoothing", "round to nearest", "GPTQ", "GPTQ, clipped")
    techniques = [
        attempt(what, [], 0.0, mean, False) | {"top10_overlap": top}
        for what, mean, top in zip(
            whats, (0.931, 0.9921, 0.9968, 0.9969), (0.58, 0.902, 0.943, 0.944), strict=True
        )
    ]
    held_out = {
        "texts": 60,
        "overall": group(0.9967, 0.9927),
        "languages": {"largest_loss": 1.62},
        "by_language": {
            name: group(0.9965 + n / 10000, 0.991 + n / 5000) for n, name in enumerate(LANGUAGES)
        },
        "by_length": {name: group(0.9968, 0.992 + n / 2000) for n, name in enumerate(LENGTHS)},
        "by_dimension": {str(n): group(0.9951 + n / 1e6, 0.98) for n in (128, 384)},
    }
    return quantization | {
        "held_out_quality": held_out,
        "pair": {
            "with": "retrieval.passage",
            "queries_int8_passages_int8": {"top10_overlap": 0.9541},
            "queries_int8_passages_fp32": {"top10_overlap": 0.9612},
            "queries_fp32_passages_int8": {"top10_overlap": 0.9603},
        },
        "speed": [
            {"precision": "fp32", "texts_per_second": 100.0},
            {"precision": "fp16", "texts_per_second": 71.3},
            {"precision": "int8", "texts_per_second": 300.0},
        ],
        "techniques": techniques,
        "tried": [{**row, "floats": ["encoder/layer/9/MatMul"]} for row in quantization["tried"]],
    }
