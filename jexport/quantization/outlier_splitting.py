"""Channels that are far beyond the rest, in a product's input and its weight, become several.

In the second matrix of an MLP a single channel can reach ten times beyond all others. SmoothQuant
divides its activations and gives what it takes to that channel's row of the weight, and then one
scale a column is as coarse as this row asks for. A channel that is there m times, each copy with
1/m of its row, adds up to the same:

    act(x W + b) V = sum over channels j of m_j act(x W + b)_j (V_j / m_j)

In float the copies are columns of W and rows of V / m; SmoothQuant then finds a channel that is m
times easier. Outlier channel splitting (Zhao et al. 2019, arXiv 1901.09504), as many copies as are
needed. Every engine sees an MLP that is 2 % wider.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from jexport.graph import edit
from jexport.quantization.observers import Site

ACTIVATIONS = ("Gelu", "Relu", "Tanh")

SHARE, MULTIPLE = 64, 16
"""Copies: one for so many channels, rounded up to a multiple of what integer kernels like. Twice as
many gave the same cosine, half as many 0.00004 less (MiniLM)."""

FAR = 8
"""Copies of the furthest channel from which it pays: with fewer, cosine stayed the same."""


@dataclass(frozen=True, kw_only=True)
class Copied:
    """An activation, by its node's name, and how often each of its channels is there: int64."""

    activation: str
    copies: NDArray[np.int64]

    def report(self) -> dict[str, Any]:
        """JSON-ready, as quantization.json has it: which channels are there how often."""
        several = np.flatnonzero(self.copies > 1)
        return {
            "activation": self.activation,
            "channels": {str(number): int(self.copies[number]) for number in several},
        }


@dataclass(frozen=True, kw_only=True)
class _Mlp:
    """act(x W + b) V: its nodes. bias: the Add and b, None without one."""

    first: ir.Node
    bias: tuple[ir.Node, ir.Value] | None
    activation: ir.Node
    second: ir.Node

    @property
    def between(self) -> ir.Value:
        """What the second product reads."""
        return self.activation.outputs[0]


def find(
    model: ir.Model,
    sites: Mapping[str, Site],
    weight: Callable[[str], NDArray[np.float32]],
) -> tuple[Copied, ...]:
    """Where copies help. sites: what goes into each product.

    weight(name): float32 [rows, columns] of one weight.
    """
    found = []
    for mlp in _mlps(model):
        site = sites.get(str(mlp.between.name))
        if site is None:
            continue
        width = np.abs(weight(_name(mlp.second))).max(axis=1)
        copies = _copies(np.maximum(site.high, -site.low) * width)
        if copies.max() >= FAR:
            found.append(Copied(activation=str(mlp.activation.name), copies=copies))
    return tuple(found)


def copy(model: ir.Model, copied: Sequence[Copied], sites: MutableMapping[str, Site]) -> None:
    """Make the copies, in place: the graph computes the same sums.

    sites: those of copied channels are replaced, where they are given.
    """
    work = edit.Edit(model.graph)
    wanted = {one.activation: one.copies for one in copied}
    for mlp in list(_mlps(model)):
        copies = wanted.get(str(mlp.activation.name))
        if copies is None:
            continue
        source = np.repeat(np.arange(len(copies)), copies)
        _widen(work, mlp, source)
        _narrow(work, mlp.second, source, copies)
        name = str(mlp.between.name)
        if name in sites:
            sites[name] = _repeated(sites[name], source)
    work.drop_dead()


def _copies(reach: NDArray[np.floating]) -> NDArray[np.int64]:
    """One more copy, again and again, of the channel whose copies reach furthest.

    reach: of each channel's products, largest input times largest weight.
    """
    copies = np.ones(len(reach), np.int64)
    furthest = [(-float(one), number) for number, one in enumerate(reach)]
    heapq.heapify(furthest)
    for _ in range(MULTIPLE * -(-len(reach) // (SHARE * MULTIPLE))):
        number = furthest[0][1]
        copies[number] += 1
        heapq.heapreplace(furthest, (-float(reach[number]) / copies[number], number))
    return copies


def _repeated(site: Site, source: NDArray[np.int64]) -> Site:
    return replace(
        site,
        low=site.low[source],
        high=site.high[source],
        gram=site.gram[np.ix_(source, source)],
        rows=site.rows[:, source],
    )


def _mlps(model: ir.Model) -> Iterator[_Mlp]:
    """Two products with an activation between them, and nothing else that reads what lies there."""
    for node in model.graph:
        if node.op_type not in ACTIVATIONS or node.domain:
            continue
        value, second = node.inputs[0], edit.only_user(node.outputs[0])
        if value is None or edit.only_user(value) is not node:
            continue
        first, bias = _product_and_bias(value)
        if _weighs(first) and _weighs(second) and second.inputs[0] is node.outputs[0]:
            yield _Mlp(first=first, bias=bias, activation=node, second=second)


def _product_and_bias(value: ir.Value) -> tuple[ir.Node | None, tuple[ir.Node, ir.Value] | None]:
    """What made a value: a MatMul, with the Add of a bias or without."""
    node = value.producer()
    for source in node.inputs if node is not None and node.op_type == "Add" else ():
        bias = edit.bias_add(source) if source is not None and source.producer() else None
        if source is not None and bias is not None:
            return source.producer(), bias
    return node, None


def _weighs(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether it is a MatMul with a weight of its own."""
    if node is None or node.op_type != "MatMul" or node.domain:
        return False
    weight = node.inputs[1]
    return weight is not None and edit.weight(weight) is not None and len(weight.uses()) == 1


def _name(product: ir.Node) -> str:
    weight = product.inputs[1]
    assert weight is not None
    return str(weight.name)


def _widen(work: edit.Edit, mlp: _Mlp, source: NDArray[np.int64]) -> None:
    """Let the first product give these columns."""
    _replaced(work, mlp.first, (-1, len(source)), lambda weight: weight[:, source])
    values = [mlp.first.outputs[0], mlp.between]
    if mlp.bias is not None:
        node, bias = mlp.bias
        assert bias.const_value is not None
        repeated = work.constant(f"{bias.name}.copied", bias.const_value.numpy()[source])
        node.replace_input_with(list(node.inputs).index(bias), repeated)
        values.append(node.outputs[0])
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], len(source)])


def _narrow(
    work: edit.Edit, product: ir.Node, source: NDArray[np.int64], copies: NDArray[np.int64]
) -> None:
    """Let the second product read them: each copy its part of the row."""
    part = (1 / copies[source]).astype(np.float32)[:, None]
    _replaced(work, product, (len(source), -1), lambda weight: weight[source] * part)


def _replaced(
    work: edit.Edit,
    product: ir.Node,
    size: tuple[int, int],
    made: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    """Give a product another weight, made of its own when it is read; -1: the size it has."""
    weight = product.inputs[1]
    assert weight is not None
    tensor = weight.const_value
    assert tensor is not None
    shape = [new if new > 0 else old for new, old in zip(size, edit.sizes(tensor), strict=True)]
    lazy = work.lazy(f"{weight.name}.copied", tensor, shape, lambda: made(tensor.numpy()))
    product.replace_input_with(1, lazy)
