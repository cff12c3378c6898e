"""Several batches at once: items -> results in the order of the items, one lane an item at a time.

A lane is a `flow.Runner` that may run while the others do. This module knows no text and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

from jexport.flow import Runner

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Sequence[Item], lanes: Sequence[Runner], work: Callable[[Runner, Item], Result]
) -> Generator[Result, None, None]:
    """`work(lane, item)` of each item, in their order; as many at once as there are lanes.

    With one lane nothing runs beside the caller. An exception of `work` is raised in its item's
    place. Whoever stops before the end closes the generator: items that have not begun never do,
    and those that have are waited for, so that no lane is in use afterwards.
    """
    if len(lanes) == 1:
        for item in items:
            yield work(lanes[0], item)
        return
    free: SimpleQueue[Runner] = SimpleQueue()
    for lane in lanes:
        free.put(lane)

    def one(item: Item) -> Result:
        lane = free.get()
        try:
            return work(lane, item)
        finally:
            free.put(lane)

    threads = ThreadPoolExecutor(len(lanes), thread_name_prefix="jexport-lane")
    try:
        yield from threads.map(one, items)
    finally:
        threads.shutdown(cancel_futures=True)
