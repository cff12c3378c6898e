"""Standard ONNX -> the same graph with onnxruntime's own operators (domain com.microsoft).

MultiHeadAttention (flash attention when nothing is padded), RotaryEmbedding, SkipLayerNormalization
and BiasGelu. Operator contracts: onnxruntime docs/ContribOperators.md. A pattern that does not
match is left as it is, so any standard graph is a valid input; `fuse` says how many it found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from jexport.graph import edit

MS = "com.microsoft"
MASKED = -10_000.0


def fuse(model: ir.Model) -> dict[str, int]:
    """Fuse in place; returns how many of each operator were made."""
    work = edit.Edit(model.graph)
    counts = {
        "MultiHeadAttention": _fuse_attention(work),
        "RotaryEmbedding": 0,
        "SkipLayerNormalization": _fuse_skip_layer_norm(work),
        "BiasGelu": _fuse_bias_gelu(work),
    }
    work.drop_dead()
    model.graph.sort()
    rotary = [n for n in model.graph if n.op_type == "RotaryEmbedding" and n.domain == MS]
    counts["RotaryEmbedding"] = len(rotary)
    if any(counts.values()):
        model.opset_imports[MS] = 1
        model.graph.opset_imports[MS] = 1
    return counts


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """softmax(q k^T * scale + mask) v of a matched subgraph; q, k, v [batch, sequence, hidden]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    output: ir.Value


def _fuse_attention(work: edit.Edit) -> int:
    found = []
    for node in list(work.graph):
        if node.op_type == "Softmax" and (match := _match_attention(work, node)) is not None:
            found.append((node, match))
    if not found:
        return 0
    padding, whole = _mask_inputs(work)
    for node, match in found:
        scope = str(node.name).rpartition("/")[0]
        last = match.output.producer()
        assert last is not None
        fused = work.insert(
            last,
            "If",
            [whole],
            {
                "then_branch": _branch(match, None, f"{scope}/whole"),
                "else_branch": _branch(match, padding, f"{scope}/padded"),
            },
            name=f"{scope}/MultiHeadAttention",
            like=match.output,
        )
        work.replace(match.output, fused.outputs[0])
    return len(found)


def _branch(match: _Attention, padding: ir.Value | None, name: str) -> ir.Graph:
    """One MultiHeadAttention in a graph of its own.

    Without a mask the CPU kernel is flash attention: no sequence x sequence matrix in memory, and
    faster at every length that was measured. It cannot take a mask, hence two branches.
    """
    inputs: list[ir.Value | None] = [match.query, match.key, match.value]
    if padding is not None:
        inputs += [None, padding]
    attributes = {"num_heads": match.heads, "scale": match.scale, "mask_filter_value": MASKED}
    node = ir.node("MultiHeadAttention", inputs, attributes, domain=MS, name=name)
    node.outputs[0].name = f"{name}:0"
    node.outputs[0].type, node.outputs[0].shape = match.output.type, match.output.shape
    return ir.Graph([], [node.outputs[0]], nodes=[node], name=name.replace("/", "_"))


def _mask_inputs(work: edit.Edit) -> tuple[ir.Value, ir.Value]:
    """The mask as int32 [batch, sequence], and a bool scalar: nothing is padded."""
    mask = next(value for value in work.graph.inputs if value.name == "attention_mask")
    first = work.graph[0]
    padding = work.insert(
        first, "Cast", [mask], {"to": int(ir.DataType.INT32)}, name="padding/Cast", like=mask
    ).outputs[0]
    padding.type, padding.name = ir.TensorType(ir.DataType.INT32), "padding"
    lowest = work.insert(first, "ReduceMin", [padding], {"keepdims": 0}, name="padding/ReduceMin")
    whole = work.insert(
        first, "Cast", [lowest.outputs[0]], {"to": int(ir.DataType.BOOL)}, name="whole/Cast"
    ).outputs[0]
    whole.type, whole.shape, whole.name = ir.TensorType(ir.DataType.BOOL), ir.Shape([]), "whole"
    return padding, whole


