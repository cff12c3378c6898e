"""jexport.runtime.combine: calls of many threads run together, each gets its own vectors."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from jexport.runtime.batches import plan
from jexport.runtime.combine import Combiner, Ids, OutputRequest
from jexport.runtime.pool import Floats
from jexport.types import Batching

PLAIN = OutputRequest("last_hidden_state")


class Slow:
    """A forward pass that gives each row's sum, takes 5 ms and remembers its shapes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.at_once = self.most_at_once = 0
        self.fails: Callable[[Ids], BaseException | None] = lambda ids: None

    def __call__(self, ids: Ids, shape: tuple[int, int], request: OutputRequest) -> Floats:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.shapes.append(shape)
        time.sleep(0.005)
        self.at_once -= 1
        error = self.fails(ids)
        if error is not None:
            raise error
        return np.array([[one.sum()] for one in ids], dtype=np.float32)


def make(slow: Slow, slots: int = 1) -> Combiner:
    def planner(lengths: Sequence[int], limit: int) -> object:
        return plan(lengths, Batching(), limit, 512)

    return Combiner(slow, planner, slots=slots)  # type: ignore[arg-type]


def row(value: int, tokens: int = 4) -> Ids:
    return [np.full(tokens, value, dtype=np.int32)]


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert not any(one.is_alive() for one in threads)


@pytest.mark.parametrize("slots", [1, 2])
def test_threads_are_joined_and_get_their_own(slots: int) -> None:
    slow, wrong = Slow(), []
    combiner = make(slow, slots)

    def work(number: int) -> None:
        for turn in range(20):
            value = number * 100 + turn
            tokens = 1 + value % 7
            got = combiner.run(row(value, tokens), (1, tokens), PLAIN, 1024)
            if got.tolist() != [[value * tokens]]:
                wrong.append((value, got))

    in_threads(12, work)
    assert not wrong
    assert slow.most_at_once <= slots
    assert len(slow.shapes) < 240 / 2  # passes, for 240 calls


def test_one_caller_runs_at_once_and_as_it_is() -> None:
    slow = Slow()
    combiner = make(slow)
    for tokens in (3, 5, 9):
        combiner.run(row(1, tokens), (2, 16), PLAIN, 1024)
    assert slow.shapes == [(2, 16)] * 3


def test_what_does_not_fit_or_differs_is_not_joined() -> None:
    slow = Slow()
    combiner = make(slow)

    def work(number: int) -> None:
        request = OutputRequest("last_hidden_state", skip=number % 2)
        combiner.run(row(number, 10), (1, 10), request, 20)

    in_threads(8, work)
    assert all(rows * tokens <= 20 for rows, tokens in slow.shapes)


def test_an_error_reaches_only_the_call_that_causes_it() -> None:
    slow = Slow()
    slow.fails = lambda ids: ArithmeticError("13") if any(one[0] == 13 for one in ids) else None
    combiner, results = make(slow), {}

    def work(number: int) -> None:
        for _ in range(5):
            try:
                results[number] = combiner.run(row(number), (1, 4), PLAIN, 1024).tolist()
            except ArithmeticError as error:
                results[number] = str(error)

    in_threads(16, work)
    assert results == {number: [[4.0 * number]] for number in range(16)} | {13: "13"}


def test_an_interrupted_leader_leaves_the_others_their_vectors() -> None:
    """Ctrl-C comes to whichever thread leads; what it was running for others runs again."""
    slow, interrupted = Slow(), []
    done: dict[int, object] = {}

    def fails(ids: Ids) -> BaseException | None:
        if len(ids) > 2 and not interrupted:
            interrupted.append(threading.get_ident())
            return KeyboardInterrupt()
        return None

    slow.fails = fails
    combiner = make(slow)

    def work(number: int) -> None:
        for _ in range(4):
            try:
                done[number] = combiner.run(row(number), (1, 4), PLAIN, 1024).tolist()
            except KeyboardInterrupt:
                done[number] = "interrupted"
                return

    in_threads(10, work)
    assert len(interrupted) == 1
    assert list(done.values()).count("interrupted") == 1
    assert all(done[n] in ("interrupted", [[4.0 * n]]) for n in range(10))
    assert combiner.run(row(3), (1, 4), PLAIN, 1024).tolist() == [[12.0]]


def test_joined_passes_run_in_one_thread_that_ends_with_it() -> None:
    names = set[str]()

    def forward(ids: Ids, shape: tuple[int, int], request: OutputRequest) -> Floats:
        if len(ids) > 1:
            names.add(threading.current_thread().name)
        time.sleep(0.005)
        return np.ones((len(ids), 1), dtype=np.float32)

    def use() -> None:
        combiner = Combiner(
            forward, lambda lengths, limit: plan(lengths, Batching(), limit, 512), slots=1
        )

        def work(number: int) -> None:
            for _ in range(20):
                combiner.run(row(number), (1, 4), PLAIN, 1024)

        in_threads(8, work)

    use()
    assert len(names) == 1
    gc.collect()
    for one in threading.enumerate():
        if one.name in names:
            one.join(10)
            assert not one.is_alive()


def test_threads_may_outlive_the_main_one() -> None:
    """Python starts no thread any more once the main one has ended; so for batches at once."""
    script = """
import threading, time
import numpy as np
from jexport.runtime.batches import plan
from jexport.runtime.combine import Combiner, OutputRequest
from jexport.runtime.parallel import in_order
from jexport.types import Batching

def forward(ids, shape, request):
    time.sleep(0.005)
    return np.ones((len(ids), 1), dtype=np.float32)

def forward_batch(stream, item):
    return stream * item

combiner = Combiner(forward, lambda lengths, limit: plan(lengths, Batching(), limit, 512), slots=1)

def work():
    threading.main_thread().join()
    for _ in range(20):
        combiner.run([np.ones(4, dtype=np.int32)], (1, 4), OutputRequest("o"), 1024)
    assert list(in_order(range(20), [2, 2], forward_batch)) == list(range(0, 40, 2))
    print("done", flush=True)

for _ in range(6):
    threading.Thread(target=work).start()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout.count("done") == 6, run.stderr
