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
class Site:
    """One attention of a fused graph.

    Attributes:
        node: what stands in the graph, an `If` of two MultiHeadAttentions or one of them.
        query, key, value: [batch, sequence, hidden].
        heads, scale: its attributes.
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


def sites(work: edit.Edit) -> list[Site]:
    """Every attention of a graph whose only mask is the padding, in the graph's order."""
    found = []
    for node in work.graph:
        site = _site(node)
        if site is not None:
            found.append(site)
    return found


def _site(node: ir.Node) -> Site | None:
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
    return Site(node=node, query=query, key=key, value=value, heads=heads, scale=scale)


def _is_padding(mask: ir.Value | None) -> bool:
    """Whether a mask is attention_mask itself, int32 [batch, sequence]."""
    source = edit.uncast(mask)
    return source is None or (source.name == "attention_mask" and len(source.shape or ()) == 2)


def lengths(work: edit.Edit) -> ir.Value:
    """int32 [batch]: how many tokens of each text are real; computed once in a graph."""
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
    made = ir.node(op, inputs, attributes, name=work.unused(name))
    made.outputs[0].name, made.outputs[0].type = str(made.name), ir.TensorType(ir.DataType.INT32)
    work.graph.append(made)
    return made.outputs[0]


def starts(work: edit.Edit) -> ir.Value:
    """int32 [3 * batch + 2]: lengths, then twice where each text begins, and where the last ends.

    Rows are as long as the batch is wide, padding included. Computed from the mask alone, so that
    nothing comes from the host.
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
    """One MultiHeadAttention with lengths in the place of each attention; returns how many."""
    found = sites(work)
    if not found:
        return 0
    given = starts(work)
    for site in found:
        node = work.insert(
            site.node,
            "MultiHeadAttention",
            [site.query, site.key, site.value, None, given],
            site.attributes,
            name=f"{site.node.name}/lengths",
            like=site.node.outputs[0],
            domain=MS,
        )
        work.take_over(site.node, node)
    return len(found)
