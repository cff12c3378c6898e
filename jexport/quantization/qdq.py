"""Treatments -> Q/DQ nodes in standard ONNX.

A product x W becomes DequantizeLinear(QuantizeLinear(x / s)) (s W, int8): per-tensor activations,
one scale per column of the weight. `int8x2` adds the same for what rounding left of x, so that
activations have about 16 bits at twice the integer work. Tables that ids look up are int8 with a
scale per row. Everything is opset 13 or older, so every engine reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from jexport.graph import edit
from jexport.quantization import layers
from jexport.quantization.quant_params import Affine
from jexport.quantization.treatment import TWICE, WEIGHTS, Treatment


def rewrite(model: ir.Model, treatments: Mapping[str, Treatment], *, tables: bool = True) -> None:
    """Quantize the named products, and every large table unless `tables` is false, in place."""
    work = edit.Edit(model.graph)
    for node in list(model.graph):
        treatment = treatments.get(str(node.name))
        if treatment is not None:
            _product(work, node, treatment)
    for node in layers.tables(model) if tables else ():
        _table(work, node)
    work.drop_dead()
    model.graph.sort()


def _product(work: edit.Edit, node: ir.Node, treatment: Treatment) -> None:
    source, weight = node.inputs
    assert source is not None
    assert weight is not None
    stem = str(node.name).removesuffix("/MatMul")
    shape = edit.sizes(weight.const_value)
    named = f"{weight.name}.int8"  # a weight that is used twice is stored once
    tensor = work.graph.initializers.get(named) or work.lazy_typed(
        named, ir.DataType.INT8, shape, treatment.steps
    )
    scales = work.constant(f"{weight.name}.scale", treatment.scales)
    restored = work.insert(
        node, "DequantizeLinear", [tensor, scales], {"axis": 1}, name=f"{stem}/weight", like=weight
    )
    if treatment.divisors is not None:
        source = work.insert(
            node,
            "Mul",
            [source, work.constant(f"{weight.name}.smooth", 1 / treatment.divisors)],
            name=f"{stem}/smooth",
            like=source,
        ).outputs[0]
    node.replace_input_with(1, restored.outputs[0])
    if treatment.kind == WEIGHTS:
        node.replace_input_with(0, source)
        return
    first = _rounded(work, node, source, treatment.grid, f"{stem}/input")
    node.replace_input_with(0, first)
    if treatment.kind != TWICE:
        return
    rest = work.insert(node, "Sub", [source, first], name=f"{stem}/rest", like=source).outputs[0]
    second = _rounded(work, node, rest, treatment.grid.rest(), f"{stem}/rest/input")
    again = ir.node("MatMul", [second, restored.outputs[0]], name=f"{stem}/rest/MatMul")
    total = ir.node("Add", [node.outputs[0], again.outputs[0]], name=f"{stem}/both")
    for made in (again, total):
        made.outputs[0].name = made.name
        made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    work.graph.insert_after(node, [again, total])
    work.replace(node.outputs[0], total.outputs[0])
    total.replace_input_with(0, node.outputs[0])


def _rounded(
    work: edit.Edit, before: ir.Node, value: ir.Value, grid: Affine, name: str
) -> ir.Value:
    """The value through QuantizeLinear and DequantizeLinear."""
    scale = work.constant(f"{name}.scale", np.array(grid.scale, np.float32))
    zero = work.constant(f"{name}.zero", np.array(grid.zero, grid.dtype))
    steps = work.insert(
        before, "QuantizeLinear", [value, scale, zero], name=f"{name}/quantize", like=value
    ).outputs[0]
    steps.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(grid.dtype)))
    return work.insert(
        before, "DequantizeLinear", [steps, scale, zero], name=f"{name}/dequantize", like=value
    ).outputs[0]


def _table(work: edit.Edit, node: ir.Node) -> None:
    """Gather(table, ids) -> Gather(steps, ids) * Gather(scales, ids), a scale per row."""
    table, ids = node.inputs
    assert table is not None
    tensor = table.const_value
    assert tensor is not None
    rows, width = edit.sizes(tensor)
    scales = row_scales(tensor.numpy())
    steps = work.lazy_typed(
        f"{table.name}.int8",
        ir.DataType.INT8,
        (rows, width),
        lambda: np.rint(tensor.numpy() / scales).astype(np.int8),
    )
    column = work.constant(f"{table.name}.scale", scales)
    like, name = node.outputs[0], str(node.name)
    picked = work.insert(node, "Gather", [steps, ids], name=f"{name}/int8", like=like)
    picked.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    wide = work.insert(
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
        node, "Mul", [wide.outputs[0], factor.outputs[0]], name=f"{name}/scaled", like=like
    )
    work.replace(node.outputs[0], result.outputs[0])


def row_scales(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """One scale per row, symmetric to +-127: float32 [rows, 1]."""
    reach = np.abs(table).max(axis=1, keepdims=True)
    scales: NDArray[np.float32] = np.maximum(reach / 127, np.float32(1e-12)).astype(np.float32)
    return scales
