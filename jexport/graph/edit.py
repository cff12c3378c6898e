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
    """Edits one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._names = {str(node.name) for node in graph}

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer.

        Args:
            name: of it; the same name twice is the same initializer.
            array: its numbers.

        Returns:
            The value, to be an input of nodes.
        """
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self._register(name, ir.tensor(array, name=name))

    def lazy(
        self, name: str, like: ir.TensorProtocol, shape: Sequence[int], make: Callable[[], Any]
    ) -> ir.Value:
        """A weight that is computed when it is written.

        Args:
            name: of the initializer, not in use yet.
            like: lends its dtype.
            shape: of the weight.
            make: () -> a numpy array of that shape and dtype.

        Returns:
            The value, to be an input of nodes.
        """
        return self.lazy_typed(name, like.dtype, shape, make)

    def lazy_typed(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], make: Callable[[], Any]
    ) -> ir.Value:
        """The same with a dtype of its own.

        Args:
            name: of the initializer, not in use yet.
            dtype: of the weight.
            shape: of the weight.
            make: () -> a numpy array of that shape and dtype.

        Returns:
            The value, to be an input of nodes.
        """
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

    def insert(  # ir.node's own parameters, and where it goes
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
        """A new node.

        Args:
            before: the node in front of which it is put.
            op: name of the operator.
            inputs: None for one that is left out.
            attributes: of the operator.
            name: of the node and its first output; `name_2` and so on when that is taken (a module
                that runs twice).
            like: lends its type and shape to the first output.
            domain: of the operator, '' for standard ONNX.
            num_outputs: of the node.

        Returns:
            The node, in the graph.
        """
        unused = self.unused(name)
        node = ir.node(
            op, inputs, attributes or {}, domain=domain, num_outputs=num_outputs, name=unused
        )
        node.outputs[0].name = unused
        if like is not None:
            node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
        self.graph.insert_before(before, node)
        return node

    def unused(self, name: str) -> str:
        """A name for a new node.

        Args:
            name: that is wished for.

        Returns:
            `name`, or `name_2` and so on when that is taken; it is taken from now on.
        """
        number, unused = 1, name
        while unused in self._names:
            number += 1
            unused = f"{name}_{number}"
        self._names.add(unused)
        return unused

    def take_over(self, old: ir.Node, new: ir.Node) -> None:
        """Let one node stand for another, under its name and that of its first output.

        Args:
            old: stays in the graph, renamed and unused.
            new: is in the graph already.
        """
        name, output = str(old.name), str(old.outputs[0].name)
        self.replace(old.outputs[0], new.outputs[0])
        old.name, old.outputs[0].name = f"{name}/replaced", f"{output}/replaced"
        new.name, new.outputs[0].name = name, output

    def cast(self, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A value in another float type.

        Args:
            before: the node in front of which a Cast is put.
            value: to be cast.
            dtype: float32 or float16.

        Returns:
            The value itself when it has that type, else the output of its one Cast.
        """
        if value.dtype == dtype:
            return value
        name = f"{value.name}/{'fp16' if dtype == ir.DataType.FLOAT16 else 'fp32'}"
        for user in value.consumers():
            if user.op_type == "Cast" and user.name == name:
                return user.outputs[0]
        node = self.insert(before, "Cast", [value], {"to": int(dtype)}, name=name, like=value)
        node.outputs[0].type = ir.TensorType(dtype)
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of a value, graph outputs too, use another.

        Args:
            old: is used no more.
            new: in its place.
        """
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
    """The numbers of a small constant.

    Args:
        value: any.

    Returns:
        At most 65,536 numbers; None for anything else.
    """
    if value is None or value.const_value is None:
        return None
    if value.const_value.size > 65_536:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number of a one-element constant.

    Args:
        value: any.

    Returns:
        The number; None for anything else.
    """
    numbers = array(value)
    return float(numbers.reshape(-1)[0]) if numbers is not None and numbers.size == 1 else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that uses a value.

    Args:
        value: any.

    Returns:
        The node; None when there are others or it is a graph output.
    """
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    return next(iter(value.consumers()))


def uncast(value: ir.Value | None) -> ir.Value | None:
    """What a value was cast from.

    Args:
        value: any.

    Returns:
        The value before every Cast; `value` itself when it was not cast.
    """
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast" and not node.domain:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return value


def producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node that gives a value, casts in between looked through.

    Args:
        value: any.
        op: a standard operator.

    Returns:
        The node; None when it is of another operator.
    """
    source = uncast(value)
    node = source.producer() if source is not None else None
    return node if node is not None and node.op_type == op and not node.domain else None


def weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a two-dimensional initializer.

    Args:
        value: any.

    Returns:
        The tensor; None for anything else.
    """
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value if len(value.const_value.shape) == 2 else None


def sizes(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor that has numbers.

    Args:
        tensor: with a `shape`.

    Returns:
        As ints.
    """
    return tuple(int(size) for size in tensor.shape)


def bias_add(matmul: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The bias behind a MatMul.

    Args:
        matmul: the MatMul's output.

    Returns:
        The Add of a one-dimensional initializer that is its only user, and that initializer; else
        None.
    """
    user = only_user(matmul)
    if user is None or user.op_type != "Add":
        return None
    other = user.inputs[1] if user.inputs[0] is matmul else user.inputs[0]
    if other is None or not other.is_initializer() or other.const_value is None:
        return None
    return (user, other) if len(other.const_value.shape) == 1 else None


def refuse(what: str, evidence: str, fix: str) -> UnsupportedGraphError:
    """The error for a graph that does not have the shape a step needs.

    Args:
        what: happened.
        evidence: that shows it.
        fix: the way out.

    Returns:
        The error, to be raised.
    """
    return UnsupportedGraphError(what, evidence=evidence, fix=fix)
