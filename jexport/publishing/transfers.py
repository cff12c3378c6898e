"""Several transfers at once, counted together: the first that fails, or Ctrl-C, stops them all.

Knows neither what is moved nor where; progress is told by the thread that called.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeAlias

LOOK_S = 0.1


class Stopped(Exception):
    """Another transfer failed: this one ends, too."""


@dataclass(frozen=True, kw_only=True)
class TransferControl:
    """What a transfer reports and asks. Both raise Stopped once everything stops.

    Args:
        moved: takes how many more bytes were moved; below 0 when it begins anew.
        sleep: a pause of so many seconds that ends when everything stops.
    """

    moved: Callable[[int], None]
    sleep: Callable[[float], None]


Job: TypeAlias = Callable[[TransferControl], None]


def run_parallel(
    jobs: Sequence[Job], *, threads: int, total_bytes: int, show: Callable[[int, int], None]
) -> None:
    """Run all jobs. The first error of one stops the others and is raised.

    Args:
        jobs: what to move.
        threads: how many run at a time.
        total_bytes: of all jobs.
        show: takes the bytes moved so far, and total_bytes.
    """
    lock, stop, counted = threading.Lock(), threading.Event(), [0]

    def moved(count: int) -> None:
        if stop.is_set():
            raise Stopped
        with lock:
            counted[0] += count

    def sleep(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped

    line = TransferControl(moved=moved, sleep=sleep)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="transfer") as pool:
        pending = {pool.submit(job, line) for job in jobs}
        try:
            while pending:
                done, pending = wait(pending, timeout=LOOK_S, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                show(min(counted[0], total_bytes), total_bytes)
        except BaseException:
            stop.set()
            for future in pending:
                future.cancel()
            raise
