"""onnx: a graph for ONNX Runtime on CPU and CUDA, with onnxruntime's own fused operators.

The standard graph comes from `export`; here it gets flash attention, rotary, skip-layer-norm and
bias-gelu nodes (graph/ort_fusion.py), is checked and can be run. Knows no other engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from jexport.errors import DependencyError, UnsupportedGraphError
from jexport.flow import CompiledModel, OnnxModel, Runner, Tensors
from jexport.recipe import CompileSpec
from jexport.targets import Target

MAX_OPSET = 23
GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"


def fingerprint() -> dict[str, Any]:
    """An ONNX graph runs wherever onnxruntime has its operators: any machine, 1.19 or newer."""
    return {"onnxruntime": ">=1.19", "device": "any"}


def check(model: OnnxModel) -> None:
    """Refuse a graph that is not valid ONNX or newer than onnxruntime reads."""
    import onnx

    if model.opset > MAX_OPSET:
        raise UnsupportedGraphError(
            f"onnxruntime does not take opset {model.opset}",
            evidence=f"supported up to {MAX_OPSET}",
            fix=f"set export.opset to {MAX_OPSET} or less",
        )
    try:
        onnx.checker.check_model(str(model.path))
    except onnx.checker.ValidationError as error:
        raise UnsupportedGraphError(
            "the exported graph is not valid ONNX",
            evidence=str(error).splitlines()[0],
            fix="report this model with its recipe",
        ) from error


def build(model: OnnxModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
    """Fuse (unless spec.fuse is false), write out_dir/model.onnx and model.onnx_data."""
    import onnx_ir as ir

    from jexport.graph import ort_fusion, storage, tidy

    graph = ir.load(model.path)
    fused = ort_fusion.fuse(graph) if spec.fuse else {}
    storage.save(graph, out_dir / GRAPH)
    operators = tidy.operators(graph)
    return CompiledModel(
        target="onnx",
        precision=model.precision,
        folder=out_dir,
        files=(GRAPH, WEIGHTS),
        signature=model.signature,
        facts={"opset": model.opset, "fused": fused, "operators": operators},
    )


@contextlib.contextmanager
def runner(compiled: CompiledModel, device: str, threads: int) -> Iterator[Runner]:
    """Open a session. device: 'auto' (CUDA when there), 'cpu' or 'cuda'. threads: 0 for all cores.

    Raises DependencyError when 'cuda' is asked for and this onnxruntime has no CUDA provider.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    cuda = "CUDAExecutionProvider"
    if device == "cuda" and cuda not in available:
        raise DependencyError(
            "this onnxruntime has no CUDA provider",
            evidence=f"onnxruntime {onnxruntime.__version__} has: {', '.join(available)}",
            fix='pip uninstall onnxruntime; pip install "jexport[gpu]"',
        )
    providers = ["CPUExecutionProvider"]
    if cuda in available and device in ("auto", "cuda"):
        providers.insert(0, cuda)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Lengths vary from batch to batch: a pattern planned for one shape only holds memory.
    options.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(
        str(compiled.folder / compiled.files[0]), options, providers=providers
    )
    outputs = [spec.name for spec in compiled.signature.outputs]
    names = {spec.name for spec in compiled.signature.inputs}

    def run(feed: Tensors) -> Tensors:
        values = session.run(outputs, {name: feed[name] for name in names})
        return dict(zip(outputs, values, strict=True))

    yield run
    del session


def version() -> str:
    """The installed onnxruntime, CPU or GPU build, else ''."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return ""


TARGET = Target(
    name="onnx",
    summary="ONNX Runtime on CPU and CUDA; also what sentence-transformers, TEI, Infinity load",
    precisions=("fp32", "fp16"),
    scheme="uint8-activations-int8-weights",
    needs_onnx=True,
    build_needs=("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    run_needs=("onnxruntime", "tokenizers", "numpy"),
    extra="onnx",
    fingerprint=fingerprint,
    check=check,
    build=build,
    runner=runner,
)
