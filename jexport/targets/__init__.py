"""What an engine is to jexport: a record of functions; the folder is the registry.

To add one: write <engine>.py as docs/writing-a-target.md shows, and add an extra in pyproject.toml.
Nothing outside that file names the engine; tests/targets/test_contract.py runs over every one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from jexport import plugins
from jexport.errors import (
    DependencyError,
    PrecisionError,
    RecipeError,
    UnknownTargetError,
    UnsupportedGraphError,
    nearest,
)
from jexport.graph.diagnostics import Diagnostic
from jexport.recipe import CompileSpec
from jexport.types import Batching, CompiledModel, OnnxModel, Runner

REFERENCE_RUNTIME = "onnx"
"""The target that runs graphs where an engine cannot: it needs no device."""

Opens: TypeAlias = Callable[[CompiledModel, str, int], AbstractContextManager[Runner]]
"""(compiled, device, threads) -> a context with one Runner; threads 0: the engine's own number."""

OpensStreams: TypeAlias = Callable[
    [CompiledModel, str, int], AbstractContextManager[Sequence[Runner]]
]
"""The same with several Runners, which may run at the same time."""


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Python modules that a target imports.

    Args:
        build: modules that a build imports.
        run: modules that opening its artifact imports.
        extra: the extra of pyproject.toml that installs `run`.
    """

    build: tuple[str, ...]
    run: tuple[str, ...]
    extra: str


@dataclass(frozen=True, kw_only=True)
class Int8Support:
    """How an int8 graph has to look for an engine.

    Args:
        scheme: of the activations, one of quantization.quant_params.SCHEMES.
        fallback: precision of a layer that plain int8 hurts (quantization.config.LAYER_PRECISIONS).
        float_precision: what the other operators compute in, 'fp32' or 'fp16'.
        tables: whether tables that ids look up become int8, too.
    """

    scheme: str
    fallback: str
    float_precision: str = "fp32"
    tables: bool = True


def always_ready() -> None:
    """Say nothing: no machine is refused."""


def accept_all(spec: CompileSpec, max_tokens: int) -> None:
    """Say nothing: no setting is refused.

    Args:
        spec: any.
        max_tokens: of the model.
    """


def default_batching(compiled: CompiledModel, device: str) -> Batching:
    """Batches that suit a CPU.

    Args:
        compiled: any.
        device: any.

    Returns:
        1,024 tokens a pass, one batch after another.
    """
    return Batching()


@dataclass(frozen=True, kw_only=True)
class RuntimeSupport:
    """What a target can do beside opening one Runner.

    Args:
        streams: opens runners that take a batch each at the same time, where that is faster for
            many batches, or none; their vectors are those of `Target.runner`, bit for bit.
        cuda_graphs: opens a runner that replays small batches as CUDA graphs.
        batching: (compiled, device) -> the batches that it wants there.
        steady_threads: with so many threads a call gives the same bits on any number of cores, and
            its runner may be called from several threads; 0 where every number gives the same.
        timed: whether its speed on Target.devices says anything.
    """

    streams: OpensStreams | None = None
    cuda_graphs: Opens | None = None
    batching: Callable[[CompiledModel, str], Batching] = default_batching
    steady_threads: int = 0
    timed: bool = True


@dataclass(frozen=True, kw_only=True)
class CompileSupport:
    """What the settings of [compile] and the precision change in a build.

    Args:
        graph_precisions: precision of the graph that export writes, where it is not the artifact's.
        accept: (spec, max_tokens): refuses settings that cannot be met, before any work.
        profiles_for: (spec, lengths in tokens, max_tokens) -> the settings for texts of these
            lengths; None where lengths decide nothing.
        variant: the target as the settings make it, where they decide what it runs on.
        portable: the target up to the engine, for a build on a machine that has none.
    """

    graph_precisions: Mapping[str, str] = field(default_factory=dict)
    accept: Callable[[CompileSpec, int], None] = accept_all
    profiles_for: Callable[[CompileSpec, Sequence[int], int], CompileSpec] | None = None
    variant: Callable[[CompileSpec], Target] | None = None
    portable: Target | None = None


@dataclass(frozen=True, kw_only=True)
class PackageContext:
    """A packaged folder, before its manifest is written, and how its texts become token ids.

    Args:
        folder: the artifact's folder.
        precision: of the artifact.
        tokenize: texts -> ids as the runtime makes them, without a prompt, cut to max_tokens.
        texts: those of the parity set.
        pad_id: id of the padding token.
        max_tokens: longest text, special tokens included.
        cut: where a longer text is cut, 'left' or 'right'.
        edge: texts that tokenizers get wrong.
    """

    folder: Path
    precision: str
    tokenize: Callable[[list[str]], list[list[int]]]
    texts: Sequence[str]
    pad_id: int
    max_tokens: int
    cut: str
    edge: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine: what it takes, how it builds, how it is opened. All after `runner` is optional.

    Args:
        name: of the file in this folder.
        summary: one line for `jexport doctor`.
        precisions: those it takes.
        devices: where it runs, 'cpu' or 'cuda'; a build is validated on the first.
        requirements: modules it imports.
        fingerprint: () -> where an artifact of this target may run, for its manifest.
        check: (model): refuses what the engine cannot take, by a JexportError.
        build: (model, spec, out_dir) -> the compiled model, its files in out_dir.
        runner: opens a compiled model to run batches.
        ready: (): refuses a machine that cannot compile for it, before any work.
        needs_onnx: whether export runs: then check and build get an OnnxModel, else a MergedModel.
        int8: how int8 is written for it; with 'int8' among the precisions.
        lint: (path, max_tokens) -> everything in a graph that the engine would not take, when that
            can be told without the engine.
        compiling: what settings change.
        runtime: what it can do beside `runner`.
        finalize_package: adds what the engine's servers read beside the graph; returns facts of it.
    """

    name: str
    summary: str
    precisions: tuple[str, ...]
    devices: tuple[str, ...]
    requirements: Requirements
    fingerprint: Callable[[], dict[str, Any]]
    check: Callable[[Any], None]
    build: Callable[[Any, CompileSpec, Path], CompiledModel]
    runner: Opens
    ready: Callable[[], None] = always_ready
    needs_onnx: bool = True
    int8: Int8Support | None = None
    lint: Callable[[Path, int | None], Sequence[Diagnostic]] | None = None
    compiling: CompileSupport = CompileSupport()
    runtime: RuntimeSupport = RuntimeSupport()
    finalize_package: Callable[[PackageContext], Mapping[str, Any]] | None = None


