"""Padding removed: from the first attention's input on, tokens of a batch lie end to end.

RemovePadding turns [batch, sequence, hidden] into [tokens, hidden] and says where each text begins;
PackedMultiHeadAttention lets a token see its own text; all that treats each token for itself runs
on the shorter tensor unchanged; RestorePadding gives graph outputs, and whatever mixes tokens, the
padded tensor back, with zeros where there is padding. ONNX Runtime has no CPU kernels of the three.

RemovePadding counts on one GPU thread and waits for the host to learn how many tokens there are, so
such a graph cannot be captured as a CUDA graph. Texts must be padded on the right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from jexport.graph import cuda_attention, edit
from jexport.graph.ort_attention import MS

EACH_NUMBER = ("Cast", "Gelu", "BiasGelu", "FastGelu", "Tanh", "Relu", "Sigmoid", "Erf", "Identity")
"""Operators that compute each number of their first input for itself; others are constants."""

BINARY = ("Add", "Sub", "Mul", "Div")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(kw_only=True)
class _Packing:
    """A graph while it is packed.

    Attributes:
        values: by id of a value, itself or what replaced it, packed: [tokens, hidden].
        offset: int32 [batch, sequence], the place of each token before packing, padding last.
        cumulative: int32 [batch + 1], where each text begins, and where the last ends.
        positions: int64 [1, tokens], the place of each token in its text, once it is needed.
        restored: by id of a packed value, it with its padding.
    """

    work: edit.Edit
    source: ir.Value
    offset: ir.Value
    cumulative: ir.Value
    values: dict[int, ir.Value]
    positions: ir.Value | None = None
    restored: dict[int, ir.Value] = field(default_factory=dict)

    def packed(self, value: ir.Value | None) -> ir.Value | None:
        """What stands for a value in the packed part of the graph, if it is there."""
        return None if value is None else self.values.get(id(value))

    def mark(self, value: ir.Value, stands_for: ir.Value | None = None) -> None:
        """A value is [tokens, hidden] from now on, also in the place of another one."""
        shape = (stands_for or value).shape
        if shape is not None:
            value.shape = ir.Shape(["tokens", shape[-1]])
        self.values[id(value)] = value
        if stands_for is not None:
            self.values[id(stands_for)] = value

    def node(
        self,
        op: str,
        inputs: list[ir.Value | None],
        name: str,
        attributes: Mapping[str, int | float] | None = None,
        *,
        domain: str = "",
    ) -> ir.Node:
        """A new node; the graph is sorted after every step."""
        unused = self.work.unused(name)
        node = ir.node(op, inputs, dict(attributes or {}), domain=domain, name=unused)
        node.outputs[0].name = unused
        self.work.graph.append(node)
        return node


def pack(work: edit.Edit) -> int:
    """Pack the layers of a graph.

    Args:
        work: a fused graph.

    Returns:
        How many attentions run on packed tokens; 0 where nothing was changed.
    """
    attentions = cuda_attention.matches(work)
    if not attentions:
        return 0
    sources = {
        _projected(value) for value in (attentions[0].query, attentions[0].key, attentions[0].value)
    }
    source = sources.pop()
    if sources or source is None or source.dtype not in FLOATS or len(source.shape or ()) != 3:
        return 0
    nodes = list(work.graph)
    packing = _remove_padding(work, source)
    matches = {id(match.node): match for match in attentions}
    return sum(_visit(packing, node, matches.get(id(node))) for node in nodes) + _outputs(packing)


def _projected(value: ir.Value | None) -> ir.Value | None:
    """The value whose projection a query, key or value is; casts in between looked through."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "MatMul" and edit.weight(node.inputs[1]) is not None:
            return edit.uncast(node.inputs[0])
        biased = node.op_type == "Add" and _is_row(node.inputs[1])
        if not biased and node.op_type not in ("Cast", "Split", "RotaryEmbedding"):
            return None
        value = node.inputs[0]
    return None


