"""CUDA graphs: a shape's pass is captured once, and replayed for every batch of that shape.

A replay reads and writes the memory that was bound when it was captured, so each shape keeps its
own inputs and outputs on the GPU. Contract: onnxruntime's CUDA provider, `enable_cuda_graph` and
the run option `gpu_graph_id`; no branches, no node on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jexport.targets.onnx.devices import Device
from jexport.types import Signature, Tensors, TensorSpec

if TYPE_CHECKING:
    from jexport.targets.onnx.session import Forward

SMALL_TOKENS = 2048
"""Padded tokens up to which a batch is captured: beyond, kernels outlast their launches."""

MOST_SHAPES = 64
"""Shapes that are captured: each holds memory for good, since no graph can be let go of."""

SKIP = "-1"
"""The gpu_graph_id of a run that is neither captured nor replayed."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What belongs to one captured shape."""

    number: int
    binding: Any
    inputs: dict[str, Any]
    outputs: list[Any]


class Captured:
    """Runs small batches as CUDA graphs, the others as `bound` does, one after another.

    Rows are filled up to a power of two with copies of the first, whose vectors are dropped:
    then one text, two, four ... are all the batches that there are for a length.
    """

    def __init__(self, session: Any, bound: Forward, signature: Signature, device: Device) -> None:
        self._session = session
        self._bound = bound
        self._signature = signature
        self._device = device
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self._lock = threading.Lock()  # one capture or replay at a time: they share the stream

    @property
    def shapes(self) -> int:
        """How many were captured."""
        return len(self._shapes)

    def run(self, outputs: Sequence[str], feed: Tensors) -> list[np.ndarray]:
        """One pass.

        Args:
            outputs: names.
            feed: by name, each [batch, sequence].

        Returns:
            The outputs in that order, rows as in `feed`.
        """
        rows, length = feed["input_ids"].shape
        filled = 1 << max(0, rows - 1).bit_length()
        key = (filled, length, tuple(outputs))
        with self._lock:
            known = self._shapes.get(key)
            small = 0 < filled * length <= SMALL_TOKENS and rows > 0
            if known is not None:
                return self._replay(known, feed, rows)
            if not small or len(self._shapes) >= MOST_SHAPES:
                return self._bound(outputs, feed)
            new = self._new(filled, length, outputs)
            result = self._replay(new, feed, rows)
            self._shapes[key] = new  # a capture that failed is none
            return result

    def _replay(self, shape: _Shape, feed: Tensors, rows: int) -> list[np.ndarray]:
        """A pass of a shape; its first one captures it."""
        for name, value in shape.inputs.items():
            value.update_inplace(_filled(feed[name], value.shape()[0]))
        self._session.run_with_iobinding(shape.binding, graph_options(str(shape.number)))
        shape.binding.synchronize_outputs()
        return [value.numpy()[:rows].copy() for value in shape.outputs]

    def _new(self, rows: int, length: int, outputs: Sequence[str]) -> _Shape:
        import onnxruntime

        place = (self._device.kind, self._device.index)
        sizes: dict[int | str, int] = {"batch": rows, "sequence": length}
        binding = self._session.io_binding()

        def buffer(spec: TensorSpec) -> Any:
            shape = [sizes.get(size, size) for size in spec.shape]
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                shape, np.dtype(spec.dtype).type, *place
            )

        inputs = {spec.name: buffer(spec) for spec in self._signature.inputs}
        given = {
            spec.name: buffer(spec) for spec in self._signature.outputs if spec.name in outputs
        }
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_ortvalue_output(name, given[name])
        number = len(self._shapes) + 1
        return _Shape(
            number=number, binding=binding, inputs=inputs, outputs=[given[name] for name in outputs]
        )


def graph_options(number: str) -> Any:
    """RunOptions of one captured graph.

    Args:
        number: of the graph, from '1', or SKIP.

    Returns:
        An onnxruntime.RunOptions.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", number)
    return options


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """The array with as many copies of its first row behind it as are missing."""
    missing = rows - len(array)
    if not missing:
        return np.ascontiguousarray(array)
    return np.concatenate([array, np.repeat(array[:1], missing, axis=0)])
