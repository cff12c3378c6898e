"""onnx: a graph for ONNX Runtime on CPU and CUDA, with onnxruntime's own fused operators.

The standard graph comes from `export`; here it gets flash attention, rotary and bias-gelu nodes
(graph/ort_fusion.py), pools (graph/pooled_output.py), is checked and can be run
(session.py). Knows no other engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from importlib import metadata
from pathlib import Path
from typing import Any

from jexport.errors import UnsupportedGraphError
from jexport.graph.diagnostics import merge_by_kind, raise_for_errors
from jexport.recipe import CompileSpec
from jexport.targets import (
    CompileSupport,
    Int8Support,
    Requirements,
    RuntimeSupport,
    Target,
    check_opset,
)
from jexport.targets.onnx import cuda, devices, session
from jexport.types import CompiledModel, OnnxModel, Runner, Signature, TensorSpec

MAX_OPSET = 23
GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"


def fingerprint() -> dict[str, Any]:
    """Say where it runs: any machine whose onnxruntime is as new as the oldest that was tried."""
    return {"onnxruntime": ">=1.27", "device": "any"}


def check(model: OnnxModel) -> None:
    """Refuse a graph that is not valid standard ONNX, or newer than onnxruntime reads.

    Args:
        model: the exported graph.

    Raises:
        UnsupportedGraphError: says what is wrong: the opset, the weights' file, the graph, a node.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    check_opset(model, MAX_OPSET, "onnxruntime")
    _check_weights(model.path)  # first: the checker opens what a graph names
    try:
        onnx.checker.check_model(str(model.path))
        graph = onnx.load(str(model.path), load_external_data=False).graph
    except (onnx.checker.ValidationError, DecodeError, OSError, ValueError, RuntimeError) as error:
        # ValueError: a name that is not UTF-8, which it cannot even say. RuntimeError: of C++.
        raise UnsupportedGraphError(
            "the exported graph is not valid ONNX",
            evidence=next(iter(str(error).strip().splitlines()), repr(error)),
            fix="report this model with its recipe",
        ) from error
    strange = [node for node in graph.node if node.domain not in ("", "ai.onnx")]
    if strange:
        raise UnsupportedGraphError(
            f"onnxruntime may not have operator {strange[0].domain}.{strange[0].op_type} "
            f"(node {strange[0].name})",
            evidence=f"{len(strange)} of {len(graph.node)} nodes are not standard ONNX",
            fix="export the model without its own operators, or report it",
        )


def _check_weights(path: Path) -> None:
    """Refuse weights that are not inside one plain file: the checker takes any offset and length.

    Raises UnsupportedGraphError.
    """
    from jexport.graph.lint import onnx_reader, weights

    raise_for_errors(merge_by_kind(weights.check(onnx_reader.read(path))))


