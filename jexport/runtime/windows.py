"""Many texts, a window at a time: tokenised, planned into batches, handed on while more are read.

So memory does not grow with the number of texts, and an engine that computes elsewhere has work
while the next texts are tokenised. Knows no tokenizer and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from jexport.runtime.batches import Batch
from jexport.runtime.combine import Ids
from jexport.runtime.inference import TextBatch, plan_texts
from jexport.runtime.parallel import submit
from jexport.runtime.pool import Ints

WINDOW = 4096
"""Texts of one `encode` that are tokenised, sorted and batched together: memory does not grow with
their number, and padding hardly changes beyond it."""

FIRST_WINDOW = 256
"""Where tokenising overlaps with running, windows begin with so many texts and double up to WINDOW:
the device has work as soon as these are tokenised."""


class Window(NamedTuple):
    """Texts that were tokenised together.

    Args:
        start: number of the first.
        ids: token ids of each.
        windows: how many come, this one included.
    """

    start: int
    ids: Ids
    windows: int


def tokenised(
    texts: int, tokenise: Callable[[int, int], Ids], *, ahead: bool
) -> Generator[Window, None, None]:
    """Token ids of the texts, window by window.

    Args:
        texts: how many there are.
        tokenise: gives the ids of the texts from a first number to before a last.
        ahead: the next window is tokenised in a thread while one is used. On a CPU there is nothing
            to gain: tokenising takes every core, as running does.

    Yields:
        The windows, in the order of the texts.
    """
    spans = _spans(texts, FIRST_WINDOW if ahead else WINDOW)

    def one(span: tuple[int, int]) -> Window:
        return Window(start=span[0], ids=tokenise(*span), windows=len(spans))

    if len(spans) <= 1 or not ahead:
        yield from map(one, spans)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="jexport-tokenise") as thread:
        coming = submit(thread, one, spans[0])
        for span in spans[1:]:
            window, coming = coming.result(), submit(thread, one, span)
            yield window
        yield coming.result()


def planned(
    windows: Iterator[Window], plan: Callable[[Sequence[int]], list[Batch]]
) -> tuple[int, Iterator[TextBatch[Ints]]]:
    """Batches of the texts, planned window by window.

    Args:
        windows: what `tokenised` gives.
        plan: the batches of texts of these lengths.

    Returns:
        About how many batches there are, and these; each window is read when its turn comes.
    """

    def batches_of(window: Window) -> list[TextBatch[Ints]]:
        return plan_texts(window.ids, plan, first_row=window.start)

    first = next(windows, None)
    if first is None:
        return 0, iter(())
    begun = batches_of(first)

    def all_batches() -> Iterator[TextBatch[Ints]]:
        yield from begun
        for window in windows:
            yield from batches_of(window)

    return len(begun) * first.windows, all_batches()


def _spans(total: int, first: int) -> list[tuple[int, int]]:
    """Begin and end of each window: `first` texts, then twice as many, up to WINDOW."""
    spans: list[tuple[int, int]] = []
    start, size = 0, first
    while start < total:
        spans.append((start, min(start + size, total)))
        start, size = start + size, min(2 * size, WINDOW)
    return spans
