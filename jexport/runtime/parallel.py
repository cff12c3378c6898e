"""Several batches at once: items -> results in the order of the items, one stream an item.

A stream is something that may run while the others do, such as a `types.Runner`. This module knows
no text and no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Stream = TypeVar("Stream")
Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 4
"""Items for each stream that are asked for ahead of their turn: a long one holds up no other."""


def in_order(
    items: Iterable[Item], streams: Sequence[Stream], work: Callable[[Stream, Item], Result]
) -> Generator[Result, None, None]:
    """`work(stream, item)` of each item, in their order; as many at once as there are streams.

    With one stream nothing runs beside the caller. Items are asked for a few ahead. An exception of
    `work` is raised in its item's place. Whoever stops before the end closes the generator: items
    that have not begun never do, and those that have are waited for, so that no stream is in use
    afterwards.
    """
    if len(streams) == 1:
        for item in items:
            yield work(streams[0], item)
        return
    free: SimpleQueue[Stream] = SimpleQueue()
    for stream in streams:
        free.put(stream)

    def one(item: Item) -> Result:
        stream = free.get()
        try:
            return work(stream, item)
        finally:
            free.put(stream)

    threads = ThreadPoolExecutor(len(streams), thread_name_prefix="jexport-stream")
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(threads.submit(one, item))
            if len(begun) >= AHEAD * len(streams):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
