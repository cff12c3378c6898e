"""Several batches at once: items -> results in the order of the items, one stream an item.

A stream is something that may run while the others do, such as a `types.Runner`. This module knows
no text and no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

Stream = TypeVar("Stream")
Item = TypeVar("Item")
Result = TypeVar("Result")

P = ParamSpec("P")

AHEAD = 4
"""Items for each stream that are asked for ahead of their turn: a long one holds up no other."""


def submit(
    threads: ThreadPoolExecutor, work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs
) -> Future[Result]:
    """Begin `work` in a thread; do it here, at once, where Python starts no thread any more.

    That is so from the end of the main thread on, while a program's other threads still embed.

    Args:
        threads: where it runs.
        work: to be done.
        args: given to it.
        kwargs: given to it.

    Returns:
        Its result, or what it raised, to come.
    """
    try:
        return threads.submit(work, *args, **kwargs)
    except RuntimeError:
        finished: Future[Result] = Future()
        try:
            finished.set_result(work(*args, **kwargs))
        except BaseException as error:
            finished.set_exception(error)
        return finished


def in_order(
    items: Iterable[Item], streams: Sequence[Stream], work: Callable[[Stream, Item], Result]
) -> Generator[Result, None, None]:
    """`work(stream, item)` of each item; as many at once as there are streams.

    With one stream nothing runs beside the caller. Whoever stops before the end closes the
    generator: items that have not begun never do, and those that have are waited for, so that no
    stream is in use afterwards.

    Args:
        items: asked for a few ahead.
        streams: one or more; each has one item at a time.
        work: what it raises is raised in its item's place.

    Yields:
        A result an item, in the order of the items.
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
            begun.append(submit(threads, one, item))
            if len(begun) >= AHEAD * len(streams):
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
