"""openvino: OpenVINO IR for CPUs; also what sentence-transformers, GenAI and Model Server load.

The standard graph becomes openvino_model.xml and .bin, its products in the forms that the engine's
kernels like (matmul_forms.py); fusing is the engine's own work when it opens them. Q/DQ of
the scheme 'uint8' runs on its int8 kernels. Beside the graph stands the tokenizer as a graph
(tokenizer.py). Knows no other engine.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jexport.errors import DependencyError, UnsupportedGraphError
from jexport.recipe import CompileSpec
from jexport.targets import (
    CompileSupport,
    Int8Support,
    PackageContext,
    Requirements,
    RuntimeSupport,
    Target,
    check_installed,
    check_opset,
)
from jexport.types import Batching, CompiledModel, OnnxModel, Runner, Tensors

GRAPH, WEIGHTS = "openvino_model.xml", "openvino_model.bin"
MAX_OPSET = 23
OLDEST = (2026, 4)
DEVICES = ("auto", "cpu")
CACHED = 256
"""CPU_RUNTIME_CACHE_CAPACITY: compiled kernels of a kind that are kept, 5,000 by default. With that
and 128 lengths, MiniLM in int8 holds 1,055 MiB, with 256 of a kind 722 (make bench-memory)."""

REQUESTS = 4
"""At most so many infer requests of a stream: more callers wait for one."""

ROUNDED = ("int8",)
"""Precisions in which a last bit can become a whole step."""

HINTS = {"bf16": "bf16", "int8": "bf16"}
"""INFERENCE_PRECISION_HINT by precision, else f32.

