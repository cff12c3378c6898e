"""Outlier channel splitting in MLPs (Zhao et al. 2019, arXiv 1901.09504).

In the second matrix of an MLP a single channel can reach ten times beyond all others. SmoothQuant
divides its activations and gives what it takes to that channel's row of the weight, and then one
scale a column is as coarse as this row asks for. A channel that is there m times, each copy with
1/m of its row, adds up to the same:

    act(x W + b) V = sum over channels j of m_j act(x W + b)_j (V_j / m_j)

In float the copies are columns of W and rows of V / m; SmoothQuant then finds a channel that is m
times easier. As many copies as are needed; every engine sees an MLP that is 2 % wider.

A gated MLP, (act(x G) * (x U)) V, is where decoders have their massive activations (Sun et al.
2024, arXiv 2402.17762): a few channels are hundreds of times beyond the rest, at single tokens.
Each copy is a column of G and one of U, which are one matrix [G U] here.
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
from jexport.quantization.observers import ActivationStats

ACTIVATIONS = ("Gelu", "Relu", "Tanh")
GATE_OPS = (*ACTIVATIONS, "Sigmoid", "Mul", "Swish", "HardSigmoid", "Erf", "Add", "Div")
"""What a gate is made of, each number for itself; SiLU is x * Sigmoid(x)."""

CHANNELS_PER_COPY, MULTIPLE = 64, 16
"""Copies: one for so many channels, rounded up to a multiple of what integer kernels like. Twice as
many gave the same cosine, half as many 0.00004 less (MiniLM)."""

MIN_COPIES = 8
"""Copies of the furthest channel from which it pays: with fewer, cosine stayed the same."""


@dataclass(frozen=True, kw_only=True)
class ChannelSplit:
    """How the channels of one activation are split.

    Args:
        activation: name of its node.
        copies: int64 [channels], how often each channel is there; 1 for most.
    """

    activation: str
    copies: NDArray[np.int64]

    def report(self) -> dict[str, Any]:
        """JSON-ready, as quantization.json has it: the split channels and their copies."""
        split_channels = np.flatnonzero(self.copies > 1)
        return {
            "activation": self.activation,
            "channels": {str(number): int(self.copies[number]) for number in split_channels},
        }


@dataclass(frozen=True, kw_only=True)
class _Mlp:
    """act(x W + b) V: its nodes.

    bias: the Add and b, None without one. activation: the last node before V. split: of a gated
    MLP, what parts x [G U] into halves. inner: outputs of the nodes between W and V, W's own aside.
    """

    first: ir.Node
    bias: tuple[ir.Node, ir.Value] | None
    activation: ir.Node
    second: ir.Node
    split: ir.Node | None = None
    inner: tuple[ir.Value, ...] = ()

    @property
    def between(self) -> ir.Value:
        """What the second layer reads."""
        return self.activation.outputs[0]

    @property
    def width(self) -> int:
        """Channels that the second layer reads."""
        weight = self.second.inputs[1]
        assert weight is not None
        return edit.sizes(weight.const_value)[0]


def find_outlier_channels(
    model: ir.Model,
    stats: Mapping[str, ActivationStats],
    weight: Callable[[str], NDArray[np.float32]],
) -> tuple[ChannelSplit, ...]:
    """The activations that have a channel so far beyond the rest that splitting it pays.

    Args:
        model: a float graph.
        stats: statistics by activation's name; MLPs without any are passed over.
        weight: reads a weight by name, float32 [in_features, out_features].

    Returns:
        One split for each such activation.
    """
    splits = []
    for mlp in _mlps(model):
        observed = stats.get(str(mlp.between.name))
        if observed is None:
            continue
        width = np.abs(weight(_weight_name(mlp.second))).max(axis=1)
        copies = _copies(np.maximum(observed.maximum, -observed.minimum) * width)
        if copies.max() >= MIN_COPIES:
            splits.append(ChannelSplit(activation=str(mlp.activation.name), copies=copies))
    return tuple(splits)


def split_channels(
    model: ir.Model,
    splits: Sequence[ChannelSplit],
    stats: MutableMapping[str, ActivationStats],
) -> None:
    """Split the channels, in place: the graph computes the same sums.

    Args:
        model: a float graph.
        splits: from find_outlier_channels.
        stats: statistics by activation's name; those of split channels are replaced.
    """
    work = edit.Edit(model.graph)
    copies_of = {split.activation: split.copies for split in splits}
    for mlp in list(_mlps(model)):
        copies = copies_of.get(str(mlp.activation.name))
        if copies is None:
            continue
        source = np.repeat(np.arange(len(copies)), copies)
        _widen_first(work, mlp, source)
        _widen_second(work, mlp.second, source, copies)
        name = str(mlp.between.name)
        if name in stats:
            stats[name] = _repeat_stats(stats[name], source)
    work.drop_dead()


def _copies(reach: NDArray[np.floating]) -> NDArray[np.int64]:
    """One more copy, again and again, of the channel whose copies reach furthest.

    reach: [channels], largest input times largest weight of each.
    """
    copies = np.ones(len(reach), np.int64)
    furthest = [(-float(one), number) for number, one in enumerate(reach)]
    heapq.heapify(furthest)
    for _ in range(MULTIPLE * -(-len(reach) // (CHANNELS_PER_COPY * MULTIPLE))):
        number = furthest[0][1]
        copies[number] += 1
        heapq.heapreplace(furthest, (-float(reach[number]) / copies[number], number))
    return copies


def _repeat_stats(stats: ActivationStats, source: NDArray[np.int64]) -> ActivationStats:
    return replace(
        stats,
        minimum=stats.minimum[source],
        maximum=stats.maximum[source],
        gram=stats.gram[np.ix_(source, source)],
        samples=stats.samples[:, source],
        total=stats.total[source],
    )


def _mlps(model: ir.Model) -> Iterator[_Mlp]:
    """Two linear layers with an activation, or a gate, between them that nothing else reads."""
    for node in model.graph:
        gated = _gated(node)
        if gated is not None:
            yield gated
        if node.op_type not in ACTIVATIONS or node.domain:
            continue
        value, second = node.inputs[0], edit.only_user(node.outputs[0])
        if value is None or edit.only_user(value) is not node:
            continue
        first, bias = _linear_and_bias(value)
        if _is_linear(first) and _is_linear(second) and second.inputs[0] is node.outputs[0]:
            yield _Mlp(first=first, bias=bias, activation=node, second=second)


def _gated(node: ir.Node) -> _Mlp | None:
    """The gated MLP whose two sides a node multiplies; None where it is none."""
    second = edit.only_user(node.outputs[0]) if node.op_type == "Mul" else None
    if not _is_linear(second) or second.inputs[0] is not node.outputs[0]:
        return None
    nodes, open_values, split = {node}, [*node.inputs], None
    while open_values:
        value = open_values.pop()
        producer = value.producer() if value is not None else None
        if value is None or producer is None:
            if edit.scalar(value) is None:  # numbers of single channels would have to be repeated
                return None
        elif producer.op_type == "Split" and not producer.domain:
            if split not in (None, producer):
                return None
            split = producer
        elif producer.op_type not in GATE_OPS or producer.domain:
            return None
        elif producer not in nodes:
            nodes.add(producer)
            open_values += producer.inputs
    if split is None or not _halves(split):
        return None
    inner = [value for one in (split, *nodes) for value in one.outputs]
    readers = {user for value in inner for user in value.consumers()}
    source = split.inputs[0]
    if source is None or edit.only_user(source) is not split or readers - nodes != {second}:
        return None
    if any(value.is_graph_output() for value in inner):
        return None
    first, bias = _linear_and_bias(source)
    if not _is_linear(first):
        return None
    return _Mlp(
        first=first, bias=bias, activation=node, second=second, split=split, inner=tuple(inner)
    )


def _halves(split: ir.Node) -> bool:
    """Whether it parts the last axis into two of one size, which a constant gives."""
    axis, sizes = split.attributes.get("axis"), edit.array(split.inputs[-1])
    source = split.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else 0
    last = axis is not None and axis.as_int() in (-1, rank - 1)
    return (
        last and len(split.inputs) == 2 and sizes is not None and sizes.tolist() == [sizes[0]] * 2
    )


def _linear_and_bias(value: ir.Value) -> tuple[ir.Node | None, tuple[ir.Node, ir.Value] | None]:
    """What computes a value: a MatMul, with the Add of a bias or without."""
    node = value.producer()
    for source in node.inputs if node is not None and node.op_type == "Add" else ():
        bias = edit.bias_add(source) if source is not None and source.producer() else None
        if source is not None and bias is not None:
            return source.producer(), bias
    return node, None


def _is_linear(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether it is a MatMul with a weight of its own."""
    if node is None or node.op_type != "MatMul" or node.domain:
        return False
    weight = node.inputs[1]
    return weight is not None and edit.weight(weight) is not None and len(weight.uses()) == 1