def _remove_padding(work: edit.Edit, source: ir.Value) -> _Packing:
    """RemovePadding behind `source`; all that used it uses the packed value."""
    users = list(source.uses())
    unused = work.unused(f"{source.name}/RemovePadding")
    node = ir.node(
        "RemovePadding",
        [source, cuda_attention.lengths(work)],
        {},
        domain=MS,
        num_outputs=4,
        name=unused,
    )
    work.graph.append(node)
    names = ("packed", "token_offset", "cumulative_length", "longest")
    for output, name in zip(node.outputs, names, strict=True):
        output.name = f"{unused}/{name}"
        output.type = ir.TensorType(ir.DataType.INT32)
    tokens, offset, cumulative, longest = node.outputs
    tokens.type, longest.shape = source.type, ir.Shape([1])
    offset.shape = ir.Shape((source.shape or [])[:2])
    cumulative.shape = ir.Shape([None])
    for user, position in users:
        user.replace_input_with(position, tokens)
    packing = _Packing(work=work, source=source, offset=offset, cumulative=cumulative, values={})
    packing.mark(tokens, source)
    return packing


def _visit(packing: _Packing, node: ir.Node, match: cuda_attention.AttentionMatch | None) -> int:
    """Carry packing on through one node, or end it there; returns 1 for a packed attention."""
    if match is not None and _attention(packing, match):
        return 1
    if not any(packing.packed(value) for _, _, value in _reads(node)):
        return 0
    if node.op_type == "RotaryEmbedding" and node.domain == MS and _rotary(packing, node):
        return 0
    if _is_each_token(packing, node):
        for output in node.outputs:
            packing.mark(output)
        return 0
    for reader, position, value in list(_reads(node)):
        packed = packing.packed(value)
        if packed is not None:
            reader.replace_input_with(position, _restored(packing, packed))
    return 0


def _reads(node: ir.Node) -> Iterator[tuple[ir.Node, int, ir.Value | None]]:
    """What a node and its subgraphs read: the reader, which of its inputs, and the value."""
    for position, value in enumerate(node.inputs):
        yield node, position, value
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _reads(inner)


def _attention(packing: _Packing, match: cuda_attention.AttentionMatch) -> bool:
    """PackedMultiHeadAttention in the place of an attention, where its inputs are packed."""
    inputs = [packing.packed(value) for value in (match.query, match.key, match.value)]
    if None in inputs:
        return False
    old = match.node
    node = packing.node(
        "PackedMultiHeadAttention",
        [*inputs, None, packing.offset, packing.cumulative],
        f"{old.name}/packed",
        match.attributes,
        domain=MS,
    )
    node.outputs[0].type = old.outputs[0].type
    packing.work.take_over(old, node)
    packing.mark(node.outputs[0], old.outputs[0])
    return True


def _rotary(packing: _Packing, node: ir.Node) -> bool:
    """A rotation by the place in the text: tokens as one text [1, tokens, hidden], with places.

    is_packed_batching: there may be more tokens than the tables have rows.
    """
    value, offset = packing.packed(node.inputs[0]), edit.scalar(node.inputs[1])
    if value is None or offset != 0.0:
        return False
    if packing.positions is None:
        packing.positions = _positions(packing)
    axis = packing.work.constant("packed_axis", np.zeros(1, np.int64))
    spread = packing.node("Unsqueeze", [value, axis], f"{node.name}/row").outputs[0]
    turned = node.outputs[0]
    flat = packing.node("Squeeze", [None, axis], f"{node.name}/tokens")
    packing.work.replace(turned, flat.outputs[0])
    flat.replace_input_with(0, turned)
    flat.outputs[0].type = turned.type
    packing.mark(flat.outputs[0], turned)
    node.replace_input_with(0, spread)
    node.replace_input_with(1, packing.positions)
    node.attributes["is_packed_batching"] = ir.AttrInt64("is_packed_batching", 1)
    spread.type = value.type
    spread.shape = turned.shape = ir.Shape([1, *(flat.outputs[0].shape or [])])
    return True


