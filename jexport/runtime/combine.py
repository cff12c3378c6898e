"""Forward passes for many threads: what waits at the same time runs together, in turn.

A thread that finds the engine free runs its batch at once and as it is: a single caller gets the
bits that it would get without this. While it runs, others wait; whoever is first of them then has
all that wait run, as far as they fit one batch. Joined passes run in a thread of their own, for
engines keep threads and buffers for each thread that calls them: from 16 threads in turn torch had
0.5 of the throughput that it has from one. Knows no engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from jexport.runtime.batches import Batch
from jexport.runtime.parallel import submit
from jexport.runtime.pool import Floats, Ints


class OutputRequest(NamedTuple):
    """What is asked of a pass; only calls that want the same are joined.

    Args:
        output: of the graph.
        skip: tokens at the start of each row that the pooling leaves out.
    """

    output: str
    skip: int = 0


Ids: TypeAlias = Sequence[Ints]
Planner: TypeAlias = Callable[[Sequence[int], int], list[Batch]]
Forward: TypeAlias = Callable[[Ids, tuple[int, int], OutputRequest], Floats]

LINGER_SECONDS = 0.010
"""The longest wait for callers that were together in the pass before: a quarter of that pass, and
not over this; it ends when they are there. Without it the first that comes back runs alone and the
others wait for it. With 2 ms, 16 threads were together in 10s, not in 16s."""


@dataclass(kw_only=True, eq=False)
class Call:
    """One batch that a thread wants run.

    Args:
        ids: token ids of each row, int64 [tokens].
        shape: (rows, tokens), padding included.
        request: what is asked of the pass.
        limit: padded tokens of one forward pass.
        leads: whether its thread is to run what waits.
        taken: whether a leader has it in a pass.
        vectors: float32 [rows, dim] when it is done, None before.
        error: what its pass raised instead.
        wake: set when its thread is to lead, or its vectors or error are there.
    """

    ids: Ids
    shape: tuple[int, int]
    request: OutputRequest
    limit: int
    leads: bool = False
    taken: bool = False
    vectors: Floats | None = None
    error: BaseException | None = None
    wake: threading.Event = field(default_factory=threading.Event)

    def tokens(self) -> int:
        """Padded tokens of the batch."""
        return self.shape[0] * self.shape[1]

    def finished(self) -> bool:
        """Whether its vectors, or its error, are there."""
        return self.vectors is not None or self.error is not None


class Combiner:
    """Runs batches of any number of threads, `slots` at once; those that wait are joined."""

    def __init__(self, forward: Forward, plan: Planner, *, slots: int) -> None:
        """Take the forward pass of one batch, and the planner for joined rows of (lengths, limit).

        slots: forward passes at once.
        """
        self._forward = forward
        self._plan = plan
        self._slots = slots
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="jexport-joined")
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._waiting: list[Call] = []
        self._leaders = 0
        self._together, self._seconds = 1, 0.0  # of the last pass: its calls, its time

    def run(self, ids: Ids, shape: tuple[int, int], request: OutputRequest, limit: int) -> Floats:
        """Run a batch, alone or joined with others that wait.

        It raises what this batch's own forward pass does. An error of a joined pass is nobody's:
        each of its batches is then run alone.

        Args:
            ids: token ids of each row, int64 [tokens].
            shape: (rows, tokens), padding included.
            request: what is asked of the pass.
            limit: padded tokens of one forward pass, joined ones too.

        Returns:
            One vector a row: float32 [len(ids), dim].
        """
        call = Call(ids=ids, shape=shape, request=request, limit=limit)
        with self._lock:
            self._waiting.append(call)
            self._arrived.notify_all()
            call.leads = self._leaders < self._slots
            self._leaders += call.leads
        try:
            while call.leads or not call.finished():
                if call.leads:
                    self._lead(call)
                else:
                    call.wake.wait()
                    call.wake.clear()
        except BaseException:
            self._withdraw(call)
            raise
        if call.error is not None:
            raise call.error
        assert call.vectors is not None
        return call.vectors

    def _lead(self, own: Call) -> None:
        """Run what waits, own first; then the first that still waits leads."""
        group: list[Call] = []
        try:
            group = self._take(own)
            begin = time.perf_counter()
            if len(group) > 1:
                self._run_in_thread(group)
            elif group:
                self._run(group)
            if group:
                with self._lock:
                    self._together, self._seconds = len(group), time.perf_counter() - begin
        finally:
            with self._lock:
                left = [call for call in group if not call.finished() and call is not own]
                for call in left:  # own was interrupted, by Ctrl-C: theirs is still to be run
                    call.taken = False
                self._waiting[:0] = left
                own.leads = False
                self._pass_on()
            for call in group:
                if call.finished() and call is not own:
                    call.wake.set()

    def _pass_on(self) -> None:
        """Make the first that waits the leader, or free the slot. The lock is held."""
        if self._waiting:
            self._waiting[0].leads = True
            self._waiting[0].wake.set()
        else:
            self._leaders -= 1

    def _withdraw(self, call: Call) -> None:
        """Take back a call whose thread was interrupted; if it was to lead, another one does."""
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            if call.leads:
                call.leads = False
                self._pass_on()

    def _take(self, own: Call) -> list[Call]:
        """Own and the waiting calls that fit one pass with it, out of the queue.

        Empty where another leader has taken own already.
        """
        with self._lock:
            if self._together > 1:
                longest = min(self._seconds / 4, LINGER_SECONDS)
                self._arrived.wait_for(lambda: len(self._waiting) >= self._together, longest)
            if own.taken:
                return []
            group, tokens = [own], own.tokens()
            for call in self._waiting:
                fits = tokens + call.tokens() <= own.limit
                alike = (call.request, call.limit) == (own.request, own.limit)
                if call is not own and fits and alike:
                    group.append(call)
                    tokens += call.tokens()
            for call in group:
                call.taken = True
                self._waiting.remove(call)
            return group

    def _run_in_thread(self, group: Sequence[Call]) -> None:
        joined = submit(self._threads, self._run, group)
        try:
            joined.result()
        finally:
            wait([joined])  # after Ctrl-C too: nobody can stop a pass, and its calls are ours

    def _run(self, group: Sequence[Call]) -> None:
        """Fill in the vectors, or the error, of each call."""
        if len(group) > 1:
            try:
                self._run_joined(group)
            except Exception:
                for call in group:
                    call.vectors = None
            else:
                return
        for call in group:
            try:
                call.vectors = self._forward(call.ids, call.shape, call.request)
            except Exception as error:
                call.error = error

    def _run_joined(self, group: Sequence[Call]) -> None:
        ids = [one for call in group for one in call.ids]
        joined: Floats | None = None
        for batch in self._plan([len(one) for one in ids], group[0].limit):
            rows = [ids[row] for row in batch.rows]
            vectors = self._forward(rows, batch.shape, group[0].request)
            if joined is None:
                joined = np.empty((len(ids), *vectors.shape[1:]), dtype=np.float32)
            joined[batch.rows] = vectors
        assert joined is not None
        start = 0
        for call in group:
            call.vectors = joined[start : start + len(call.ids)]
            start += len(call.ids)
