"""MultiHeadAttention as CUDA's fused kernels take it: with each text's length, in one node.

With a mask [batch, sequence] none of the fused kernels is eligible, and the one that is left holds
a heads x tokens x tokens matrix; the `If` that avoids the mask when nothing is padded costs a copy
to the host in every layer. With lengths and starts, int32 [3 * batch + 2], CUTLASS's memory
efficient attention takes padded batches, in float16 and (from 256 tokens on) in float32.

What both need: padding on the right, as jexport's runtime and these models' tokenizers pad.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jexport.graph import edit
from jexport.graph.ort_attention import MS

LARGEST_HEAD = 1024
"""MultiHeadAttention's memory efficient kernel: heads of a multiple of 8, up to so many numbers."""


@dataclass(frozen=True, kw_only=True)
class AttentionMatch:
    """One attention of a fused graph.

    Args:
        node: what stands in the graph, an `If` of two MultiHeadAttentions or one of them.
        query: [batch, sequence, hidden].
        key: [batch, sequence, hidden].
        value: [batch, sequence, hidden].
        heads: its attribute.
        scale: its attribute.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float

    @property
    def attributes(self) -> dict[str, int | float]:
        """Those of the operator that takes its place."""
        return {"num_heads": self.heads, "scale": self.scale}


def matches(work: edit.Edit) -> list[AttentionMatch]:
    """Every attention of a graph whose only mask is the padding.

    Args:
        work: an edit of a fused graph; nothing is changed.

    Returns:
        The attentions, in the graph's order.
    """
    attentions = []
    for node in work.graph:
        match = _match(node)
        if match is not None:
            attentions.append(match)
    return attentions


def _match(node: ir.Node) -> AttentionMatch | None:
    inner = node
    if node.op_type == "If" and not node.domain:
        branch = node.attributes["then_branch"].as_graph()
        if len(branch) != 1:
            return None
        inner = branch[0]
    if inner.op_type != "MultiHeadAttention" or inner.domain != MS:
        return None
    query, key, value, *rest = inner.inputs
    if query is None or key is None or value is None or len(query.shape or ()) != 3:
        return None
    masks = rest[1:2] if inner is node else []
    if any(rest[:1]) or any(rest[2:]) or not all(map(_is_padding, masks)):
        return None
    heads = inner.attributes["num_heads"].as_int()
    hidden = (query.shape or (None,))[-1]
    if not isinstance(hidden, int) or hidden % (8 * heads) or hidden // heads > LARGEST_HEAD:
        return None
    scale = inner.attributes["scale"].as_float()
    return AttentionMatch(node=node, query=query, key=key, value=value, heads=heads, scale=scale)


def _is_padding(mask: ir.Value | None) -> bool:
    """Whether a mask is attention_mask itself, int32 [batch, sequence]."""
    source = edit.uncast(mask)
    return source is None or (source.name == "attention_mask" and len(source.shape or ()) == 2)


def lengths(work: edit.Edit) -> ir.Value:
    """How many tokens of each text are real; computed once in a graph.

    Args:
        work: an edit of a graph with the input `attention_mask`.

    Returns:
        int32 [batch].
    """
    for node in work.graph:
        if node.name == "lengths":
            return node.outputs[0]
    mask = next(value for value in work.graph.inputs if value.name == "attention_mask")
    narrow = _int32(work, "Cast", [mask], "lengths/mask", to=int(ir.DataType.INT32))
    narrow.shape = mask.shape
    axis = work.constant("lengths_axis", np.ones(1, np.int64))
    total = _int32(work, "ReduceSum", [narrow, axis], "lengths", keepdims=0)
    total.shape = ir.Shape([(mask.shape or [None])[0]])
    return total


def _int32(
    work: edit.Edit, op: str, inputs: list[ir.Value | None], name: str, **attributes: int
) -> ir.Value:
    """The int32 output of a new node; the graph is sorted after every step."""
    node = ir.node(op, inputs, attributes, name=work.unused(name))
    node.outputs[0].name, node.outputs[0].type = str(node.name), ir.TensorType(ir.DataType.INT32)
    work.graph.append(node)
    return node.outputs[0]


def starts(work: edit.Edit) -> ir.Value:
    """Lengths, then twice where each text begins, and where the last ends.

    Rows are as long as the batch is wide, padding included. Computed from the mask alone, so that
    nothing comes from the host.

    Args:
        work: an edit of a graph with the input `attention_mask`.

    Returns:
        int32 [3 * batch + 2].
    """
    real = lengths(work)
    counted = real.producer()
    assert counted is not None
    mask, axis = counted.inputs
    zero = work.constant("starts_zero", np.zeros(1, np.int32))
    one = work.constant("starts_one", np.ones(1, np.int32))
    first_axis = work.constant("starts_axis", np.array(0, np.int64))
    # Every place of a row counts: 1 where it is real, and 1 where it is not.
    blank = _int32(work, "Mul", [mask, zero], "starts/blank")
    places = _int32(work, "Add", [blank, one], "starts/places")
    widths = _int32(work, "ReduceSum", [places, axis], "starts/widths", keepdims=0)
    ends = _int32(work, "CumSum", [widths, first_axis], "starts/ends")
    joined = _int32(work, "Concat", [real, zero, ends, zero, ends], "starts", axis=0)
    blank.shape = places.shape = mask.shape if mask is not None else None
    widths.shape = ends.shape = real.shape
    joined.shape = ir.Shape([None])
    return joined


def efficient(work: edit.Edit) -> int:
    """One MultiHeadAttention with lengths in the place of each attention.

    Args:
        work: an edit of a fused graph.

    Returns:
        How many.
    """
    attentions = matches(work)
    if not attentions:
        return 0
    given = starts(work)
    for match in attentions:
        node = work.insert(
            match.node,
            "MultiHeadAttention",
            [match.query, match.key, match.value, None, given],
            match.attributes,
            name=f"{match.node.name}/lengths",
            like=match.node.outputs[0],
            domain=MS,
        )
        work.take_over(match.node, node)
    return len(attentions)


def split_projection(work: edit.Edit) -> int:
    """One product that is split (query, key, value; gate and up) -> a product of each part.

    Split copies what the product wrote: as many bytes as the product's output, twice. Smaller
    products may use a GPU less well, so that a measurement decides.

    Args:
        work: an edit of a fused graph.

    Returns:
        How many were taken apart.
    """
    count = 0
    for split in list(work.graph):
        sizes = edit.array(split.inputs[1]) if len(split.inputs) == 2 else None
        if split.op_type != "Split" or split.domain or sizes is None or not _splits_last(split):
            continue
        matmul, bias = _behind(split)
        weight = edit.weight(matmul.inputs[1]) if matmul is not None else None
        if matmul is None or weight is None or matmul.inputs[1] is None:
            continue
        begins = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        for number, output in enumerate(list(split.outputs)):
            part = slice(int(begins[number]), int(begins[number + 1]))
            node = _part(work, split, matmul, bias, part)
            work.replace(output, node)
        count += 1
    return count


def _splits_last(split: ir.Node) -> bool:
    axis, rank = split.attributes.get("axis"), len(split.outputs[0].shape or ())
    return axis is not None and rank > 0 and axis.as_int() in (-1, rank - 1)


def _behind(split: ir.Node) -> tuple[ir.Node | None, ir.Value | None]:
    """The product that is split, and its bias; nothing else may use them."""
    value = split.inputs[0]
    node = value.producer() if value is not None and edit.only_user(value) is split else None
    if node is None or node.domain:
        return None, None
    if node.op_type == "MatMul":
        return node, None
    if node.op_type != "Add":
        return None, None
    for source in node.inputs:
        matmul = source.producer() if source is not None else None
        match = edit.bias_add(source) if source is not None else None
        if matmul is not None and matmul.op_type == "MatMul" and match and match[0] is node:
            return matmul, match[1]
    return None, None


def _part(
    work: edit.Edit, split: ir.Node, matmul: ir.Node, bias: ir.Value | None, part: slice
) -> ir.Value:
    """The columns `part` of a product, with their bias."""
    source, weight = matmul.inputs
    assert weight is not None
    tensor = weight.const_value
    assert tensor is not None
    name, rows = f"{part.start}_{part.stop}", edit.sizes(tensor)[0]
    columns = work.lazy(
        f"{weight.name}.{name}",
        tensor,
        (rows, part.stop - part.start),
        lambda: tensor.numpy()[:, part],
    )
    node = work.insert(
        split, "MatMul", [source, columns], name=f"{matmul.name}/{name}", like=matmul.outputs[0]
    ).outputs[0]
    node.shape = ir.Shape([*(node.shape or [None])[:-1], part.stop - part.start])
    if bias is None:
        return node
    assert bias.const_value is not None
    row = work.constant(f"{bias.name}.{name}", bias.const_value.numpy()[part].copy())
    return work.insert(
        split, "Add", [node, row], name=f"{matmul.name}/{name}/bias", like=node
    ).outputs[0]
