"""Several batches at once: items -> results in the order of the items, one lane an item at a time.

A lane is something that may run while the others do, such as a `types.Runner`. This module knows no
text and no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Lane = TypeVar("Lane")
Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Items for each lane that are asked for ahead of their turn: a long one holds up no other."""


def in_order(
    items: Iterable[Item], lanes: Sequence[Lane], work: Callable[[Lane, Item], Result]
) -> Generator[Result, None, None]:
    """`work(lane, item)` of each item, in their order; as many at once as there are lanes.

    With one lane nothing runs beside the caller. Items are asked for a few ahead. An exception of
    `work` is raised in its item's place. Whoever stops before the end closes the generator: items
    that have not begun never do, and those that have are waited for, so that no lane is in use
    afterwards.
    """
    if len(lanes) == 1:
        for item in items:
            yield work(lanes[0], item)
        return
    free: SimpleQueue[Lane] = SimpleQueue()
    for lane in lanes:
        free.put(lane)

    def one(item: Item) -> Result:
        lane = free.get()
        try:
            return work(lane, item)
        finally:
            free.put(lane)

    threads = ThreadPoolExecutor(len(lanes), thread_name_prefix="jexport-lane")
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(threads.submit(one, item))
            if len(begun) >= AHEAD * len(lanes):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
