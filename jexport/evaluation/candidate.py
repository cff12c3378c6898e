"""An artifact before it is one: its engine behind the very Embedder that users open.

What the Embedder returns is validated; what its engine gave meanwhile is kept beside it, for the
comparison of token vectors and of other outputs. Knows no reference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jexport.errors import NotFiniteError, ParityError
from jexport.runtime.embedder import Embedder
from jexport.runtime.inference import (
    BATCH_TOKENS,
    TextBatch,
    in_text_order,
    plan_by_tokens,
    run_batches,
)
from jexport.runtime.pool import Floats
from jexport.runtime.tokenise import TextTokenizer
from jexport.types import Embedding, Runner, Tensors, TensorSpec

ONE_BATCH = 1 << 30
"""Padded tokens of a call of the Embedder: its texts are one batch, which is chosen here."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is validated.

    Args:
        tokenizer: the artifact's.
        open: opens its engine.
        at_once: from how many threads that may be called.
        embedding: how its runtime makes an embedding of token vectors.
        outputs: what its engine gives.
    """

    tokenizer: TextTokenizer
    open: Callable[[], AbstractContextManager[Runner]]
    at_once: int = 1
    embedding: Embedding
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Texts embedded by the runtime.

    Args:
        vectors: float32 [texts, dimension].
        outputs: by name, a float32 array a text: token vectors [tokens, hidden] or a vector
            [dimension].
    """

    vectors: NDArray[np.float32]
    outputs: Mapping[str, list[np.ndarray]]

    def of(self, rows: Sequence[int]) -> Embedded:
        """Some of the texts.

        Args:
            rows: numbers of the texts.

        Returns:
            Their vectors and outputs, in the order of `rows`.
        """
        kept = {name: [values[row] for row in rows] for name, values in self.outputs.items()}
        return Embedded(vectors=self.vectors[list(rows)], outputs=kept)


