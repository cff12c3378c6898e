"""A module imports only downward: the order of packages in jexport/__init__.py."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import jexport

PACKAGE = Path(str(jexport.__file__)).parent
FLOORS = (
    {"redact", "types"},
    {"errors"},
    {"gates", "plugins", "recipe_schema", "tasks", "workspace"},
    {"artifacts", "recipe", "toy"},
    {"cache", "checkpoints", "datasets", "graph"},
    {"publishing", "targets"},
    {"runtime"},
    {"evaluation", "serving"},
    {"quantization"},
    {"stages"},
    {"building"},
    {"jobs"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
OUTSIDE = {"jexport", "jexport.__main__"}
"""The front door and its bell: they open onto every floor."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if name not in OUTSIDE:
            yield name, path


def room(module: str) -> str:
    return module.split(".")[1]


def imported(tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of jexport's that a module imports, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "jexport":
                yield node.lineno, name


def test_every_room_has_a_floor() -> None:
    rooms = {room(name) for name, _ in modules()}
    assert rooms <= set(FLOOR), f"say in FLOORS where {sorted(rooms - set(FLOOR))} belongs"


def test_lines_import_only_downward() -> None:
    found = list(modules())
    known = {name for name, _ in found}
    upward = []
    for name, path in found:
        for line, target in imported(ast.parse(path.read_text(encoding="utf-8")), known):
            if target == "jexport":
                upward.append(f"{path}:{line}: the front door; import the room itself")
            elif room(target) != room(name) and FLOOR[room(target)] >= FLOOR[room(name)]:
                upward.append(
                    f"{path}:{line}: {room(name)} (floor {FLOOR[room(name)]}) imports {target} "
                    f"(floor {FLOOR[room(target)]}); move that line up to where both may be used"
                )
    assert not upward, "\n".join(upward)


def test_the_walk_sees_imports_inside_functions() -> None:
    # Guards the test above: most of jexport's imports of frameworks and packages are in functions.
    source = "def f():\n    from jexport.artifacts import store\n    import jexport.cli.build\n"
    assert [*imported(ast.parse(source), {"jexport.artifacts.store"})] == [
        (2, "jexport.artifacts.store"),
        (3, "jexport.cli.build"),
    ]


def test_only_the_command_line_prints_or_exits() -> None:
    found = []
    for name, path in modules():
        if room(name) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "exit",
                "quit",
                "sys.exit",
                "os._exit",
                "input",
                "click.echo",
            ):
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)[:60]}")
    assert not found, "\n".join(found)


def test_the_map_in_the_front_door_is_in_this_order() -> None:
    house = (jexport.__doc__ or "").split("The packages", 1)[1].splitlines()[1:]
    lines = []
    for line in itertools.takewhile(str.strip, house):
        # Names stand first, then two spaces and what they are; a line may have two such pairs.
        names = re.split(r"\s{2,}", line.strip())[::2]
        lines.append([name for part in names for name in part.split(", ")])
    told = {name for names in lines for name in names}
    assert told == set(FLOOR)
    for lower, upper in itertools.pairwise(lines):
        assert max(map(FLOOR.__getitem__, lower)) <= min(map(FLOOR.__getitem__, upper))
