"""Small graphs to lint: nodes between input_ids, attention_mask and one output.

Tests are no package: a conftest opens this file with `runpy.run_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF, INT8, UINT8, INT64, BOOL, DOUBLE = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.DOUBLE,
)
WIDE = 4
NODE = helper.make_node
VALUE = helper.make_tensor_value_info


def tensor(name: str, values: Any, dtype: Any = np.float32) -> Any:
    """An initializer."""
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def inputs(*more: Any, dtype: int = INT64, dims: Sequence[Any] = ("batch", "sequence")) -> Any:
    """input_ids and attention_mask, and others."""
    return [VALUE("input_ids", dtype, dims), VALUE("attention_mask", dtype, dims), *more]


def model(
    nodes: Sequence[Any],
    weights: Sequence[Any] = (),
    *,
    given: Sequence[Any] | None = None,
    opset: int = 20,
    output: str = "out",
    output_type: int = FLOAT,
    functions: Sequence[Any] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """The nodes after `x` (float32 [batch, sequence, 4], looked up by input_ids), up to `out`."""
    head = [
        NODE("Gather", ["table", "input_ids"], ["x"], name="embed"),
        NODE("Cast", ["attention_mask"], ["mask"], to=FLOAT, name="mask/Cast"),
    ]
    graph = helper.make_graph(
        [*head, *nodes],
        "g",
        inputs() if given is None else given,
        [VALUE(output, output_type, None)],
        [tensor("table", np.arange(8 * WIDE).reshape(8, WIDE) / 10), *weights],
    )
    imports = [helper.make_opsetid("", opset)] + [helper.make_opsetid(one, 1) for one in domains]
    made = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)
    assert isinstance(made, onnx.ModelProto)
    return made


def save(made: onnx.ModelProto, folder: Path) -> Path:
    """As folder/model.onnx."""
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def pair(
    source: str,
    *,
    zero: Any = 0,
    dtype: Any = np.int8,
    scale: Any = 0.1,
    name: str = "q",
    axis: int | None = None,
) -> tuple[list[Any], list[Any]]:
    """QuantizeLinear and DequantizeLinear on a value, and their constants; makes `<name>/out`.

    zero None: no zero point.
    """
    constants = [tensor(f"{name}/scale", scale)]
    given = [f"{name}/scale"]
    if zero is not None:
        constants.append(tensor(f"{name}/zero", zero, dtype))
        given.append(f"{name}/zero")
    more = {} if axis is None else {"axis": axis}
    return [
        NODE("QuantizeLinear", [source, *given], [f"{name}/steps"], name=f"{name}/Q", **more),
        NODE(
            "DequantizeLinear",
            [f"{name}/steps", *given],
            [f"{name}/out"],
            name=f"{name}/DQ",
            **more,
        ),
    ], constants
