"""Ranks of similarities: Spearman's correlation and who is whose neighbour, ties shared fairly.

What `parity` needs besides distances between vectors. Plain numpy; knows no text and no gate.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]

RANK_TIE = 1e-14
"""Neighbouring similarities this close share a rank: float64 rounding of a dot product of two
length-1 vectors of 1,024 values is about 4e-15 (sqrt(1024) * 2**-53)."""

NEIGHBOUR_TIE = 4 * float(np.finfo(np.float32).eps)
"""Similarities this close to the last neighbour's are tied with it (4.8e-7): inputs are float32, so
the same text in another batch comes back this far away."""


def levels(similarities: Floats) -> Integers:
    """Each value's place among the distinct values, lowest first.

    Values that a chain of gaps of at most RANK_TIE connects are one level. Sorted once; a group's
    ranks then need counting only.

    Args:
        similarities: float64 [pairs].

    Returns:
        int64 [pairs], from 0.
    """
    order = np.argsort(similarities)
    ranks = np.empty(len(similarities), dtype=np.int64)
    ranks[order[0]] = 0
    ranks[order[1:]] = np.cumsum(np.diff(similarities[order]) > RANK_TIE)
    return ranks


def spearman(reference: Integers, candidate: Integers) -> float:
    """Spearman's rank correlation of two lists of levels, ties averaged.

    It is Pearson's correlation of the average ranks (Kendall and Gibbons 1990, Rank Correlation
    Methods).

    Args:
        reference: int64 [pairs], from `levels`.
        candidate: int64 [pairs] of the same pairs.

    Returns:
        -1 to 1. Undefined when a side ranks nothing: 1 when neither does, 0 when only one.
    """
    ours, theirs = _centred_ranks(reference), _centred_ranks(candidate)
    # Not np.linalg.norm: BLAS adds up one part a thread (from 10,000 values on).
    our_length, their_length = (np.sqrt(np.square(side).sum()) for side in (ours, theirs))
    if our_length == 0 or their_length == 0:
        return float(our_length == their_length)
    # 1 - |a - b|^2 / 2: exactly 1 for equal ranks, where a.b may round to something beside it
    apart = np.square(ours / our_length - theirs / their_length).sum()
    return float(np.clip(1 - apart / 2, -1, 1))


def _centred_ranks(places: Integers) -> Floats:
    """Average ranks minus their mean, float64 [pairs]."""
    counts = np.bincount(places)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks - (len(places) + 1) / 2


def choices(similarities: Floats, count: int) -> Floats:
    """`nearest` of each text among all others, itself excluded.

    Args:
        similarities: float64 [texts, texts].
        count: how many neighbours, fewer than texts.

    Returns:
        float64 [texts, texts], 0 to 1.
    """
    others = similarities.copy()
    np.fill_diagonal(others, -np.inf)
    return nearest(others, count)


def nearest(similarities: Floats, count: int) -> Floats:
    """How much of each column is among each row's `count` largest.

    Columns tied (within NEIGHBOUR_TIE) at the last place share what is left of it equally, so exact
    duplicates cost nothing, and a candidate whose vectors are all alike gains nothing.

    Args:
        similarities: float64 [rows, columns].
        count: at most as many as there are columns.

    Returns:
        float64 [rows, columns], 0 to 1; rows sum to `count`.
    """
    last = np.partition(similarities, -count, axis=1)[:, -count, np.newaxis]
    nearer = similarities > last + NEIGHBOUR_TIE
    tied = (similarities >= last - NEIGHBOUR_TIE) & ~nearer
    left = count - nearer.sum(axis=1, keepdims=True)
    shares: Floats = nearer + tied * (left / tied.sum(axis=1, keepdims=True))
    return shares


def shared(reference: Floats, candidate: Floats, count: int) -> Floats:
    """Share of each row's nearest columns that both sides have.

    Args:
        reference: float64 [rows, columns].
        candidate: of the same shape.
        count: how many columns are near, at most as many as there are.

    Returns:
        float64 [rows], 0 to 1; exactly 1 where both sides are equal.
    """
    unshared = np.abs(nearest(reference, count) - nearest(candidate, count)).sum(axis=1)
    # the sum of min(a, b) over rows that both sum to `count`; exactly 1 when a equals b
    overlaps: Floats = np.clip(1 - unshared / (2 * count), 0, 1)
    return overlaps
