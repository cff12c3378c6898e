"""Channel shifting behind LayerNormalization (Outlier Suppression+, Wei et al. 2023).

A channel of a LayerNormalization's output lies to one side of zero as a rule, the furthest one
above all, and an activation has one step and one zero for all channels. Each is moved to the middle
of its range (arXiv 2304.09145), at no cost where biases take it up:

    LayerNorm(h) = n + z, with n of the bias b - z
    (n + z) W + c = n W + (c + z W)        the linear layers that read it
    (n + z) + (v + c) = n + (v + (c + z))  the residual connection, v + c from a linear layer

In float the graph computes the same. An output that anything else reads is left alone; so is
whatever follows a Gelu, where most values are close to zero and zero has to stay a step.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from jexport.graph import edit
from jexport.quantization.observers import ActivationStats

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ChannelShift:
    """By how much the channels of one activation are shifted.

    Args:
        normalization: name of the LayerNormalization that gives it.
        offsets: float32 [channels], what is taken from each.
    """

    normalization: str
    offsets: Array


@dataclass(frozen=True, kw_only=True)
class _Bias:
    """A bias that takes up a shift: an input of a node; the weight z goes through, if any."""

    node: ir.Node
    place: int
    weight: ir.Value | None


def find_shifts(model: ir.Model, stats: Mapping[str, ActivationStats]) -> tuple[ChannelShift, ...]:
    """The activations whose channels can be shifted to the middle of their range.

    Args:
        model: a float graph.
        stats: statistics by activation's name; those without any are passed over.

    Returns:
        One shift for each such activation.
    """
    shifts = []
    for node in model.graph:
        if not _biases(node):
            continue
        observed = stats.get(str(node.outputs[0].name))
        if observed is not None:
            middle = ((observed.minimum + observed.maximum) / 2).astype(np.float32)
            shifts.append(ChannelShift(normalization=str(node.name), offsets=middle))
    return tuple(shifts)


def shift_channels(
    model: ir.Model,
    shifts: Sequence[ChannelShift],
    stats: MutableMapping[str, ActivationStats],
) -> None:
    """Shift the channels, in place: the graph computes the same sums.

    Args:
        model: a float graph.
        shifts: from find_shifts.
        stats: statistics by activation's name; those of shifted channels are replaced.
    """
    work = edit.Edit(model.graph)
    offsets_of = {shift.normalization: shift.offsets for shift in shifts}
    for node in list(model.graph):
        offsets = offsets_of.get(str(node.name))
        if offsets is None:
            continue
        biases = _biases(node)
        if not biases:
            continue
        for one in biases:
            _add(work, one, _behind(offsets, one.weight))
        _add(work, _Bias(node=node, place=2, weight=None), -offsets)
        name = str(node.outputs[0].name)
        if name in stats:
            stats[name] = stats[name].shifted(offsets)
    work.drop_dead()


def _behind(offsets: Array, weight: ir.Value | None) -> NDArray[np.float64]:
    """What offsets come to behind a weight, or as they are without one; float64, a long sum."""
    exact = offsets.astype(np.float64)
    if weight is None:
        return exact
    assert weight.const_value is not None
    # Column sums row after row: the order of BLAS depends on the machine.
    behind: NDArray[np.float64] = (weight.const_value.numpy() * exact[:, None]).sum(axis=0)
    return behind


def _add(work: edit.Edit, bias: _Bias, values: NDArray[np.floating]) -> None:
    """Give a node a bias with more in it."""
    value = bias.node.inputs[bias.place]
    assert value is not None
    assert value.const_value is not None
    total = (value.const_value.numpy() + values).astype(np.float32)
    stem = str(value.name).partition(".shifted")[0]
    name, number = f"{stem}.shifted", 1
    while name in work.graph.initializers:  # shifts of two activations, or a module that runs twice
        number += 1
        name = f"{stem}.shifted_{number}"
    bias.node.replace_input_with(bias.place, work.constant(name, total))


def _biases(node: ir.Node) -> list[_Bias]:
    """The biases that take up a shift behind a LayerNormalization, one for each that reads it.

    Args:
        node: any.

    Returns:
        Empty for another operator or axis, without a bias of its own, where a reader has no bias,
        and where no linear layer reads it.
    """
    if node.op_type != "LayerNormalization" or node.domain or len(node.inputs) < 3:
        return []
    value, axis, own = node.outputs[0], node.attributes.get("axis"), node.inputs[2]
    if value.is_graph_output() or own is None or own.const_value is None:
        return []
    if len(own.const_value.shape) != 1 or (axis is not None and axis.as_int() != -1):
        return []
    biases = [_bias_behind(user, value) for user, _ in value.uses()]
    takers = [one for one in biases if one is not None]
    linear = any(one.weight is not None for one in takers)
    return takers if linear and len(takers) == len(biases) else []


def _bias_behind(user: ir.Node, value: ir.Value) -> _Bias | None:
    """The bias that takes up the shift of a value for one that reads it; None without one."""
    if user.op_type == "MatMul" and not user.domain and user.inputs[0] is value:
        weight = user.inputs[1]
        bias = edit.bias_add(user.outputs[0]) if edit.weight(weight) is not None else None
        return _bias(*bias, weight) if bias is not None else None
    if user.op_type != "Add" or user.domain:
        return None
    other = user.inputs[1] if user.inputs[0] is value else user.inputs[0]
    producer = edit.producer(other, "Add")
    if other is None or producer is None or edit.only_user(other) is not user:
        return None
    for source in producer.inputs:
        bias = edit.bias_add(source) if edit.producer(source, "MatMul") and source else None
        if bias is not None and bias[0] is producer:
            return _bias(*bias, None)
    return None


def _bias(node: ir.Node, value: ir.Value, weight: ir.Value | None) -> _Bias:
    return _Bias(node=node, place=list(node.inputs).index(value), weight=weight)
