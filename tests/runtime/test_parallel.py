"""jexport.runtime.parallel: order, errors and early ends with several batches at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from jexport.runtime.parallel import in_order
from jexport.types import Runner, Tensors


class Stream:
    """A Runner that sleeps for as many milliseconds as it is told and gives back the number."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.threads: set[int] = set()
        self._busy = threading.Lock()

    def __call__(self, feed: Tensors) -> Tensors:
        assert self._busy.acquire(blocking=False), "two items in one stream"
        try:
            self.threads.add(threading.get_ident())
            number = int(feed["number"])
            self.ran.append(number)
            time.sleep(number % 7 / 1000)
            if number < 0:
                raise ArithmeticError(f"item {number}")
            return {"number": np.array(number * 10)}
        finally:
            self._busy.release()

    @property
    def busy(self) -> bool:
        return self._busy.locked()


def work(stream: Runner, item: int) -> int:
    return int(stream({"number": np.array(item)})["number"])


def ran(streams: Sequence[Stream]) -> list[int]:
    return sorted(number for stream in streams for number in stream.ran)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    streams = [Stream() for _ in range(count)]
    items = [int(n) for n in np.random.default_rng(0).permutation(60)]
    assert list(in_order(items, streams, work)) == [item * 10 for item in items]
    assert ran(streams) == sorted(items)
    assert all(stream.ran for stream in streams)
    assert list(in_order([], streams, work)) == []


def test_streams_run_at_the_same_time() -> None:
    together = threading.Barrier(3)

    def meet(stream: Runner, item: int) -> int:
        together.wait(timeout=30)
        return item

    assert list(in_order(range(6), [Stream(), Stream(), Stream()], meet)) == list(range(6))


def test_one_stream_stays_in_the_callers_thread() -> None:
    stream = Stream()
    results = in_order([1, 2, 3], [stream], work)
    assert next(results) == 10
    assert stream.ran == [1], "nothing runs before it is asked for"
    assert list(results) == [20, 30]
    assert stream.threads == {threading.get_ident()}


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_comes_in_its_items_place(count: int) -> None:
    streams = [Stream() for _ in range(count)]
    seen: list[int] = []
    results = in_order([6, 5, 1, -3, *range(10, 200)], streams, work)
    with pytest.raises(ArithmeticError, match="item -3"):
        seen.extend(results)
    assert seen == [60, 50, 10]
    before = ran(streams)
    assert not any(stream.busy for stream in streams)
    assert len(before) < 100, "what had not begun is not begun any more"
    time.sleep(0.02)
    assert ran(streams) == before


@pytest.mark.parametrize("count", [1, 2])
def test_whoever_stops_early_leaves_nothing_running(count: int) -> None:
    streams = [Stream() for _ in range(count)]
    results = in_order([6] * 200, streams, work)
    assert [next(results), next(results)] == [60, 60]
    results.close()
    assert not any(stream.busy for stream in streams)
    before = ran(streams)
    assert 2 <= len(before) < 100
    time.sleep(0.02)
    assert ran(streams) == before
    assert not [t for t in threading.enumerate() if t.name.startswith("jexport-stream")]