def _match_attention(work: edit.Edit, softmax: ir.Node) -> _Attention | None:
    masked = _producer(softmax.inputs[0], "Add")
    if masked is None or not _is_mask(masked.inputs[1]):
        return None
    scores = _producer(masked.inputs[0], "MatMul")
    if scores is None:
        return None
    scaled = _producer(scores.inputs[0], "Mul")
    scale = edit.scalar(scaled.inputs[1]) if scaled is not None else None
    if scaled is None or scale is None:
        return None
    query = _heads_source(work, scaled.inputs[0], keys=False)
    key = _heads_source(work, scores.inputs[1], keys=True)
    mixed = edit.only_user(softmax.outputs[0])
    while mixed is not None and mixed.op_type == "Cast":
        mixed = edit.only_user(mixed.outputs[0])
    if mixed is None or mixed.op_type != "MatMul" or query is None or key is None:
        return None
    value = _heads_source(work, mixed.inputs[1], keys=False)
    back = edit.only_user(mixed.outputs[0])
    flat = edit.only_user(back.outputs[0]) if back is not None else None
    if value is None or back is None or back.op_type != "Transpose" or flat is None:
        return None
    if flat.op_type != "Reshape" or len({query[1], key[1], value[1]}) != 1:
        return None
    return _Attention(
        query=query[0], key=key[0], value=value[0], heads=query[1], scale=scale,
        output=flat.outputs[0],
    )  # fmt: skip


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of operator `op` that made a value, casts in between looked through."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == op and not node.domain else None


def _is_mask(value: ir.Value | None) -> bool:
    """Whether a value is the additive mask: (1 - attention_mask) * MASKED, shape [b, 1, 1, s]."""
    scaled = _producer(value, "Mul")
    if scaled is None or edit.scalar(scaled.inputs[1]) != MASKED:
        return False
    inverse = _producer(scaled.inputs[0], "Sub")
    if inverse is None or edit.scalar(inverse.inputs[0]) != 1.0:
        return False
    spread = _producer(inverse.inputs[1], "Unsqueeze")
    source = spread.inputs[0].producer() if spread is not None and spread.inputs[0] else None
    return (
        source is not None
        and source.op_type == "Cast"
        and source.inputs[0] is not None
        and source.inputs[0].name == "attention_mask"
    )


def _heads_source(
    work: edit.Edit, value: ir.Value | None, *, keys: bool
) -> tuple[ir.Value, int] | None:
    """[batch, sequence, hidden] behind a [batch, heads, ...] value, and the number of heads.

    keys: the value is transposed for the product ([..., head size, sequence]). Rotated heads are
    rotated by RotaryEmbedding instead.
    """
    if keys:
        turned = _producer(value, "Transpose")
        if turned is None:
            return None
        if _perm(turned) == [0, 1, 3, 2]:
            return _heads_source(work, turned.inputs[0], keys=False)
        wanted = [0, 2, 3, 1]
    else:
        rotated = _producer(value, "Add")
        if rotated is not None:
            return _rotated_source(work, rotated)
        turned = _producer(value, "Transpose")
        wanted = [0, 2, 1, 3]
    if turned is None or _perm(turned) != wanted:
        return None
    shaped = _producer(turned.inputs[0], "Reshape")
    if shaped is None or shaped.inputs[0] is None:
        return None
    sizes = edit.array(shaped.inputs[1])
    if sizes is None or len(sizes) != 4:
        return None
    return shaped.inputs[0], int(sizes[2])


def _perm(node: ir.Node) -> list[int]:
    return [int(axis) for axis in node.attributes["perm"].as_ints()]


def _rotated_source(work: edit.Edit, rotated: ir.Node) -> tuple[ir.Value, int] | None:
    """Match x * cos + concat(-x2, x1) * sin and put a RotaryEmbedding in its place."""
    straight = _producer(rotated.inputs[0], "Mul")
    turned = _producer(rotated.inputs[1], "Mul")
    joined = _producer(turned.inputs[0], "Concat") if turned is not None else None
    negative = _producer(joined.inputs[0], "Neg") if joined is not None else None
    if straight is None or turned is None or joined is None or negative is None:
        return None
    halves = _producer(negative.inputs[0], "Split")
    if halves is None or _producer(joined.inputs[1], "Split") is not halves:
        return None
    source = _heads_source(work, straight.inputs[0], keys=False)
    tables = [_table(node.inputs[1]) for node in (straight, turned)]
    same = _heads_source(work, halves.inputs[0], keys=False)
    if source is None or same is None or source[0] is not same[0] or None in tables:
        return None
    value, heads = source
    caches = [_cache(work, table) for table in tables if table is not None]
    scope = str(rotated.name).rpartition("/")[0]
    number = 1 + sum(1 for n in work.graph if str(n.name).startswith(f"{scope}/RotaryEmbedding"))
    node = work.insert(
        rotated,
        "RotaryEmbedding",
        [value, work.constant("position_offset", np.zeros(1, dtype=np.int64)), *caches],
        {"interleaved": 0},
        name=f"{scope}/RotaryEmbedding_{number}",
        like=value,
        domain=MS,
    )
    node.outputs[0].name = str(node.name)
    return node.outputs[0], heads


