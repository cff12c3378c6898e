"""Rules on operators: taken at all, in these types, as restricted, in this opset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jexport.graph.diagnostics import Diagnostic
from jexport.graph.lint import dataflow
from jexport.graph.lint.dataflow import CONSTANT, Constness
from jexport.graph.lint.graph_view import Constant, GraphFile, Node, Scope, error, warning
from jexport.targets.trt.support import table

SYMMETRIC = "quantize with the scheme 'symmetric' (int8 Q/DQ pairs), which this target asks for"
PLAIN = "export in standard ONNX operators, without the fused ones of another engine"
FIXES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "DynamicQuantizeLinear",
            "MatMulInteger",
            "ConvInteger",
            "QLinearMatMul",
            "QLinearConv",
            "MatMulNBits",
            "MatMulIntegerToFloat",
            "DynamicQuantizeMatMul",
            "QAttention",
            "QGemm",
        ),
        SYMMETRIC,
    ),
    "Compress": "leave out the step whose output length depends on the text",
    "Unique": "leave out the step whose output length depends on the text",
}
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
OUTPUT_TYPED = ("Cast", "CastLike", "Constant", "ConstantOfShape")
"""Operators whose output type is what the table's types are about (Cast: both sides)."""


def check_opset(file: GraphFile) -> Iterator[Diagnostic]:
    """Opsets that no, or not every, TensorRT reads.

    Args:
        file: the graph.

    Yields:
        An error for one that none reads, a warning for each version that does not.
    """
    known = table().opsets
    lowest = min(low for low, _ in known.values())
    highest = max(high for _, high in known.values())
    if not file.opset:
        yield error(
            "opset",
            None,
            "the graph names no opset of standard ONNX",
            f"its opset_import has: {', '.join(sorted(filter(None, file.opsets))) or 'nothing'}",
            "export it again",
        )
    elif not lowest <= file.opset <= highest:
        yield error(
            "opset",
            None,
            f"TensorRT does not read opset {file.opset}",
            f"it reads {lowest} to {highest} ({table().source} and later release notes)",
            "set export.opset to 20",
        )
    else:
        behind = {version: high for version, (_, high) in known.items() if file.opset > high}
        for version, high in behind.items():
            yield warning(
                "opset",
                None,
                f"TensorRT {version} does not read opset {file.opset}",
                f"it reads up to {high}; a later one reads {highest}",
                "set export.opset to 20, or build with a later TensorRT only",
            )


def check_operators(file: GraphFile) -> Iterator[Diagnostic]:
    """Operators that are not in the table, or in it as not taken.

    Args:
        file: the graph; calls of its own functions are not looked at, their nodes are.

    Yields:
        An error for each node.
    """
    support = table()
    for scope in file.scopes():
        for node in scope.nodes:
            if (node.domain, node.op) in file.functions:
                continue
            if not node.standard:
                why = f"its domain '{node.domain}' is no part of standard ONNX"
            elif node.op in support.refused:
                why = f"{support.source}: not taken"
            elif node.op not in support.operators:
                why = f"{support.source} does not list it"
            else:
                continue
            fix = FIXES.get(node.op, PLAIN)
            yield error(
                "operator", node, f"TensorRT cannot take operator {node.operator}", why, fix
            )


def check_types(file: GraphFile) -> Iterator[Diagnostic]:
    """Element types that an operator is not taken in.

    Args:
        file: the graph, its types inferred.

    Yields:
        Errors; warnings for float64, and for types that only a layer's reference lists.
    """
    for scope in file.scopes():
        for node in scope.nodes:
            if node.standard and node.op in table().operators and node.op not in QUANTIZING:
                for dtype, name in _typed(node, scope, file.opset):
                    yield from _check_type(node, dtype, name)
            if node.standard and not node.scopes:
                yield from _check_mixed(node, scope, file.opset)


def _typed(node: Node, scope: Scope, opset: int) -> Iterator[tuple[str, str]]:
    """Types of the values of a node that the table is about, each once, with its first value."""
    schema = dataflow.schema_of(node.op, opset)
    names: list[str] = []
    if schema is not None and schema[0] and node.op != "ConstantOfShape":
        words = schema[0]
        about = {words[0], "T"} if node.op == "Where" else {words[0]}
        names += [
            name
            for index, name in enumerate(node.inputs)
            if name and words[min(index, len(words) - 1)] in about
        ]
    if node.op in OUTPUT_TYPED:
        names += node.outputs
    yield from {dtype: name for name in reversed(names) if (dtype := scope.dtype(name))}.items()


def _check_mixed(node: Node, scope: Scope, opset: int) -> Iterator[Diagnostic]:
    """Inputs of one type variable in two types: strongly typed networks cast nothing by themselves.

    ONNX does not allow it either; graphs that were made float16 by hand have it all the same.
    """
    schema = dataflow.schema_of(node.op, opset)
    words = schema[0] if schema is not None else []
    seen: dict[str, tuple[str, str]] = {}
    for index, name in enumerate(node.inputs if words else ()):
        dtype, word = scope.dtype(name), words[min(index, len(words) - 1)]
        first, other = seen.setdefault(word, (dtype, name)) if dtype else ("", "")
        if dtype and first != dtype and "(" not in word:
            yield error(
                "mixed-types",
                node,
                f"{node.op} is given {first} and {dtype}",
                f"'{other}' is {first}, '{name}' is {dtype}; TensorRT's networks are strongly "
                "typed",
                "cast one of them before it",
            )
            return


