"""lint: an ONNX file against what TensorRT takes, without TensorRT and without a GPU.

It names what TensorRT would refuse, and what it would compute otherwise than onnxruntime. It is no
proof that an engine can be built: kernels, memory and the builder's own limits only a GPU shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jexport.graph.diagnostics import Diagnostic, merge_by_kind, raise_for_errors
from jexport.graph.lint import dataflow, onnx_reader, weights
from jexport.targets.trt import operators, quantization, ranges, shapes

__all__ = ["Diagnostic", "lint", "raise_for_errors"]


def lint(
    path: Path,
    dims: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    *,
    max_tokens: int | None = None,
) -> list[Diagnostic]:
    """What TensorRT would not take.

    Args:
        path: of an ONNX file.
        dims: by dynamic axis ('batch', 'sequence', or its name in the file), the lowest and highest
            size of each profile; None: profiles are not looked at.
        max_tokens: the longest text; None where that is not known.

    Returns:
        Errors first, one diagnostic a kind, the same order every time.

    Raises:
        UnsupportedGraphError: the file is not an ONNX graph.
    """
    file = onnx_reader.read(path)
    dataflow.infer_types(file)
    constness = dataflow.infer_constness(file)
    kinds: tuple[Iterable[Diagnostic], ...] = (
        weights.check(file),
        weights.check_connected(file),
        operators.check_opset(file),
        operators.check_operators(file),
        operators.check_types(file),
        operators.check_border_types(file),
        operators.check_restrictions(file, constness),
        quantization.check(file, constness),
        shapes.check_data_dependent(file, constness),
        shapes.check_inputs(file),
        shapes.check_axes(file),
        shapes.check_profiles(file, dims, max_tokens),
        ranges.check(file),
    )
    return merge_by_kind(one for kind in kinds for one in kind)
