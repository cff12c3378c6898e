"""An ONNX file -> its scopes, with the weights left on disk.

Nothing of protobuf's structure leaves this module, and whatever stands in the file is taken as it
is: rules decide, this reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jexport.errors import UnsupportedGraphError
from jexport.graph.lint.graph_view import Constant, GraphFile, Node, Place, Scope, Value
from jexport.graph.lint.onnx_types import TYPES

LARGEST_FILE_BYTES = (1 << 31) - 1
"""Protobuf's limit, so ONNX's: a larger file cannot be a graph."""


def read(path: Path) -> GraphFile:
    """Read a graph without its external weights.

    Weights inside the file (under 2 GiB by ONNX's own limit) are read with it.

    Args:
        path: of an .onnx file.

    Returns:
        Its scopes.

    Raises:
        UnsupportedGraphError: it is any other file, or cannot be read.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        size = path.stat().st_size
        if not path.is_file():
            raise _not_onnx(path, "it is not a file")
        if size > LARGEST_FILE_BYTES:
            raise _not_onnx(path, f"it has {size:,} bytes; ONNX files end at 2 GiB")
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as wrong:
        raise _not_onnx(path, next(iter(str(wrong).splitlines()), "")) from wrong
    except (OSError, ValueError) as wrong:  # ValueError: a NUL in the path
        raise _not_onnx(path, str(wrong)) from wrong
    if not model.HasField("graph"):
        raise _not_onnx(path, "there is no graph in it")
    reader = _Reader(path.parent)
    return GraphFile(
        path=path,
        opsets={_text(one.domain): one.version for one in model.opset_import},
        graph=reader.graph(model.graph, "", None),
        functions={
            (_text(one.domain), _text(one.name)): reader.function(one) for one in model.functions
        },
    )


def _not_onnx(path: Path, why: str) -> UnsupportedGraphError:
    return UnsupportedGraphError(
        f"{path} is not an ONNX graph",
        evidence=why or "it cannot be decoded",
        fix="give the path of a .onnx file",
    )


def _text(word: str | bytes) -> str:
    """Protobuf hands out bytes where a string is not UTF-8."""
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else word


class _Reader:
    """Copies protobuf messages into scopes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def graph(self, proto: Any, where: str, parent: Scope | None) -> Scope:
        scope = Scope(where=where, parent=parent)
        for tensor in proto.initializer:
            constant = self.constant(tensor, _text(tensor.name))
            scope.constants[constant.name] = constant
        scope.sparse += [_text(one.values.name) for one in proto.sparse_initializer]
        stored = {*scope.constants, *scope.sparse}
        scope.inputs += [v for v in map(_value, proto.input) if v.name not in stored]
        scope.outputs += map(_value, proto.output)
        for value in (*scope.inputs, *map(_value, proto.value_info), *scope.outputs):
            scope.stated.setdefault(value.name, value)
        self._fill(scope, proto.node)
        return scope

    def function(self, proto: Any) -> Scope:
        scope = Scope(where=f"function {_text(proto.name)}", parent=None)
        scope.inputs += [Value(name=_text(name), dtype="", dims=None) for name in proto.input]
        scope.outputs += [Value(name=_text(name), dtype="", dims=None) for name in proto.output]
        self._fill(scope, proto.node)
        return scope

    def _fill(self, scope: Scope, nodes: Any) -> None:
        for proto in nodes:
            node = self._node(proto, scope)
            scope.nodes.append(node)
            for name in filter(None, node.outputs):
                scope.producers[name] = node
            value = node.attributes.get("value")
            if node.op == "Constant" and node.standard and isinstance(value, Constant):
                scope.constants.update(dict.fromkeys(node.outputs[:1], value))

    def _node(self, proto: Any, scope: Scope) -> Node:
        outputs = tuple(map(_text, proto.output))
        name = _text(proto.name) or f"without a name, output '{next(iter(outputs), '')}'"
        label = f"{name} in {scope.where}" if scope.where else name
        attributes, scopes = {}, []
        for one in proto.attribute:
            key = _text(one.name)
            attributes[key] = self._attribute(one, scope, key)
            for inner in ([one.g] if one.HasField("g") else []) + list(one.graphs):
                scopes.append(self.graph(inner, f"{key} of {label}", scope))
        return Node(
            label=label,
            op=_text(proto.op_type),
            domain=_text(proto.domain),
            inputs=tuple(map(_text, proto.input)),
            outputs=outputs,
            attributes=attributes,
            scopes=tuple(scopes),
        )

    def _attribute(self, proto: Any, scope: Scope, key: str) -> Any:
        """A number, text, list or Constant; None for the rest (graphs, references)."""
        if proto.HasField("t"):
            return self.constant(proto.t, key)
        for single in ("i", "f"):
            if proto.HasField(single):
                return getattr(proto, single)
        if proto.HasField("s"):
            return _text(proto.s)
        return list(proto.ints) or list(proto.floats) or [_text(word) for word in proto.strings]

    def constant(self, tensor: Any, name: str) -> Constant:
        place = None
        if tensor.data_location == 1 or tensor.external_data:
            entries = {_text(one.key): _text(one.value) for one in tensor.external_data}
            place = Place(
                location=entries.get("location", ""),
                offset=entries.get("offset", ""),
                length=entries.get("length", ""),
            )
        return Constant(
            name=name,
            dtype=TYPES.get(tensor.data_type, f"TYPE{tensor.data_type}"),
            dims=tuple(tensor.dims),
            place=place,
            stored_bytes=len(tensor.raw_data) if tensor.HasField("raw_data") else -1,
            folder=self.folder,
            tensor=tensor,
        )


def _value(proto: Any) -> Value:
    dtype, dims = "", None
    if proto.type.HasField("tensor_type"):
        stated = proto.type.tensor_type
        dtype = TYPES.get(stated.elem_type, f"TYPE{stated.elem_type}") if stated.elem_type else ""
        if stated.HasField("shape"):
            dims = tuple(
                one.dim_value if one.HasField("dim_value") else _text(one.dim_param)
                for one in stated.shape.dim
            )
    return Value(name=_text(proto.name), dtype=dtype, dims=dims)
