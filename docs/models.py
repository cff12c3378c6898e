"""docs/models.md, made from the rows that `make test-recipes` leaves.

    python docs/models.py FOLDER    # FOLDER: what JEXPORT_RECIPES named

A row is one build of one recipe; a recipe without a row has an empty cell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("models.md")
START, END = "<!-- rows -->\n", "<!-- end of rows -->\n"


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows in a folder."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Models by target and precision: the lowest cosine, rounded down."""
    columns = sorted({(row["target"], row["precision"]) for row in rows}, key=_order)
    cells = {(row["name"], row["target"], row["precision"]): _cell(row) for row in rows}
    kinds = {row["name"]: row["kind"] for row in rows}
    lines = [
        "| recipe | model type, modules | " + " | ".join(f"{t} {p}" for t, p in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for name in sorted(kinds, key=str.lower):
        numbers = " | ".join(cells.get((name, *column), "") for column in columns)
        lines.append(f"| `{name}` | {kinds[name]} | {numbers} |")
    return "\n".join(lines) + "\n"


def _order(column: tuple[str, str]) -> tuple[str, int]:
    return column[0], ("fp32", "fp16", "bf16", "int8").index(column[1])


def _cell(row: Mapping[str, Any]) -> str:
    """Six decimals, never rounded up to 1."""
    return f"{int(min(row['cosine_min'], row['direct']) * 1e6) / 1e6:.6f}"


def page(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page with another table."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + table(rows) + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8"), read(Path(sys.argv[1]))), encoding="utf-8")