def _positions(packing: _Packing) -> ir.Value:
    """int64 [1, tokens]: how many real tokens of its text are before each token."""
    work = packing.work
    mask = next(value for value in work.graph.inputs if value.name == "attention_mask")
    int64, int32 = ir.TensorType(ir.DataType.INT64), packing.offset.type
    zero, flat = (
        work.constant(f"packed_{name}", np.array([number], np.int64))
        for name, number in (("axis", 0), ("flat", -1))
    )
    last_axis = work.constant("packed_last_axis", np.array(1, np.int64))
    tokens = packing.values[id(packing.source)]
    count = packing.node("Shape", [tokens], "packed/count", {"start": 0, "end": 1}).outputs[0]
    places = packing.node("Reshape", [packing.offset, flat], "packed/places").outputs[0]
    real = packing.node("Slice", [places, zero, count, zero], "packed/real").outputs[0]
    before = packing.node("CumSum", [mask, last_axis], "packed/before", {"exclusive": 1}).outputs[0]
    listed = packing.node("Reshape", [before, flat], "packed/listed").outputs[0]
    chosen = packing.node("Gather", [listed, real], "packed/chosen", {"axis": 0}).outputs[0]
    row = packing.node("Unsqueeze", [chosen, zero], "packed/positions").outputs[0]
    for value in (count, before, listed, chosen, row):
        value.type = int64
    places.type = real.type = int32
    count.shape, row.shape = ir.Shape([1]), ir.Shape([1, "tokens"])
    before.shape, chosen.shape, real.shape = mask.shape, ir.Shape(["tokens"]), ir.Shape(["tokens"])
    return row


def _is_each_token(packing: _Packing, node: ir.Node) -> bool:
    """Whether a node gives, of packed tokens, what it gave of padded ones; sets its axis."""
    first, *others = node.inputs
    constants = all(value is None or _is_row(value) for value in others)
    packed = packing.packed(first) is not None
    if node.domain == MS and node.op_type == "SkipLayerNormalization":
        skip = packing.packed(others[0]) is not None
        return packed and skip and all(value is None or _is_row(value) for value in others[1:])
    if node.op_type in BINARY and not node.domain:
        inputs = [packing.packed(value) is not None or _is_row(value) for value in node.inputs]
        return all(inputs)
    if node.op_type == "MatMul" and not node.domain:
        return packed and edit.weight(others[0]) is not None
    if node.op_type in ("LayerNormalization", "Split") and not node.domain:
        axis = node.attributes.get("axis")
        default = -1 if node.op_type == "LayerNormalization" else 0
        if (
            not packed
            or not constants
            or (default if axis is None else axis.as_int())
            not in (
                -1,
                2,
            )
        ):
            return False
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return True
    if node.op_type == "Cast":
        return packed and node.attributes["to"].as_int() in map(int, FLOATS)
    return node.op_type in EACH_NUMBER and packed and constants


def _is_row(value: ir.Value | None) -> bool:
    """Whether a value is a constant that has at most one axis."""
    return value is not None and value.is_initializer() and len(value.shape or ()) <= 1


def _restored(packing: _Packing, value: ir.Value) -> ir.Value:
    """A packed value with its padding: zeros."""
    if id(value) not in packing.restored:
        node = packing.node(
            "RestorePadding", [value, packing.offset], f"{value.name}/RestorePadding", domain=MS
        )
        padded = node.outputs[0]
        padded.type = value.type
        padded.shape = ir.Shape([*(packing.source.shape or [])[:2], (value.shape or [None])[-1]])
        packing.restored[id(value)] = padded
    return packing.restored[id(value)]


def _outputs(packing: _Packing) -> int:
    """Give graph outputs their padding back, under their names; returns 0."""
    outputs = packing.work.graph.outputs
    for place, value in enumerate(list(outputs)):
        packed = packing.packed(value)
        if packed is None or value is packing.source:
            continue
        padded, name = _restored(packing, packed), value.name
        packed.name = f"{name}/packed"
        padded.name = name
        outputs[place] = padded
    return 0
