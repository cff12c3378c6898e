"""Whether an int8 model is good enough beside float ones: its speed, and its ranking in a pair.

Knows no engine and no text: only speeds and vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.errors import QuantizationError
from jexport.evaluation import ranking, speed
from jexport.workspace.threads import one_blas_thread

INT8 = "int8"
FLOATS = ("fp32", "fp16", "bf16")
NEIGHBOURS = 10

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class FloatComparison:
    """The quantized model compared with float ones of its target, on this machine.

    Args:
        speeds: texts a second by precision, empty where that says nothing.
        sizes: bytes of graph and weights by precision.
        float_vectors: of the held-out texts, float32 [texts, dimension].
        quantized_vectors: of the same texts.
    """

    speeds: Mapping[str, float]
    sizes: Mapping[str, int]
    float_vectors: Vectors
    quantized_vectors: Vectors


@dataclass(frozen=True, kw_only=True)
class CounterpartVectors:
    """The held-out texts of a retrieval pair's other half.

    Args:
        task: the other half.
        float_vectors: float32 [texts, dimension].
        quantized_vectors: of the same texts in int8, None before that is built.
    """

    task: str
    float_vectors: Vectors
    quantized_vectors: Vectors | None


def speed_rows(speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Speeds as manifest and report have them.

    Args:
        speeds: texts a second by precision.

    Returns:
        A row a precision, JSON-ready.
    """
    return [{"precision": name, "texts_per_second": rate} for name, rate in speeds.items()]


def check_speed(speeds: Mapping[str, float], precision: str, *, allow_slower: bool) -> str:
    """How much faster int8 is than the fastest float, in words.

    Args:
        speeds: texts a second by precision.
        precision: of the quantized model.
        allow_slower: int8 need not be faster.

    Returns:
        Such as '1.52 times the speed of fp32'.

    Raises:
        QuantizationError: int8 is not faster and has to be.
    """
    floats = {name: rate for name, rate in speeds.items() if name in FLOATS}
    best = max(floats, key=floats.__getitem__)
    fast, slow = speeds[precision], floats[best]
    if precision == INT8 and fast <= slow and not allow_slower:
        raise QuantizationError(
            f"int8 is not faster than {best} on this machine",
            evidence=f"{fast:.1f} texts a second against {slow:.1f}, one batch of {speed.TEXTS}",
            fix=f"build where the processor has int8 instructions (VNNI, AMX), use {best}, or add "
            "--allow-slower",
        )
    return f"{fast / slow:.2f} times the speed of {best}"


def pair_ranking(
    own: FloatComparison, other: CounterpartVectors, *, own_are_queries: bool
) -> dict[str, Any]:
    """How much of float queries' nearest float passages is found where one or both are int8.

    Args:
        own: vectors of this build's held-out texts.
        other: vectors of the other task's held-out texts.
        own_are_queries: whether this build embeds queries, else passages.

    Returns:
        For each combination top10_overlap and top1 (share of queries whose first passage stays),
        0 to 1; None for one that needs an artifact not built yet.
    """
    queries, passages = (own, other) if own_are_queries else (other, own)
    reference = _similarities(queries.float_vectors, passages.float_vectors)
    ranking_by_pair: dict[str, Any] = {
        "with": other.task,
        "queries": len(queries.float_vectors),
        "passages": len(passages.float_vectors),
    }
    for name, first, second in (
        ("queries_int8_passages_fp32", queries.quantized_vectors, passages.float_vectors),
        ("queries_fp32_passages_int8", queries.float_vectors, passages.quantized_vectors),
        ("queries_int8_passages_int8", queries.quantized_vectors, passages.quantized_vectors),
    ):
        ranking_by_pair[name] = None
        if first is not None and second is not None:
            candidate = _similarities(first, second)
            count = _count(reference)
            ranking_by_pair[name] = {
                "top10_overlap": float(ranking.shared(reference, candidate, count).mean()),
                "top1": float(ranking.shared(reference, candidate, 1).mean()),
            }
    return ranking_by_pair


def _similarities(queries: Vectors, passages: Vectors) -> NDArray[np.float64]:
    with one_blas_thread():
        similarities: NDArray[np.float64] = (
            queries.astype(np.float64) @ passages.astype(np.float64).T
        )
    return similarities


def _count(similarities: NDArray[np.float64]) -> int:
    return min(NEIGHBOURS, int(similarities.shape[1]))


def check_ranking(pair: Mapping[str, Any], goal: float) -> str:
    """Hold a retrieval pair's overlaps against the goal.

    Args:
        pair: as `pair_ranking` returns it.
        goal: least top-10 overlap, 0 to 1.

    Returns:
        The lowest overlap in words.

    Raises:
        QuantizationError: one is below the goal.
    """
    overlaps = {
        name: group["top10_overlap"] for name, group in pair.items() if isinstance(group, Mapping)
    }
    worst = min(overlaps, key=overlaps.__getitem__)
    if overlaps[worst] < goal:
        raise QuantizationError(
            f"int8 does not keep the ranking of passages (together with {pair['with']})",
            evidence=f"{worst.replace('_', ' ')}: top-10 overlap {overlaps[worst]:.4f} < {goal}, "
            f"{pair['queries']} queries, {pair['passages']} passages",
            fix="build the other of the two anew, raise the goals of both, or lower "
            "quantize.pair_top10_overlap",
        )
    missing = "" if len(overlaps) == 3 else f"; {pair['with']} in int8 is not built yet"
    return f"with {pair['with']}: top-10 {overlaps[worst]:.3f}{missing}"