def _check_type(node: Node, dtype: str, name: str) -> Iterator[Diagnostic]:
    support = table()
    taken = support.operators[node.op]
    if dtype in taken:
        return
    listed = f"value '{name}' is {dtype}; {support.source} lists {', '.join(sorted(taken))}"
    if dtype == "DOUBLE":
        yield warning(
            "double",
            node,
            f"{node.op} is in float64, which TensorRT narrows to float32",
            f"value '{name}' is {dtype}",
            "export in float32",
        )
    elif dtype in support.beyond.get(node.op, ()):
        yield warning(
            "type",
            node,
            f"{node.op} in {dtype} is not in the parser's table, only in the layer's reference",
            listed,
            "try it on the GPU first; a table that ids look up can stay float"
            if dtype == "INT8"
            else "try it on the GPU first, or cast to float32 before it",
        )
    elif dtype == "UINT8":
        yield error(
            "uint8",
            node,
            f"TensorRT does not compute {node.op} in uint8",
            f"value '{name}' is uint8, which is taken as a network input or output only",
            SYMMETRIC,
        )
    else:
        yield error(
            "type",
            node,
            f"TensorRT does not take {node.op} in {dtype}",
            listed,
            "cast to a listed type before it",
        )


def check_restrictions(file: GraphFile, constness: Constness) -> Iterator[Diagnostic]:
    """What the table restricts beyond types.

    Args:
        file: the graph, its types inferred.
        constness: of its values.

    Yields:
        An error for each restriction of each node.
    """
    for scope in file.scopes():
        for name in scope.sparse:
            yield error(
                "restriction",
                None,
                "TensorRT takes no sparse weights",
                f"weight '{name}' is sparse",
                "export dense weights",
            )
        for node in scope.nodes:
            limits = table().restrictions.get(node.op) if node.standard else None
            for problem in _problems(node, scope, limits or {}, constness):
                yield error(
                    _rule(node, problem),
                    node,
                    f"TensorRT restricts {node.op}: {problem}",
                    f"{table().source}; inputs: {', '.join(node.inputs)}"[:300],
                    _way_out(node),
                )


def _rule(node: Node, problem: str) -> str:
    return "reduce-axes" if node.op.startswith("Reduce") and "input" in problem else "restriction"


def _way_out(node: Node) -> str:
    if node.op.startswith("Reduce"):
        return "store the axes as an initializer (fold constants when exporting)"
    return "export this step otherwise, or fold what can be constant"


def _problems(
    node: Node, scope: Scope, limits: Mapping[str, Any], constness: Constness
) -> Iterator[str]:
    yield from _input_problems(node, scope, limits, constness)
    if len([name for name in node.outputs if name]) > limits.get("only_outputs", 99):
        yield f"only the first {limits['only_outputs']} of its outputs"
    for name in limits.get("absent_attributes", ()):
        if node.attributes.get(name) not in (None, 0, 0.0):
            yield f"no attribute {name}"
    for name, taken in limits.get("attributes", {}).items():
        if node.attributes.get(name, taken[0]) not in taken:
            yield f"attribute {name} only {' or '.join(map(str, taken))}"
    for name in limits.get("ones", ()):
        given = node.attributes.get(name)
        if isinstance(given, list) and any(one != 1 for one in given):
            yield f"attribute {name} only ones"
    kernel = node.attributes.get("kernel_shape")
    if "spatial" in limits and isinstance(kernel, list) and len(kernel) not in limits["spatial"]:
        yield "2-D or 3-D only"


def _input_problems(
    node: Node, scope: Scope, limits: Mapping[str, Any], constness: Constness
) -> Iterator[str]:
    for index in limits.get("initializers", ()):
        name = node.given(index)
        maker = scope.producer(name)
        stored = scope.constant(name) or (maker is not None and maker.op == "Constant")
        if name and not stored:
            yield f"input {index} must be an initializer"
    for index in limits.get("constants", ()):
        name = node.given(index)
        if name and dataflow.constness_of(constness, scope, name) != CONSTANT:
            yield f"input {index} must be a constant"
    for index in limits.get("false_inputs", ()):
        name = node.given(index)
        values = _numbers(scope.constant(name))
        if name and (values is None or any(values)):
            yield f"input {index} must be a constant and false"
    for index in limits.get("absent_inputs", ()):
        if node.given(index):
            yield f"no input {index}"
    for index, highest in limits.get("below", {}).items():
        values = _numbers(scope.constant(node.given(int(index))))
        if values is not None and any(one >= highest for one in values):
            yield f"input {index} must be below {highest}"
    for index, ranks in limits.get("ranks", {}).items():
        rank = scope.rank(node.given(int(index)))
        if rank is not None and rank not in ranks:
            yield f"input {index} must have {' or '.join(map(str, ranks))} dimensions"
    for index, types in limits.get("input_types", {}).items():
        dtype = scope.dtype(node.given(int(index)))
        if dtype and dtype not in types:
            yield f"input {index} must be {' or '.join(types)}"


def _numbers(constant: Constant | None) -> list[Any] | None:
    values = constant.values() if constant is not None else None
    return None if values is None else values.tolist()


def check_border_types(file: GraphFile) -> Iterator[Diagnostic]:
    """Element types that no TensorRT tensor has, in weights and at the graph's border.

    Args:
        file: the graph.

    Yields:
        An error for each value.
    """
    named = {value.name: value.dtype for value in (*file.graph.inputs, *file.graph.outputs)}
    for scope in file.scopes():
        named |= {name: constant.dtype for name, constant in scope.constants.items()}
    for name, dtype in named.items():
        if dtype and dtype not in table().network_types:
            yield error(
                "type",
                None,
                f"TensorRT has no {dtype} tensors",
                f"'{name}' is {dtype}",
                "export it in a type that TensorRT has (float32, float16, int64, int32, bool)",
            )
