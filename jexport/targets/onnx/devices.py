"""Where an onnx artifact runs: the device that was asked for, its memory, the provider's options.

Facts of onnxruntime's CUDA provider are from its documentation (execution-providers/CUDA) and were
held against the option names in the library of 1.30.0. Nothing here needs a GPU to be imported.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.graph import cuda_kernels
from jexport.types import Batching, CompiledModel

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DEVICES = "'auto', 'cpu', 'cuda', 'cuda:1' and so on"

ARENA_SHARE = 0.9
"""Share of the free memory that the provider's arena may take: weights and activations. The rest is
for what it allocates outside of the arena: the CUDA context's kernels, cuBLAS, cuDNN."""

LARGEST_BATCH, SMALLEST_BATCH = 65_536, 1024
"""Padded tokens of a pass on a GPU. An H200 took 0.52 of the time with 65,536 that it took with
1,024; a pass of MiniLM's shape has no use for more."""

UNKNOWN_BATCH = 16_384
"""The same where the driver does not say what is free."""

LENGTH_MULTIPLE = 16
"""Lengths are rounded up to it where padding costs no other kernel, so that shapes repeat."""

FULL = re.compile(
    r"Failed to allocate memory|out of memory|OUT_OF_MEMORY|cudaErrorMemoryAllocation"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|BFCArena|Available memory of",
    re.IGNORECASE,
)
"""What onnxruntime's errors say when memory is full: its arena, CUDA, cuBLAS, cuDNN."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as it was asked for.

    Args:
        kind: 'auto', 'cpu' or 'cuda'.
        index: which GPU.
    """

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return f"cuda:{self.index}" if self.kind == "cuda" and self.index else self.kind


def parse(text: str) -> Device:
    """Read a device.

    Args:
        text: 'auto', 'cpu', 'cuda' or 'cuda:1'.

    Returns:
        The device; its index is 0 where none is named.

    Raises:
        ValueError: another text.
    """
    match = re.fullmatch(r"cuda:(\d{1,3})", text)
    if match:
        return Device(kind="cuda", index=int(match[1]))
    if text not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {text!r}; onnx knows {DEVICES}")
    return Device(kind=text)


def without_kernel(compiled: CompiledModel) -> list[str]:
    """What would not run on a GPU.

    Args:
        compiled: the artifact's graph.

    Returns:
        Its operators that onnxruntime has no CUDA kernel for.
    """
    return cuda_kernels.without_kernel(list(compiled.facts.get("operators", ())))


def capturable(compiled: CompiledModel) -> bool:
    """Whether the graph can be captured as a CUDA graph: no branch, and no node on the CPU.

    RemovePadding waits for the host to learn how many tokens there are.

    Args:
        compiled: told by its facts; False without `operators`.

    Returns:
        True where it can.
    """
    operators = compiled.facts.get("operators", {"If": 1})
    waits = {"If", "com.microsoft.RemovePadding"} & set(operators)
    return not waits and not without_kernel(compiled)


def provider_options(
    compiled: CompiledModel, index: int, free_bytes: int | None, *, cuda_graphs: bool
) -> dict[str, str]:
    """What the CUDA provider is told.

    use_tf32 is on by default there, which is not float32: the factors of a MatMul are rounded to 10
    bits. kSameAsRequested: doubling, the default, would take twice what a long batch needs.

    Args:
        compiled: its facts may have options of their own, which come last.
        index: which GPU.
        free_bytes: on it; None where that is not known, which leaves the arena without a limit.
        cuda_graphs: whether passes are captured.

    Returns:
        Options by name, as texts.
    """
    options = {
        "device_id": str(index),
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "1" if compiled.precision == "tf32" else "0",
    }
    if free_bytes is not None:
        options["gpu_mem_limit"] = str(int(free_bytes * ARENA_SHARE))
    if cuda_graphs:
        options["enable_cuda_graph"] = "1"
    # What an artifact that is made for CUDA alone needs to be run with.
    options.update(compiled.facts.get("cuda", {}).get("provider_options", {}))
    return options


def batching(compiled: CompiledModel, device: str) -> Batching:
    """How many tokens a pass takes there, by what is free on a GPU; two passes in flight on one.

    Asked once the session is open: its weights are not free any more.

    A graph that branches on padding keeps lengths as they are: a text without padding runs the
    faster branch.

    Args:
        compiled: its width, precision, longest text and operators decide.
        device: where it really runs: 'cpu', 'cuda', 'cuda:1'.

    Returns:
        The default on a CPU.
    """
    chosen = parse(device)
    if chosen.kind != "cuda":
        return Batching()
    free = free_memory(chosen.index)
    return Batching(
        tokens=UNKNOWN_BATCH if free is None else batch_tokens(compiled, free),
        length_multiple=LENGTH_MULTIPLE if capturable(compiled) else 1,
        in_flight=2,
        pooled=True,
    )


def batch_tokens(compiled: CompiledModel, free_bytes: int) -> int:
    """Padded tokens of one pass that fit, as a power of two; two passes may be in flight.

    A token's activations are about 12 rows of the model's width at once (the two MLP ones are four
    wide), and its row of attention's scores and weights in every head of 64, as long as the longest
    text: the kernel that takes a padding mask writes them out; those that take lengths do not.

    Args:
        compiled: the artifact's graph.
        free_bytes: on the GPU.

    Returns:
        SMALLEST_BATCH to LARGEST_BATCH.
    """
    width = next(spec.shape[-1] for spec in compiled.signature.outputs)
    assert isinstance(width, int), width
    size = 2 if compiled.precision == "fp16" else 4
    longest = int(compiled.facts.get("max_tokens", 8192))
    steps = compiled.facts.get("cuda", {}).get("steps", {})
    lengths = steps.get("packed_attention") or steps.get("efficient_attention")
    scores = 0 if lengths else 2 * max(1, width // 64) * longest
    per_token = size * (12 * width + scores)
    fit = int(free_bytes * ARENA_SHARE / (2 * per_token))
    power = 1 << max(0, fit.bit_length() - 1)
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, power))


# --- the driver ---------------------------------------------------------------------------------


def free_memory(index: int) -> int | None:
    """How much is free on a GPU now.

    Through the driver's library alone, which is wherever a GPU can be used. The primary context is
    the one that onnxruntime computes in.

    Args:
        index: which GPU.

    Returns:
        Bytes; None where the driver does not say.
    """
    driver = _driver()
    if driver is None:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return None if failed else int(free.value)
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _driver() -> Any:
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def why_not(index: int) -> str:
    """What keeps the CUDA provider from starting, as far as can be told.

    Args:
        index: which GPU was asked for.

    Returns:
        A line of evidence.
    """
    driver = _driver()
    if driver is None:
        return "there is no NVIDIA driver: libcuda.so.1 cannot be loaded"
    count = ctypes.c_int()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        return f"the NVIDIA driver does not start (CUDA error {code})"
    if index >= count.value:
        return f"there are {count.value} GPUs, numbered from 0; number {index} was asked for"
    return _missing_library() or "its libraries load; onnxruntime's own log says more"


def _missing_library() -> str:
    """What the provider's library says that it cannot load, or ''."""
    import onnxruntime

    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libonnxruntime_providers_cuda.so"))
    except OSError as error:
        return str(error)
    return ""
