"""Texts of many lengths -> batches: which rows run together, and in which shape.

Some engines keep code for what they have seen: OpenVINO mostly for each number of tokens of a pass,
rows x length, whatever the rows are. For those, `Batching.few_shapes` asks for numbers from a
ladder, so that they are few and repeat. This module knows no tokenizer and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jexport.types import Batching

STEPS = 32
"""A ladder's step doubles where a length is more than so many steps: it stays below 1/16 of it."""

PASS_COST = 64
"""A forward pass costs so many parts of the limit besides its tokens."""

PASS_MULTIPLE = 16
"""The first step of the ladder of a pass's tokens: 48 numbers up to 1,024."""

ROW_FACTORS = (1, 3)
"""Rows of a pass are one of these times a power of two."""

FULL_BATCHES = 16
"""Full batches from which the rows that fill up the last ones no longer matter."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One forward pass.

    Args:
        rows: numbers of its texts.
        shape: (rows, tokens), padding included.
    """

    rows: list[int]
    shape: tuple[int, int]


def plan(
    lengths: Sequence[int], batching: Batching, max_batch_tokens: int, max_tokens: int
) -> list[Batch]:
    """Group rows of similar length into batches, longest first.

    Args:
        lengths: tokens of each row.
        batching: how the engine wants its shapes.
        max_batch_tokens: limit of rows x tokens of one batch; a longer row is alone.
        max_tokens: no length is rounded up beyond it.

    Returns:
        Batches with every row in exactly one. Without ladders they are those of `plan_batches`.
    """
    rounded = [max(1, length) for length in lengths]
    if batching.length_multiple > 1:
        rounded = [round_up(length, batching.length_multiple, max_tokens) for length in lengths]
    many = sum(rounded) >= 2 * max_batch_tokens
    if batching.few_shapes == "always" or (many and batching.few_shapes == "many"):
        return _plan_few_shapes(rounded, max_batch_tokens, max_tokens)
    return [
        Batch(rows=rows, shape=(len(rows), max(rounded[row] for row in rows)))
        for rows in plan_batches(rounded, max_batch_tokens)
    ]


def round_up(length: int, multiple: int, max_tokens: int) -> int:
    """A length on the ladder of multiples, its step doubling with the length.

    With a multiple of 1: 1 to 32 are exact, then 34, 36 to 64, 68 to 128. An empty text takes one
    token: engines refuse an empty axis.

    Args:
        length: in tokens.
        multiple: the first step.
        max_tokens: of the model; what is rounded up ends there.

    Returns:
        The length in tokens, at least `length` and 1.
    """
    length = max(1, length)
    step = multiple
    while length > STEPS * step:
        step *= 2
    return max(length, min(-(-length // step) * step, max_tokens))


def _plan_few_shapes(lengths: Sequence[int], max_batch_tokens: int, max_tokens: int) -> list[Batch]:
    """Batches in shapes of `_shapes`, with the fewest tokens, as in `plan_batches`.

    Rows that are left over run together whatever their lengths, so the rest of one length pads no
    batch of its own. 640 docstrings pad 3.1 %, 150 pad 4.3 %, 4,096 texts of 3 to 25 words 0.5 %.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    total = len(order)
    # What a pass costs (28 tokens of MiniLM in fp32, 60 in int8) counts for less where a call is
    # neither so small that passes are most of it nor so large that little is padded anyway: there
    # small passes for what is left over would only be more shapes, so the smallest grows.
    full_batches = sum(lengths) // max_batch_tokens
    least = max_batch_tokens * min(full_batches, 4 * FULL_BATCHES) // (8 * FULL_BATCHES)
    pass_cost = max_batch_tokens / PASS_COST * (1 if 1 <= full_batches < FULL_BATCHES else 2)
    shapes = {n: _shapes(n, max_batch_tokens, max_tokens) for n in set(lengths)}
    cost = [0.0] * (total + 1)  # of the rows from there to the end, cut as well as possible
    chosen = [(0, 0)] * total
    for start in range(total - 1, -1, -1):
        fitting = shapes[lengths[order[start]]]
        best, chosen[start] = min(
            (rows * tokens + cost[min(total, start + rows)], (rows, tokens))
            for rows, tokens in fitting
            if rows * tokens >= least or rows == fitting[-1][0]
        )
        cost[start] = best + pass_cost
    batches: list[Batch] = []
    start = 0
    while start < total:
        rows, tokens = chosen[start]
        batches.append(Batch(rows=order[start : start + rows], shape=(rows, tokens)))
        start += rows
    return batches


def _shapes(length: int, max_batch_tokens: int, max_tokens: int) -> list[tuple[int, int]]:
    """The shapes for rows up to a length: (1, tokens), and what is within the limit.

    rows x tokens is on the ladder of PASS_MULTIPLE, or tokens is the model's limit.
    """
    shapes = []
    for rows in sorted(factor << power for factor in ROW_FACTORS for power in range(16)):
        if rows > 1 and rows * length > max_batch_tokens:
            break
        tokens = 0
        total = rows * length
        while total != rows * tokens:
            tokens = -(-total // rows)
            total = round_up(rows * tokens, PASS_MULTIPLE, rows * max_tokens)
        if rows == 1 or total <= max_batch_tokens:
            shapes.append((rows, tokens))
    return shapes


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Group rows of similar length so that rows x longest <= max_batch_tokens.

    Of all cuts of the rows sorted by length, it takes the one with the fewest tokens, padding
    included, where each batch costs 1/PASS_COST of the limit on top: padding [500, 10] doubles the
    work. On 1,500 mixed texts it padded 0.3 % (filling each batch to the limit: 1.0 %), in 5 ms.

    Args:
        lengths: tokens of each row.
        max_batch_tokens: padded tokens of one batch; a row over the limit is alone.

    Returns:
        The row numbers of each batch, longest first; every row is in exactly one.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cost = np.zeros(len(order) + 1)  # of the first n rows in that order, cut as well as possible
    begin = [0] * (len(order) + 1)  # where the last batch of that cut begins
    for stop, row in enumerate(order, 1):
        longest = max(1, lengths[row])
        low = max(0, stop - max(1, max_batch_tokens // longest))
        candidates = cost[low:stop] + np.arange(stop - low, 0, -1) * longest
        best = int(candidates.argmin())
        begin[stop] = low + best
        cost[stop] = candidates[best] + max_batch_tokens / PASS_COST
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[begin[stop] : stop])
        stop = begin[stop]
    return batches