def names() -> list[str]:
    """The targets there are, without importing any."""
    return plugins.names(__name__)


def load(name: str) -> Target:
    """Import one target.

    Args:
        name: of its file.

    Returns:
        Its record; the engine itself is not imported.

    Raises:
        UnknownTargetError: there is none; names the nearest.
    """
    target: Target = plugins.load(
        __name__, name, record="TARGET", kind="target", error=UnknownTargetError
    )
    return target


def up_to(target: Target, stage: str) -> Target:
    """The same target for a build that ends after a stage.

    Args:
        target: the whole one.
        stage: '' (all of it) or 'compile'.

    Returns:
        `target` itself, or its portable form.

    Raises:
        UnknownTargetError: there is nothing to stop before.
    """
    if not stage:
        return target
    if target.compiling.portable is None:
        raise UnknownTargetError(
            f"target '{target.name}' is whole after one build: there is no --until for it",
            evidence="it needs no engine of another machine",
            fix="leave --until away",
        )
    return target.compiling.portable


def with_settings(target: Target, spec: CompileSpec) -> Target:
    """The target as settings of [compile] make it: another device to run and be validated on.

    Args:
        target: as `load` gives it.
        spec: the recipe's settings.

    Returns:
        `target` itself where they change nothing.
    """
    variant = target.compiling.variant
    return variant(spec) if variant is not None else target


def check_precision(target: Target, precision: str) -> None:
    """Refuse a precision that the target does not take.

    Args:
        target: the engine.
        precision: as the recipe names it.

    Raises:
        PrecisionError: not one of target.precisions.
    """
    if precision not in target.precisions:
        raise PrecisionError(
            f"target '{target.name}' has no precision '{precision}'",
            evidence=f"it has: {', '.join(target.precisions)}",
            fix=nearest(precision, target.precisions),
        )


def profiles_for(
    target: Target, spec: CompileSpec, lengths: Sequence[int], max_tokens: int
) -> CompileSpec:
    """A target's settings for texts of these lengths.

    Args:
        target: the engine.
        spec: the recipe's settings.
        lengths: of sample texts, in tokens.
        max_tokens: of the model.

    Returns:
        The settings with optimization profiles.

    Raises:
        RecipeError: lengths decide nothing for this target.
    """
    if target.compiling.profiles_for is None:
        raise RecipeError(
            f"target '{target.name}' is not tuned to the lengths of texts",
            evidence="it has no optimization profiles",
            fix="leave --profile-from away",
        )
    return target.compiling.profiles_for(spec, lengths, max_tokens)


def check_opset(model: OnnxModel, newest: int, engine: str) -> None:
    """Refuse a graph of a newer opset than an engine takes.

    Args:
        model: the graph.
        newest: opset that the engine takes.
        engine: its name, for the message.

    Raises:
        UnsupportedGraphError: the graph's opset is newer.
    """
    if model.opset > newest:
        raise UnsupportedGraphError(
            f"{engine} does not take opset {model.opset}",
            evidence=f"supported up to {newest}",
            fix=f"set export.opset to {newest} or less",
        )


def check_installed(modules: tuple[str, ...], *, extra: str, purpose: str) -> None:
    """Refuse an environment that lacks a module.

    Args:
        modules: names to import.
        extra: of jexport, which installs them.
        purpose: what needs them, for the message.

    Raises:
        DependencyError: one is missing; names the extra to install.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"{purpose} needs {', '.join(missing)}",
            evidence="not installed in this environment",
            fix=f'pip install "jexport[{extra}]"',
        )
