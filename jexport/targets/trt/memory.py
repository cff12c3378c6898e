"""How much GPU memory an engine will need, from the graph alone, before anything is built.

Weights as they are in the graph, and the most bytes of intermediate tensors that are alive at one
time in the graph's own order at the largest shape. TensorRT fuses attention where it can, and then
never holds the scores (tokens x tokens a head): they are left out of what must be there, so that
nothing is refused that would fit, and told apart as what it takes without that. Knows no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.targets.trt.profiles import Profile


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of weights, and of activations at the hungriest profile.

    Args:
        weights_bytes: as they are in the graph.
        activations_bytes: when attention is fused.
        unfused_bytes: activations when it is not.
        profile: the hungriest, in words.
        unknown: tensors that were not sized.
    """

    weights_bytes: int
    activations_bytes: int
    unfused_bytes: int
    profile: str
    unknown: int

    @property
    def total_bytes(self) -> int:
        """Both together."""
        return self.weights_bytes + self.activations_bytes

    def __str__(self) -> str:
        return (
            f"needed: {self.weights_bytes / 2**30:.2f} GiB of weights and "
            f"{self.activations_bytes / 2**30:.2f} GiB of activations at {self.profile} "
            f"({self.unfused_bytes / 2**30:.2f} GiB when attention is not fused)"
        )


def predict(path: Path, profiles: Sequence[Profile]) -> Need:
    """What an engine of this graph needs. The weights themselves are not read.

    Args:
        path: of the ONNX file; its first input is [batch, tokens], both axes named.
        profiles: at least one.

    Returns:
        The need at their largest shapes.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = sum(_size(tensor.data_type, tensor.dims) for tensor in model.graph.initializer)
    inferred = onnx.shape_inference.infer_shapes(model)
    known = {
        value.name: value.type.tensor_type
        for value in (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    }
    batch, tokens = _axes(inferred.graph)
    peaks = []
    unknown = 0
    for profile in profiles:
        axes = {batch: profile.batch.max, tokens: profile.tokens.max}
        sizes, unknown = _sizes(inferred.graph, known, axes)
        scores = {name for name in sizes if _squared(known[name], tokens)}
        fused = {name: size for name, size in sizes.items() if name not in scores}
        peaks.append((_peak(inferred.graph, fused), _peak(inferred.graph, sizes), str(profile)))
    most = max(peaks)
    return Need(
        weights_bytes=weights,
        activations_bytes=most[0],
        unfused_bytes=max(peak[1] for peak in peaks),
        profile=most[2],
        unknown=unknown,
    )


def _squared(kind: Any, tokens: str) -> bool:
    """Whether a tensor has the tokens axis twice: attention scores and masks of that shape."""
    return [dim.dim_param for dim in kind.shape.dim].count(tokens) > 1


def _axes(graph: Any) -> tuple[str, str]:
    """Names of the two dynamic axes of the first input: [batch, tokens]."""
    dims = graph.input[0].type.tensor_type.shape.dim
    return dims[0].dim_param, dims[1].dim_param


def _size(kind: int, dims: Sequence[int]) -> int:
    from onnx import helper

    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize) * math.prod(dims)


def _sizes(
    graph: Any, known: Mapping[str, Any], axes: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """Bytes of each node's outputs; those whose shape is not known count as none, and are told."""
    sizes, unknown = {}, 0
    for node in graph.node:
        for name in filter(None, node.output):
            kind = known.get(name)
            if kind is None or not kind.HasField("shape"):
                unknown += 1
                continue
            dims = [
                dim.dim_value if dim.HasField("dim_value") else axes.get(dim.dim_param)
                for dim in kind.shape.dim
            ]
            if None in dims:
                unknown += 1
                continue
            sizes[name] = _size(kind.elem_type, [int(dim or 0) for dim in dims])
    return sizes, unknown


def _peak(graph: Any, sizes: Mapping[str, int]) -> int:
    """Most bytes alive at once: a tensor lives from its node to the last that reads it."""
    last = {name: at for at, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = peak = 0
    leaving: dict[int, int] = {}
    for at, node in enumerate(graph.node):
        produced = sum(sizes.get(name, 0) for name in node.output)
        alive += produced
        peak = max(peak, alive)
        for name in node.output:
            if name in sizes:
                until = max(last.get(name, at), at)
                leaving[until] = leaving.get(until, 0) + sizes[name]
        alive -= leaving.pop(at, 0)
    return peak
