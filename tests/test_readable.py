"""No function is too long, or takes too much, without a reason that stands here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jexport

ROOT = Path(str(jexport.__file__)).parent
MOST_LINES, MOST_PARAMETERS = 60, 6

COMMAND = "a click command: a parameter for each option, and nothing but calls in it"
ANSWERS = "called by a library, with that library's parameters"
KEYWORDS = "a front door: keywords with defaults, most calls give one or two"

LONG: dict[str, str] = {
    "runtime/embedder.py:Embedder.encode": "most of it is what the Python reference says of it",
}
"""Functions of more lines, with the reason."""

WIDE: dict[str, str] = {
    "building/pipeline.py:build": KEYWORDS,
    "cli/compile.py:compile_": COMMAND,
    "cli/embed.py:embed": COMMAND,
    "cli/matrix.py:matrix": COMMAND,
    "cli/package.py:package": COMMAND,
    "cli/publish.py:publish": COMMAND,
    "graph/edit.py:Edit.insert": "the parameters of onnx_ir.node, and where the node goes",
    "graph/traceable.py:plain_attention": ANSWERS,
    "graph/traceable.py:plain_sdpa": ANSWERS,
    "jobs/ray/__init__.py:run": KEYWORDS,
    "publishing/pull.py:run": KEYWORDS,
    "runtime/embedder.py:Embedder.__init__": "what an engine may bring; four have no default",
    "runtime/embedder.py:Embedder.encode": KEYWORDS + ", in sentence-transformers' manner",
    "stages/quantize.py:run": "a stage's shape (input, spec, out_dir), and who runs graphs",
}
"""Functions of more parameters, `self` and `cls` aside, with the reason."""


class Function(NamedTuple):
    """One function. name: the module's path below jexport/, and where in it."""

    name: str
    lines: int
    parameters: int


def functions(source: str, path: str) -> Iterator[Function]:
    """Every function of a module, also those inside others."""

    def below(node: ast.AST, outer: tuple[str, ...]) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            inner = outer
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = (*outer, child.name)
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                words = child.args
                names = [one.arg for one in (*words.posonlyargs, *words.args, *words.kwonlyargs)]
                if names[:1] in (["self"], ["cls"]):
                    del names[0]
                lines = int(child.end_lineno or 0) - child.lineno + 1
                yield Function(f"{path}:{'.'.join(inner)}", lines, len(names))
            yield from below(child, inner)

    yield from below(ast.parse(source), ())


def all_functions() -> list[Function]:
    return [
        one
        for path in sorted(ROOT.rglob("*.py"))
        for one in functions(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def test_no_function_is_longer_without_a_reason() -> None:
    long = {one.name: one.lines for one in all_functions() if one.lines > MOST_LINES}
    added = {name: lines for name, lines in long.items() if name not in LONG}
    assert not added, f"over {MOST_LINES} lines; split, or say why in LONG: {added}"
    assert LONG.keys() <= long.keys(), "short again: take it out of LONG"


def test_no_function_takes_more_without_a_reason() -> None:
    wide = {one.name: one.parameters for one in all_functions() if one.parameters > MOST_PARAMETERS}
    added = {name: number for name, number in wide.items() if name not in WIDE}
    assert not added, f"over {MOST_PARAMETERS} parameters; a dataclass, or say why in WIDE: {added}"
    assert WIDE.keys() <= wide.keys(), "narrow again: take it out of WIDE"


def test_the_walk_counts_what_a_reader_would() -> None:
    # Guards the tests above: a function is found in a class, in a function and behind a condition.
    source = (
        "class A:\n    def b(self, x, /, y, *rest, z=1, **more):\n        if y:\n"
        "            async def c(cls, d):\n                return 1\n        return c\n"
    )
    assert list(functions(source, "m.py")) == [
        Function("m.py:A.b", 5, 3),
        Function("m.py:A.b.c", 2, 1),
    ]
