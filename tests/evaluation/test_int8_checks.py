"""What only int8 builds need: speeds compared, pairs ranked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jexport.errors import QuantizationError
from jexport.evaluation import int8_checks


def beside(plain: np.ndarray, int8: np.ndarray) -> int8_checks.FloatComparison:
    return int8_checks.FloatComparison(
        speeds={}, sizes={}, float_vectors=plain, quantized_vectors=int8
    )


def unit(*rows: list[float]) -> np.ndarray:
    vectors = np.array(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_int8_is_held_against_the_best_float() -> None:
    speeds = {"fp32": 10.0, "fp16": 16.0, "int8": 20.0}
    assert (
        int8_checks.check_speed(speeds, "int8", allow_slower=False)
        == "1.25 times the speed of fp16"
    )
    with pytest.raises(QuantizationError, match="not faster than fp16") as caught:
        int8_checks.check_speed({**speeds, "int8": 15.0}, "int8", allow_slower=False)
    assert "15.0 texts a second against 16.0" in str(caught.value)
    assert "--allow-slower" in str(caught.value)


def test_slower_is_allowed_when_asked_for_and_for_weights_only() -> None:
    speeds = {"fp32": 10.0, "int8": 9.0, "int8-weights": 9.0}
    assert (
        int8_checks.check_speed(speeds, "int8", allow_slower=True) == "0.90 times the speed of fp32"
    )
    assert int8_checks.check_speed(speeds, "int8-weights", allow_slower=False).startswith("0.90")


def test_ranking_is_measured_from_queries_to_passages() -> None:
    rng = np.random.default_rng(0)
    queries, passages = (unit(*rng.normal(size=(rows, 8)).tolist()) for rows in (5, 40))
    swapped = queries[::-1].copy()  # as wrong as int8 queries could be
    other = int8_checks.CounterpartVectors(
        task="retrieval.passage", float_vectors=passages, quantized_vectors=passages
    )
    same = int8_checks.pair_ranking(beside(queries, queries), other, own_are_queries=True)
    for name in (
        "queries_int8_passages_fp32",
        "queries_fp32_passages_int8",
        "queries_int8_passages_int8",
    ):
        assert same[name] == {"top10_overlap": 1.0, "top1": 1.0}
    assert (same["queries"], same["passages"], same["with"]) == (5, 40, "retrieval.passage")
    wrong = int8_checks.pair_ranking(beside(queries, swapped), other, own_are_queries=True)
    assert wrong["queries_fp32_passages_int8"] == {"top10_overlap": 1.0, "top1": 1.0}
    assert wrong["queries_int8_passages_fp32"]["top10_overlap"] < 0.9
    assert wrong["queries_int8_passages_fp32"] == wrong["queries_int8_passages_int8"]
    # the same seen from the other artifact's build
    mine = int8_checks.CounterpartVectors(
        task="retrieval.query", float_vectors=queries, quantized_vectors=swapped
    )
    other_way = int8_checks.pair_ranking(beside(passages, passages), mine, own_are_queries=False)
    for name in ("queries_int8_passages_fp32", "queries_int8_passages_int8"):
        assert other_way[name] == wrong[name]


def test_top10_overlap_is_the_share_of_passages_that_stay() -> None:
    passages = unit(*np.eye(12).tolist())
    queries = unit(np.arange(12, 0, -1).tolist())  # passages in order
    moved = queries.copy()
    moved[0, [9, 10]] = moved[0, [10, 9]]  # the tenth and the eleventh change places
    other = int8_checks.CounterpartVectors(
        task="retrieval.passage", float_vectors=passages, quantized_vectors=None
    )
    found = int8_checks.pair_ranking(beside(queries, moved), other, own_are_queries=True)
    assert found["queries_int8_passages_fp32"] == {
        "top10_overlap": pytest.approx(0.9),
        "top1": 1.0,
    }
    assert found["queries_int8_passages_int8"] is None


def test_the_lowest_combination_is_judged() -> None:
    pair: dict[str, Any] = {
        "with": "retrieval.passage",
        "queries": 90,
        "passages": 80,
        "queries_int8_passages_fp32": {"top10_overlap": 0.97, "top1": 1.0},
        "queries_fp32_passages_int8": {"top10_overlap": 0.96, "top1": 1.0},
        "queries_int8_passages_int8": {"top10_overlap": 0.93, "top1": 1.0},
    }
    assert "top-10 0.930" in int8_checks.check_ranking(pair, 0.93)
    with pytest.raises(QuantizationError) as caught:
        int8_checks.check_ranking(pair, 0.94)
    assert "queries int8 passages int8: top-10 overlap 0.9300 < 0.94" in str(caught.value)
    pair["queries_int8_passages_int8"] = pair["queries_int8_passages_fp32"] = None
    assert "retrieval.passage in int8 is not built yet" in int8_checks.check_ranking(pair, 0.94)
