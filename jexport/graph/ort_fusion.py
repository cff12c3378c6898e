"""Standard ONNX -> the same graph with onnxruntime's own operators (domain com.microsoft).

Attention, MultiHeadAttention (flash attention when nothing is padded) and RotaryEmbedding
(ort_attention.py), MatMulIntegerToFloat (ort_integer.py), SkipLayerNormalization and BiasGelu.
Operator contracts: onnxruntime docs/ContribOperators.md. A pattern that does not match is left as
it is, so any standard graph is a valid input; `fuse` says how many it found. In a float16 graph
norms and rotations stay float32; attention is float16, whose kernels sum and normalise in float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jexport.graph import edit, ort_attention, ort_integer
from jexport.graph.ort_attention import MS


def fuse(model: ir.Model, *, skip_layer_norm: bool = True, max_tokens: int) -> dict[str, int]:
    """Fuse in place.

    Args:
        model: standard ONNX.
        skip_layer_norm: its CPU kernel is slower than the operators it replaces (BENCHMARKS.md).
        max_tokens: the longest text to come; long ones need attention without a square of memory.

    Returns:
        How many of each operator were made.
    """
    work = edit.Edit(model.graph)
    rotations = _rotations(model)
    ort_integer.unfuse_weights(work)
    counts = {
        "MatMulIntegerToFloat": ort_integer.fuse(work),
        **ort_attention.fuse(work, max_tokens, exact=_rounds(model)),
        "RotaryEmbedding": 0,
        "SkipLayerNormalization": fuse_skip_layer_norm(work) if skip_layer_norm else 0,
        "BiasGelu": fuse_bias_gelu(work),
    }
    work.drop_dead()
    model.graph.sort()
    counts["RotaryEmbedding"] = _rotations(model) - rotations
    if any(counts.values()):
        model.opset_imports[MS] = 1
        model.graph.opset_imports[MS] = 1
    return counts


def _rounds(model: ir.Model) -> bool:
    """Whether activations are rounded somewhere."""
    rounding = ("QuantizeLinear", "MatMulIntegerToFloat")
    return any(node.op_type in rounding for node in model.graph)


def _rotations(model: ir.Model) -> int:
    return sum(n.op_type == "RotaryEmbedding" and n.domain == MS for n in model.graph)


def fuse_skip_layer_norm(work: edit.Edit) -> int:
    """LayerNormalization(a + (b + bias)) -> one node. Sums with other users are left alone.

    Args:
        work: an edit of a standard graph.

    Returns:
        How many.
    """
    count = 0
    for norm in list(work.graph):
        if norm.op_type != "LayerNormalization" or norm.domain or len(norm.inputs) != 3:
            continue
        source, gain, offset = norm.inputs
        axis, epsilon = norm.attributes.get("axis"), norm.attributes.get("epsilon")
        total = source.producer() if source is not None else None
        if source is None or gain is None or offset is None or source.dtype is None:
            continue
        if axis is not None and axis.as_int() not in (-1, len(source.shape or ()) - 1):
            continue
        if total is None or total.op_type != "Add" or edit.only_user(source) is not norm:
            continue
        match = _skip_inputs(total)
        if match is None:
            continue
        matmul, bias, skip = match
        inputs = [work.cast(norm, matmul, source.dtype), skip, gain, offset]
        if bias is not None:
            inputs.append(_constant_as(work, bias, source.dtype))
        node = work.insert(
            norm,
            "SkipLayerNormalization",
            inputs,
            {"epsilon": 1e-5 if epsilon is None else epsilon.as_float()},
            name=f"{norm.name}/skip",
            like=norm.outputs[0],
            domain=MS,
        )
        work.take_over(norm, node)
        count += 1
    return count


def _skip_inputs(total: ir.Node) -> tuple[ir.Value, ir.Value | None, ir.Value] | None:
    """A matrix product, its bias (or None) and what they are added to, all of one shape."""
    for one, other in ((0, 1), (1, 0)):
        value, skip = total.inputs[one], total.inputs[other]
        if value is None or skip is None or skip.is_initializer():
            continue
        if skip.dtype != total.outputs[0].dtype or skip.shape != total.outputs[0].shape:
            continue
        if not _used_only_by(value, total):
            continue
        matmul = edit.producer(value, "MatMul")
        if matmul is not None:
            return matmul.outputs[0], None, skip
        added = edit.producer(value, "Add")
        match = edit.bias_add(added.inputs[0]) if added is not None and added.inputs[0] else None
        if match is None or added is None or match[0] is not added or added.inputs[0] is None:
            continue
        if edit.producer(added.inputs[0], "MatMul") is not None:
            return added.inputs[0], match[1], skip
    return None


def _used_only_by(value: ir.Value, user: ir.Node) -> bool:
    """Whether `user` is the only node that a value, and what it was cast from, goes to."""
    if edit.only_user(value) is not user:
        return False
    node = value.producer()
    if node is None or node.op_type != "Cast" or node.inputs[0] is None:
        return True
    return _used_only_by(node.inputs[0], node)


def _constant_as(work: edit.Edit, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """A bias in another float type; a new initializer when it differs."""
    tensor = value.const_value
    if value.dtype == dtype or tensor is None:
        return value
    name = f"{value.name}.{'fp16' if dtype == ir.DataType.FLOAT16 else 'fp32'}"
    return work.constant(name, tensor.numpy().astype(np.dtype(dtype.numpy())))


def fuse_bias_gelu(work: edit.Edit) -> int:
    """Gelu(x + bias) -> BiasGelu, exact (erf) form only.

    Args:
        work: an edit of a standard graph.

    Returns:
        How many.
    """
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
            gelu,
            "BiasGelu",
            [added.inputs[0], match[1]],
            {},
            name=f"{gelu.name}/bias",
            like=gelu.outputs[0],
            domain=MS,
        )
        work.take_over(gelu, node)
        count += 1
    return count
