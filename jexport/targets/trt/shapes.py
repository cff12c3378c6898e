"""Rules on shapes: inputs, dynamic axes and the profiles for them, shapes made of values.

A profile is seen here as the ranges it covers of each named axis. Knows no operator's types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jexport.graph.diagnostics import Diagnostic
from jexport.graph.lint import dataflow
from jexport.graph.lint.dataflow import VALUES, Constness
from jexport.graph.lint.graph_view import GraphFile, Node, Value, error, warning
from jexport.targets.trt.support import table

INPUTS = ("input_ids", "attention_mask")
TASK_INPUTS = ("task_id", "adapter_mask")
AXES = ("batch", "sequence")
"""The two axes of an input that may be dynamic, by position."""

Ranges = Mapping[str, Sequence[tuple[int, int]]]
"""By axis name: lowest and highest size of each profile."""

SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Slice": (1, 2, 3, 4),
    "Range": (0, 1, 2),
    "Tile": (1,),
    "Pad": (1, 3),
    "Resize": (2, 3),
    "TopK": (1,),
    "Split": (1,),
    "OneHot": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
    "CenterCropPad": (1,),
}
"""Inputs that decide the shape of a result."""

BY_TEXT = "compute it from shapes (Shape, Gather, Concat) and not from what the text says"


def check_data_dependent(file: GraphFile, constness: Constness) -> Iterator[Diagnostic]:
    """Results whose shape depends on values and not only on the inputs' shapes.

    Args:
        file: the graph.
        constness: of its values.

    Yields:
        An error for each node and input.
    """
    for scope in file.scopes():
        for node in scope.nodes:
            if not node.standard:
                continue
            if node.op in table().value_shaped:
                yield error(
                    "data-dependent-shape",
                    node,
                    f"the size of what {node.op} makes depends on the text",
                    "no profile can say it, and the runtime reserves memory by profile",
                    "mask instead of picking: Where or a product with the mask",
                )
            for index in SHAPE_INPUTS.get(node.op, ()):
                name = node.given(index)
                if name and dataflow.constness_of(constness, scope, name) == VALUES:
                    yield error(
                        "data-dependent-shape",
                        node,
                        f"the shape that {node.op} makes depends on the text",
                        f"its input {index} ('{name}') is computed from the values of an input",
                        BY_TEXT,
                    )
            if _scans(node) and dataflow.constness_of(constness, scope, node.given(0)) == VALUES:
                yield error(
                    "data-dependent-shape",
                    node,
                    "the length of what a Loop collects depends on the text",
                    f"its trip count '{node.given(0)}' is computed from values",
                    BY_TEXT,
                )


def _scans(node: Node) -> bool:
    """Whether a Loop gives more than what it carries."""
    carried = max(len(node.inputs) - 2, 0)
    return node.op == "Loop" and len(node.outputs) > carried


def check_inputs(file: GraphFile) -> Iterator[Diagnostic]:
    """input_ids and attention_mask, int64 [batch, sequence], and nothing else.

    Args:
        file: the graph.

    Yields:
        An error for each that is missing, strange or of another type or shape.
    """
    given = {value.name: value for value in file.graph.inputs}
    for name in INPUTS:
        if name not in given:
            yield error(
                "input",
                None,
                f"the graph has no input '{name}'",
                f"it has: {', '.join(given) or 'none'}",
                "export with jexport, whose graphs take input_ids and attention_mask",
            )
    for value in given.values():
        if value.name in TASK_INPUTS:
            yield error(
                "task-input",
                None,
                f"the graph takes '{value.name}'",
                "the authors' published graph takes task_id and rebuilds a LoRA delta at each call",
                "build one artifact per task (--task), with the adapter merged",
            )
        elif value.name not in INPUTS:
            yield error(
                "input",
                None,
                f"the graph takes an input '{value.name}' that nobody feeds",
                f"jexport feeds {' and '.join(INPUTS)}",
                "export with that input as a constant",
            )
        else:
            yield from _check_known(value)


def _check_known(value: Value) -> Iterator[Diagnostic]:
    if value.dtype != "INT64":
        yield error(
            "input",
            None,
            f"input '{value.name}' is {value.dtype or 'without a type'}, not int64",
            "TensorRT takes int64 inputs since 10, and jexport feeds int64",
            "export it as int64",
        )
    if value.dims is None or len(value.dims) != len(AXES):
        shape = "unknown" if value.dims is None else list(value.dims)
        yield error(
            "input",
            None,
            f"input '{value.name}' is not [batch, sequence]",
            f"its shape is {shape}",
            "export it with two axes",
        )


def check_axes(file: GraphFile) -> Iterator[Diagnostic]:
    """Dynamic axes anywhere but in batch and sequence.

    Args:
        file: the graph.

    Yields:
        Errors for inputs; warnings for outputs, and for an axis with two names.
    """
    for value in file.graph.inputs:
        for position, size in enumerate(value.dims or ()):
            if isinstance(size, str) and (position >= len(AXES) or value.name not in INPUTS):
                yield error(
                    "dynamic-axis",
                    None,
                    f"axis {position} of input '{value.name}' is dynamic",
                    f"its shape is {list(value.dims or ())}; only batch and sequence may be",
                    "export it with a fixed size there",
                )
    names = {size for value in file.graph.inputs for size in value.dims or ()}
    for value in file.graph.outputs:
        dims = value.dims or ()
        strange = [size for size in dims[1:] if isinstance(size, str) and size not in names]
        if strange or (dims and isinstance(dims[-1], str)):
            yield warning(
                "dynamic-axis",
                None,
                f"output '{value.name}' has an axis of unknown size",
                f"its shape is {list(dims)}",
                "export it with the embedding's size stated",
            )
    for position, axis in enumerate(AXES):
        called = sorted(
            {
                str(value.dims[position])
                for value in file.graph.inputs
                if value.name in INPUTS and value.dims and len(value.dims) > position
            }
        )
        if len(called) > 1:
            yield warning(
                "dynamic-axis",
                None,
                f"the inputs name their {axis} axis differently",
                f"it is called {' and '.join(called)}; TensorRT takes them for independent",
                f"give that axis one name, '{axis}'",
            )


def check_profiles(
    file: GraphFile, ranges: Ranges | None, max_tokens: int | None
) -> Iterator[Diagnostic]:
    """Dynamic axes that no profile covers, and texts longer than any.

    Args:
        file: the graph.
        ranges: what the profiles cover; None: dynamic axes are not looked at.
        max_tokens: the longest text; None where that is not known.

    Yields:
        Errors; warnings for sizes that have to be padded.
    """
    known = [value for value in file.graph.inputs if value.name in INPUTS and value.dims]
    for position, axis in enumerate(AXES):
        sizes = dict.fromkeys(
            value.dims[position] for value in known if value.dims and len(value.dims) > position
        )
        for size in sizes:
            if isinstance(size, int):
                yield from _fixed(axis, size, max_tokens)
            elif ranges is not None:
                expected = max_tokens if axis == "sequence" else None
                yield from _covered(axis, size, ranges.get(size, ranges.get(axis, ())), expected)


def _fixed(axis: str, size: int, max_tokens: int | None) -> Iterator[Diagnostic]:
    if axis == "sequence" and max_tokens is not None and size < max_tokens:
        yield error(
            "profile",
            None,
            f"the graph takes {size} tokens and nothing else",
            f"texts have up to {max_tokens}",
            "export with a dynamic sequence axis",
        )
    else:
        yield warning(
            "profile",
            None,
            f"the {axis} axis has the fixed size {size}",
            "every batch is padded to it",
            f"export with a dynamic {axis} axis",
        )


def _covered(
    axis: str, name: str, ranges: Sequence[tuple[int, int]], expected: int | None
) -> Iterator[Diagnostic]:
    if not ranges:
        yield error(
            "profile",
            None,
            f"no profile covers the {axis} axis ('{name}')",
            "TensorRT needs a lowest and a highest size of each dynamic axis",
            f"give a profile with a range for {axis}",
        )
        return
    ordered = sorted(ranges)
    highest = max(high for _, high in ordered)
    if expected is not None and highest < expected:
        yield error(
            "profile",
            None,
            f"no profile covers texts of {highest + 1} to {expected} tokens",
            f"the profiles end at {highest}",
            f"raise a profile's highest to {expected}, or lower max_tokens",
        )
    reached = ordered[0][0] - 1 if axis == "batch" else 0
    for low, high in ordered:
        if low > reached + 1:
            yield warning(
                "profile",
                None,
                f"no profile covers {axis} sizes {reached + 1} to {low - 1}",
                "what lies between has to be padded up",
                "let the profiles touch",
            )
        reached = max(reached, high)
