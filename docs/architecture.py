"""The drawing and the table of the architecture page, made from the imports of jexport/.

    python docs/architecture.py     # writes architecture.svg, and the table in architecture.md

A box is a package or module at the top of jexport/, on its floor of tests/test_floors.py. An arrow
goes from a package to one that it imports; one that a longer path of arrows says already is left
out. tests/docs checks that both files are current.
"""

from __future__ import annotations

import ast
import functools
import re
import runpy
from pathlib import Path

import jexport

DOCS = Path(__file__).parent
DRAWING, PAGE = DOCS / "architecture.svg", DOCS / "architecture.md"
BEGIN, END = "<!-- packages: begin -->", "<!-- packages: end -->"
WIDTH, FLOOR_HEIGHT, BOX_WIDTH, BOX_HEIGHT = 760, 62, 122, 30
"""Of the drawing, in pixels."""

STYLE = """\
.box { fill: var(--md-code-bg-color, #f5f5f5); stroke: var(--md-default-fg-color--lighter, #bbb); }
.name { fill: var(--md-default-fg-color, #222); font: 13px sans-serif; text-anchor: middle; }
.arrow { fill: none; stroke: var(--md-primary-fg-color, #4051b5); stroke-opacity: .55; }
.head { fill: var(--md-primary-fg-color, #4051b5); }"""


@functools.cache
def imports() -> dict[str, set[str]]:
    """What each package imports of the others, from every import statement in it."""
    floors = runpy.run_path(str(DOCS.parent / "tests" / "test_floors.py"))
    modules = list(floors["modules"]())
    known = {name for name, _ in modules}
    found: dict[str, set[str]] = {floors["room"](name): set() for name in known}
    for name, path in modules:
        own = floors["room"](name)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        others = {floors["room"](other) for _, other in floors["imported"](tree, known)}
        found[own] |= others - {own}
    return found


def floors() -> list[list[str]]:
    """The packages of each floor, from the ground up, as tests/test_floors.py has them."""
    found = runpy.run_path(str(DOCS.parent / "tests" / "test_floors.py"))["FLOORS"]
    return [sorted(floor) for floor in found]


def reduced(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no longer path says: the transitive reduction of a graph without circles."""

    def below(package: str) -> set[str]:
        return set().union(*({other} | below(other) for other in graph[package]))

    return sorted(
        (package, other)
        for package, others in graph.items()
        for other in others
        if not any(other in below(between) for between in others)
    )


def drawing() -> str:
    """The drawing, as SVG: the top floor first; colours follow the site's theme."""
    levels = floors()[::-1]
    places = {
        name: (WIDTH * (2 * column + 1) // (2 * len(level)), FLOOR_HEIGHT * row + 20)
        for row, level in enumerate(levels)
        for column, name in enumerate(level)
    }
    height = FLOOR_HEIGHT * len(levels)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        ' aria-label="Packages of jexport and what they import" class="architecture">',
        f"<style>{STYLE}</style>",
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
        ' orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker>',
    ]
    for package, other in reduced(imports()):
        (x, y), (to_x, to_y) = places[package], places[other]
        start, stop = y + BOX_HEIGHT, to_y - 1
        lines.append(
            f'<path class="arrow" marker-end="url(#head)" d="M{x} {start}C{x} {start + 24}'
            f' {to_x} {stop - 24} {to_x} {stop}"><title>{package} imports {other}</title></path>'
        )
    for name, (x, y) in places.items():
        lines.append(
            f'<rect class="box" x="{x - BOX_WIDTH // 2}" y="{y}" width="{BOX_WIDTH}"'
            f' height="{BOX_HEIGHT}" rx="4"/>'
            f'<text class="name" x="{x}" y="{y + 20}">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def summaries() -> dict[str, str]:
    """What each package is for, from the list in jexport/__init__.py."""
    rows = re.findall(r"^    (\w+)  +(\S.*)$", jexport.__doc__ or "", flags=re.MULTILINE)
    return {name: summary for name, summary in rows}


def table() -> str:
    """Every package, what it is for and all that it imports, from the top floor down."""
    graph, known = imports(), summaries()
    rows = ["| package | what it is for | imports |", "|---|---|---|"]
    for floor in floors()[::-1]:
        for name in floor:
            others = ", ".join(sorted(graph[name])) or "nothing"
            rows.append(f"| `{name}` | {known[name]} | {others} |")
    return "\n".join(rows)


def page(text: str) -> str:
    """The page with the table between its marks replaced."""
    assert text.count(BEGIN) == text.count(END) == 1
    between = f"(?s){re.escape(BEGIN)}.*{re.escape(END)}"
    return re.sub(between, lambda _: f"{BEGIN}\n{table()}\n{END}", text)


if __name__ == "__main__":
    DRAWING.write_text(drawing(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
