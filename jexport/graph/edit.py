"""Small, safe edits on an onnx_ir graph: constants, insertions, replacements, lazy weights.

A weight that is made from other weights stays a recipe until it is written, so that no more than
one of them is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from jexport.errors import UnsupportedGraphError


class Edit:
    """Edits one graph. `scope` (set by the caller) prefixes the names of inserted nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer; the same name twice is the same initializer."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self._register(name, ir.tensor(array, name=name))

    def lazy(
        self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Callable[[], Any]
    ) -> ir.Value:
        """A weight computed by `make` (a numpy array of like's dtype) when it is written."""
        return self.lazy_typed(name, like.dtype, shape, make)

    def lazy_typed(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], Any]
    ) -> ir.Value:
        """The same with a dtype of its own."""
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.ascontiguousarray(make()), name=name),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
            cache=False,
        )
        return self._register(name, tensor)

    def _register(self, name: str, tensor: Any) -> ir.Value:
        assert name not in self.graph.initializers, name
        value = ir.Value(
            name=name,
            shape=ir.Shape(list(tensor.shape)),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def insert(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        name: str,
        like: ir.Value | None = None,
        domain: str = "",
        num_outputs: int = 1,
    ) -> ir.Node:
        """A new node in front of `before`; `like` lends its type and shape to the first output."""
        node = ir.node(
            op, inputs, attributes or {}, domain=domain, num_outputs=num_outputs, name=name
        )
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self.graph.insert_before(before, node)
        return node

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of `old`, graph outputs too, use `new`."""
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def drop_dead(self) -> int:
        """Remove nodes that nothing uses; returns how many."""
        outputs = set(self.graph.outputs)
        dead = 0
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value in outputs for value in node.outputs):
                self.graph.remove(node, safe=True)
                dead += 1
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in outputs:
                del self.graph.initializers[name]
        return dead


def array(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a small constant; None for anything else."""
    if value is None or value.const_value is None:
        return None
    if value.const_value.size > 65_536:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number of a one-element constant; None for anything else."""
    numbers = array(value)
    return float(numbers.reshape(-1)[0]) if numbers is not None and numbers.size == 1 else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that uses a value; None when there are others or it is a graph output."""
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    return next(iter(value.consumers()))


def weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a two-dimensional initializer; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value if len(value.const_value.shape) == 2 else None


def bias_add(product: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a one-dimensional initializer that is a MatMul's only user, and its bias."""
    user = only_user(product)
    if user is None or user.op_type != "Add":
        return None
    other = user.inputs[1] if user.inputs[0] is product else user.inputs[0]
    if other is None or not other.is_initializer() or other.const_value is None:
        return None
    return (user, other) if len(other.const_value.shape) == 1 else None


def refuse(what: str, evidence: str, fix: str) -> UnsupportedGraphError:
    """The error for a graph that does not have the shape a step needs."""
    return UnsupportedGraphError(what, evidence=evidence, fix=fix)
