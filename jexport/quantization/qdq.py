"""LayerQuantization -> Q/DQ nodes in standard ONNX.

A linear layer x W becomes DequantizeLinear(QuantizeLinear(x / s)) (s W, int8): per-tensor
activations, one scale per column of the weight. INT8_RESIDUAL adds the same for what rounding left
of x, so that activations have about 16 bits at twice the integer work. Embedding tables are int8
with a scale per row. Everything is opset 13 or older, so every engine reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from jexport.graph import edit
from jexport.quantization.config import INT8_RESIDUAL, INT8_WEIGHTS
from jexport.quantization.layer_quantization import LayerQuantization
from jexport.quantization.layers import find_embedding_tables
from jexport.quantization.quant_params import QuantParams


def insert_qdq(
    model: ir.Model, quantizations: Mapping[str, LayerQuantization], *, tables: bool = True
) -> None:
    """Quantize linear layers and embedding tables, in place.

    Args:
        model: a float graph.
        quantizations: by layer's name; other layers stay float.
        tables: whether large embedding tables become int8, too.
    """
    work = edit.Edit(model.graph)
    for node in list(model.graph):
        quantization = quantizations.get(str(node.name))
        if quantization is not None:
            _quantize_linear(work, node, quantization)
    for node in find_embedding_tables(model) if tables else ():
        _quantize_table(work, node)
    work.drop_dead()
    model.graph.sort()


def _quantize_linear(work: edit.Edit, node: ir.Node, quantization: LayerQuantization) -> None:
    source, weight = node.inputs
    assert source is not None
    assert weight is not None
    stem = str(node.name).removesuffix("/MatMul")
    shape = edit.sizes(weight.const_value)
    int8_name = f"{weight.name}.int8"  # a weight that is used twice is stored once
    tensor = work.graph.initializers.get(int8_name) or work.lazy_typed(
        int8_name, ir.DataType.INT8, shape, quantization.qweight
    )
    scales = work.constant(f"{weight.name}.scale", quantization.scales)
    restored = work.insert(
        node, "DequantizeLinear", [tensor, scales], {"axis": 1}, name=f"{stem}/weight", like=weight
    )
    if quantization.smoothing_factors is not None:
        source = work.insert(
            node,
            "Mul",
            [source, work.constant(f"{weight.name}.smooth", 1 / quantization.smoothing_factors)],
            name=f"{stem}/smooth",
            like=source,
        ).outputs[0]
    node.replace_input_with(1, restored.outputs[0])
    if quantization.precision == INT8_WEIGHTS:
        node.replace_input_with(0, source)
        return
    params = quantization.input_params
    first = _fake_quantize(work, node, source, params, f"{stem}/input")
    node.replace_input_with(0, first)
    if quantization.precision != INT8_RESIDUAL:
        return
    residual = work.insert(node, "Sub", [source, first], name=f"{stem}/rest", like=source).outputs[
        0
    ]
    second = _fake_quantize(work, node, residual, params.residual(), f"{stem}/rest/input")
    again = ir.node("MatMul", [second, restored.outputs[0]], name=f"{stem}/rest/MatMul")
    total = ir.node("Add", [node.outputs[0], again.outputs[0]], name=f"{stem}/both")
    for added in (again, total):
        added.outputs[0].name = added.name
        added.outputs[0].type, added.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    work.graph.insert_after(node, [again, total])
    work.replace(node.outputs[0], total.outputs[0])
    total.replace_input_with(0, node.outputs[0])


def _fake_quantize(
    work: edit.Edit, before: ir.Node, value: ir.Value, params: QuantParams, name: str
) -> ir.Value:
    """The value through QuantizeLinear and DequantizeLinear."""
    scale = work.constant(f"{name}.scale", np.array(params.scale, np.float32))
    zero = work.constant(f"{name}.zero", np.array(params.zero_point, params.dtype))
    quantized = work.insert(
        before, "QuantizeLinear", [value, scale, zero], name=f"{name}/quantize", like=value
    ).outputs[0]
    quantized.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(params.dtype)))
    return work.insert(
        before, "DequantizeLinear", [quantized, scale, zero], name=f"{name}/dequantize", like=value
    ).outputs[0]


def _quantize_table(work: edit.Edit, node: ir.Node) -> None:
    """Gather(table, ids) -> Gather(int8, ids) * Gather(scales, ids), a scale per row."""
    table, ids = node.inputs
    assert table is not None
    tensor = table.const_value
    assert tensor is not None
    rows, width = edit.sizes(tensor)
    scales = row_scales(tensor.numpy())
    quantized = work.lazy_typed(
        f"{table.name}.int8",
        ir.DataType.INT8,
        (rows, width),
        lambda: np.rint(tensor.numpy() / scales).astype(np.int8),
    )
    column = work.constant(f"{table.name}.scale", scales)
    like, name = node.outputs[0], str(node.name)
    picked = work.insert(node, "Gather", [quantized, ids], name=f"{name}/int8", like=like)
    picked.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    as_float = work.insert(
        node,
        "Cast",
        [picked.outputs[0]],
        {"to": int(ir.DataType.FLOAT)},
        name=f"{name}/cast",
        like=like,
    )
    factor = work.insert(node, "Gather", [column, ids], name=f"{name}/scale")
    factor.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    result = work.insert(
        node, "Mul", [as_float.outputs[0], factor.outputs[0]], name=f"{name}/scaled", like=like
    )
    work.replace(node.outputs[0], result.outputs[0])


def row_scales(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """One scale per row, symmetric to +-127.

    Args:
        table: float32 [rows, columns].

    Returns:
        float32 [rows, 1], at least 1e-12, for a row of zeros.
    """
    reach = np.abs(table).max(axis=1, keepdims=True)
    scales: NDArray[np.float32] = np.maximum(reach / 127, np.float32(1e-12)).astype(np.float32)
    return scales
