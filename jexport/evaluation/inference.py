"""Many texts through something that takes batches: which go together, how many at once, how far.

Knows no text, no engine and no reference: only lengths and rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

BATCH_TOKENS = 1024

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """Places from the shortest to the longest, evenly: the longest cost most of the time."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    steps = np.linspace(0, len(order) - 1, num=min(count, len(order)))
    return sorted({order[int(step)] for step in steps})


def batches_of(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in batches of neighbours in length, padded to the longest: at most BATCH_TOKENS."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    batches: list[list[int]] = []
    for row in order:
        # sorted: this row is the longest so far
        if batches and lengths[row] * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def mapped(work: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> Iterator[Result]:
    """`work` of each item, in order; at most `at_once` begun beyond the one that is waited for.

    What is in an item does not depend on at_once, so neither does a result.
    """
    if at_once == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