int8: what is not an int8 product runs in bfloat16 where the CPU can, 1.1 to 1.2 times as fast and
as near to fp32; it is also what every other loader does by itself.
Without it OpenVINO computes in bfloat16 wherever the CPU can: largest difference 0.022 in token
vectors of MiniLM. The IR cannot say it: `runtime_options` in its rt_info is not read for this.
"""


def ready() -> None:
    """Refuse a machine without OpenVINO and its tokenizers, or with too old ones, before any work.

    Raises:
        DependencyError: one is missing, or OpenVINO is older than OLDEST.
    """
    purpose = "building for openvino"
    check_installed(("openvino", "openvino_tokenizers"), extra="openvino", purpose=purpose)
    _check_version()


def _check_version() -> None:
    installed = metadata.version("openvino")
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DependencyError(
            f"OpenVINO {installed} is too old for this artifact",
            evidence=f"tried and working: {oldest} and newer",
            fix=f'pip install "openvino>={oldest}" (the extra jexport[openvino] asks for it)',
        )


def fingerprint() -> dict[str, Any]:
    """Say where it runs: any x86-64 or ARM CPU whose OpenVINO is as new as the oldest tried."""
    return {"openvino": f">={OLDEST[0]}.{OLDEST[1]}", "device": "cpu"}


def check(model: OnnxModel) -> None:
    """Refuse a graph that OpenVINO's own reader does not take.

    Args:
        model: the exported graph.

    Raises:
        UnsupportedGraphError: its opset is too new, or the reader's own words, with the operator.
    """
    check_opset(model, MAX_OPSET, "OpenVINO")
    _read(model)


def _read(model: OnnxModel) -> Any:
    """The graph in memory. Raises UnsupportedGraphError."""
    import openvino

    try:
        return openvino.Core().read_model(str(model.path))
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        # Its message begins with places in its own sources; what is wrong stands after them.
        reason = [line for line in lines if ".cpp:" not in line and not line.startswith("Check '")]
        raise UnsupportedGraphError(
            "OpenVINO cannot read the exported graph",
            evidence="\n".join((reason or lines)[:5]) or repr(error),
            fix="use --target onnx, or report this model with its recipe",
        ) from error


def build(model: OnnxModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
    """Write openvino_model.xml and .bin.

    Args:
        model: the exported graph, which stays as it is.
        spec: has nothing for OpenVINO.
        out_dir: an empty folder.

    Returns:
        The graph; its facts name the properties to open it with, and count what was changed.

    Raises:
        UnsupportedGraphError: OpenVINO cannot read the graph.
    """
    import openvino

    from jexport.targets.openvino import attention, matmul_forms
    from jexport.targets.openvino import names as graph_names

    graph = _read(model)
    given = {name for port in graph.inputs for name in port.names}
    assert given == {spec.name for spec in model.signature.inputs}, given
    whole = attention.whole_vectors(graph) if model.precision in ROUNDED else 0
    forms = matmul_forms.settle(graph)
    graph_names.settle(graph)
    openvino.save_model(graph, str(out_dir / GRAPH), compress_to_fp16=False)
    return CompiledModel(
        target="openvino",
        precision=model.precision,
        folder=out_dir,
        files=(GRAPH, WEIGHTS),
        signature=model.signature,
        facts={
            "opset": model.opset,
            "properties": properties(model.precision),
            "attention_in_whole_vectors": whole,
            **forms,
        },
    )


def properties(precision: str) -> dict[str, str]:
    """What whoever opens the graph should pass to `compile_model`, to get the vectors validated.

    Args:
        precision: of the artifact.

    Returns:
        Properties by name, as OpenVINO spells them.
    """
    return {"INFERENCE_PRECISION_HINT": HINTS.get(precision, "f32")}


def finalize_package(package: PackageContext) -> Mapping[str, Any]:
    """Add the tokenizer as a graph, and the properties where sentence-transformers reads them.

    Args:
        package: has a sentence_bert_config.json, which gets them.

    Returns:
        `tokenizer_graph`: whether it was written, and what was compared.
    """
    from jexport.targets.openvino import tokenizer

    path = package.folder / "sentence_bert_config.json"
    if not path.is_file():  # a static embedding: sentence-transformers reads no graph of one
        return {"tokenizer_graph": tokenizer.write(package)}
    config = json.loads(path.read_text(encoding="utf-8"))
    # `model_args` is the key's old name; sentence-transformers 6 takes both, 3 to 5 only this one.
    config["model_args"] = {"ov_config": properties(package.precision)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"tokenizer_graph": tokenizer.write(package)}


@contextlib.contextmanager
def runner(compiled: CompiledModel, device: str, threads: int) -> Iterator[Runner]:
    """Open it on the CPU; one compiled graph takes every batch size and length.

    Args:
        compiled: what `build` wrote.
        device: 'auto' or 'cpu'.
        threads: 0 for all cores.

    Yields:
        A runner of those outputs of the signature that the graph has, in float32.

    Raises:
        DependencyError: 'cuda' is asked for, or OpenVINO is too old.
        ValueError: another device.
    """
    all_cores_on_one_batch = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    with _opened(compiled, device, threads, all_cores_on_one_batch) as opened:
        yield opened.run


@contextlib.contextmanager
def streams(compiled: CompiledModel, device: str, threads: int) -> Iterator[Sequence[Runner]]:
    """Open it for many batches: as many runners as OpenVINO wants requests.

    Each stream has its own share of the cores, so no operator waits for the slowest of
    all. They share one copy of the weights, which is a second one beside `runner`'s.

    Args:
        compiled: what `build` wrote.
        device: 'auto' or 'cpu'.
        threads: of all streams together; 0 for all cores.

    Yields:
        The runners; none where OpenVINO wants one request.

    Raises:
        DependencyError: 'cuda' is asked for, or OpenVINO is too old.
        ValueError: another device.
    """
    with _opened(compiled, device, threads, {"PERFORMANCE_HINT": "THROUGHPUT"}) as opened:
        yield (opened.run,) * opened.streams if opened.streams > 1 else ()


class _Requests:
    """A compiled graph that any number of threads may run: each call has an infer request alone.

    streams: how many it runs at once.
    """

    def __init__(self, graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.streams = int(graph.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
        self._graph = graph
        self._inputs, self._outputs = inputs, outputs
        self._free: SimpleQueue[Any] = SimpleQueue()
        self._unmade = REQUESTS * self.streams
        self._lock = threading.Lock()

    def run(self, feed: Tensors) -> Tensors:
        """One forward pass, by a request that is free; waits for one where all are in use."""
        request = self._request()
        try:
            given = {name: feed[name] for name in self._inputs}
            request.infer(given, share_inputs=True)
            # The engine writes the request's next answer over this one.
            return {name: _float32(request.get_tensor(name)) for name in self._outputs}
        finally:
            self._free.put(request)

    def _request(self) -> Any:
        with contextlib.suppress(Empty):
            return self._free.get_nowait()
        with self._lock:
            if self._graph is None:
                raise RuntimeError("this runner is closed")
            if self._unmade:
                self._unmade -= 1
                return self._graph.create_infer_request()
        return self._free.get()

    def close(self) -> None:
        """Free the graph and its requests; running it afterwards is a RuntimeError."""
        with self._lock:
            self._graph = None
            self._free = SimpleQueue()


@contextlib.contextmanager
def _opened(
    compiled: CompiledModel, device: str, threads: int, hints: Mapping[str, Any]
) -> Iterator[_Requests]:
    """The graph, compiled with these hints."""
    if device == "cuda":
        raise DependencyError(
            "OpenVINO has no CUDA device",
            evidence="an openvino artifact is validated on the CPU and runs there",
            fix="use --device cpu, or an artifact of the target onnx or trt",
        )
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; openvino knows {', '.join(DEVICES)}")
    _check_version()
    import openvino

    core = openvino.Core()
    config: dict[str, Any] = {
        **properties(compiled.precision),
        **hints,
        "CPU_RUNTIME_CACHE_CAPACITY": CACHED,
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    graph = core.compile_model(_prepared(core, compiled), "CPU", config)
    given = {name for port in graph.outputs for name in port.names}
    outputs = [spec.name for spec in compiled.signature.outputs if spec.name in given]
    names = [spec.name for spec in compiled.signature.inputs]
    requests = _Requests(graph, names, outputs)
    del graph, core
    try:
        yield requests
    finally:
        requests.close()


def _prepared(core: Any, compiled: CompiledModel) -> Any:
    """The graph as `compile_model` takes it: a path, or read and with token vectors in bfloat16.

    What lies between the last product and a float32 output stays float32; with residual sums that
    is every sum and LayerNormalization, each turned into bfloat16 for the product behind it. In an
    int8 graph that takes 6 % and brings nothing that rounding leaves.
    """
    path = str(compiled.folder / compiled.files[0])
    half = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if compiled.precision not in ROUNDED or not half:
        return path
    from openvino import Type, preprocess

    graph = core.read_model(path)
    changed = preprocess.PrePostProcessor(graph)
    for number, port in enumerate(graph.outputs):
        if len(port.get_partial_shape()) == 3:
            changed.output(number).tensor().set_element_type(Type.bf16)
    return changed.build()


def _float32(tensor: Any) -> NDArray[np.float32]:
    """A copy of a tensor that is float32, or bfloat16: its bits are the upper half of float32's."""
    if tensor.element_type.get_type_name() != "bf16":
        return np.array(tensor.data, np.float32)
    upper = tensor.data.view(np.uint16)  # numpy has no bfloat16
    bits = np.empty(upper.shape, np.uint32)
    np.left_shift(upper, np.uint32(16), out=bits, dtype=np.uint32)
    return bits.view(np.float32)


