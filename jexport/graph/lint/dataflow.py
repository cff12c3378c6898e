"""Dataflow along the values of a graph: type and constness inference.

Types follow the operators' own schemas, so no shape inference (and no weight) is needed. Knows
nothing of what TensorRT takes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jexport.graph.lint.graph_view import Constant, GraphFile, Node, Scope
from jexport.graph.lint.onnx_types import IN_SCHEMAS, TYPES

CONSTANT, SHAPE, VALUES = 0, 1, 2
"""Where a number comes from: the file, the shapes of the inputs, or the inputs' values."""

Constness = Mapping[int, Mapping[str, int]]
"""By id of the scope: where each value's numbers come from."""

TYPE_ATTRIBUTES = {
    "Cast": "to",
    "EyeLike": "dtype",
    "RandomNormal": "dtype",
    "RandomUniform": "dtype",
    "Bernoulli": "dtype",
}


def infer_types(file: GraphFile) -> None:
    """Fill `types` of every scope.

    Args:
        file: whose scopes are changed; a value of no known type gets ''.
    """
    for scope in [file.graph, *file.functions.values()]:
        _infer_scope_types(scope, file.opset)


def _infer_scope_types(scope: Scope, opset: int) -> None:
    for value in scope.inputs:
        scope.types[value.name] = value.dtype
    for name, constant in scope.constants.items():
        scope.types[name] = constant.dtype
    for node in scope.nodes:
        for inner in node.scopes:
            _infer_scope_types(inner, opset)
        dtypes = _outputs(node, scope, opset) if node.standard else []
        for index, name in enumerate(node.outputs):
            dtype = dtypes[index] if index < len(dtypes) else ""
            stated = scope.stated.get(name)
            scope.types[name] = dtype or (stated.dtype if stated else "")


def _outputs(node: Node, scope: Scope, opset: int) -> list[str]:
    """The types of a node's outputs, '' where its schema leaves them open."""
    given = [scope.dtype(name) if name else "" for name in node.inputs]
    if node.op in ("If", "Loop", "Scan") and node.scopes:
        body = node.scopes[0]
        results = [body.types.get(value.name, "") for value in body.outputs]
        return results[1:] if node.op == "Loop" else results
    own = _own_type(node, given)
    if own:
        return [own] * len(node.outputs)
    schema = schema_of(node.op, opset)
    if schema is None:
        return []
    inputs, outputs, fixed = schema
    bound: dict[str, str] = {}
    for index, dtype in enumerate(given):
        if inputs and dtype:
            bound.setdefault(inputs[min(index, len(inputs) - 1)], dtype)
    if not outputs:
        return []
    words = [outputs[min(index, len(outputs) - 1)] for index in range(len(node.outputs))]
    return [bound.get(word) or fixed.get(word, "") for word in words]


def _own_type(node: Node, given: Sequence[str]) -> str:
    """Types that an attribute or a rule of the operator decides."""
    if node.op in TYPE_ATTRIBUTES:
        number = node.attributes.get(TYPE_ATTRIBUTES[node.op])
        return TYPES.get(number, f"TYPE{number}") if isinstance(number, int) else ""
    if node.op in ("Constant", "ConstantOfShape"):
        value = node.attributes.get("value")
        if isinstance(value, Constant):
            return value.dtype
        whole = {"value_int", "value_ints"} & set(node.attributes)
        return "INT64" if whole else "FP32"
    if node.op == "QuantizeLinear":
        return quantized_type(node, given)
    if node.op == "DequantizeLinear":
        return _stated(node) or (given[1] if len(given) > 1 else "")
    return ""


def quantized_type(node: Node, given: Sequence[str]) -> str:
    """What QuantizeLinear makes: its zero point's type, else output_dtype, else ONNX's uint8.

    Args:
        node: a QuantizeLinear.
        given: types of its inputs, '' where they are not known.

    Returns:
        The element type.
    """
    return (given[2] if len(given) > 2 else "") or _stated(node) or "UINT8"


def _stated(node: Node) -> str:
    number = node.attributes.get("output_dtype")
    return TYPES.get(number, "") if isinstance(number, int) and number else ""


@functools.lru_cache(maxsize=512)
def schema_of(op: str, opset: int) -> tuple[list[str], list[str], dict[str, str]] | None:
    """What an operator's schema says of types.

    Args:
        op: of ONNX's own domain.
        opset: the newest that counts.

    Returns:
        Type words of its inputs and outputs, and the element types of words that can only be one;
        None for an operator that ONNX does not have.
    """
    from onnx import defs

    try:
        schema: Any = defs.get_schema(op, max_inclusive_version=max(opset, 1))
    except (defs.SchemaError, TypeError):
        return None
    fixed = {
        one.type_param_str: IN_SCHEMAS.get(next(iter(one.allowed_type_strs)), "")
        for one in schema.type_constraints
        if len(one.allowed_type_strs) == 1
    }
    inputs = [one.type_str for one in schema.inputs]
    outputs = [one.type_str for one in schema.outputs]
    return inputs, outputs, {**IN_SCHEMAS, **fixed}


def infer_constness(file: GraphFile) -> Constness:
    """Where every value's numbers come from.

    Args:
        file: the graph and its functions.

    Returns:
        CONSTANT, SHAPE or VALUES, by id of the scope and name of the value.
    """
    constness: dict[int, dict[str, int]] = {}
    for scope in [file.graph, *file.functions.values()]:
        _infer_scope_constness(scope, constness)
    return constness


def constness_of(constness: Constness, scope: Scope, name: str) -> int:
    """Where one value's numbers come from.

    Args:
        constness: from `infer_constness`.
        scope: that the value is read in; those around it count too.
        name: of the value.

    Returns:
        CONSTANT, SHAPE or VALUES; what nobody knows counts as the inputs' values.
    """
    for one in scope.around():
        if name in constness.get(id(one), {}):
            return constness[id(one)][name]
    return VALUES


def _infer_scope_constness(scope: Scope, constness: dict[int, dict[str, int]]) -> None:
    here = constness.setdefault(id(scope), {})
    here |= dict.fromkeys((*scope.constants, *scope.sparse), CONSTANT)
    here |= {value.name: VALUES for value in scope.inputs}
    for node in scope.nodes:
        for inner in node.scopes:
            _infer_scope_constness(inner, constness)
        if node.op in ("Shape", "Size") and node.standard:
            source = SHAPE
        elif node.scopes:
            source = VALUES
        elif node.op == "Constant" and node.standard:
            source = CONSTANT
        else:
            source = max(
                (constness_of(constness, scope, name) for name in node.inputs if name),
                default=VALUES,
            )
        here |= dict.fromkeys(filter(None, node.outputs), source)
