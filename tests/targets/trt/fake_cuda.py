"""A stand-in for `cuda.bindings.runtime`: a GPU of host memory whose streams run when waited for.

What is put on a stream happens at cudaStreamSynchronize, so a result that is read too early is
garbage here as on a GPU. Memory is filled with 0xAB when it is allocated; copies in the wrong
direction, past an end or of freed memory raise. Enums are the real package's.
"""

from __future__ import annotations

import ctypes
import types
from collections.abc import Callable
from typing import Any

from cuda.bindings import runtime as real

OK = real.cudaError_t.cudaSuccess
GARBAGE = 0xAB
H2D = real.cudaMemcpyKind.cudaMemcpyHostToDevice
D2H = real.cudaMemcpyKind.cudaMemcpyDeviceToHost


class Handle:
    """A stream, graph or instantiated graph, as the real package hands them out."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.work: list[Callable[[], None]] = []
        self.alive = True

    def __int__(self) -> int:
        return self.number


class FakeGpu:
    """One GPU. `runtime` is what takes the place of cuda.bindings.runtime.

    fail: by function name, how many calls succeed before every further one fails.
    """

    def __init__(self, *, total_bytes: int = 1 << 30) -> None:
        self.name, self.major, self.minor = "Stand-In 3090", 8, 6
        self.driver, self.count, self.total_bytes = 13000, 1, total_bytes
        self.old_driver = False
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.handles: dict[int, Handle] = {}
        self.capturing: dict[int, Handle] = {}
        self.fail: dict[str, int] = {}
        self.calls: list[str] = []
        self._next = 1000
        self.runtime = self._module()

    # --- what tests and the stand-in engine ask ---------------------------------------------

    def leaks(self) -> dict[str, int]:
        """What was made and not given back."""
        live = sum(handle.alive for handle in self.handles.values())
        return {"device": len(self.device), "host": len(self.host), "handles": live}

    def view(self, pointer: int, size: int) -> Any:
        """Device memory from an address on, as a ctypes array."""
        for start, block in self.device.items():
            if start <= pointer and pointer + size <= start + len(block):
                return (ctypes.c_uint8 * size).from_address(pointer)
        raise AssertionError(f"{size} bytes at {pointer:#x} are not device memory")

    def stream(self, number: int) -> Handle:
        """The live stream of that handle."""
        handle = self.handles[number]
        assert handle.alive, "the stream was destroyed"
        return handle

    def put(self, number: int, work: Callable[[], None]) -> None:
        """Put work on a stream, or into the graph that is being captured on it."""
        stream = self.stream(number)
        self.capturing.get(number, stream).work.append(work)

    # --- the functions ----------------------------------------------------------------------

    def _module(self) -> types.ModuleType:
        module = types.ModuleType("cuda.bindings.runtime")
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(module, name, self._counted(name, getattr(self, name)))
        for name in (
            "cudaError_t",
            "cudaMemcpyKind",
            "cudaStreamCaptureMode",
            "cudaStreamNonBlocking",
        ):
            setattr(module, name, getattr(real, name))
        return module

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*words: Any) -> Any:
            self.calls.append(name)
            if name in self.fail:
                self.fail[name] -= 1
                if self.fail[name] < 0:
                    if name == "cudaStreamEndCapture":  # a capture that went wrong is over too
                        self.capturing.pop(words[0].number).alive = False
                    return (real.cudaError_t.cudaErrorUnknown, None)
            return function(*words)

        called.__name__ = name
        return called

    def _new(self) -> Handle:
        self._next += 1
        self.handles[self._next] = Handle(self._next)
        return self.handles[self._next]

    def _allocate(self, kept: dict[int, Any], size: int) -> int:
        block = (ctypes.c_uint8 * size)()
        ctypes.memset(block, GARBAGE, size)
        kept[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _used(self) -> int:
        return sum(len(block) for block in self.device.values())

    def cudaGetErrorString(self, error: Any) -> Any:
        return OK, str(error).encode()

    def cudaDriverGetVersion(self) -> Any:
        return OK, self.driver

    def cudaGetDeviceCount(self) -> Any:
        if self.old_driver:
            return real.cudaError_t.cudaErrorInsufficientDriver, None
        if not self.count:
            return real.cudaError_t.cudaErrorNoDevice, None
        return OK, self.count

    def cudaSetDevice(self, device: int) -> Any:
        return (OK,)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return OK, types.SimpleNamespace(
            name=self.name.encode(),
            major=self.major,
            minor=self.minor,
            totalGlobalMem=self.total_bytes,
        )

    def cudaMemGetInfo(self) -> Any:
        return OK, self.total_bytes - self._used(), self.total_bytes

    def cudaMalloc(self, size: int) -> Any:
        if size > self.total_bytes - self._used():
            return real.cudaError_t.cudaErrorMemoryAllocation, None
        return OK, self._allocate(self.device, size)

    def cudaMallocHost(self, size: int) -> Any:
        return OK, self._allocate(self.host, size)

    def cudaFree(self, devPtr: int) -> Any:
        pending = [handle for handle in self.handles.values() if handle.alive and handle.work]
        assert not [h for h in pending if h.number in self._streams()], "freed while in use"
        del self.device[devPtr]
        return (OK,)

    def cudaFreeHost(self, ptr: int) -> Any:
        del self.host[ptr]
        return (OK,)

    def _streams(self) -> set[int]:
        return {number for number, handle in self.handles.items() if hasattr(handle, "is_stream")}

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == real.cudaStreamNonBlocking
        stream = self._new()
        stream.is_stream = True  # type: ignore[attr-defined]
        return OK, stream

    def cudaStreamDestroy(self, stream: Handle) -> Any:
        assert stream.alive
        stream.alive = False
        return (OK,)

    def cudaStreamSynchronize(self, stream: Handle) -> Any:
        assert stream.number not in self.capturing, "waiting ends a capture with an error"
        work, self.stream(stream.number).work = stream.work, []
        for one in work:
            one()
        return (OK,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Handle) -> Any:
        assert kind in (H2D, D2H)
        host, device = (src, dst) if kind == H2D else (dst, src)
        starts = [at for at, block in self.host.items() if at <= host <= at + len(block) - count]
        assert starts, "only pinned host memory is copied without waiting"
        self.view(device, count)

        def copy() -> None:
            self.view(device, count)
            ctypes.memmove(dst, src, count)

        self.put(stream.number, copy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: Handle, mode: Any) -> Any:
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        assert not stream.work
        self.capturing[stream.number] = self._new()
        return (OK,)

    def cudaStreamEndCapture(self, stream: Handle) -> Any:
        return OK, self.capturing.pop(stream.number)

    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Any:
        made = self._new()
        made.work = list(graph.work)
        return OK, made

    def cudaGraphDestroy(self, graph: Handle) -> Any:
        assert graph.alive
        graph.alive = False
        return (OK,)

    def cudaGraphLaunch(self, graphExec: Handle, stream: Handle) -> Any:
        assert graphExec.alive
        for work in graphExec.work:
            self.put(stream.number, work)
        return (OK,)

    def cudaGraphExecDestroy(self, graphExec: Handle) -> Any:
        assert graphExec.alive
        graphExec.alive = False
        return (OK,)
