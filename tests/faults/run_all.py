"""`make faults`: every step on the disk of a build, one after the other; writes RELIABILITY.md.

Counts of this run only. The tests of this folder do a spread of the same.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from harness import Nursery, failed_at, killed_at, steps  # noqa: E402

PAGE = HERE.parents[1] / "RELIABILITY.md"
HEAD = "# Reliability\n"
NAME = "Builds that are killed, and disks that fail"
SMALL = HERE.parent / "fixtures" / "jina_original_small"
TARGETS = ("hf", "onnx")


def kills(nursery: Nursery, room: Path) -> Iterator[list[str]]:
    for target in TARGETS:
        for warm in (False, True):
            begin, count = time.monotonic(), steps(nursery, target, room, warm)
            for nth in range(1, count + 1):
                killed_at(nursery, target, nth, warm, room)
            yield [
                f"{target}, {'warm' if warm else 'cold'} cache: kill -9 at each write, fsync, "
                "create, rename and removal",
                str(count),
                f"{count} resumed to the same digest, 0 orphans",
                f"{time.monotonic() - begin:.0f}",
            ]


def failures(nursery: Nursery, room: Path) -> Iterator[list[str]]:
    words = {
        "full": "disk full from each step on",
        "broken": "I/O error at each step",
        "short": "short write at each step",
        "read-only": "read-only from each step on",
    }
    for mode, what in words.items():
        begin, count = time.monotonic(), steps(nursery, "hf", room, beside="onnx")
        found = [failed_at(nursery, "hf", "onnx", mode, nth, room) for nth in range(1, count + 1)]
        failed, refused = (sum(values) for values in zip(*found, strict=True))
        yield [
            f"hf beside an onnx artifact: {what}",
            str(count),
            f"{failed} met, {refused} told as errors of jexport's, {count - refused} built all the "
            "same; 0 lost of what was there",
            f"{time.monotonic() - begin:.0f}",
        ]


def written(rows: list[list[str]]) -> str:
    """The page with this section in the place of its old one."""
    head = ["what", "times", "came of it", "seconds"]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * 4, *rows)]
    note = (
        "Each time a build of the small checkpoint in a process of its own, on a disk that a "
        "preloaded library\n(tests/faults/failing_disk.c) has fail or be the last thing that the "
        "process does. validate (and, of onnx,\nexport) hand back what a real build gave; what "
        "they write is written. Then the same build\nagain: its digest is that of an undisturbed "
        "one, and after `gc` nothing is left that is nobody's."
    )
    body = [f"## {NAME}", "", f"`make faults`, {date.today().isoformat()}", "", note, "", *lines]
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else HEAD
    parts = re.split(r"(?m)^(?=## )", text)
    kept = [part.rstrip() for part in parts if not part.startswith(f"## {NAME}\n")]
    return "\n\n".join([*kept, "\n".join(body)]) + "\n"


def main() -> None:
    """Do them all, then write the page."""
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        nursery = Nursery(room / "nursery", SMALL)
        for made in (kills, failures):
            for row in made(nursery, room):
                print(" | ".join(row), flush=True)
                rows.append(row)
        nursery.close()
    PAGE.write_text(written(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
