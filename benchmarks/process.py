"""A command in a process of its own: its time, its peak memory, what it printed."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def measured(*command: str) -> tuple[float, float, str]:
    """Run python with these words; wall seconds, peak resident GB (10^9 bytes), its stdout."""
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e9, output
