"""Rules on what a graph stands on: weights whole and beside it, every value made by something.

Reads no weight: names, sizes and places only.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from jexport.graph.diagnostics import Diagnostic
from jexport.graph.lint.graph_view import Constant, GraphFile, Place, error, warning
from jexport.graph.lint.onnx_types import BITS

AGAIN = "build again, or copy the graph together with its weights"
LONGEST_NUMBER = 19
"""Digits of the largest 64-bit number."""

PLAIN = "save the weights as one plain file in the graph's folder"


def check(file: GraphFile) -> Iterator[Diagnostic]:
    """Every stored tensor.

    Args:
        file: the graph and its functions.

    Yields:
        An error for each that is missing, not whole or in no plain file; a warning where they lie
        in several files.
    """
    places = set()
    for scope in file.scopes():
        for constant in scope.constants.values():
            if constant.elements < 0:
                yield error(
                    "weights",
                    None,
                    "a weight has a negative size",
                    f"'{constant.name}' is {list(constant.dims)}",
                    AGAIN,
                )
            elif constant.place is not None:
                places.add(constant.place.location)
                yield from _check_place(constant, constant.place)
            elif constant.stored_bytes >= 0 and constant.stored_bytes != _bytes(constant):
                yield error(
                    "weights",
                    None,
                    "a weight inside the graph file is not whole",
                    f"'{constant.name}' has {constant.stored_bytes} of {_bytes(constant)} bytes",
                    AGAIN,
                )
    if len(places) > 1:
        shown = ", ".join(sorted(places)[:3])
        yield warning(
            "weights", None, "the weights lie in several files", f"{len(places)}: {shown}", PLAIN
        )


def _bytes(constant: Constant) -> int:
    """What its elements take, -1 for types without a fixed width."""
    bits = BITS.get(constant.dtype)
    return -1 if bits is None else -(-constant.elements * bits // 8)


def _check_place(constant: Constant, place: Place) -> Iterator[Diagnostic]:
    name = place.location
    if not name or Path(name).name != name or "\\" in name or "\0" in name or name == "..":
        yield error(
            "weights",
            None,
            "external weights must be one plain file beside the graph",
            f"'{constant.name}' lies in {name!r}",
            PLAIN,
        )
        return
    try:
        status = (constant.folder / name).lstat()
    except OSError as wrong:
        yield error("weights", None, "the weights are missing", f"{name}: {wrong.strerror}", AGAIN)
        return
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "not a file"
        yield error(
            "weights",
            None,
            "external weights must be one plain file beside the graph",
            f"{name} is {kind}",
            PLAIN,
        )
        return
    yield from _check_inside(constant, place, status.st_size)


def _check_inside(constant: Constant, place: Place, size: int) -> Iterator[Diagnostic]:
    needed = _bytes(constant)
    offset = _number(place.offset) if place.offset else 0
    length = _number(place.length) if place.length else max(needed, 0)
    if offset < 0 or length < 0 or offset + length > size:
        yield error(
            "weights",
            None,
            "a weight lies outside its file",
            f"'{constant.name}': offset {place.offset or 0}, length {place.length or length}; "
            f"{place.location} has {size} bytes",
            AGAIN,
        )
    elif needed >= 0 and length != needed:
        yield error(
            "weights",
            None,
            "a weight is not whole",
            f"'{constant.name}' has {length} bytes, {list(constant.dims)} {constant.dtype} "
            f"takes {needed}",
            AGAIN,
        )


def _number(text: str) -> int:
    """Its value, -1 for anything but plain digits: engines read '+4', ' 4' or '4_0' differently."""
    plain = text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER
    return int(text) if plain else -1


def check_connected(file: GraphFile) -> Iterator[Diagnostic]:
    """An empty graph, and values that nothing makes.

    Args:
        file: the graph and its functions.

    Yields:
        An error for each.
    """
    graph = file.graph
    if not graph.nodes or not graph.outputs:
        yield error(
            "empty",
            None,
            "the graph is empty",
            f"{len(graph.nodes)} nodes, {len(graph.outputs)} outputs",
            "export it again",
        )
    for scope in file.scopes():
        for node in scope.nodes:
            for name in node.inputs:
                if name and not scope.knows(name):
                    yield error(
                        "dangling",
                        node,
                        f"{node.op} reads a value that nothing makes",
                        f"'{name}' is no input, no weight and no result",
                        "export it again",
                    )
        for value in scope.outputs:
            if not scope.knows(value.name):
                yield error(
                    "dangling",
                    None,
                    "an output is made by nothing",
                    f"output '{value.name}'" + (f" of {scope.where}" if scope.where else ""),
                    "export it again",
                )
