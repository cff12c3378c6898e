"""A graph as rules see it: scopes with their nodes, constants and stated values.

A scope is a graph, a branch or body inside a node, or a model-local function. Knows no file format
and decides nothing; `error` and `warning` make the diagnostics of the rules.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.graph.diagnostics import ERROR, WARNING, Diagnostic

STANDARD = ("", "ai.onnx")
READ_ELEMENTS = 1 << 20
"""Constants up to this many elements are looked into; larger ones are weights and stay on disk."""

NUMPY = {
    "FP32": "<f4",
    "FP16": "<f2",
    "DOUBLE": "<f8",
    "INT8": "i1",
    "UINT8": "u1",
    "INT16": "<i2",
    "UINT16": "<u2",
    "INT32": "<i4",
    "INT64": "<i8",
    "BOOL": "?",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an external weight says it lies; each is '' where it says nothing.

    Args:
        location: name of the file.
        offset: first byte, in digits.
        length: bytes, in digits.
    """

    location: str
    offset: str
    length: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Constant:
    """An initializer or the value of a Constant node.

    Args:
        name: of the initializer, or of the attribute that it is.
        dtype: element type, see onnx_types.TYPES.
        dims: its shape.
        place: where it lies, None for one inside the graph file.
        stored_bytes: in the graph file; -1 where it is not raw.
        folder: of the graph file, where `place` begins.
        tensor: as onnx has it.
    """

    name: str
    dtype: str
    dims: tuple[int, ...]
    place: Place | None
    stored_bytes: int
    folder: Path
    tensor: Any = field(repr=False)

    @property
    def elements(self) -> int:
        """How many numbers; -1 when a dimension is negative."""
        return -1 if any(size < 0 for size in self.dims) else math.prod(self.dims)

    def values(self, limit: int = READ_ELEMENTS) -> NDArray[Any] | None:
        """Its numbers, flat.

        Args:
            limit: so many elements are read at most.

        Returns:
            [elements]; None when there are more than `limit`, or they cannot be read.
        """
        if self.dtype not in NUMPY or not 0 <= self.elements <= limit:
            return None
        try:
            values = self._stored()
        except (OSError, ValueError, OverflowError, TypeError):
            return None
        return values if len(values) == self.elements else None

    def _stored(self) -> NDArray[Any]:
        kind = np.dtype(NUMPY[self.dtype])
        if self.place is not None:
            if Path(self.place.location).name != self.place.location:
                raise ValueError("not a plain file name")
            path = self.folder / self.place.location
            if path.is_symlink() or not path.is_file():  # a pipe would never end
                raise ValueError("not a file")
            return np.fromfile(path, kind, self.elements, offset=int(self.place.offset or 0))
        from onnx import numpy_helper

        return np.asarray(numpy_helper.to_array(self.tensor)).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Value:
    """An input or output with its stated type.

    Args:
        name: of the value.
        dtype: element type, '' where it is not stated.
        dims: each a number, a name, or '' (unknown); None where no shape is stated.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One operator call.

    Args:
        label: its name and, inside a branch or function, where that is.
        op: the operator.
        domain: '' or 'ai.onnx' for ONNX's own.
        inputs: names, '' for one that was left out.
        outputs: names, '' for one that was left out.
        attributes: numbers, texts, lists and Constants by name.
        scopes: graphs inside it: branches, a body.
    """

    label: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    scopes: tuple[Scope, ...]

    @property
    def operator(self) -> str:
        """Its operator, with the domain unless it is standard ONNX."""
        return self.op if self.standard else f"{self.domain}.{self.op}"

    @property
    def standard(self) -> bool:
        """Whether it is of ONNX itself."""
        return self.domain in STANDARD

    def given(self, index: int) -> str:
        """The name of an input.

        Args:
            index: its position.

        Returns:
            '' when it was left out.
        """
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(kw_only=True, eq=False)
class Scope:
    """Nodes that see each other's values, and those of the scopes around them.

    Args:
        where: it is, in words; '' for the graph itself.
        parent: the scope around it, None for the graph itself and for a function.
        nodes: in the file's order.
        constants: initializers and values of Constant nodes, by name.
        sparse: names of sparse initializers.
        inputs: those that are no initializer.
        outputs: of the scope.
        stated: what the file states of inputs, outputs and other values, by name.
        producers: the node that makes a value, by name.
        types: element types by name, filled by dataflow.infer_types.
    """

    where: str
    parent: Scope | None
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    sparse: list[str] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    stated: dict[str, Value] = field(default_factory=dict)
    producers: dict[str, Node] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def readers(self) -> Mapping[str, list[tuple[Node, int]]]:
        """By value: the nodes of this scope that read it, with the index of their input."""
        readers: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.inputs):
                readers.setdefault(name, []).append((node, index))
        return readers

    def around(self) -> Iterator[Scope]:
        """Itself, then the scopes around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def constant(self, name: str) -> Constant | None:
        """The initializer or Constant node of that name.

        Args:
            name: of a value, here or in a scope around.

        Returns:
            None where it is neither.
        """
        return next((s.constants[name] for s in self.around() if name in s.constants), None)

    def producer(self, name: str) -> Node | None:
        """The node that makes a value.

        Args:
            name: of the value, here or in a scope around.

        Returns:
            None where no node does.
        """
        return next((s.producers[name] for s in self.around() if name in s.producers), None)

    def dtype(self, name: str) -> str:
        """A value's element type.

        Args:
            name: of the value, here or in a scope around.

        Returns:
            '' where it is not known.
        """
        return next((s.types[name] for s in self.around() if name in s.types), "")

    def knows(self, name: str) -> bool:
        """Whether anything makes this value.

        Args:
            name: of the value, here or in a scope around.

        Returns:
            True for a node's output, an input or an initializer.
        """
        return any(
            name in s.constants
            or name in s.producers
            or name in s.sparse
            or any(value.name == name for value in s.inputs)
            for s in self.around()
        )

    def rank(self, name: str) -> int | None:
        """A value's number of dimensions.

        Args:
            name: of the value, here or in a scope around.

        Returns:
            None where the file does not state it.
        """
        constant = self.constant(name)
        if constant is not None:
            return len(constant.dims)
        stated = next((s.stated[name] for s in self.around() if name in s.stated), None)
        return None if stated is None or stated.dims is None else len(stated.dims)


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphFile:
    """A whole file.

    Args:
        path: of the file.
        opsets: versions by domain.
        graph: the outermost scope.
        functions: by domain and name.
    """

    path: Path
    opsets: Mapping[str, int]
    graph: Scope
    functions: Mapping[tuple[str, str], Scope]

    def scopes(self) -> list[Scope]:
        """The graph, every branch and body in it, and every function that is called."""
        scopes: list[Scope] = []
        waiting = [self.graph]
        while waiting:
            scope = waiting.pop(0)
            scopes.append(scope)
            for node in scope.nodes:
                waiting += node.scopes
                called = self.functions.get((node.domain, node.op))
                if called is not None and called not in scopes and called not in waiting:
                    waiting.append(called)
        return scopes

    @property
    def opset(self) -> int:
        """Of standard ONNX, 0 when the file names none."""
        return max((self.opsets.get(domain, 0) for domain in STANDARD), default=0)


def error(rule: str, node: Node | None, what: str, evidence: str, fix: str) -> Diagnostic:
    """A diagnostic for which the graph is refused.

    Args:
        rule: its name.
        node: that breaks it; None for the graph itself.
        what: is wrong.
        evidence: that shows it.
        fix: the way out.

    Returns:
        The diagnostic.
    """
    return _diagnostic(ERROR, rule, node, what, evidence, fix)


def warning(rule: str, node: Node | None, what: str, evidence: str, fix: str) -> Diagnostic:
    """A diagnostic that is shown and refuses nothing.

    Args:
        rule: its name.
        node: that breaks it; None for the graph itself.
        what: is wrong.
        evidence: that shows it.
        fix: the way out.

    Returns:
        The diagnostic.
    """
    return _diagnostic(WARNING, rule, node, what, evidence, fix)


def _diagnostic(
    severity: str, rule: str, node: Node | None, what: str, evidence: str, fix: str
) -> Diagnostic:
    return Diagnostic(
        rule=rule,
        severity=severity,
        node=node.label if node else "",
        operator=node.operator if node else "",
        what=what,
        evidence=evidence,
        fix=fix,
    )