class Runtime:
    """A candidate that is open. Use through `opened`."""

    def __init__(self, candidate: Candidate, forward: Runner) -> None:
        """Put Embedders before the engine.

        One for each thread: a single one would join what several threads send, and what is in a
        batch would depend on the time.
        """
        self._candidate = candidate
        self._recorder = _Recorder(forward, candidate.outputs)
        self._embedders = [_embedder(candidate, self._recorder) for _ in range(candidate.at_once)]

    def embed(
        self,
        words: Sequence[str],
        ids: Sequence[Sequence[int]],
        use: str,
        *,
        max_batch_tokens: int = BATCH_TOKENS,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> Embedded:
        """Embed texts, a call of the Embedder for each batch.

        Args:
            words: the texts.
            ids: their token ids, as the runtime makes them.
            use: the Embedder's method.
            max_batch_tokens: padded tokens of one batch: 1 for each text alone, ONE_BATCH for all
                together.
            progress: called after each batch with how many tokens it had.

        Returns:
            Vectors and outputs, in the order of the texts.

        Raises:
            ParityError: an output is missing or has another shape, a vector is not finite, or the
                Embedder ran other tokens than `ids`.
        """
        self._recorder.rows = {}

        def answer(embedder: Embedder, batch: TextBatch[Sequence[int]]) -> Floats:
            method = getattr(embedder, use)
            vectors: Floats = method([words[row] for row in batch.rows], max_batch_tokens=ONE_BATCH)
            return vectors

        with _explained():
            vectors = in_text_order(
                run_batches(plan_by_tokens(ids, max_batch_tokens), self._embedders, answer),
                len(words),
                lambda rows: progress(sum(len(ids[row]) for row in rows)),
            )
        kept = [self._recorder.rows.get(tuple(one), {}) for one in ids]
        if not all(kept):
            place = kept.index({})
            raise ParityError(
                "validate: the Embedder runs other tokens than its tokenizer gives",
                evidence=f"text {words[place]!a:.80} by {use}",
                fix="this is a fault of jexport: report it, with this text",
            )
        outputs = {spec.name: [one[spec.name] for one in kept] for spec in self._candidate.outputs}
        return Embedded(vectors=np.stack(vectors), outputs=outputs)


def _embedder(candidate: Candidate, runner: Runner) -> Embedder:
    return Embedder(
        tokenizer=candidate.tokenizer,
        runner=runner,
        embedding=candidate.embedding,
        outputs=[spec.name for spec in candidate.outputs],
    )


def token_ids(candidate: Candidate, words: Sequence[str], use: str) -> list[list[int]]:
    """Token ids of each text as the Embedder gives them to an engine: prompt included, cut.

    The engine is left out, so that every text can be asked for.

    Args:
        candidate: its tokenizer and embedding; its engine is not opened.
        words: the texts.
        use: the Embedder's method.

    Returns:
        The ids of each text.
    """
    listener = _Listener(candidate.outputs)
    method = getattr(_embedder(candidate, listener), use)
    ids = []
    for text in words:
        listener.ids = []
        method(text)
        ids.append(listener.ids)
    return ids


@contextmanager
def opened(candidate: Candidate) -> Iterator[Runtime]:
    """Open the engine.

    Args:
        candidate: what is validated.

    Yields:
        Embedders before the open engine, which is closed at the end.
    """
    with candidate.open() as forward:
        yield Runtime(candidate, forward)


@contextmanager
def _explained() -> Iterator[None]:
    """A NaN is no vector: the comparison says so, with the text that has it."""
    try:
        yield
    except NotFiniteError as error:
        what = f"{error.what}: a NaN or an infinity"
        raise ParityError(what, evidence=error.evidence, fix=error.fix) from error


class _Recorder:
    """A runner that keeps each row of what it gave, by the row's token ids."""

    def __init__(self, forward: Runner, specs: Sequence[TensorSpec]) -> None:
        self._forward, self._specs = forward, specs
        self.rows: dict[tuple[int, ...], dict[str, np.ndarray]] = {}

    def __call__(self, feed: Tensors) -> Tensors:
        ids, mask = feed["input_ids"], feed["attention_mask"].astype(bool)
        try:
            answer = self._forward(feed)
        except Exception as error:
            error.add_note(f"validate: while running a batch of shape {list(ids.shape)}")
            raise
        values = {spec.name: _checked(answer, spec, ids.shape) for spec in self._specs}
        for row, real in enumerate(mask):
            self.rows[tuple(ids[row][real].tolist())] = {
                name: (value[row][real] if value.ndim == 3 else value[row]).copy()
                for name, value in values.items()
            }
        return answer


class _Listener:
    """A runner that computes nothing and keeps the token ids of the text that it was given.

    A long text of a static embedding comes in windows, one after the other.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = specs
        self.ids: list[int] = []

    def __call__(self, feed: Tensors) -> Tensors:
        ids, mask = feed["input_ids"], feed["attention_mask"].astype(bool)
        self.ids += ids[0][mask[0]].tolist()
        sizes = _sizes(ids.shape)
        return {
            spec.name: np.ones(tuple(int(sizes.get(one, one)) for one in spec.shape), np.float32)
            for spec in self._specs
        }


def _sizes(shape: tuple[int, ...]) -> dict[int | str, int]:
    return dict(zip(("batch", "sequence"), shape, strict=True))


def _checked(answer: Tensors, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """An output that is there and has its shape; shape: of the batch, rows and columns."""
    if spec.name not in answer:
        raise ParityError(
            f"validate: output '{spec.name}' is missing",
            evidence=f"the runner gave: {', '.join(answer) or 'nothing'}",
            fix="build again; if it stays, report this model",
        )
    value: NDArray[np.float32] = np.asarray(answer[spec.name], dtype=np.float32)
    sizes = _sizes(shape)
    expected = tuple(sizes.get(size, size) for size in spec.shape)
    if value.shape != expected:
        raise ParityError(
            f"validate: output '{spec.name}' has another shape than it should",
            evidence=f"{list(value.shape)} instead of {list(expected)}",
            fix="build again; if it stays, report this model",
        )
    return value


class StoredIds(TextTokenizer):
    """A tokenizer whose texts are the numbers of token ids that were stored."""

    def __init__(self, tokenizer: TextTokenizer, ids: Sequence[Sequence[int]]) -> None:
        """Take the tokenizer that the ids came from, for its padding and limit."""
        self.__dict__.update(copy.copy(tokenizer.__dict__))
        self._ids = ids

    def token_ids(self, texts: Sequence[str], *, first_index: int = 0) -> list[list[int]]:
        """The stored ids of each number.

        Args:
            texts: the numbers, in digits.
            first_index: not used: TextTokenizer has it for its errors.

        Returns:
            Token ids of each, as they were stored.
        """
        return [list(self._ids[int(text)]) for text in texts]
