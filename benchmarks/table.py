"""BENCHMARKS.md: one section a benchmark, each replaced when its benchmark runs again."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "BENCHMARKS.md"
HEAD = """# Benchmarks

Written by the commands named in each section; every number is from that run. The machine is shared
and has few cores: read ratios, not seconds. Compared things run in turn, in one run.
"""


def write(
    name: str, command: str, note: str, head: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Replace section `name` of the page by a table, and print it."""
    section = "\n".join(
        [
            f"## {name}",
            "",
            f"`{command}`, {date.today().isoformat()}, {machine()}",
            "",
            note,
            "",
            *lines(head, rows),
            "",
        ]
    )
    put(name, section)


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines in Markdown."""
    first = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return first + [f"| {' | '.join(row)} |" for row in rows]


def put(name: str, section: str) -> None:
    """Replace section `name` of the page by this one, and print it."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else HEAD
    sections = re.split(r"(?m)^(?=## )", text)
    kept = [part for part in sections[1:] if not part.startswith(f"## {name}\n")]
    body = [part.rstrip() + "\n" for part in [*kept, section]]
    PAGE.write_text("\n".join([HEAD, *sorted(body)]), encoding="utf-8")
    print(section)


def machine() -> str:
    """Cores, processor features and library versions that the numbers depend on."""
    versions = [
        f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "onnxruntime", "openvino")
    ]
    return f"{cores()}, {', '.join(versions)}"


def cores() -> str:
    """Architecture, cores and those processor features that matter."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    features = [
        f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if f in flags
    ]
    count = len(os.sched_getaffinity(0))
    return f"{platform.machine()}, {count} cores ({' '.join(features)})"
