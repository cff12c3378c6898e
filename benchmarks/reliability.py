"""RELIABILITY.md: what was done to builds and artifacts, how often, and what came of it.

`python -m benchmarks.reliability FOLDER` reads the counts that the tests left in FOLDER
(JEXPORT_RELIABILITY=FOLDER) and writes the table; nothing in it is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "RELIABILITY.md"
BEGIN, END = "<!-- counts: begin -->", "<!-- counts: end -->"
PREFACE = f"""# Reliability

What `make reliability` and `make fuzz` did, and how often: each number is that of a run.
`accepted` counts what should have been refused and was not; of fuzzed files `read` are those that
a reader took, all others it refused with an error of its own.

{BEGIN}
{END}
"""


def read(folder: Path) -> dict[str, dict[str, float]]:
    """What each test counted, by name."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(one.pop("name"), {}).update(one)
    return found


def table(counts: dict[str, dict[str, float]]) -> str:
    """A line a name: what was counted, in words."""
    lines = ["| what | counts |", "|---|---|"]
    for name, numbers in sorted(counts.items()):
        told = " · ".join(
            f"{key.replace('_', ' ')} {value:,}" for key, value in sorted(numbers.items())
        )
        lines.append(f"| {name} | {told} |")
    return "\n".join(lines)


def written(page: str, counts: dict[str, dict[str, float]]) -> str:
    """The page with the counts of this run; names that this run does not have stay as they are."""
    start, rest = page.split(BEGIN)
    old, end = rest.split(END)
    kept = [
        line
        for line in old.splitlines()
        if line.startswith("| ") and line.split(" | ")[0][2:] not in {"what", *counts}
    ]
    lines = table(counts).splitlines()
    body = "\n".join([*lines[:2], *sorted([*lines[2:], *kept])])
    return f"{start}{BEGIN}\n{body}\n{END}{end}"


def main() -> None:
    """Write the page."""
    counts = read(Path(sys.argv[1]))
    if not counts:
        sys.exit(f"no counts in {sys.argv[1]}")
    page = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else PREFACE
    PAGE.write_text(written(page, counts), encoding="utf-8")


if __name__ == "__main__":
    main()
