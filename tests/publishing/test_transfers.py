"""transfer: all at once, counted together, stopped together."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from jexport.publishing.transfers import TransferControl, run_parallel


def test_all_run_and_are_counted() -> None:
    shown: list[tuple[int, int]] = []
    jobs = [lambda line: line.moved(10) for _ in range(20)]
    run_parallel(jobs, threads=4, total_bytes=200, show=lambda *far: shown.append(far))
    assert shown[-1] == (200, 200)


def test_they_run_at_once_and_no_more_than_asked() -> None:
    both = threading.Barrier(3, timeout=10)
    run_parallel([lambda line: both.wait()] * 3, threads=3, total_bytes=0, show=lambda *far: None)  # type: ignore[list-item,return-value]
    now, most = [0], [0]

    def job(line: TransferControl) -> None:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.02)
        now[0] -= 1

    run_parallel([job] * 6, threads=2, total_bytes=0, show=lambda *far: None)
    assert most[0] == 2


@pytest.mark.parametrize("how", ["job", "show"])
def test_the_first_error_stops_the_others(how: str) -> None:
    """Also a pause of a minute, and Ctrl-C, which show() may raise."""
    ended: list[str] = []

    def resting(line: TransferControl) -> None:
        try:
            line.sleep(60)
        finally:
            ended.append("rest")

    def moving(line: TransferControl) -> None:
        try:
            while True:
                line.moved(1)
                time.sleep(0.01)
        finally:
            ended.append("move")

    def breaks(line: TransferControl) -> None:
        time.sleep(0.05)
        if how == "job":
            raise ValueError("broken")

    def show(*far: Any) -> None:
        if how == "show":
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises((ValueError, KeyboardInterrupt)):
        run_parallel([resting, moving, breaks], threads=3, total_bytes=1, show=show)
    assert time.monotonic() - begin < 10
    assert sorted(ended) == ["move", "rest"]
