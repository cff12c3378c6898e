"""Running a TensorRT plan: profiles, GPU memory that is reused, CUDA graphs, and letting go.

One execution context for each optimization profile and one more for each captured graph (a graph is
bound to its context's state), all on one stream and in one piece of activation memory. Whether a
plan may be opened at all is asked in engine_info.py, before TensorRT sees it. Knows no manifest
file.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jexport.errors import EngineError
from jexport.targets.trt import device, engine_info, profiles
from jexport.targets.trt.cuda import Buffer, Graph, Stream
from jexport.targets.trt.device import Machine
from jexport.targets.trt.engine_info import EngineInfo
from jexport.targets.trt.log import Log
from jexport.targets.trt.profiles import Profile
from jexport.types import Tensors

Array = npt.NDArray[Any]
Shape = tuple[int, int]

GRAPH_TOKENS = 1024
"""Up to so many tokens a batch the launch of kernels costs more than their work."""

GRAPHS = 16
"""So many shapes keep a graph; the one that was not used for longest goes first."""


@dataclass(kw_only=True)
class _Tensor:
    """An input or output of the engine and its memory."""

    name: str
    dtype: np.dtype[Any]
    buffer: Buffer


@dataclass(frozen=True, kw_only=True)
class _Captured:
    """A graph, the context that it is bound to, and the output shapes of its run."""

    graph: Graph
    context: Any
    shapes: Mapping[str, tuple[int, ...]]


class Plan:
    """An opened engine: `run` it, `close` it. A context manager."""

    def __init__(
        self, engine: Any, profiles_: Sequence[Profile], log: Log, *, graphs: bool
    ) -> None:
        """Take a deserialized engine; `open_plan` is the way in."""
        self._engine: Any = engine
        self._profiles = tuple(profiles_)
        self._log = log
        self._use_graphs = graphs
        self._lock = threading.Lock()
        self._contexts: list[Any] = []
        self._captured: OrderedDict[Shape, _Captured] = OrderedDict()
        self._seen: set[Shape] = set()
        self._bound_to: tuple[int, ...] = ()
        self._inputs, self._outputs = _tensors(engine)
        self._activations = Buffer(staged=False)
        self._stream = Stream()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        """Activation memory for the hungriest profile, and a context for each."""
        engine = self._engine
        needed = [
            int(engine.get_device_memory_size_for_profile_v2(number))
            for number in range(len(self._profiles))
        ]
        most = max(needed)
        what = f"needed: {most / 2**30:.2f} GiB of activations at profile {needed.index(most)}"
        device.check_memory(most, what=what)
        # TensorRT refuses a null pointer unless nothing is needed at all.
        self._activations.reserve(most)
        self._contexts = [self._context(number) for number in range(len(self._profiles))]

    def _context(self, number: int) -> Any:
        """A new execution context on the shared activation memory, set to one profile."""
        import tensorrt as trt

        context = self._engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise self._failed("making an execution context")
        context.set_device_memory(self._activations.pointer, self._activations.size_bytes)
        if not context.set_optimization_profile_async(number, self._stream.handle):
            raise self._failed(f"choosing profile {number}")
        self._stream.wait()
        return context

    def _failed(self, doing: str) -> EngineError:
        return EngineError(
            f"TensorRT failed at {doing}",
            evidence=self._log.text() or "it gave no reason",
            fix="compile the artifact again on this machine: jexport compile ARTIFACT",
        )

    def run(self, feed: Tensors) -> dict[str, Array]:
        """One forward pass.

        A batch that no profile takes is split by the texts' lengths; outputs at padding that the
        engine then never saw are 0.

        Args:
            feed: input_ids and attention_mask, int64 [batch, sequence].

        Returns:
            Outputs by name, [batch, sequence, ...] or [batch, ...], as arrays of their own.

        Raises:
            ProfileError: a text is longer than every profile.
            EngineError: TensorRT failed, with its own words.
            DeviceError: the GPU's memory is full.
            RuntimeError: it is closed.
        """
        with self._lock:
            if self._engine is None:
                raise RuntimeError("this plan is closed")
            batch, tokens = next(iter(feed.values())).shape
            chosen = profiles.pick(self._profiles, batch, tokens)
            if chosen is not None:
                return self._execute(chosen, feed, (batch, tokens))
            return self._in_parts(feed, batch, tokens)

    def _in_parts(self, feed: Tensors, batch: int, tokens: int) -> dict[str, Array]:
        lengths = _lengths(feed["attention_mask"])
        whole: dict[str, Array] = {}
        for chosen, rows in profiles.split(self._profiles, lengths):
            longest = max(lengths[row] for row in rows)
            shape = profiles.shape(self._profiles[chosen], len(rows), longest)
            part = {name: _padded(values[rows], longest, shape) for name, values in feed.items()}
            for name, values in self._execute(chosen, part, shape).items():
                axes = values.ndim
                if name not in whole:
                    size = (
                        (batch, tokens, *values.shape[2:])
                        if axes > 2
                        else (batch, *values.shape[1:])
                    )
                    whole[name] = np.zeros(size, dtype=values.dtype)
                if axes > 2:  # [batch, tokens, ...]
                    whole[name][rows, :longest] = values[: len(rows), :longest]
                else:  # [batch, ...]
                    whole[name][rows] = values[: len(rows)]
        return whole

    def _execute(self, number: int, feed: Tensors, shape: Shape) -> dict[str, Array]:
        """Upload, run (or launch the shape's graph), download."""
        for tensor in self._inputs:
            values = np.ascontiguousarray(feed[tensor.name], dtype=tensor.dtype)
            tensor.buffer.reserve(values.nbytes)
            tensor.buffer.host(values.nbytes)[:] = values.view(np.uint8).reshape(-1)
        context = self._contexts[number]
        shapes = self._bind(context, shape)
        self._drop_graphs_that_moved()
        captured = self._graph(number, shape)
        for tensor in self._inputs:
            self._stream.upload(tensor.buffer, _bytes(shape, tensor.dtype))
        if captured is None:
            self._enqueue(context)
        else:
            self._stream.launch(captured.graph)
        for tensor in self._outputs:
            self._stream.download(tensor.buffer, _bytes(shapes[tensor.name], tensor.dtype))
        self._stream.wait()
        outputs = {}
        for tensor in self._outputs:
            size = shapes[tensor.name]
            raw = tensor.buffer.host(_bytes(size, tensor.dtype))
            outputs[tensor.name] = raw.view(tensor.dtype).reshape(size).copy()
        return outputs

    def _bind(self, context: Any, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Tell a context the input shapes and every address; the output shapes that follow."""
        for tensor in self._inputs:
            if not context.set_input_shape(tensor.name, shape):
                raise self._failed(f"setting {tensor.name} to {list(shape)}")
        shapes = {t.name: tuple(context.get_tensor_shape(t.name)) for t in self._outputs}
        for tensor in self._outputs:
            if min(shapes[tensor.name]) < 0:
                raise self._failed(f"working out the shape of {tensor.name}")
            tensor.buffer.reserve(_bytes(shapes[tensor.name], tensor.dtype))
        for tensor in (*self._inputs, *self._outputs):
            if not context.set_tensor_address(tensor.name, tensor.buffer.pointer):
                raise self._failed(f"setting the address of {tensor.name}")
        return shapes

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise self._failed("running the engine")

    def _drop_graphs_that_moved(self) -> None:
        """A graph reads and writes where the buffers were when it was captured."""
        now = tuple(tensor.buffer.moved for tensor in (*self._inputs, *self._outputs))
        if now != self._bound_to:
            self._drop_graphs()
            self._bound_to = now

    def _drop_graphs(self) -> None:
        while self._captured:
            _, captured = self._captured.popitem()
            captured.graph.free()

    def _graph(self, number: int, shape: Shape) -> _Captured | None:
        """The graph of a small shape that comes again; None while it is new, or too large."""
        if not self._use_graphs or shape[0] * shape[1] > GRAPH_TOKENS:
            return None
        if shape in self._captured:
            self._captured.move_to_end(shape)
            return self._captured[shape]
        if shape not in self._seen:
            self._seen.add(shape)
            return None
        while len(self._captured) >= GRAPHS:
            _, oldest = self._captured.popitem(last=False)
            oldest.graph.free()
        context = self._context(number)
        shapes = self._bind(context, shape)
        # The first run after a change of shapes may do work that cannot be captured.
        self._enqueue(context)
        self._stream.wait()
        graph = self._stream.capture(lambda: self._enqueue(context))
        self._captured[shape] = _Captured(graph=graph, context=context, shapes=shapes)
        return self._captured[shape]

    def close(self) -> None:
        """Free the engine and all its memory; closing twice is harmless."""
        with contextlib.ExitStack() as stack:  # each, whatever another one raises
            for tensor in (*self._inputs, *self._outputs):
                stack.callback(tensor.buffer.free)
            stack.callback(self._stream.free)
            stack.callback(self._activations.free)
            stack.callback(self._forget)
            stack.callback(self._drop_graphs)
            if self._engine is not None:
                stack.callback(self._stream.wait)

    def _forget(self) -> None:
        self._contexts = []
        self._engine = None


def _tensors(engine: Any) -> tuple[list[_Tensor], list[_Tensor]]:
    import tensorrt as trt

    inputs: list[_Tensor] = []
    outputs: list[_Tensor] = []
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        tensor = _Tensor(name=name, dtype=dtype, buffer=Buffer(staged=True))
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        (inputs if is_input else outputs).append(tensor)
    return inputs, outputs


def _bytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _lengths(mask: Array) -> list[int]:
    """Tokens of each row up to its last that is not padding; 1 for an empty row."""
    return [int(row.nonzero()[0][-1]) + 1 if row.any() else 1 for row in mask]


def _padded(rows: Array, longest: int, shape: Shape) -> Array:
    """Rows cut to `longest` tokens, in an array of that shape; what is added is 0 and masked."""
    padded = np.zeros(shape, dtype=rows.dtype)
    padded[: len(rows), :longest] = rows[:, :longest]
    return padded


@contextlib.contextmanager
def open_plan(
    path: Path, info: EngineInfo, *, here: Machine | None = None, graphs: bool = True
) -> Iterator[Callable[[Tensors], dict[str, Array]]]:
    """Open a plan for this machine; all its memory is freed at the end.

    What does not fit is refused before TensorRT sees the plan.

    Args:
        path: of the plan.
        info: what the manifest says of it.
        here: this machine, asked when not given.
        graphs: capture CUDA graphs of small shapes.

    Yields:
        Its `run`.

    Raises:
        DependencyError: no TensorRT that fits.
        DeviceError: no GPU, another one, or too little of its memory.
        EngineError: another TensorRT, a plan that it does not open, or one with other profiles.
        ArtifactError: another digest.
    """
    machine = here or device.machine()
    engine_info.check(info, machine, path=path)
    raw = engine_info.read(info, path)
    device.check_memory(
        len(raw), what=f"needed: {len(raw) / 2**30:.2f} GiB for the engine's weights alone"
    )
    import tensorrt as trt

    log = Log()
    runtime = trt.Runtime(log.logger)
    # A version-compatible plan carries code that runs on the host; no other plan may.
    runtime.engine_host_code_allowed = info.version_compatible
    engine = runtime.deserialize_cuda_engine(raw)
    if engine is None:
        raise EngineError(
            f"TensorRT does not open {path.name}",
            evidence=log.text() or "it gave no reason",
            fix=f"compile it again on this machine: jexport compile {path.parent}",
        )
    _check_profiles(engine, info, path)
    with Plan(engine, info.profiles, log, graphs=graphs) as plan:
        del engine
        yield plan.run


def _check_profiles(engine: Any, info: EngineInfo, path: Path) -> None:
    """Refuse an engine whose own profiles are not those that the manifest names."""
    name = engine.get_tensor_name(0)
    own = [
        [list(shape) for shape in engine.get_tensor_profile_shape(name, number)]
        for number in range(engine.num_optimization_profiles)
    ]
    differences = [
        [[getattr(one.batch, size), getattr(one.tokens, size)] for size in ("min", "opt", "max")]
        for one in info.profiles
    ]
    if own != differences:
        raise EngineError(
            f"the profiles of {path.name} are not those of its manifest",
            evidence=f"the engine has {own}, the manifest {differences}",
            fix=f"compile it again: jexport compile {path.parent}",
        )
