"""An opened engine for any number of threads: in turn, halved where memory ends, closed once.

Knows no text: it takes padded batches of token ids. Which rows run together is planned before it
(batches.py), and joined across threads here (combine.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from jexport.errors import DeviceMemoryError
from jexport.runtime.batches import plan
from jexport.runtime.combine import Combiner, Ids, OutputRequest
from jexport.runtime.pool import Floats
from jexport.types import Batching, Runner

Pass: TypeAlias = Callable[[Runner, Ids, tuple[int, int], OutputRequest], Floats]
"""One forward pass with a runner: the vectors of these rows, padded to that shape."""

Shape: TypeAlias = tuple[int, int]

MANY = 32
"""Batches in one call from which opening streams pays: OpenVINO took 13 batches' time to open
MiniLM again, and saved about a quarter of each batch from then on."""


class DeviceMemoryWarning(UserWarning):
    """A batch did not fit the device's memory and ran in two halves, as will those after it."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a target opened.

    Args:
        runner: the one that a single batch goes through.
        streams: opens runners that take a batch each at the same time, or none.
        release: frees them all.
    """

    runner: Runner
    streams: Callable[[], Sequence[Runner]] | None = None
    release: Callable[[], None] | None = None


class Engine:
    """Runs batches from any thread until it is closed."""

    def __init__(self, opened: Opened, run: Pass, batching: Batching, *, max_tokens: int) -> None:
        """Take what was opened, and how a batch is run with one of its runners."""
        self._opened: Opened | None = opened
        self._run = run
        self._batching = batching
        self._max_tokens = max_tokens
        self._streams: Sequence[Runner] = ()
        self._streams_asked = False
        self._half_tokens = 0  # of a batch that runs whole, once one did not fit; 0: none yet
        self.stale = False
        self._make_locks()

    def _make_locks(self) -> None:
        self._state = threading.Condition()
        self._opening = threading.Lock()
        self._passes = 0
        self._combiner = self._new_combiner()

    def _new_combiner(self) -> Combiner:
        return Combiner(
            lambda ids, shape, request: self._pass(None, ids, shape, request),
            lambda lengths, limit: plan(lengths, self._batching, limit, self._max_tokens),
            slots=max(1, self._batching.in_flight),
        )

    def forked(self, *, again: bool) -> None:
        """In a child that was forked: locks of its own, for a thread of the parent may hold those.

        Args:
            again: never touch the parent's engine any more, for it will be opened again: its
                threads do not exist here. It is kept, too, since freeing it would wait for them.
        """
        if again and not self.stale:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object((self._opened, self._streams)))
            self.stale = True
        self._make_locks()

    def close(self) -> None:
        """Free the engine once the passes that run have ended. Closing twice is harmless."""
        with self._state:
            opened, self._opened = self._opened, None
            while self._passes:
                self._state.wait()
            self._streams = ()
            self._combiner = self._new_combiner()  # the old one's threads end with it
        if opened is not None and opened.release is not None and not self.stale:
            opened.release()

    def check_open(self) -> None:
        """Refuse a closed engine.

        Raises:
            RuntimeError: it is closed.
        """
        if self._opened is None:
            raise RuntimeError("this Embedder is closed")

    def streams(self, batches: int) -> Sequence[Runner | None]:
        """As many as there may be batches at once, to be given to `run`.

        Args:
            batches: how many are coming; streams are opened, once, where they are many.

        Returns:
            Streams, at least one; None is the one runner.
        """
        if batches >= MANY:
            with self._opening:
                opened = self._opened
                if not self._streams_asked and opened is not None and opened.streams is not None:
                    self._streams_asked = True
                    with self.in_use():
                        self._streams = opened.streams()
        # One batch goes through the runner that gives it every core.
        if batches > 1 and self._streams:
            return self._streams
        return (None,) * max(1, min(batches, self._batching.in_flight))

    def run(
        self, stream: Runner | None, ids: Ids, shape: Shape, request: OutputRequest, limit: int
    ) -> Floats:
        """Run a batch on one of the `streams`.

        Args:
            stream: one of them; None for the one runner, where threads' batches are joined.
            ids: token ids of each row, int64 [tokens].
            shape: (rows, tokens), padding included.
            request: what is asked of the pass.
            limit: padded tokens of one forward pass, for joining what other threads run meanwhile.

        Returns:
            One vector a row: float32 [len(ids), dim].

        Raises:
            RuntimeError: the engine is closed.
            DeviceMemoryError: memory suffices neither for the batch nor for half its rows.
        """
        if stream is None:
            return self._combiner.run(ids, shape, request, limit)
        return self._pass(stream, ids, shape, request)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Runner]:
        """The one runner; the engine stays open meanwhile. RuntimeError when it is closed."""
        with self._state:
            self.check_open()
            opened = cast(Opened, self._opened)
            self._passes += 1
        try:
            yield opened.runner
        finally:
            with self._state:
                self._passes -= 1
                self._state.notify_all()

    def _pass(
        self, stream: Runner | None, ids: Ids, shape: Shape, request: OutputRequest
    ) -> Floats:
        """One forward pass, or two of half the rows where memory did not suffice for one."""
        with self.in_use() as runner:
            chosen = stream or runner
            whole = not self._half_tokens or shape[0] * shape[1] <= self._half_tokens
            if whole or len(ids) == 1:
                try:
                    return self._run(chosen, ids, shape, request)
                except DeviceMemoryError as error:
                    if len(ids) == 1:
                        raise _still_full(shape, error) from error
                    self._halve(shape, error)
            middle = (len(ids) + 1) // 2
            half = (max(middle, (shape[0] + 1) // 2), shape[1])
            try:
                parts = [
                    self._run(chosen, part, half, request) for part in (ids[:middle], ids[middle:])
                ]
            except DeviceMemoryError as error:
                raise _still_full(half, error) from error
            return np.concatenate(parts)

    def _halve(self, shape: Shape, error: DeviceMemoryError) -> None:
        """Run batches of this size in halves from now on, and say so the first time."""
        with self._state:
            first = not self._half_tokens
            if first:
                self._half_tokens = max(1, shape[0] * shape[1] // 2)
        if first:
            warnings.warn(
                f"a batch of {shape[0]} x {shape[1]} tokens does not fit the device's memory "
                f"({error.evidence.splitlines()[0]}): from now on such batches run in two halves. "
                f"max_batch_tokens={self._half_tokens} (--batch-tokens) asks for them at once",
                DeviceMemoryWarning,
                stacklevel=2,
            )


def _still_full(shape: Shape, error: DeviceMemoryError) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the device's memory is full at {shape[0]} x {shape[1]} tokens",
        evidence=error.evidence,
        fix="use a smaller max_batch_tokens (--batch-tokens), cut long texts, or free the device's "
        "memory that other programs hold",
    )


def only(runner: Runner, output: str) -> Runner:
    """The runner asked for one output alone, where it can be.

    Args:
        runner: of a target.
        output: of the graph.

    Returns:
        A runner of that output, or `runner` itself.
    """
    ask: Any = getattr(runner, "only", None)
    return runner if ask is None else cast(Runner, ask((output,)))
