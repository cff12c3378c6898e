"""Attention of a standard graph -> onnxruntime's Attention, MultiHeadAttention, RotaryEmbedding.

Operator contracts: onnxruntime docs/ContribOperators.md. Only a subgraph that is attention under
the padding mask alone matches; any other (a window, a bias per position) is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jexport.graph import edit

MS = "com.microsoft"
MASKED = -10_000.0

SHORT = 512
"""Up to this many tokens Attention, which holds a heads x tokens x tokens matrix, was the faster
at every length measured (8 to 512, 3 to 9 %; BENCHMARKS.md). Beyond, memory decides: no matrix."""


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """softmax(q k^T * scale + mask) v of a matched subgraph; q, k, v [batch, sequence, hidden]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    head_size: int
    scale: float
    dtype: ir.DataType
    output: ir.Value


@dataclass(frozen=True, kw_only=True)
class _Heads:
    """[batch, sequence, heads * size] before it is split into heads."""

    source: ir.Value
    heads: int
    size: int


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """x W + b that gives query, key and value side by side: W [hidden, 3 * hidden]."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value


EXACT = 2048
"""Up to this many tokens a quantized graph has one kernel for padded and unpadded batches."""


def fuse(work: edit.Edit, max_tokens: int, *, exact: bool = False) -> dict[str, int]:
    """Replace every attention that matches.

    Args:
        work: an edit of a standard graph.
        max_tokens: the longest text to come; up to SHORT tokens Attention is the faster.
        exact: a text's numbers do not depend on its batch, to the last bit, up to EXACT tokens.
            What is 1e-7 in a float graph is, behind a rounding to 8 bits, now and then a whole
            step, and a few layers on a cosine of 0.9996 (all-MiniLM-L6-v2). The masked kernel is
            exact (420 pairs of lengths, 2 to 300), flash attention is another one.

    Returns:
        How many became which operator.
    """
    counts = {"Attention": 0, "MultiHeadAttention": 0}
    matches = [
        (node, match)
        for node in list(work.graph)
        if node.op_type == "Softmax" and (match := _match_attention(work, node)) is not None
    ]
    if not matches:
        return counts
    padding, whole = _mask_inputs(work)
    if exact and max_tokens > EXACT:
        whole = _and_long(work, whole)
    for node, match in matches:
        projection = _projection(match) if max_tokens <= SHORT else None
        if projection is not None:
            _pack(work, node, match, projection, padding)
            counts["Attention"] += 1
            continue
        counts["MultiHeadAttention"] += 1
        name = str(node.name).replace("Softmax", "MultiHeadAttention")
        last = match.output.producer()
        assert last is not None
        assert match.output.dtype is not None
        if exact and max_tokens <= EXACT:
            single = _node(match, padding, name)
            work.graph.insert_before(last, single)
            work.replace(match.output, work.cast(last, single.outputs[0], match.output.dtype))
            continue
        fused = work.insert(
            last,
            "If",
            [whole],
            {
                "then_branch": _branch(match, None, f"{name}/whole"),
                "else_branch": _branch(match, padding, f"{name}/padded"),
            },
            name=name,
            like=match.output,
        )
        fused.outputs[0].type = ir.TensorType(match.dtype)
        work.replace(match.output, work.cast(last, fused.outputs[0], match.output.dtype))
    return counts


def _projection(match: _Attention) -> _Projection | None:
    """The one product behind query, key and value, when nothing happens to them in between."""
    split = match.query.producer()
    if split is None or split.op_type != "Split" or match.dtype != ir.DataType.FLOAT:
        return None
    if tuple(split.outputs) != (match.query, match.key, match.value):
        return None
    added = edit.producer(split.inputs[0], "Add")
    matmul = added.inputs[0].producer() if added is not None and added.inputs[0] else None
    if matmul is None or matmul.op_type != "MatMul" or matmul.inputs[0] is None:
        return None
    match_bias = edit.bias_add(matmul.outputs[0])
    weight = matmul.inputs[1]
    if match_bias is None or weight is None or not weight.is_initializer():
        return None
    hidden = match.heads * match.head_size
    if list(weight.shape or ()) != [hidden, 3 * hidden] or weight.dtype != ir.DataType.FLOAT:
        return None
    if added is None or edit.only_user(added.outputs[0]) is not split:
        return None
    return _Projection(source=matmul.inputs[0], weight=weight, bias=match_bias[1])


def _pack(
    work: edit.Edit, softmax: ir.Node, match: _Attention, given: _Projection, padding: ir.Value
) -> None:
    """One Attention, projection included: its heads are written where they are read."""
    last = match.output.producer()
    assert last is not None
    assert match.output.dtype is not None
    attributes = {"num_heads": match.heads, "scale": match.scale, "mask_filter_value": MASKED}
    fused = work.insert(
        last,
        "Attention",
        [given.source, given.weight, given.bias, padding],
        attributes,
        name=str(softmax.name).replace("Softmax", "Attention"),
        like=match.output,
        domain=MS,
    )
    fused.outputs[0].type = ir.TensorType(match.dtype)
    work.replace(match.output, work.cast(last, fused.outputs[0], match.output.dtype))


def _branch(match: _Attention, padding: ir.Value | None, name: str) -> ir.Graph:
    """One MultiHeadAttention in a graph of its own.

    Without a mask the CPU kernel is flash attention: no sequence x sequence matrix in memory, and
    faster at every length that was measured. It cannot take a mask, hence two branches.
    """
    node = _node(match, padding, name)
    return ir.Graph([], list(node.outputs), nodes=[node], name=name.replace("/", "_"))


def _node(match: _Attention, padding: ir.Value | None, name: str) -> ir.Node:
    inputs: list[ir.Value | None] = [match.query, match.key, match.value]
    if padding is not None:
        inputs += [None, padding]
    attributes = {"num_heads": match.heads, "scale": match.scale, "mask_filter_value": MASKED}
    node = ir.node("MultiHeadAttention", inputs, attributes, domain=MS, name=name)
    output = node.outputs[0]
    output.name, output.shape = f"{name}:0", match.output.shape
    output.type = ir.TensorType(match.dtype)
    return node


def _mask_inputs(work: edit.Edit) -> tuple[ir.Value, ir.Value]:
    """The mask as int32 [batch, sequence], and a bool scalar: nothing is padded."""
    mask = next(value for value in work.graph.inputs if value.name == "attention_mask")
    first = work.graph[0]
    padding = work.insert(
        first, "Cast", [mask], {"to": int(ir.DataType.INT32)}, name="padding", like=mask
    ).outputs[0]
    padding.type = ir.TensorType(ir.DataType.INT32)
    # The product of zeros and ones: onnxruntime has no CUDA kernel of ReduceMin at opset 20.
    lowest = work.insert(first, "ReduceProd", [padding], {"keepdims": 0}, name="padding/lowest")
    lowest.outputs[0].type, lowest.outputs[0].shape = padding.type, ir.Shape([])
    whole = work.insert(
        first, "Cast", [lowest.outputs[0]], {"to": int(ir.DataType.BOOL)}, name="whole"
    ).outputs[0]
    whole.type, whole.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    return padding, whole


def _and_long(work: edit.Edit, whole: ir.Value) -> ir.Value:
    """A bool scalar: nothing is padded, and there are more than EXACT tokens."""
    node = whole.producer()
    assert node is not None
    mask = next(value for value in work.graph.inputs if value.name == "attention_mask")
    size = work.insert(node, "Shape", [mask], {"start": 1, "end": 2}, name="tokens")
    size.outputs[0].type, size.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    scalar = work.insert(
        node,
        "Squeeze",
        [size.outputs[0], work.constant("tokens_axis", np.zeros(1, np.int64))],
        name="tokens/number",
    )
    long = work.insert(
        node,
        "Greater",
        [scalar.outputs[0], work.constant("tokens_exact", np.array(EXACT, np.int64))],
        name="long",
    )
    both = ir.node("And", [whole, long.outputs[0]], name="whole_and_long")
    both.outputs[0].name = "whole_and_long"
    for value in (long.outputs[0], both.outputs[0]):
        value.type, value.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    work.graph.insert_after(node, both)
    return both.outputs[0]


def _match_attention(work: edit.Edit, softmax: ir.Node) -> _Attention | None:
    masked = edit.producer(softmax.inputs[0], "Add")
    if masked is None or not _is_mask(masked.inputs[1]) or not _last_axis(softmax, 4):
        return None
    scores = edit.producer(masked.inputs[0], "MatMul")
    mixed = _user_of(softmax.outputs[0], "MatMul")
    back = _user_of(mixed.outputs[0], "Transpose") if mixed is not None else None
    flat = _user_of(back.outputs[0], "Reshape") if back is not None else None
    if scores is None or mixed is None or back is None or flat is None:
        return None
    scaled = edit.producer(scores.inputs[0], "Mul")
    factor = edit.scalar(scaled.inputs[1]) if scaled is not None else None
    if scaled is None or factor is None:
        scaled, factor = None, 1.0
    query = _heads(work, scaled.inputs[0] if scaled is not None else scores.inputs[0])
    key = _keys(work, scores.inputs[1])
    value = _heads(work, mixed.inputs[1])
    if query is None or key is None or value is None:
        return None
    shape = edit.array(flat.inputs[1])
    joined = shape is not None and len(shape) == 3 and shape[-1] in (-1, value.heads * value.size)
    same = query.heads == key.heads == value.heads and query.size == key.size
    if _perm(back) != [0, 2, 1, 3] or not joined or not same:
        return None
    # float16 when both products are: a product that is kept in float32 stays there.
    is_float32 = ir.DataType.FLOAT in (scores.outputs[0].dtype, mixed.outputs[0].dtype)
    dtype = ir.DataType.FLOAT if is_float32 else ir.DataType.FLOAT16
    inputs = [work.cast(scores, heads.source, dtype) for heads in (query, key, value)]
    return _Attention(
        query=inputs[0],
        key=inputs[1],
        value=inputs[2],
        heads=query.heads,
        head_size=query.size,
        scale=factor,
        dtype=dtype,
        output=flat.outputs[0],
    )


def _user_of(value: ir.Value, op: str) -> ir.Node | None:
    """The only user of a value, casts looked through, when it is a node of operator `op`."""
    user = edit.only_user(value)
    while user is not None and user.op_type == "Cast":
        user = edit.only_user(user.outputs[0])
    return user if user is not None and user.op_type == op and not user.domain else None


def _last_axis(node: ir.Node, rank: int) -> bool:
    axis = node.attributes.get("axis")
    return (-1 if axis is None else axis.as_int()) in (-1, rank - 1)


def _is_mask(value: ir.Value | None) -> bool:
    """Whether a value is the additive mask: (1 - attention_mask) * MASKED, shape [b, 1, 1, s]."""
    scaled = edit.producer(value, "Mul")
    if scaled is None or edit.scalar(scaled.inputs[1]) != MASKED:
        return False
    inverse = edit.producer(scaled.inputs[0], "Sub")
    if inverse is None or edit.scalar(inverse.inputs[0]) != 1.0:
        return False
    spread = edit.producer(inverse.inputs[1], "Unsqueeze")
    axes = edit.array(spread.inputs[1]) if spread is not None else None
    if spread is None or axes is None or axes.tolist() != [1, 2]:
        return False
    source = spread.inputs[0].producer() if spread.inputs[0] is not None else None
    return (
        source is not None
        and source.op_type == "Cast"
        and source.inputs[0] is not None
        and source.inputs[0].name == "attention_mask"
    )


def _keys(work: edit.Edit, value: ir.Value | None) -> _Heads | None:
    """The same for keys, which are transposed for the product: [batch, heads, size, sequence]."""
    turned = edit.producer(value, "Transpose")
    if turned is None:
        return None
    if _perm(turned) == [0, 1, 3, 2]:
        return _heads(work, turned.inputs[0])
    return _split_into_heads(turned) if _perm(turned) == [0, 2, 3, 1] else None


def _heads(work: edit.Edit, value: ir.Value | None) -> _Heads | None:
    """What is behind [batch, heads, sequence, size]; rotated heads get a RotaryEmbedding."""
    rotated = edit.producer(value, "Add")
    if rotated is not None:
        return _rotated(work, rotated)
    turned = edit.producer(value, "Transpose")
    if turned is None or _perm(turned) != [0, 2, 1, 3]:
        return None
    return _split_into_heads(turned)


def _split_into_heads(turned: ir.Node) -> _Heads | None:
    shaped = edit.producer(turned.inputs[0], "Reshape")
    if shaped is None or shaped.inputs[0] is None:
        return None
    sizes = edit.array(shaped.inputs[1])
    if sizes is None or len(sizes) != 4 or sizes[:2].tolist() != [0, 0] or min(sizes[2:]) < 1:
        return None
    return _Heads(source=shaped.inputs[0], heads=int(sizes[2]), size=int(sizes[3]))


def _perm(node: ir.Node) -> list[int]:
    return [int(axis) for axis in node.attributes["perm"].as_ints()]


def _rotated(work: edit.Edit, rotated: ir.Node) -> _Heads | None:
    """Match x * cos + concat(-x2, x1) * sin and put a float32 RotaryEmbedding in its place."""
    straight = edit.producer(rotated.inputs[0], "Mul")
    turned = edit.producer(rotated.inputs[1], "Mul")
    joined = edit.producer(turned.inputs[0], "Concat") if turned is not None else None
    if straight is None or turned is None or joined is None or len(joined.inputs) != 2:
        return None
    negative = edit.producer(joined.inputs[0], "Neg")
    halves = edit.producer(negative.inputs[0], "Split") if negative is not None else None
    if negative is None or halves is None or len(halves.outputs) != 2 or not _last_axis(joined, 4):
        return None
    first, second = halves.outputs
    # The second half goes first, with its sign changed; the other way round is another rotation.
    if edit.uncast(negative.inputs[0]) is not second or edit.uncast(joined.inputs[1]) is not first:
        return None
    plain, same = _heads(work, straight.inputs[0]), _heads(work, halves.inputs[0])
    if plain is None or same is None or plain.source is not same.source:
        return None
    caches = [_cache(work, node.inputs[1], plain.size) for node in (straight, turned)]
    if None in caches:
        return None
    scope = str(rotated.name).rpartition("/")[0]
    value = work.cast(rotated, plain.source, ir.DataType.FLOAT)
    node = work.insert(
        rotated,
        "RotaryEmbedding",
        [value, work.constant("position_offset", np.zeros(1, dtype=np.int64)), *caches],
        {"interleaved": 0},
        name=f"{scope}/RotaryEmbedding",
        like=value,
        domain=MS,
    )
    return _Heads(source=node.outputs[0], heads=plain.heads, size=plain.size)


def _cache(work: edit.Edit, value: ir.Value | None, size: int) -> ir.Value | None:
    """The cos or sin that RotaryEmbedding wants, [positions, size / 2], or None.

    The value has to be Unsqueeze(Slice(table from 0 on)), table float32 [1, positions, size] of two
    halves that are alike.
    """
    spread = edit.producer(value, "Unsqueeze")
    cut = edit.producer(spread.inputs[0], "Slice") if spread is not None else None
    if cut is None or cut.inputs[0] is None or len(cut.inputs) < 4:
        return None
    table, tensor = cut.inputs[0], cut.inputs[0].const_value
    if not table.is_initializer() or tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    begin, axis = edit.scalar(cut.inputs[1]), edit.scalar(cut.inputs[3])
    step = edit.scalar(cut.inputs[4]) if len(cut.inputs) > 4 else 1.0
    if (begin, axis, step) != (0.0, 1.0, 1.0) or len(tensor.shape) != 3:
        return None
    name = f"{table.name}_cache"
    if name in work.graph.initializers:
        return work.graph.initializers[name]
    full = tensor.numpy()
    half = size // 2
    if full.shape[0] != 1 or full.shape[2] != size:
        return None
    if not np.array_equal(full[..., :half], full[..., half:]):
        return None
    return work.constant(name, np.ascontiguousarray(full[0, :, :half]))
