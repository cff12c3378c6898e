"""trt: TensorRT engines for NVIDIA GPUs, 11 and 10, with optimization profiles.

What is checked and built is in the modules of this package; here it becomes a target. Knows no
other engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jexport import targets
from jexport.artifacts import manifest
from jexport.errors import DeviceError, EngineError
from jexport.graph.diagnostics import Diagnostic, raise_for_errors
from jexport.recipe import CompileSpec
from jexport.targets import (
    CompileSupport,
    Int8Support,
    Requirements,
    RuntimeSupport,
    Target,
    check_opset,
)
from jexport.types import CompiledModel, OnnxModel, Runner, Tensors

if TYPE_CHECKING:
    from jexport.targets.trt.profiles import Profile

PLAN, STRIPPED = "model.plan", "model.stripped.plan"
GRAPH, WEIGHTS = "model.onnx", "model.onnx_data"
MAX_OPSET = 25
"""TensorRT 11's ONNX parser reads opsets up to 25 (engine notes; 10.x stops earlier)."""

DEVICES = ("auto", "cuda")


def ready() -> None:
    """Refuse a machine that cannot build an engine; each error says the way out.

    Raises:
        DependencyError: no Polygraphy, or no TensorRT that fits.
        DeviceError: no driver or GPU, or one too old.
    """
    from jexport.targets.trt import device

    device.check_installed("polygraphy")
    device.machine()


def fingerprint() -> dict[str, Any]:
    """Say where it runs: the GPU, TensorRT and system of this machine, as far as they are there."""
    from jexport.targets.trt import device

    return dict(device.fingerprint())


def profiles_for(spec: CompileSpec, lengths: Sequence[int], max_tokens: int) -> CompileSpec:
    """Profiles for texts of these lengths.

    Args:
        spec: settings, whose own profiles are replaced.
        lengths: of sample texts, in tokens.
        max_tokens: of the model, and the end of the last profile.

    Returns:
        The settings with the profiles.

    Raises:
        ProfileError: no length is above 0.
    """
    from jexport.targets.trt import profiles

    chosen = profiles.choose(lengths, max_tokens=max_tokens)
    return replace(spec, profiles=profiles.specs(chosen))


def accept(spec: CompileSpec, max_tokens: int) -> None:
    """Refuse profiles that contradict themselves or the model.

    Args:
        spec: the settings.
        max_tokens: of the model.

    Raises:
        ProfileError: says which profile, and why.
    """
    from jexport.targets.trt import profiles

    profiles.read(spec.profiles, max_tokens=max_tokens)


def check(model: OnnxModel) -> None:
    """Refuse what TensorRT cannot take; needs no GPU.

    Args:
        model: the exported graph.

    Raises:
        UnsupportedGraphError: names the opset or the operators.
    """
    check_opset(model, MAX_OPSET, "TensorRT")
    raise_for_errors(lint_graph(model.path, model.max_tokens))


def lint_graph(path: Path, max_tokens: int | None) -> Sequence[Diagnostic]:
    """Everything that TensorRT would not take; needs neither it nor a GPU.

    Args:
        path: of an ONNX file.
        max_tokens: the longest text to come; None where that is not known.

    Returns:
        As `lint.lint`, profiles left aside.

    Raises:
        UnsupportedGraphError: the file is not an ONNX graph.
    """
    # Not named `lint`: importing the module of that name below would take its place.
    from jexport.targets.trt.lint import lint as read

    return read(path, max_tokens=max_tokens)


