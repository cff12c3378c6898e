"""Which TensorRT names a source file uses, by its syntax tree, and which of them are not real.

`trt` is the module; objects are known by the names of the variables that hold them (OBJECTS), so
these names mean nothing else in jexport/trt. A name asked for by `getattr(x, "NAME", default)` is
guarded and not counted.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OBJECTS = {
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "parser_refitter": "OnnxParserRefitter",
    "settings": "ISerializationConfig",
    "runtime": "Runtime",
}


@dataclass(frozen=True)
class Use:
    """One name in a file. chain: ('trt', 'BuilderFlag', 'REFIT') or ('ICudaEngine', 'name').

    words, keywords: how it was called; None when it was not.
    """

    line: int
    chain: tuple[str, ...]
    words: int | None = None
    keywords: tuple[str, ...] = ()


def uses(source: str) -> list[Use]:
    """Every TensorRT name in a source text."""
    return list(_walk(ast.parse(source), cuda=False))


def _walk(node: ast.AST, *, cuda: bool) -> Iterator[Use]:
    """Uses below a node; inside a function that imports CUDA's runtime, `runtime` is that."""
    if isinstance(node, ast.FunctionDef):
        cuda = any(
            isinstance(line, ast.ImportFrom) and line.module == "cuda.bindings"
            for line in ast.walk(node)
        )
    called = node.func if isinstance(node, ast.Call) else None
    chain = _chain(called if called is not None else node, cuda=cuda)
    if chain:
        yield Use(
            line=getattr(node, "lineno", 0),
            chain=chain,
            words=len(node.args) if isinstance(node, ast.Call) else None,
            keywords=tuple(k.arg or "" for k in node.keywords)
            if isinstance(node, ast.Call)
            else (),
        )
        if isinstance(node, ast.Call):
            for child in (*node.args, *node.keywords):
                yield from _walk(child, cuda=cuda)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, cuda=cuda)


def _chain(node: ast.AST, *, cuda: bool) -> tuple[str, ...]:
    """Dotted names from the module or a known object on; () for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        holder = node.attr.lstrip("_")
        if holder in OBJECTS and len(names) > 1 and not (cuda and holder == "runtime"):
            return (OBJECTS[holder], *names[1:])
        node = node.value
    if not isinstance(node, ast.Name) or not names:
        return ()
    if node.id == "trt":
        return ("trt", *names)
    if node.id in OBJECTS and not (cuda and node.id == "runtime"):
        return (OBJECTS[node.id], *names)
    return ()


def wrong(use: Use, real: dict[str, Any]) -> str:
    """What is not real about a use, '' when all of it is."""
    if use.chain[0] != "trt":
        return _wrong_attribute(use.chain[0], use.chain[1], use, real)
    name, *rest = use.chain[1:]
    if not rest:
        if name in real["functions"]:
            return _wrong_call(name, real["functions"][name], use)
        if name not in real["classes"]:
            return "" if name == "__version__" else f"tensorrt has no {name}"
        return _wrong_call("__init__", real["classes"][name].get("__init__", ""), use)
    members = {}
    for end in range(len(use.chain), 1, -1):
        members = real["enums"].get(".".join(use.chain[1:end]), {})
        if members:
            rest = list(use.chain[end:])
            break
    if members:
        return "" if not rest or rest[0] in members else f"{name} has no member {rest[0]}"
    if name not in real["classes"]:
        return f"tensorrt has no {name}"
    return _wrong_attribute(name, rest[0], use, real)


def _wrong_attribute(kind: str, name: str, use: Use, real: dict[str, Any]) -> str:
    if name not in real["classes"].get(kind, {}):
        return f"{kind} has no {name}"
    return _wrong_call(name, real["classes"][kind][name], use)


def _wrong_call(name: str, doc: str, use: Use) -> str:
    """Whether some overload takes the call; a class without a constructor's text takes any."""
    found = overloads(name, doc)
    if use.words is None or not found:
        return ""
    words = use.words - (use.chain[-1] == "__init__")  # called on the class: self is given
    for parameters in found:
        named = [*list(parameters)[:words], *use.keywords]
        needed = {word for word, optional in parameters.items() if not optional}
        if (
            words <= len(parameters)
            and len(set(named)) == len(named)
            and (needed <= set(named) <= set(parameters))
        ):
            return ""
    return f"{name} takes {found}, not {words} and {list(use.keywords)}"


def overloads(name: str, doc: str) -> list[dict[str, bool]]:
    """Parameters, without self, of each signature in a docstring: name -> has a default."""
    found = []
    for line in doc.splitlines():
        if match := re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> ", line):
            # a parameter begins at the start or after a comma that another `name: ` follows
            words = re.split(r"(?:^|, )(?=\w+: )", match.group(1))
            names = {word.split(":")[0]: " = " in word for word in words if word}
            if "*args" not in names:
                found.append({word: said for word, said in names.items() if word != "self"})
    return found
