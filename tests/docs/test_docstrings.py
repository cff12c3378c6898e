"""Docstrings: every parameter, result and error of a public function.

Read from the code by ast: `Args:` names the parameters of a function and the fields of a dataclass,
`Returns:` (or `Yields:`) stands where something is returned, `Raises:` where something is raised.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
JEXPORT = PROJECT / "jexport"
HELP = "jexport/cli/"
"""Docstrings of commands are their help."""

LONG = {
    "jexport/artifacts/model_card.py": {"text"},
    "jexport/checkpoints/shards.py": {"reader"},
    "jexport/publishing/pull.py": {"run"},
    "jexport/publishing/registries/_objects.py": {"store"},
    "jexport/targets/trt/__init__.py": {"build"},
    "jexport/targets/trt/building.py": {"refit"},
}
"""Functions that a section more would make longer than 60 lines; what they take is in prose."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    """The files that are held to it."""
    every = {path.relative_to(PROJECT).as_posix(): path for path in JEXPORT.rglob("*.py")}
    return [path for name, path in sorted(every.items()) if not name.startswith(HELP)]


def sections(node: Function | ast.ClassDef) -> dict[str, str]:
    """The docstring's sections by name."""
    text = ast.get_docstring(node) or ""
    parts = re.split(r"^(Args|Returns|Yields|Raises):$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def described(section: str) -> set[str]:
    """Names before the colons of the section's entries."""
    entries = re.findall(r"^    (\w[\w*, ]*|\*+\w+):", section, re.MULTILINE)
    return {name.strip("* ") for entry in entries for name in entry.split(",")}


def parameters(function: Function) -> set[str]:
    """Names of what it takes, a method's `self` and `cls` aside."""
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    bound = any("classmethod" in ast.unparse(one) for one in function.decorator_list)
    return {one.arg for one in every if one is not None} - {"self", "cls" if bound else "self"}


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of its body, those of functions inside aside."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


@functools.cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """The package's classes by name, which need not be the only one's."""
    named: dict[str, list[ast.ClassDef]] = {}
    for path in modules():
        for one in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(one, ast.ClassDef):
                named.setdefault(one.name, []).append(one)
    return named


def inherited(node: ast.ClassDef) -> dict[str, str]:
    """Methods that a base class describes, and what it says that they raise."""
    names: dict[str, str] = {}
    for base in node.bases:
        for above in classes().get(getattr(base, "id", ""), []):
            names |= inherited(above)
            for member in above.body:
                if isinstance(member, Function) and sections(member):
                    names[member.name] = sections(member).get("Raises", "")
    return names


def lacking(name: str, function: Function) -> Iterator[str]:
    """What its docstring does not say."""
    text, nodes = sections(function), list(own_nodes(function))
    for parameter in sorted(parameters(function) - described(text.get("Args", ""))):
        yield f"{name}: Args lacks {parameter}"
    for parameter in sorted(described(text.get("Args", "")) - parameters(function)):
        yield f"{name}: Args has {parameter}, which it does not take"
    returns = ast.unparse(function.returns) if function.returns else "None"
    is_property = any("property" in ast.unparse(one) for one in function.decorator_list)
    is_context = any("contextmanager" in ast.unparse(one) for one in function.decorator_list)
    one_line = "\n" not in (ast.get_docstring(function) or "")
    if (
        returns not in ("None", "NoReturn")
        and not is_property
        and not (one_line and not parameters(function))
    ):
        wanted = "Yields" if is_context else "Returns"
        if not {"Returns", "Yields"} & set(text):
            yield f"{name}: no {wanted}"
    raised = [one for one in nodes if isinstance(one, ast.Raise) and isinstance(one.exc, ast.Call)]
    for one in raised:
        error = ast.unparse(one.exc.func)  # type: ignore[attr-defined]
        if error[0].isupper() and error not in text.get("Raises", ""):
            yield f"{name}: Raises lacks {error}"


def fields(node: ast.ClassDef) -> set[str]:
    """Public fields of a dataclass or NamedTuple; none for another class."""
    kinds = [ast.unparse(one) for one in (*node.decorator_list, *node.bases)]
    if not any("dataclass" in kind or kind == "NamedTuple" for kind in kinds):
        return set()
    names = {
        one.target.id
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    return {name for name in names if not name.startswith("_")}


def problems(path: Path) -> Iterator[str]:
    """Everything that docstrings of a module's public functions and classes lack."""
    prose = LONG.get(str(path.absolute().relative_to(PROJECT)), set())
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Function) and not node.name.startswith("_") and node.name not in prose:
            yield from lacking(node.name, node)
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        for name in sorted(fields(node) - described(sections(node).get("Args", ""))):
            yield f"{node.name}: Args lacks {name}"
        for member in node.body:
            if isinstance(member, Function) and not member.name.startswith("_"):
                raises = inherited(node).get(member.name)
                for one in lacking(f"{node.name}.{member.name}", member):
                    error = one.partition("Raises lacks ")[2]
                    if raises is None or (error and error not in raises):
                        yield one


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_docstrings_name_parameters_results_and_errors(path: Path) -> None:
    assert list(problems(path)) == []


def test_what_is_missing_is_noticed() -> None:
    code = '''
def one(a: int, *, b: str) -> int:
    """Say.

    Args:
        a: first.
        c: nothing.
    """
    raise ValueError("no")
'''
    [node] = ast.parse(code).body
    assert isinstance(node, ast.FunctionDef)
    assert list(lacking("one", node)) == [
        "one: Args lacks b",
        "one: Args has c, which it does not take",
        "one: no Returns",
        "one: Raises lacks ValueError",
    ]