def build(model: OnnxModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
    """Build out_dir/model.plan on this machine's GPU; it is asked for before any work.

    With spec.weight_stripped also model.stripped.plan, which takes the weights of other tasks: with
    spec.refit_from nothing is built, and the plan is that artifact's with this graph's weights.

    Returns:
        The plan; its facts say what it was built with and for.
    """
    from jexport.targets.trt import building, device, engine_info, memory, profiles

    ready()
    machine = device.machine()
    if spec.refit_from:
        return _refitted(model, Path(spec.refit_from), out_dir)
    ranges = profiles.read(spec.profiles, max_tokens=model.max_tokens)
    raise_for_errors(lint_at(model.path, ranges, model.max_tokens))
    need = memory.predict(model.path, ranges)
    device.check_memory(need.total_bytes, what=str(need))
    options = building.Options(
        hardware_compatible=spec.hardware_compatible,
        version_compatible=spec.version_compatible,
        workspace_bytes=int(spec.workspace_gib * 2**30),
        timings=Path(spec.timing_cache) if spec.timing_cache else None,
        weight_stripped=spec.weight_stripped,
    )
    built = building.build(model.path, model.signature, ranges, options, machine)
    plan, files = built.plan, [PLAN]
    if spec.weight_stripped:
        (out_dir / STRIPPED).write_bytes(plan)
        files.append(STRIPPED)
        plan = building.refit(plan, model.path, version_compatible=spec.version_compatible)
    (out_dir / PLAN).write_bytes(plan)
    info = engine_info.EngineInfo(
        tensorrt=machine.tensorrt,
        gpu=machine.gpu.name,
        capability=machine.gpu.capability,
        system=machine.system,
        hardware_compatible=spec.hardware_compatible,
        version_compatible=spec.version_compatible,
        profiles=ranges,
        sha256=hashlib.sha256(plan).hexdigest(),
    )
    return CompiledModel(
        target="trt",
        precision=model.precision,
        folder=out_dir,
        files=tuple(files),
        signature=model.signature,
        facts={
            **info.to_dict(),
            "graph_sha256": model.sha256,
            "reproducible": False,
            "opset": model.opset,
            "costs": options.costs(),
            "notes": list(built.notes),
            "weights_bytes": need.weights_bytes,
            "activations_bytes": need.activations_bytes,
        },
    )


def _refitted(model: OnnxModel, donor: Path, out_dir: Path) -> CompiledModel:
    """The donor's engine with this graph's weights: another task of the same model."""
    from jexport.targets.trt import building, device, engine_info

    content = manifest.verify(donor).content  # a plan is native code: first of all its digest
    if STRIPPED not in content["engine"]["files"] or content["precision"] != model.precision:
        raise EngineError(
            f"{donor} has no engine that takes the weights of this graph",
            evidence=f"{content['target']}-{content['precision']}: "
            f"{', '.join(content['engine']['files'])}; wanted: {STRIPPED}, {model.precision}",
            fix="compile one task with --weight-stripped first, and give that artifact",
        )
    info = engine_info.from_facts(content["engine"]["facts"])
    engine_info.check(info, device.machine(), path=donor / STRIPPED)
    plan = building.refit(
        (donor / STRIPPED).read_bytes(), model.path, version_compatible=info.version_compatible
    )
    (out_dir / PLAN).write_bytes(plan)
    digest = hashlib.sha256(plan).hexdigest()
    return CompiledModel(
        target="trt",
        precision=model.precision,
        folder=out_dir,
        files=(PLAN,),
        signature=model.signature,
        facts={
            **replace(info, sha256=digest).to_dict(),
            "graph_sha256": model.sha256,
            "reproducible": False,
            "opset": model.opset,
            "refitted_from": content["sha256"],
        },
    )


@contextlib.contextmanager
def runner(compiled: CompiledModel, device: str, threads: int) -> Iterator[Runner]:
    """Open the plan.

    Args:
        compiled: what `build` wrote.
        device: 'auto' or 'cuda', which are the same here.
        threads: of no effect.

    Yields:
        A runner of those outputs of the signature that the engine has.

    Raises:
        DeviceError: 'cpu' is asked for, or the GPU does not fit.
        ValueError: another device.
        DependencyError: no TensorRT that fits.
        EngineError: the plan is of another TensorRT, or does not open.
        ArtifactError: the plan is not that of its manifest.
    """
    if device == "cpu":
        raise DeviceError(
            "a TensorRT engine does not run on the CPU",
            evidence=f"{compiled.files[0]} is native code for a GPU",
            fix="leave --device away, or build the target onnx for the CPU",
        )
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; trt knows {', '.join(DEVICES)}")
    from jexport.targets.trt import engine_info, plan

    info = engine_info.from_facts(compiled.facts)
    names = [spec.name for spec in compiled.signature.outputs]
    with plan.open_plan(compiled.folder / compiled.files[0], info) as run:
        opened = [run]

        def select(feed: Tensors) -> Tensors:
            outputs = opened[0](feed)
            return {name: outputs[name] for name in names if name in outputs}

        try:
            yield select
        finally:
            opened.clear()


def version() -> str:
    """The installed TensorRT, else ''."""
    from jexport.targets.trt.device import tensorrt_version

    installed = tensorrt_version()
    return f"tensorrt {installed}" if installed else ""


def prepare(model: OnnxModel, spec: CompileSpec, out_dir: Path) -> CompiledModel:
    """The graph as TensorRT will read it, with its profiles: all that another machine needs.

    Args:
        model: the exported graph, which is copied.
        spec: the settings; of them the profiles are read.
        out_dir: an empty folder.

    Returns:
        The graph and its weights, `portable` among the facts.

    Raises:
        ProfileError: the profiles contradict themselves or the model.
        UnsupportedGraphError: TensorRT cannot take the graph.
    """
    from jexport.targets.trt import profiles

    ranges = profiles.read(spec.profiles, max_tokens=model.max_tokens)
    raise_for_errors(lint_at(model.path, ranges, model.max_tokens))
    for name in (GRAPH, WEIGHTS):
        shutil.copyfile(model.path.parent / name, out_dir / name)
    return CompiledModel(
        target="trt",
        precision=model.precision,
        folder=out_dir,
        files=(GRAPH, WEIGHTS),
        signature=model.signature,
        facts={
            "portable": True,
            "profiles": [profile.plain() for profile in ranges],
            "opset": model.opset,
            "max_tokens": model.max_tokens,
        },
    )


def lint_at(path: Path, ranges: Sequence[Profile], max_tokens: int) -> Sequence[Diagnostic]:
    """The lint, told which shapes the profiles hold.

    Args:
        path: of an ONNX file.
        ranges: the profiles, at least one.
        max_tokens: of the model; texts longer than every profile are not asked for.

    Returns:
        As `lint.lint`.

    Raises:
        UnsupportedGraphError: the file is not an ONNX graph.
    """
    from jexport.targets.trt.lint import lint as read

    dims = {
        "batch": [(one.batch.min, one.batch.max) for one in ranges],
        "sequence": [(one.tokens.min, one.tokens.max) for one in ranges],
    }
    return read(path, dims, max_tokens=min(max_tokens, max(one.tokens.max for one in ranges)))


def anywhere() -> dict[str, Any]:
    """Say where a portable artifact runs: nowhere as it is; what completes it."""
    return {"device": "none yet", "complete": "jexport compile ARTIFACT, on a machine with a GPU"}


_ENGINE = Target(
    name="trt",
    summary="TensorRT engines for NVIDIA GPUs, one per GPU architecture",
    precisions=("fp32", "fp16", "int8"),
    devices=("cuda",),
    requirements=Requirements(
        # What it takes up to the engine; the rest is asked for by `ready`.
        build=("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        run=("tensorrt", "cuda", "tokenizers", "numpy"),
        extra="trt",
    ),
    fingerprint=fingerprint,
    check=check,
    build=build,
    runner=runner,
    ready=ready,
    int8=Int8Support(
        scheme="symmetric",
        # Tensor cores do float16 at half the speed of int8, as two int8 terms do.
        fallback="int8-weights",
        float_precision="fp16",
        # The parser's table has no int8 for Gather, and no lookup is slow on a GPU.
        tables=False,
    ),
    lint=lint_graph,
    compiling=CompileSupport(profiles_for=profiles_for, accept=accept),
)

PORTABLE = replace(
    _ENGINE,
    summary="everything up to the TensorRT engine",
    devices=("cpu",),
    requirements=replace(
        _ENGINE.requirements, run=("onnxruntime", "tokenizers", "numpy"), extra="build"
    ),
    fingerprint=anywhere,
    build=prepare,
    runner=targets.load(targets.REFERENCE_RUNTIME).runner,
    ready=targets.always_ready,
    runtime=RuntimeSupport(timed=False),
)

TARGET = replace(_ENGINE, compiling=replace(_ENGINE.compiling, portable=PORTABLE))
