"""Every deliberate error: a code of its own, three parts, and a place that raises it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import jexport
from jexport import errors
from jexport.errors import JexportError, nearest

PACKAGE = Path(str(jexport.__file__)).parent
RESERVED = {0: "success", 1: "a bug", 2: "wrong flags", 130: "Ctrl-C", 141: "a closed pipe"}
KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, JexportError)
]
SUBCLASSES = [kind for kind in KINDS if kind is not JexportError]


def calls() -> list[tuple[str, str, ast.Call]]:
    """Every call in jexport, with its file and the name of what is called."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found.append((str(path), ast.unparse(node.func).split(".")[-1], node))
    return found


def test_codes_are_unique_and_free() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert len(codes) > 20
    assert len(set(codes)) == len(codes)
    assert not set(codes) & set(RESERVED)
    assert all(2 < code < 126 for code in codes)  # from 126 on a shell speaks of its own troubles


def test_every_error_is_raised_somewhere() -> None:
    made = {name for path, name, _ in calls() if not path.endswith("errors.py")}
    assert {kind.__name__ for kind in SUBCLASSES} <= made


def test_nobody_raises_the_base_class() -> None:
    assert not [path for path, name, _ in calls() if name == "JexportError"]


def test_every_error_is_written_in_three_parts() -> None:
    names = {kind.__name__ for kind in SUBCLASSES}
    wrong = []
    for path, name, node in calls():
        parts = {keyword.arg for keyword in node.keywords}
        if name in names and (len(node.args) != 1 or parts != {"evidence", "fix"}):
            wrong.append(f"{path}:{node.lineno}: {name} with {sorted(map(str, parts))}")
    assert not wrong, "\n".join(wrong)


def test_every_error_says_what_it_is_for() -> None:
    assert all((kind.__doc__ or "").strip() for kind in SUBCLASSES)


def test_text_is_what_evidence_fix_and_notes() -> None:
    error = errors.RecipeError("it broke", evidence="line 1\nline 2", fix="mend it")
    error.add_note("  report: x")
    assert str(error).splitlines() == [
        "it broke",
        "  line 1",
        "  line 2",
        "  fix: mend it",
        "  report: x",
    ]
    assert (error.what, error.evidence, error.fix) == ("it broke", "line 1\nline 2", "mend it")


def test_nearest() -> None:
    known = ("retrieval.query", "retrieval.passage", "separation")
    assert nearest("retrieval.qery", known) == "did you mean 'retrieval.query'?"
    assert nearest("zzz", known) == "known: retrieval.query, retrieval.passage, separation"
    assert nearest("zzz", ()) == "known: none"
