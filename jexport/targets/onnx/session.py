"""Opens an onnx artifact in onnxruntime, and runs batches through it.

On the CPU a batch is `InferenceSession.run`. On a GPU it is bound: ids are copied there, and of all
that the graph gives only what was asked for comes back. With `cuda_graphs` batches of few tokens
are replayed as CUDA graphs (capture.py). The same code runs bound on the CPU, for the tests.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jexport.errors import (
    DependencyError,
    DeviceError,
    DeviceMemoryError,
    JexportError,
    UnsupportedGraphError,
)
from jexport.targets.onnx import devices as devices
from jexport.targets.onnx.devices import CPU, CUDA, Device
from jexport.types import CompiledModel, Runner, Tensors


class Forward(Protocol):
    """One pass: the named outputs, as arrays of their own, for these inputs."""

    def __call__(self, outputs: Sequence[str], feed: Tensors, /) -> list[np.ndarray]:
        """Run the session once."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a session is opened with.

    Args:
        device: 'cpu' or 'cuda', never 'auto'.
        threads: 0 for all cores.
        bound: by I/O binding; always on a GPU.
        cuda_graphs: batches of few tokens are captured.
    """

    device: Device
    threads: int
    bound: bool = False
    cuda_graphs: bool = False


class SessionRunner:
    """A `types.Runner` of one session. May be called from several threads at once.

    device: where it really runs, as `target.runner` takes it: 'cpu', 'cuda', 'cuda:1'.
    """

    def __init__(self, forward: Forward, outputs: Sequence[str], device: str) -> None:
        self.outputs = tuple(outputs)
        self.device = device
        self._forward: Forward | None = forward

    def __call__(self, feed: Tensors) -> Tensors:
        """Run one batch; inputs and outputs by name."""
        return self._run(self.outputs, feed)

    def only(self, outputs: Sequence[str]) -> Runner:
        """A runner of these outputs alone: no other is copied to the host.

        It is computed all the same: onnxruntime 1.32 runs every node, whatever
        RunOptions.only_execute_path_to_fetches says (that is for its training builds).

        Args:
            outputs: names; one that this runner lacks is left out.

        Returns:
            The runner, good until `close`.
        """
        chosen = tuple(name for name in self.outputs if name in outputs)
        return lambda feed: self._run(chosen, feed)

    def _run(self, outputs: tuple[str, ...], feed: Tensors) -> Tensors:
        if self._forward is None:
            raise RuntimeError("this runner is closed")
        with memory_errors(self.device):
            return dict(zip(outputs, self._forward(outputs, feed), strict=True))

    def close(self) -> None:
        """Let go of the session; calling it afterwards is a RuntimeError."""
        self._forward = None


@contextlib.contextmanager
def memory_errors(device: str) -> Iterator[None]:
    """Turn onnxruntime's errors of a full memory into one of ours; all others pass.

    Args:
        device: for the message.

    Yields:
        Nothing.

    Raises:
        DeviceMemoryError: the device's memory is full.
    """
    try:
        yield
    except JexportError:
        raise
    except Exception as error:
        # What a bound pass raises is a RuntimeError, of an unbound one a class of onnxruntime's.
        theirs = type(error) is RuntimeError or type(error).__module__.startswith("onnxruntime")
        if not theirs or not devices.FULL.search(str(error)):
            raise
        raise DeviceMemoryError(
            f"onnxruntime: the memory of '{device}' is full",
            evidence=next(iter(str(error).strip().splitlines()), repr(error))[-300:],
            fix="use smaller batches (max_batch_tokens, --batch-tokens), or free memory there",
        ) from error


@contextlib.contextmanager
def opened(
    compiled: CompiledModel, device: str, threads: int, *, cuda_graphs: bool = False
) -> Iterator[SessionRunner]:
    """Open a session on a device.

    'auto' takes the first GPU when this onnxruntime has a CUDA provider that starts, and warns when
    it has one that does not.

    Args:
        compiled: what the target wrote.
        device: 'auto', 'cpu', 'cuda' or 'cuda:1'.
        threads: 0 for all cores.
        cuda_graphs: replay small batches as CUDA graphs; then on a GPU alone.

    Yields:
        A runner, closed at the end.

    Raises:
        DependencyError: a GPU is needed, and there is no CUDA provider or it does not start.
        UnsupportedGraphError: the graph cannot run there.
        DeviceError: the CPU is asked for, and what is wanted runs on a GPU alone.
        DeviceMemoryError: the device's memory is full.
        ValueError: another device.
    """
    asked = devices.parse(device)
    chosen = _chosen(compiled, asked, cuda_graphs=cuda_graphs)
    try:
        runner = _open(compiled, Choice(device=chosen, threads=threads, cuda_graphs=cuda_graphs))
    except DependencyError as error:
        if asked.kind != "auto" or cuda_graphs or "cuda" in compiled.facts:
            raise
        _say(f"{error.what}: it runs on the CPU ({error.evidence})")
        runner = _open(compiled, Choice(device=Device(kind="cpu"), threads=threads))
    try:
        yield runner
    finally:
        runner.close()


def _chosen(compiled: CompiledModel, asked: Device, *, cuda_graphs: bool) -> Device:
    """The device to try. Raises as `opened`."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    for_cuda = "cuda" in compiled.facts or cuda_graphs
    if asked.kind == "cpu" and for_cuda:
        raise DeviceError(
            "this artifact was made for CUDA alone"
            if "cuda" in compiled.facts
            else "CUDA graphs are of a GPU",
            evidence="the device 'cpu' was asked for",
            fix="use --device cuda, or an artifact that was built without compile.cuda"
            if "cuda" in compiled.facts
            else "leave cuda_graphs away",
        )
    if asked.kind == "cpu" or (asked.kind == "auto" and not for_cuda and CUDA not in available):
        return Device(kind="cpu")
    if CUDA not in available:
        raise DependencyError(
            "this onnxruntime has no CUDA provider",
            evidence=f"onnxruntime {onnxruntime.__version__} has: {', '.join(available)}",
            fix='pip uninstall onnxruntime; pip install "jexport[gpu]"',
        )
    absent = devices.without_kernel(compiled)
    if absent and asked.kind == "auto" and not for_cuda:
        _say(f"the GPU is not used: onnxruntime has no CUDA kernel of {', '.join(absent)}")
        return Device(kind="cpu")
    if absent:
        raise UnsupportedGraphError(
            "this artifact's products would not run on the GPU",
            evidence=f"onnxruntime has no CUDA kernel of {', '.join(absent)}",
            fix="use an fp16 artifact there, or --device cpu",
        )
    if cuda_graphs and not devices.capturable(compiled):
        raise UnsupportedGraphError(
            "this graph cannot be captured as a CUDA graph",
            evidence="it chooses between two branches of attention by what is padded (If)",
            fix="build it with compile.cuda, or with load.max_tokens = 512 or less; or leave "
            "cuda_graphs away",
        )
    return Device(kind="cuda", index=asked.index)


