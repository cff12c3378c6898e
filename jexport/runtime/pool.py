"""Token vectors -> one vector per text, in plain numpy.

The order is fixed: pool, cut to the wanted dimensions, normalise. It is the order of the authors'
own `encode`, of TEI and of vLLM. This module knows no tokenizer, no engine and no artifact.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from jexport.errors import UnsupportedGraphError, nearest

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

MODES = ("mean", "cls", "max", "mean_sqrt_len", "weightedmean", "last")

BLOCK = 128
"""Tokens whose vectors are added up in float32."""

_MIN_TOKENS = 1e-9  # the clamp of the authors and of sentence-transformers
_MIN_NORM = 1e-12  # torch.nn.functional.normalize's eps


def pool(hidden: Floats, mask: Ints, mode: str, *, skipped: int = 0) -> Floats:
    """Pool token vectors over the tokens whose mask is 1.

    Source: the authors' `XLMRobertaModel.mean_pooling` and sentence-transformers' `Pooling`.

    Args:
        hidden: float32 [batch, sequence, dim].
        mask: int64 [batch, sequence] of 0 and 1, padding on either side.
        mode: 'mean' (sum over max(count, 1e-9)), 'mean_sqrt_len' (the same over its square root),
            'weightedmean' (each token's weight is its number, from 1 on), 'cls' (first token),
            'last' (last token), 'max' (largest value in each column).
        skipped: tokens before the first of the mask that have a number all the same: a prompt's.

    Returns:
        float32 [batch, dim]; a row without any token gives zeros.

    Raises:
        UnsupportedGraphError: on another mode.
    """
    rows = np.arange(len(hidden))
    counts = mask.sum(axis=1)
    if mode in ("mean", "mean_sqrt_len"):
        size = np.maximum(counts.astype(np.float32), _MIN_TOKENS)[:, None]
        divisor = size if mode == "mean" else np.sqrt(size)
        pooled = _masked_sum(hidden, mask) / divisor
    elif mode == "weightedmean":
        numbers = (mask.cumsum(axis=1) + skipped) * mask
        size = np.maximum(numbers.sum(axis=1).astype(np.float32), _MIN_TOKENS)[:, None]
        pooled = _masked_sum(hidden, numbers) / size
    elif mode == "max":
        pooled = np.where(mask[:, :, None] > 0, hidden, -np.inf).max(axis=1)
    elif mode == "cls":
        pooled = hidden[rows, mask.argmax(axis=1)]
    elif mode == "last":
        pooled = hidden[rows, mask.shape[1] - 1 - mask[:, ::-1].argmax(axis=1)]
    else:
        raise UnsupportedGraphError(
            f"pool: no pooling mode '{mode}'",
            evidence=f"the artifact's manifest names '{mode}'",
            fix=nearest(mode, MODES),
        )
    pooled[counts == 0] = 0.0
    vectors: Floats = pooled.astype(np.float32, copy=False)
    return vectors


def without_prompt(mask: Ints, tokens: int) -> Ints:
    """The mask without a prompt's tokens: what sentence-transformers pools over.

    Source: `include_prompt=False` of sentence-transformers' `Pooling`.

    Args:
        mask: int64 [batch, sequence], padding on the right.
        tokens: how many columns become 0, from the first.

    Returns:
        int64 [batch, sequence]; `mask` itself for no token.
    """
    if tokens == 0:
        return mask
    kept = mask.copy()
    kept[:, :tokens] = 0
    return kept


def _masked_sum(hidden: Floats, mask: Ints) -> Floats:
    """Sum of the token vectors, each times its number in `mask`: float32 [batch, dim].

    Token after token in float32, BLOCK of them, the blocks in float64: padding to the right, other
    texts of the batch, threads and processors change no bit. A BLAS product did (OpenBLAS on AVX2:
    the same texts in other batches, 15 of 200 values) and was no closer to the float64 sum.
    """
    weights = mask.astype(np.float32)
    summed = np.zeros((hidden.shape[0], hidden.shape[2]), np.float64)
    for begin in range(0, hidden.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        summed += np.einsum("bs,bsd->bd", weights[:, block], hidden[:, block])
    return summed.astype(np.float32)


def mean_of_windows(
    token_vectors: Callable[[slice], Floats], mask: Ints, window_tokens: int
) -> Floats:
    """Mean over the real tokens of texts whose token vectors are made a window at a time.

    Args:
        token_vectors: gives those of some columns, float32 [batch, columns, dim].
        mask: int64 [batch, sequence] of 0 and 1.
        window_tokens: columns at a time, so that memory does not grow with a text's length.

    Returns:
        float32 [batch, dim]; a row without any token gives zeros.
    """
    columns = [slice(at, at + window_tokens) for at in range(0, mask.shape[1], window_tokens)]
    parts = (_masked_sum(token_vectors(part), mask[:, part]) for part in columns)
    summed = functools.reduce(operator.add, (part.astype(np.float64) for part in parts))
    means: Floats = (summed / np.maximum(mask.sum(axis=1), 1)[:, None]).astype(np.float32)
    return means


def mean_by_group(hidden: Floats, group: Ints, groups: int) -> Floats:
    """Mean token vector of each group: what late chunking pools with.

    Args:
        hidden: float32 [sequence, dim].
        group: int64 [sequence], the group of each token, -1 for none.
        groups: how many there are. Each needs a token; the caller has checked that.

    Returns:
        float32 [groups, dim].
    """
    chosen = np.flatnonzero(group >= 0)
    order = chosen[np.argsort(group[chosen], kind="stable")]
    first = np.searchsorted(group[order], np.arange(groups))
    sums = np.add.reduceat(hidden[order], first, axis=0, dtype=np.float64)
    counts = np.bincount(group[order], minlength=groups)[:, None]
    means: Floats = (sums / counts).astype(np.float32)
    return means


def finish(
    vectors: Floats, *, dimensions: int | None, normalize: bool, cut_last: bool = False
) -> Floats:
    """Cut vectors to their first columns, then L2-normalise if asked.

    Cutting comes first: a cut unit vector is shorter than 1.

    Args:
        vectors: float32 [n, dim].
        dimensions: columns to keep, None for all.
        normalize: to length 1. Norms are clamped at 1e-12, so a zero vector stays zero.
        cut_last: cut after normalising, as sentence-transformers' `truncate_dim` does.

    Returns:
        float32 [n, min(dim, dimensions)].
    """
    finished = vectors if dimensions is None or cut_last else vectors[:, :dimensions]
    if normalize:
        finished = finished / np.maximum(np.linalg.norm(finished, axis=1, keepdims=True), _MIN_NORM)
    if cut_last and dimensions is not None:
        finished = finished[:, :dimensions]
    return finished.astype(np.float32, copy=False)
