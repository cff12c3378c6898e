"""Rules on numbers: what float16 cannot hold, and masks that overflow there.

Looks into small constants only (scopes.READ_ELEMENTS); what large weights and activations reach is
measured where a graph is made float16. Follows a constant through moves and sums, not through
operators that bound it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jexport.graph.diagnostics import Diagnostic
from jexport.graph.lint.graph_view import Constant, GraphFile, Node, Scope, error, warning

LARGEST = 65504.0
"""Of float16."""

CLOSE = 60000.0
"""A float16 mask from here on overflows when a score of the same sign is added."""

SMALL = 1 << 16
"""Elements of a constant that is looked into here; a mask is one number or a few rows."""

THROUGH = (
    "Identity",
    "Cast",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Expand",
    "Transpose",
    "Slice",
    "Concat",
    "Gather",
    "Tile",
    "Where",
    "Add",
    "Sub",
    "Mul",
    "Neg",
    "ConstantOfShape",
    "Constant",
)
LOW = -1e38
"""A float32 mask down here overflows float32 itself when scores are added to it twice."""

FIX = "use a mask of -10000: it is finite in float16, and its softmax is 0"


def check(file: GraphFile) -> Iterator[Diagnostic]:
    """Every small constant.

    Args:
        file: the graph, its types inferred; one without float16 has nothing that overflows.

    Yields:
        Errors for what float16 cannot hold, warnings for masks near its end or that of float32.
    """
    half = any(
        dtype == "FP16" for scope in file.scopes() for dtype in scope.types.values()
    )  # nothing overflows in a float32 graph
    for scope in file.scopes():
        for name, constant, node in _constants(scope):
            values = constant.values(SMALL)
            if values is None or not len(values) or values.dtype.kind != "f":
                continue
            if constant.dtype == "FP16":
                yield from _check_half(name, values, node, scope)
            elif half:
                yield from _check_float(name, values, node, scope)


def _constants(scope: Scope) -> Iterator[tuple[str, Constant, Node | None]]:
    """Initializers, values of Constant and of ConstantOfShape, with the node that holds them."""
    for name, constant in scope.constants.items():
        yield name, constant, scope.producers.get(name)
    for node in scope.nodes:
        value = node.attributes.get("value")
        if node.op == "ConstantOfShape" and isinstance(value, Constant) and node.outputs:
            yield node.outputs[0], value, node


def _check_half(
    name: str, values: np.ndarray, node: Node | None, scope: Scope
) -> Iterator[Diagnostic]:
    bad = values[~np.isfinite(values)]
    if len(bad):
        yield error(
            "fp16-range",
            node or _first_reader(scope, name),
            "a float16 constant is not a finite number",
            f"'{name}' has {len(bad)} of {len(values)}, the first {bad[0]}",
            FIX if bad[0] < 0 else "keep that module in float32 (export.keep_fp32)",
        )
    elif float(values.min()) <= -CLOSE and _reaches(scope, name, ("Softmax",)):
        yield warning(
            "mask-overflow",
            node or _first_reader(scope, name),
            "a float16 mask is so low that adding a score can overflow",
            f"'{name}' is {float(values.min())}; float16 ends at {-LARGEST}",
            FIX,
        )


def _check_float(
    name: str, values: np.ndarray, node: Node | None, scope: Scope
) -> Iterator[Diagnostic]:
    beyond = values[~(np.abs(values) <= LARGEST)]
    if not len(beyond):
        return
    low = bool((beyond < 0).any())
    at = node or _first_reader(scope, name)
    evidence = f"'{name}' has {beyond[0]:g}; float16 ends at {LARGEST:g}"
    cast = _reaches(scope, name, ("Cast",), to_half=True)
    if cast is not None:
        yield error(
            "mask-overflow" if low else "fp16-range",
            at,
            "a mask overflows float16" if low else "a constant overflows float16",
            f"{evidence}; it reaches {cast.label}, which casts to float16",
            FIX if low else "keep that module in float32 (export.keep_fp32)",
        )
    elif (beyond <= LOW).any():
        yield warning(
            "mask-overflow",
            at,
            "a graph with float16 in it has a mask at the end of float32",
            evidence,
            FIX,
        )


def _first_reader(scope: Scope, name: str) -> Node | None:
    return next((node for node, _ in scope.readers.get(name, ())), None)


def _reaches(
    scope: Scope, name: str, op_types: tuple[str, ...], *, to_half: bool = False
) -> Node | None:
    """The first node of the wanted operators that a value comes to, moved or summed."""
    seen, waiting = {name}, [name]
    while waiting:
        for node, index in scope.readers.get(waiting.pop(0), ()):
            if node.op in op_types and (not to_half or _casts_to_half(node)):
                return node
            if node.op not in THROUGH or (node.op in ("Gather", "Slice", "Expand") and index):
                continue
            fresh = [one for one in node.outputs if one and one not in seen]
            seen.update(fresh)
            waiting += fresh
    return None


def _casts_to_half(node: Node) -> bool:
    return node.attributes.get("to") == 10  # TensorProto.FLOAT16
