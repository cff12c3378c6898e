"""Clocks and meters: sides in turn, one call's percentiles, memory, a large matrix product."""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096
SAMPLE_S = 0.002


class Deadline:
    """How much of a run's time is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds; negative when it is over."""
        return self._end - time.monotonic()


@dataclass(kw_only=True)
class Rounds:
    """Seconds of each side in each round, and why a side is not among them."""

    seconds: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)


def in_turn(
    sides: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float, warm: bool = True
) -> Rounds:
    """Run the sides one after another in each round; at least one round, then until time is up.

    warm: one round before that does not count. A side that raises is left out from then on, and
    its error is kept.
    """
    result = Rounds(seconds={name: [] for name in sides})
    end = time.monotonic() + seconds
    for number in range(rounds + warm):
        counted = number >= warm
        if number > warm and time.monotonic() > end:
            break
        for name, run in sides.items():
            if name in result.failed:
                continue
            begin = time.perf_counter()
            try:
                run()
            except Exception as error:
                result.failed[name] = one_line(error)
                continue
            if counted:
                result.seconds[name].append(time.perf_counter() - begin)
    return result


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def percentile(seconds: list[float], share: float) -> float:
    """The value that `share` of the runs do not exceed (the nearest rank)."""
    ranked = sorted(seconds)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def median(seconds: list[float]) -> float:
    """The usual median."""
    return statistics.median(seconds)


class Memory:
    """What is used of the device's memory by everybody, or of this process's, in bytes."""

    def __init__(self, provider: str) -> None:
        self.provider = provider

    def used(self) -> int:
        """On CUDA total less free, as the driver says; on a CPU the resident set."""
        if self.provider == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info()
            return int(total - free)
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES

    def give_back(self) -> None:
        """Free what torch keeps for later, so that it is not counted as another side's."""
        if self.provider == "cuda":
            import torch

            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def watched(self, *, sampled: bool = True) -> Iterator[list[int]]:
        """Sample meanwhile; the list's one number is the highest use at the end.

        sampled: False asks before and after alone, as calls of another thread may spoil the capture
        of a CUDA graph.
        """
        highest = [self.used()]
        if not sampled:
            yield highest
            highest[0] = max(highest[0], self.used())
            return
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(SAMPLE_S):
                highest[0] = max(highest[0], self.used())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield highest
        finally:
            stop.set()
            thread.join()
            highest[0] = max(highest[0], self.used())


class MemoryOf:
    """Peak memory of each side, where only one of them acts at a time.

    What changes while a side opens or runs is its own; what torch gives back afterwards is not
    kept. A side's peak is what it holds plus the highest rise meanwhile.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._held: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    @contextlib.contextmanager
    def acting(self, side: str, *, sampled: bool = True) -> Iterator[None]:
        """What happens in the block is that side's. sampled: see Memory.watched."""
        self._memory.give_back()
        before, held = self._memory.used(), self._held.get(side, 0)
        with self._memory.watched(sampled=sampled) as highest:
            yield
        self.peak[side] = max(self.peak.get(side, 0), held + highest[0] - before)
        self._memory.give_back()
        self._held[side] = held + self._memory.used() - before


def matmul_tflops(provider: str, size: int, *, seconds: float) -> float:
    """TFLOP/s of a square fp16 matrix product in torch, the best of rounds of ten."""
    import torch

    place = torch.device(provider)
    first, second = (torch.randn(size, size, dtype=torch.float16, device=place) for _ in "ab")
    best, end = float("inf"), time.monotonic() + seconds
    for number in range(100):
        if number > 1 and time.monotonic() > end:
            break
        begin = time.perf_counter()
        for _ in range(10):
            torch.matmul(first, second)
        synchronize(provider)
        if number:
            best = min(best, (time.perf_counter() - begin) / 10)
    return float(2 * size**3 / best / 1e12)


def synchronize(provider: str) -> None:
    """Wait for the device."""
    if provider == "cuda":
        import torch

        torch.cuda.synchronize()


def card(provider: str) -> dict[str, Any]:
    """The card, its driver and compute capability; empty on a CPU."""
    if provider != "cuda":
        return {}
    import subprocess

    import torch

    major, minor = torch.cuda.get_device_capability()
    about = {
        "name": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": "",
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        about["driver"] = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()
    return about
