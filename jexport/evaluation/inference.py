"""Token ids through a runner, in batches and alone -> one array a text.

Knows no text, no reference and no gate.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jexport.errors import ParityError
from jexport.flow import Runner, TensorSpec

BATCH_TOKENS = 1024
ALONE_TEXTS = 48
"""Texts that are also run alone, to see whether a text's vector depends on its batch."""


class Counter:
    """Tells how many tokens of all have been through a runner."""

    def __init__(self, total: int, progress: Callable[[int, int], None]) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, tokens: int) -> None:
        """So many more are done."""
        self.done += tokens
        self.progress(self.done, self.total)


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """Places from the shortest to the longest, evenly: the longest cost most of the time."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    steps = np.linspace(0, len(order) - 1, num=min(count, len(order)))
    return sorted({order[int(step)] for step in steps})


def batches_of(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows in batches of neighbours in length, padded to the longest: at most BATCH_TOKENS."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    batches: list[list[int]] = []
    for row in order:
        # sorted: this row is the longest so far
        if batches and len(ids[row]) * (len(batches[-1]) + 1) <= BATCH_TOKENS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def outputs(
    forward: Runner,
    ids: Sequence[Sequence[int]],
    specs: Sequence[TensorSpec],
    pad_id: int,
    count: Counter,
    at_once: int = 1,
) -> dict[str, list[np.ndarray]]:
    """Per output name, one array a text: token vectors [tokens, hidden] or a vector [dimension].

    at_once: batches in flight; what is in a batch does not depend on it.
    """
    found: dict[str, list[Any]] = {spec.name: [None] * len(ids) for spec in specs}

    def answer(rows: list[int]) -> dict[str, list[np.ndarray]]:
        return _forward(forward, [ids[row] for row in rows], specs, pad_id)

    batches = batches_of(ids)
    with ThreadPoolExecutor(at_once) as pool:
        for rows, answers in zip(batches, mapped(pool, answer, batches, at_once), strict=True):
            for name, values in answers.items():
                for row, value in zip(rows, values, strict=True):
                    found[name][row] = value
            count.add(sum(len(ids[row]) for row in rows))
    return found


def mapped(
    pool: ThreadPoolExecutor, answer: Callable[[Any], Any], batches: Sequence[Any], at_once: int
) -> Iterator[Any]:
    """The answers in order, at most `at_once` batches begun beyond the one that is waited for."""
    if at_once == 1:
        yield from map(answer, batches)
        return
    waiting: deque[Future[Any]] = deque()
    for batch in batches:
        waiting.append(pool.submit(answer, batch))
        if len(waiting) > at_once:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def alone_and_batched(
    forward: Runner,
    ids: Sequence[Sequence[int]],
    specs: Sequence[TensorSpec],
    pad_id: int,
    made: Mapping[str, list[np.ndarray]],
) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """Per output name, up to ALONE_TEXTS texts run alone, and the same texts as run in a batch.

    Only texts that had neighbours count; when none had, the two shortest are batched for this.
    """
    rows = [row for batch in batches_of(ids) if len(batch) > 1 for row in batch]
    if rows:
        rows = [rows[place] for place in spread([len(ids[row]) for row in rows], ALONE_TEXTS)]
        batched = {name: [values[row] for row in rows] for name, values in made.items()}
    else:
        rows = sorted(range(len(ids)), key=lambda row: len(ids[row]))[:2]
        batched = _forward(forward, [ids[row] for row in rows], specs, pad_id)
    alone: dict[str, list[np.ndarray]] = {spec.name: [] for spec in specs}
    for row in rows:
        for name, values in _forward(forward, [ids[row]], specs, pad_id).items():
            alone[name] += values
    return alone, batched


def _forward(
    forward: Runner, ids: Sequence[Sequence[int]], specs: Sequence[TensorSpec], pad_id: int
) -> dict[str, list[np.ndarray]]:
    """One batch; per output name one array a text, padding cut off. Raises ParityError."""
    feed = _padded(ids, pad_id)
    shape = feed["input_ids"].shape
    try:
        answer = forward(feed)
    except Exception as error:
        error.add_note(f"validate: while running a batch of shape {list(shape)}")
        raise
    found = {}
    for spec in specs:
        if spec.name not in answer:
            raise ParityError(
                f"validate: output '{spec.name}' is missing",
                evidence=f"the runner gave: {', '.join(answer) or 'nothing'}",
                fix="build again; if it stays, report this model",
            )
        value = np.asarray(answer[spec.name], dtype=np.float32)
        sizes: dict[int | str, int] = dict(zip(("batch", "sequence"), shape, strict=True))
        wanted = tuple(sizes.get(size, size) for size in spec.shape)
        if value.shape != wanted:
            raise ParityError(
                f"validate: output '{spec.name}' has another shape than it should",
                evidence=f"{list(value.shape)} instead of {list(wanted)}",
                fix="build again; if it stays, report this model",
            )
        hidden = value.ndim == 3
        found[spec.name] = [
            value[row, : len(tokens)].copy() if hidden else value[row]
            for row, tokens in enumerate(ids)
        ]
    return found


def _padded(ids: Sequence[Sequence[int]], pad_id: int) -> dict[str, np.ndarray]:
    longest = max(map(len, ids))
    input_ids = np.full((len(ids), longest), pad_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for row, tokens in enumerate(ids):
        input_ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}