def _say(text: str) -> None:
    warnings.warn(f"onnxruntime: {text}", RuntimeWarning, stacklevel=2)


def _open(compiled: CompiledModel, choice: Choice) -> SessionRunner:
    """A runner on that device. Raises DependencyError where the provider does not start."""
    with memory_errors(str(choice.device)):
        session = _session(compiled, choice)
    if choice.device.kind == "cuda" and CUDA not in session.get_providers():
        raise _does_not_start(choice.device.index)
    given = {value.name for value in session.get_outputs()}
    outputs = [spec.name for spec in compiled.signature.outputs if spec.name in given]
    inputs = [spec.name for spec in compiled.signature.inputs]
    return SessionRunner(_forward(session, inputs, choice, compiled), outputs, str(choice.device))


def _forward(
    session: Any, inputs: Sequence[str], choice: Choice, compiled: CompiledModel
) -> Forward:
    if choice.device.kind == "cpu" and not choice.bound and not choice.cuda_graphs:
        return _plain(session, inputs)
    if not choice.cuda_graphs:
        return _bound(session, inputs)
    from jexport.targets.onnx import capture

    skip = capture.graph_options(capture.SKIP)
    bound = _bound(session, inputs, skip)
    return capture.Captured(session, bound, compiled.signature, choice.device).run


def _does_not_start(index: int, error: Exception | None = None) -> DependencyError:
    text = next(iter(str(error).strip().splitlines()), "") if error is not None else ""
    return DependencyError(
        "onnxruntime's CUDA provider does not start here",
        evidence=f"{devices.why_not(index)}\n{text[-300:]}".strip(),
        fix="install the CUDA and cuDNN that this onnxruntime-gpu names, or use the CPU",
    )


def _session(compiled: CompiledModel, choice: Choice) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = choice.threads
    options.log_severity_level = 3
    # Lengths vary from batch to batch: a pattern planned for one shape only holds memory.
    options.enable_mem_pattern = False
    path = str(compiled.folder / compiled.files[0])
    if choice.device.kind == "cpu":
        # There onnxruntime would fuse residual sums into a slower kernel by itself (CompileSpec).
        return onnxruntime.InferenceSession(
            path, options, providers=[CPU], disabled_optimizers=["SkipLayerNormFusion"]
        )
    index = choice.device.index
    preload(onnxruntime)
    provider_options = devices.provider_options(
        compiled, index, devices.free_memory(index), cuda_graphs=choice.cuda_graphs
    )
    try:
        # enable_fallback=0: else a session that cannot start is opened on the CPU with a print.
        return onnxruntime.InferenceSession(
            path, options, providers=[(CUDA, provider_options), CPU], enable_fallback=0
        )
    except Exception as error:
        if devices.FULL.search(str(error)) or not _is_of_cuda(error):
            raise
        raise _does_not_start(index, error) from error


def _is_of_cuda(error: Exception) -> bool:
    return any(word in str(error) for word in ("CUDA", "cuda", "cudnn", "CUDNN", "cublas"))


def preload(onnxruntime: Any) -> None:
    """Load CUDA and cuDNN from the wheels that pip installed, where there are any.

    Args:
        onnxruntime: the module; an old one has no such function, and nothing is loaded.
    """
    load = getattr(onnxruntime, "preload_dlls", None)
    if load is not None:
        with contextlib.redirect_stdout(None):  # it prints what it does not find
            load()


# --- one pass -----------------------------------------------------------------------------------


def _plain(session: Any, inputs: Sequence[str]) -> Forward:
    def run(outputs: Sequence[str], feed: Tensors) -> list[np.ndarray]:
        given = {name: feed[name] for name in inputs}
        arrays: list[np.ndarray] = session.run(list(outputs), given)
        return arrays

    return run


def _bound(session: Any, inputs: Sequence[str], options: Any = None) -> Forward:
    """By I/O binding: inputs from host memory, outputs into it, each call with its own.

    options: RunOptions of every pass.
    """

    def run(outputs: Sequence[str], feed: Tensors) -> list[np.ndarray]:
        binding = session.io_binding()
        held = [np.ascontiguousarray(feed[name]) for name in inputs]  # read until the pass is done
        for name, array in zip(inputs, held, strict=True):
            binding.bind_cpu_input(name, array)
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        return [np.asarray(value) for value in binding.copy_outputs_to_cpu()]

    return run