def batching(compiled: CompiledModel, device: str) -> Batching:
    """Few shapes, filled up to the usual 1,024 tokens.

    OpenVINO keeps 5 MiB of code for every number of tokens, rows x length, that MiniLM in int8 has
    seen, 0.3 MiB for another shape of the same number, and 0.7 MiB in fp32.

    Args:
        compiled: any.
        device: any.

    Returns:
        The same for all.
    """
    return Batching(few_shapes="always")


def version() -> str:
    """The installed OpenVINO, else ''."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"openvino {metadata.version('openvino')}"
    return ""


TARGET = Target(
    name="openvino",
    summary="OpenVINO on CPUs; also what sentence-transformers, OpenVINO GenAI, Model Server load",
    precisions=("fp32", "fp16", "bf16", "int8"),
    devices=("cpu",),
    requirements=Requirements(
        build=("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        run=("openvino", "tokenizers", "numpy"),
        extra="openvino",
    ),
    fingerprint=fingerprint,
    check=check,
    build=build,
    runner=runner,
    ready=ready,
    int8=Int8Support(scheme="uint8", fallback="int8x2"),
    compiling=CompileSupport(graph_precisions={"bf16": "fp32"}),
    runtime=RuntimeSupport(streams=streams, batching=batching),
    finalize_package=finalize_package,
)
