"""CUDA memory, one stream and its graphs, through NVIDIA's own `cuda.bindings.runtime`.

Polygraphy wraps streams and plain copies only; pinned memory, graphs and free memory need the
runtime API itself, and cuda-bindings is kept by its makers and needs no compiler. Every call is
checked. Knows no TensorRT.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from jexport.errors import DeviceError

ALIGNMENT = 256
"""What TensorRT asks of the memory it is given; cudaMalloc aligns to at least as much."""

Bytes = npt.NDArray[np.uint8]


def call(function: Callable[..., Any], *words: Any) -> Any:
    """Call a function of the CUDA runtime, and look at its status.

    Args:
        function: of cuda.bindings.runtime.
        *words: its arguments.

    Returns:
        What it gives beside the status: nothing (an empty tuple), one value, or a tuple.

    Raises:
        DeviceError: it failed; says when memory is full.
    """
    from cuda.bindings import runtime

    status, *values = function(*words)
    if status != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(status)
        name = getattr(function, "__name__", "a CUDA call")
        out_of_memory = status == runtime.cudaError_t.cudaErrorMemoryAllocation
        raise DeviceError(
            "the GPU is out of memory" if out_of_memory else f"{name} failed",
            evidence=f"{name}{words if out_of_memory else ''}: {text.decode()} ({int(status)})",
            fix="free GPU memory, or compile again with smaller profiles (compile.profiles)"
            if out_of_memory
            else "see what else uses this GPU with nvidia-smi, then try again",
        )
    return values[0] if len(values) == 1 else tuple(values)


class Buffer:
    """A piece of GPU memory with, on request, pinned memory beside it; grows, never shrinks.

    `moved` counts how often its address changed: a captured graph is bound to addresses.
    """

    def __init__(self, *, staged: bool) -> None:
        """staged: whether the host has a pinned copy of it (`host`)."""
        self.pointer = 0
        self.size_bytes = 0
        self.moved = 0
        self._staged = staged
        self._host = 0

    def reserve(self, size_bytes: int) -> None:
        """Hold at least so many bytes. The memory must not be in use; its content may be lost.

        Args:
            size_bytes: rounded up to ALIGNMENT.

        Raises:
            DeviceError: the memory is full.
        """
        from cuda.bindings import runtime

        if size_bytes <= self.size_bytes:
            return
        self.free()
        size_bytes = -(-size_bytes // ALIGNMENT) * ALIGNMENT
        self.pointer = int(call(runtime.cudaMalloc, size_bytes))
        self.moved += 1
        if self._staged:
            self._host = int(call(runtime.cudaMallocHost, size_bytes))
        self.size_bytes = size_bytes

    @property
    def host_pointer(self) -> int:
        """Address of the pinned copy."""
        return self._host

    def host(self, size_bytes: int) -> Bytes:
        """A view of the pinned copy.

        Args:
            size_bytes: how many of its first bytes, at most what is reserved.

        Returns:
            uint8 [size_bytes], not to be kept past `reserve` or `free`.
        """
        held = (ctypes.c_uint8 * size_bytes).from_address(self._host)
        view: Bytes = np.ctypeslib.as_array(held)
        return view

    def free(self) -> None:
        """Give both pieces back; harmless when there are none."""
        from cuda.bindings import runtime

        pointer, host = self.pointer, self._host
        self.pointer = self._host = self.size_bytes = 0
        try:
            if pointer:
                call(runtime.cudaFree, pointer)
        finally:
            if host:
                call(runtime.cudaFreeHost, host)


class Stream:
    """One CUDA stream: what is put on it happens in order; `wait` until all of it did."""

    def __init__(self) -> None:
        """Make it. Non-blocking: it does not wait for the default stream's work."""
        from cuda.bindings import runtime

        self._handle = call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking)
        self.handle = int(self._handle)

    def upload(self, buffer: Buffer, size_bytes: int) -> None:
        """Copy from a buffer's pinned memory to the GPU.

        Args:
            buffer: made with `staged`.
            size_bytes: how many of its first bytes.
        """
        from cuda.bindings import runtime

        call(
            runtime.cudaMemcpyAsync,
            buffer.pointer,
            buffer.host_pointer,
            size_bytes,
            runtime.cudaMemcpyKind.cudaMemcpyHostToDevice,
            self._handle,
        )

    def download(self, buffer: Buffer, size_bytes: int) -> None:
        """Copy from the GPU to a buffer's pinned memory, which is whole after `wait`.

        Args:
            buffer: made with `staged`.
            size_bytes: how many of its first bytes.
        """
        from cuda.bindings import runtime

        call(
            runtime.cudaMemcpyAsync,
            buffer.host_pointer,
            buffer.pointer,
            size_bytes,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
            self._handle,
        )

    def wait(self) -> None:
        """Return when all that was put on the stream is done."""
        from cuda.bindings import runtime

        call(runtime.cudaStreamSynchronize, self._handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what `work` puts on the stream, without running it.

        Args:
            work: an exception of it ends the capture and passes through.

        Returns:
            The graph, ready for `launch`.

        Raises:
            DeviceError: CUDA cannot record or instantiate it.
        """
        from cuda.bindings import runtime

        # Of this thread only: other threads of the process may allocate meanwhile.
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(runtime.cudaStreamBeginCapture, self._handle, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(DeviceError):
                call(runtime.cudaGraphDestroy, call(runtime.cudaStreamEndCapture, self._handle))
            raise
        recorded = call(runtime.cudaStreamEndCapture, self._handle)
        try:
            return Graph(call(runtime.cudaGraphInstantiate, recorded, 0))
        finally:
            call(runtime.cudaGraphDestroy, recorded)

    def launch(self, graph: Graph) -> None:
        """Put a captured graph on the stream.

        Args:
            graph: as `capture` gave it, not freed yet.
        """
        from cuda.bindings import runtime

        call(runtime.cudaGraphLaunch, graph.handle, self._handle)

    def free(self) -> None:
        """Destroy it; harmless when that was done."""
        from cuda.bindings import runtime

        handle, self._handle = self._handle, None
        if handle is not None:
            call(runtime.cudaStreamDestroy, handle)


class Graph:
    """A captured, instantiated CUDA graph."""

    def __init__(self, handle: Any) -> None:
        """Keep what cudaGraphInstantiate gave."""
        self.handle = handle

    def free(self) -> None:
        """Destroy it; harmless when that was done."""
        from cuda.bindings import runtime

        handle, self.handle = self.handle, None
        if handle is not None:
            call(runtime.cudaGraphExecDestroy, handle)
