"""`make bench-memory`: peak memory of embedding 20,000 texts and MEMORY_TEXTS (200,000), by target.

Each in a process of its own, through `embed_stream`; texts of 3 to 25 words. ARTIFACTS names the
folders of artifacts. Writes BENCHMARKS.md; fails where the larger peak is over 1.1 times the
smaller.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jexport
from benchmarks import table
from jexport.runtime.stream import embed_stream

FEW, RATIO = 20_000, 1.1
WORDS = [
    "the",
    "ferry",
    "leaves",
    "at",
    "seven",
    "profits",
    "rose",
    "island",
    "two",
    "towers",
    "one",
    "boat",
    "sails",
    "every",
    "hour",
]


def texts(count: int) -> Iterator[str]:
    """Seeded texts of 3 to 25 words."""
    rng = random.Random(0)
    for _ in range(count):
        yield " ".join(rng.choices(WORDS, k=rng.randint(3, 25)))


def _child(folder: str, count: int) -> None:
    with (
        tempfile.TemporaryDirectory() as out,
        jexport.open_artifact(folder, device="cpu", verify=False) as model,
    ):
        embed_stream(model, texts(count), Path(out) / "vectors.npy")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def _peak_mib(folder: str, count: int) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", folder, str(count)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure every artifact that ARTIFACTS (separated like PATH) names, and write the table."""
    many = int(os.environ.get("MEMORY_TEXTS", "200000"))
    over, rows = False, []
    for folder in os.environ["ARTIFACTS"].split(os.pathsep):
        small, large = _peak_mib(folder, FEW), _peak_mib(folder, many)
        over |= large > RATIO * small
        name = "/".join(Path(folder).parts[-4:-1])
        rows.append([name, f"{small:,}", f"{large:,}", f"{large / small:.2f}"])
        print(*rows[-1], sep=" | ", flush=True)
    note = "Peak resident memory of a process that embeds texts of 3 to 25 words, in MiB."
    head = ["artifact", f"{FEW:,} texts", f"{many:,} texts", "ratio"]
    command = f"MEMORY_TEXTS={many} make bench-memory"
    table.write(f"Memory at {many:,} texts", command, note, head, rows)
    sys.exit(over)


if __name__ == "__main__":
    _child(sys.argv[1], int(sys.argv[2])) if len(sys.argv) > 1 else main()
