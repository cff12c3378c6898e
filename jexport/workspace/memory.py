"""How much memory this process can still get: of the machine, its control groups and its limits.

Knows nothing of what it is wanted for.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

MEMINFO, OWN_GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")

UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number for no limit, and one larger than any memory."""


def available_bytes() -> int | None:
    """The least that any of them leaves; None where none says anything."""
    limits = [one for one in (_machine(), *_groups(), _addresses()) if one is not None]
    return min(limits) if limits else None


def _machine() -> int | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        known = dict(line.split(":", 1) for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    return None


def _groups() -> Iterator[int]:
    """What each control group leaves, from the process's own up to the root that it can see."""
    for line in _lines(OWN_GROUPS):
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            root, most, now = GROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, most, now = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path can be the host's: then only the root is there.
        for folder in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):
                limit = int((folder / most).read_text())  # "max" is no number: no limit
                if limit < UNLIMITED:
                    used = int((folder / now).read_text()) - _file_pages(folder)
                    yield max(limit - max(used, 0), 0)
            if folder == root:
                break


def _file_pages(folder: Path) -> int:
    """Bytes of files that a group has read: counted as used, and given back when wanted."""
    counters = dict(line.split() for line in _lines(folder / "memory.stat"))
    return sum(
        int(counters.get(f"total_{kind}", counters.get(kind, 0)))
        for kind in ("inactive_file", "active_file")
    )


def _addresses() -> int | None:
    """What `ulimit -v` leaves of addresses, of which a build takes more than of memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return max(soft - pages * resource.getpagesize(), 0)
    return soft


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
