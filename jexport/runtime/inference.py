"""Token ids of many texts -> batches -> what a model gives for them: the one loop over batches.

The Embedder, int8's statistics and trials, the validation and its reference library go through it;
each brings how one batch is run. Which texts go together, in which order, on how many streams, and
whose result is whose is decided here. Knows no tokenizer and no engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from jexport.runtime.batches import Batch, plan
from jexport.runtime.parallel import in_order
from jexport.types import Batching, Runner, Tensors

BATCH_TOKENS = 1024
"""Padded tokens of a forward pass where nobody waits for it: small batches pad little."""

Ids = TypeVar("Ids", bound=Sequence[int] | NDArray[np.int64])
Stream = TypeVar("Stream")
Result = TypeVar("Result")

Pad = Callable[[Sequence[Sequence[int]]], Mapping[str, NDArray[np.int64]]]
"""Makes a padded batch: int64 [batch, sequence] by input's name."""


@dataclass(frozen=True, kw_only=True)
class TextBatch(Generic[Ids]):
    """Texts of one forward pass.

    Args:
        rows: numbers of the texts.
        ids: token ids of each.
        shape: (rows, tokens), padding included.
    """

    rows: list[int]
    ids: Sequence[Ids]
    shape: tuple[int, int]


def plan_texts(
    ids: Sequence[Ids], planner: Callable[[Sequence[int]], list[Batch]], *, first_row: int = 0
) -> list[TextBatch[Ids]]:
    """Batches of tokenised texts, every text in exactly one.

    Args:
        ids: token ids of each text.
        planner: the batches of texts of these lengths.
        first_row: number of the first text.

    Returns:
        The batches in the planner's order, with numbers and ids of their texts.
    """
    return [
        TextBatch(
            rows=[first_row + row for row in batch.rows],
            ids=[ids[row] for row in batch.rows],
            shape=batch.shape,
        )
        for batch in planner([len(one) for one in ids])
    ]


def plan_by_tokens(
    ids: Sequence[Ids], max_batch_tokens: int = BATCH_TOKENS
) -> list[TextBatch[Ids]]:
    """Batches of neighbours in length for an engine that takes any shape.

    Args:
        ids: token ids of each text.
        max_batch_tokens: padded tokens of one batch; a longer text is alone.

    Returns:
        The batches, longest first.
    """
    longest = max(map(len, ids), default=0)
    return plan_texts(ids, lambda lengths: plan(lengths, Batching(), max_batch_tokens, longest))


def run_batches(
    batches: Iterable[TextBatch[Ids]],
    streams: Sequence[Stream],
    forward: Callable[[Stream, TextBatch[Ids]], Result],
) -> Generator[tuple[TextBatch[Ids], Result], None, None]:
    """Each batch with what `forward` gives for it.

    Args:
        batches: asked for a few ahead where there are several streams.
        streams: as many batches run at once; see parallel.in_order.
        forward: runs one batch on a stream. What it raises is raised in the batch's place.

    Returns:
        A generator of (batch, result), in the order of the batches.
    """
    return in_order(batches, streams, lambda stream, batch: (batch, forward(stream, batch)))


def run_padded(
    runner: Runner, batches: Iterable[TextBatch[Sequence[int]]], *, pad: Pad
) -> Generator[tuple[TextBatch[Sequence[int]], NDArray[np.int64], Tensors], None, None]:
    """Each batch, its attention mask and the graph's outputs, one batch after the other.

    Args:
        runner: runs the graph.
        batches: from `plan_by_tokens`.
        pad: makes a padded batch of the texts of one.

    Yields:
        The batch; int64 [batch, sequence] of 0 and 1; outputs by name, padding included.
    """

    def forward(
        stream: Runner, batch: TextBatch[Sequence[int]]
    ) -> tuple[NDArray[np.int64], Tensors]:
        feeds = pad(batch.ids)
        return feeds["attention_mask"], stream(feeds)

    for batch, (mask, outputs) in run_batches(batches, [runner], forward):
        yield batch, mask, outputs


def in_text_order(
    results: Generator[tuple[TextBatch[Ids], Iterable[Result]], None, None],
    texts: int,
    progress: Callable[[Sequence[int]], None] = lambda rows: None,
) -> list[Result]:
    """What each text got, in the order of the texts.

    Args:
        results: each batch with one result a text of it. Closed whatever `progress` raises, so that
            no stream is in use afterwards.
        texts: how many there are.
        progress: called after each batch with the numbers of its texts.

    Returns:
        A result a text.
    """
    by_row: dict[int, Result] = {}
    with contextlib.closing(results):
        for batch, values in results:
            by_row.update(zip(batch.rows, values, strict=True))
            progress(batch.rows)
    return [by_row[row] for row in range(texts)]