def build(model: OnnxModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
    """Write model.onnx and model.onnx_data: pooled where that is wanted, and fused.

    Args:
        model: the exported graph, which stays as it is.
        spec: `fuse` and `skip_layer_norm`, or with `cuda` the steps for a graph for CUDA alone.
        out_dir: an empty folder.

    Returns:
        The graph with counts of its operators, and of what was fused, among the facts.

    Raises:
        UnsupportedGraphError: no step of spec.cuda finds anything.
    """
    import onnx_ir as ir

    from jexport.graph import cuda_ready, ort_fusion, pooled_output, storage, tidy

    graph = ir.load(model.path)
    signature = model.signature
    if model.pooling and pooled_output.append(graph, model.pooling, normalize=model.normalize):
        signature = _with_pooled(signature)
    cuda_ready.rewrite(graph)
    facts: dict[str, Any] = {"fused": {}}
    if spec.cuda:
        facts = cuda.rewrite(graph, spec, model.max_tokens)
    elif spec.fuse:
        facts["fused"] = ort_fusion.fuse(
            graph, skip_layer_norm=spec.skip_layer_norm, max_tokens=model.max_tokens
        )
    storage.save(graph, out_dir / GRAPH)
    operators = tidy.operators(graph)
    return CompiledModel(
        target="onnx",
        precision=model.precision,
        folder=out_dir,
        files=(GRAPH, WEIGHTS),
        signature=signature,
        facts={
            "opset": model.opset,
            "max_tokens": model.max_tokens,
            **facts,
            "operators": operators,
        },
    )


def _with_pooled(signature: Signature) -> Signature:
    """The signature with one vector a text behind the token vectors: the first output stays."""
    hidden = next(spec for spec in signature.outputs if spec.name == "last_hidden_state")
    shape = (hidden.shape[0], hidden.shape[2])
    pooled = TensorSpec(name="sentence_embedding", dtype=hidden.dtype, shape=shape)
    return dataclasses.replace(signature, outputs=(*signature.outputs, pooled))


def runner(
    compiled: CompiledModel, device: str, threads: int
) -> contextlib.AbstractContextManager[Runner]:
    """Open a session.

    Args:
        compiled: what `build` wrote.
        device: 'auto' (CUDA when it starts), 'cpu', 'cuda' or 'cuda:1'.
        threads: 0 for all cores.

    Returns:
        A context with a runner of those outputs of the signature that the graph has.

    Raises:
        DependencyError: 'cuda' is asked for and there is no CUDA provider, or it cannot start here.
        UnsupportedGraphError: the graph cannot run there.
        DeviceError: 'cpu' is asked for and the artifact is made for CUDA alone.
        DeviceMemoryError: the device's memory is full.
        ValueError: another device.
    """
    return session.opened(compiled, device, threads)


def cuda_graph_runner(
    compiled: CompiledModel, device: str, threads: int
) -> contextlib.AbstractContextManager[Runner]:
    """The same on a GPU, with small batches replayed as CUDA graphs.

    Args:
        compiled: what `build` wrote.
        device: 'auto', 'cuda' or 'cuda:1'; no CPU stands in for them.
        threads: 0 for all cores.

    Returns:
        A context with the runner.

    Raises:
        UnsupportedGraphError: it cannot be captured, or has nodes without a CUDA kernel.
        DeviceError: 'cpu' is asked for.
        DependencyError: there is no CUDA provider, or it cannot start here.
    """
    return session.opened(compiled, device, threads, cuda_graphs=True)


def version() -> str:
    """The installed onnxruntime, CPU or GPU build, else ''."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return ""


def variant(spec: CompileSpec) -> Target:
    """The target as [compile] wants it.

    Args:
        spec: the settings.

    Returns:
        With `cuda` a target that is built, validated and run on CUDA alone, else TARGET.
    """
    if not spec.cuda:
        return TARGET
    return dataclasses.replace(
        TARGET,
        summary="ONNX Runtime on CUDA alone",
        precisions=cuda.PRECISIONS,
        devices=("cuda",),
        ready=cuda.ready,
        fingerprint=lambda: {**fingerprint(), "device": "cuda"},
    )


TARGET = Target(
    name="onnx",
    summary="ONNX Runtime on CPU and CUDA; also what sentence-transformers, TEI, Infinity load",
    precisions=("fp32", "fp16", "tf32", "int8", "int8-weights"),
    devices=("cpu", "cuda"),
    requirements=Requirements(
        build=("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        run=("onnxruntime", "tokenizers", "numpy"),
        extra="onnx",
    ),
    fingerprint=fingerprint,
    check=check,
    build=build,
    runner=runner,
    # A float MatMul costs eight times an int8 one, two int8 terms twice (DECISIONS.md).
    int8=Int8Support(scheme="uint8", fallback="int8x2"),
    compiling=CompileSupport(graph_precisions={"tf32": "fp32"}, variant=variant),
    runtime=RuntimeSupport(cuda_graphs=cuda_graph_runner, batching=devices.batching),
)