def _table(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind Unsqueeze(Slice(table)): float32 [1, positions, head size]."""
    spread = _producer(value, "Unsqueeze")
    cut = _producer(spread.inputs[0], "Slice") if spread is not None else None
    table = cut.inputs[0] if cut is not None else None
    if table is None or not table.is_initializer() or table.const_value is None:
        return None
    return table if len(table.const_value.shape) == 3 else None


def _cache(work: edit.Edit, table: ir.Value) -> ir.Value:
    """cos or sin as RotaryEmbedding wants it: [positions, head size / 2]; both halves are alike."""
    name = f"{table.name}_cache"
    if name in work.graph.initializers:
        return work.graph.initializers[name]
    tensor = table.const_value
    assert tensor is not None
    full = tensor.numpy()[0]
    half = full.shape[1] // 2
    assert np.array_equal(full[:, :half], full[:, half:]), "RoPE tables are not two equal halves"
    return work.constant(name, np.ascontiguousarray(full[:, :half]))


def _fuse_skip_layer_norm(work: edit.Edit) -> int:
    """LayerNormalization(a + (b + bias)) -> one node. Sums with other users are left alone."""
    count = 0
    for norm in list(work.graph):
        if norm.op_type != "LayerNormalization" or len(norm.inputs) != 3:
            continue
        total = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if total is None or total.op_type != "Add" or edit.only_user(total.outputs[0]) is not norm:
            continue
        match = _skip_inputs(total)
        if match is None or norm.inputs[0] is None:
            continue
        product, bias, skip = match
        node = work.insert(
            norm,
            "SkipLayerNormalization",
            [product, skip, norm.inputs[1], norm.inputs[2], bias],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            name=str(norm.name),
            like=norm.outputs[0],
            domain=MS,
        )
        node.outputs[0].name = str(norm.outputs[0].name)
        work.replace(norm.outputs[0], node.outputs[0])
        count += 1
    return count


def _skip_inputs(total: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    for one, other in ((0, 1), (1, 0)):
        value, skip = total.inputs[one], total.inputs[other]
        added = value.producer() if value is not None else None
        if added is None or added.op_type != "Add" or added.inputs[0] is None or skip is None:
            continue
        if skip.is_initializer() or value is None or edit.only_user(value) is not total:
            continue
        match = edit.bias_add(added.inputs[0])
        producer = added.inputs[0].producer()
        if match and match[0] is added and producer is not None and producer.op_type == "MatMul":
            return added.inputs[0], match[1], skip
    return None


def _fuse_bias_gelu(work: edit.Edit) -> int:
    """Gelu(x + bias), exact (erf) form only."""
    count = 0
    for gelu in list(work.graph):
        if gelu.op_type != "Gelu" or gelu.domain or gelu.inputs[0] is None:
            continue
        mode = gelu.attributes.get("approximate")
        if mode is not None and mode.as_string() != "none":
            continue
        added = gelu.inputs[0].producer()
        if added is None or added.op_type != "Add" or added.inputs[0] is None:
            continue
        match = edit.bias_add(added.inputs[0])
        if match is None or match[0] is not added or edit.only_user(added.outputs[0]) is not gelu:
            continue
        node = work.insert(
            gelu, "BiasGelu", [added.inputs[0], match[1]], {}, name=str(gelu.name),
            like=gelu.outputs[0], domain=MS,
        )  # fmt: skip
        node.outputs[0].name = str(gelu.outputs[0].name)
        work.replace(gelu.outputs[0], node.outputs[0])
        count += 1
    return count