def _weight_name(linear: ir.Node) -> str:
    weight = linear.inputs[1]
    assert weight is not None
    return str(weight.name)


def _widen_first(work: edit.Edit, mlp: _Mlp, source: NDArray[np.int64]) -> None:
    """Let the first layer give these columns, in both halves where it has two."""
    columns = source
    if mlp.split is not None:
        columns = np.concatenate([source, source + mlp.width])
        sizes = np.array([len(source)] * 2, np.int64)
        mlp.split.replace_input_with(1, work.constant(f"{mlp.split.name}.copied", sizes))
    _replace_weight(work, mlp.first, (-1, len(columns)), lambda weight: weight[:, columns])
    values = [mlp.first.outputs[0]]
    if mlp.bias is not None:
        node, bias = mlp.bias
        assert bias.const_value is not None
        repeated = work.constant(f"{bias.name}.copied", bias.const_value.numpy()[columns])
        node.replace_input_with(list(node.inputs).index(bias), repeated)
        values.append(node.outputs[0])
    for value, width in [
        *((value, len(columns)) for value in values),
        *((value, len(source)) for value in (mlp.between, *mlp.inner)),
    ]:
        if value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], width])


def _widen_second(
    work: edit.Edit, linear: ir.Node, source: NDArray[np.int64], copies: NDArray[np.int64]
) -> None:
    """Let the second layer read them: each copy its part of the row."""
    part = (1 / copies[source]).astype(np.float32)[:, None]
    _replace_weight(work, linear, (len(source), -1), lambda weight: weight[source] * part)


def _replace_weight(
    work: edit.Edit,
    linear: ir.Node,
    size: tuple[int, int],
    compute: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> None:
    """Give a layer another weight, computed from its own when it is read; -1: the size it has."""
    weight = linear.inputs[1]
    assert weight is not None
    tensor = weight.const_value
    assert tensor is not None
    shape = [new if new > 0 else old for new, old in zip(size, edit.sizes(tensor), strict=True)]
    lazy = work.lazy(f"{weight.name}.copied", tensor, shape, lambda: compute(tensor.numpy()))
    linear.replace_input_with(1, lazy)
