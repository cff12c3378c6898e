"""Operators that onnxruntime has no CUDA kernel for at this opset -> equal ones that it has.

A kernel is of one version of its operator: Equal became another one at opset 19, ReduceMax and
ReduceMin at 20, without a new kernel (cuda_kernels.py). Each would bring a tensor to the CPU and
back, and rule CUDA graphs out. Standard ONNX in, standard ONNX out; no bit changes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from jexport.graph import cuda_kernels, edit

EXTREMES = {"ReduceMax": 1, "ReduceMin": 0}
"""Operator -> TopK's attribute `largest`."""


def rewrite(model: ir.Model) -> dict[str, int]:
    """Rewrite in place what has no kernel.

    Args:
        model: standard ONNX.

    Returns:
        How many nodes of each operator were rewritten.
    """
    opset = int(model.opset_imports[""])
    work = edit.Edit(model.graph)
    counts: dict[str, int] = {}
    for node in list(model.graph):
        if node.domain or _has_kernel(node.op_type, opset):
            continue
        if (node.op_type == "Equal" and _equal(work, node)) or (
            node.op_type in EXTREMES and _extreme(work, node)
        ):
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    work.drop_dead()
    return counts


def _has_kernel(operator: str, opset: int) -> bool:
    kernel = cuda_kernels.KERNELS.get(operator)
    version = cuda_kernels.since_version(operator, "", opset)
    return kernel is not None and any(low <= version <= high for low, high in kernel.versions)


def _equal(work: edit.Edit, node: ir.Node) -> bool:
    """Numbers alone: a == b -> a >= b and a <= b."""
    first = node.inputs[0]
    if first is None or first.dtype not in (
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
    ):
        return False
    name = str(node.name)
    sides = [
        work.insert(node, op, list(node.inputs), name=f"{name}/{op}", like=node.outputs[0])
        for op in ("GreaterOrEqual", "LessOrEqual")
    ]
    both = work.insert(
        node, "And", [side.outputs[0] for side in sides], name=f"{name}/And", like=node.outputs[0]
    )
    work.replace(node.outputs[0], both.outputs[0])
    return True


def _extreme(work: edit.Edit, node: ir.Node) -> bool:
    """The largest or smallest along one axis -> the first of TopK there."""
    axes = edit.array(node.inputs[1]) if len(node.inputs) > 1 else None
    keeps = node.attributes.get("keepdims")
    if axes is None or axes.size != 1 or node.inputs[0] is None:
        return False
    axis, name = int(axes.reshape(-1)[0]), str(node.name)
    one = work.constant("one_value", np.ones(1, np.int64))
    attributes = {"axis": axis, "largest": EXTREMES[node.op_type], "sorted": 1}
    top = work.insert(
        node, "TopK", [node.inputs[0], one], attributes, name=f"{name}/TopK", num_outputs=2
    )
    extreme = top.outputs[0]
    extreme.type = node.inputs[0].type
    top.outputs[1].name = f"{name}/TopK:1"
    if keeps is None or keeps.as_int():
        extreme.shape = node.outputs[0].shape
    else:
        squeezed = work.insert(
            node, "Squeeze", [extreme, node.inputs[1]], name=f"{name}/Squeeze", like=node.outputs[0]
        )
        extreme = squeezed.outputs[0]
    work.replace(node.outputs[0], extreme)
    return True
