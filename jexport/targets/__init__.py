"""What an engine is to jexport: a record of functions; the folder is the registry.

To add one: copy onnx.py to <engine>.py, fill the functions, add an extra in pyproject.toml. Nothing
outside that file names the engine; tests/targets/test_contract.py runs over every file here.
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
    nearest,
)
from jexport.graph.diagnostics import Diagnostic
from jexport.recipe import CompileSpec
from jexport.types import Batching, CompiledModel, Runner

JUDGE = "onnx"
"""The target that runs graphs where an engine cannot: it needs no device."""

OpensLanes: TypeAlias = Callable[
    [CompiledModel, str, int], AbstractContextManager[Sequence[Runner]]
]


@dataclass(frozen=True, kw_only=True)
class Furnishing:
    """A packaged folder, before its manifest is written, and how its texts become token ids.

    tokenize(texts): ids as the runtime makes them, prompt aside, cut to max_tokens at the end
    `cut`. texts: those of the parity set. edge: texts that tokenizers get wrong.
    """

    folder: Path
    precision: str
    tokenize: Callable[[list[str]], list[list[int]]]
    texts: Sequence[str]
    pad_id: int
    max_tokens: int
    cut: str
    edge: Sequence[str] = ()


def default_batching(compiled: CompiledModel, device: str) -> Batching:
    """What suits a CPU: 1,024 tokens a pass, one batch after another."""
    return Batching()


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine.

    precisions: those it takes. scheme: the quantization scheme it needs for int8. wide: what a
    product becomes that plain int8 hurts (int8/treatment.py). needs_onnx: whether export runs: then
    check and build are given an OnnxModel, else a MergedModel.
    devices: where it runs; a build is judged on the first. build_needs, run_needs: modules. extra:
    what pip installs to run it. ready(): refuses a machine that cannot compile for it, before any
    work. fingerprint(): where an artifact of this target may run. check(model): refuses what the
    engine cannot take. build(model, spec, out_dir): compiles. runner(compiled, device, threads):
    opens. lanes(compiled, device, threads): opens runners that take a batch each at the same time,
    where that is faster for many batches; their vectors are those of `runner`, bit for bit.
    graph_runner(compiled, device, threads): opens it to replay small batches as CUDA graphs.
    batching(compiled, device): how it wants its batches on that device.
    lint(path, max_tokens): everything in a graph that the engine would not take, when the target
    can tell without the engine. float_rest: what an int8 graph's other operators compute in.
    int8_tables: whether tables that ids look up become int8, too. profiled(spec, lengths,
    max_tokens): the settings for texts of these lengths, when they decide anything. accept(spec,
    max_tokens): refuses settings that cannot be met, before any work. timed: whether its speed on
    `devices` says anything. portable: the target up to the engine, for a machine that has none.
    graphs: the precision of the graph that export writes, where it is not the artifact's own.
    furnish(room): adds what the engine's servers read beside the graph; returns facts of it.
    variant(spec): the target as settings of [compile] make it, where they decide what it runs on.
    steady_threads: with so many threads a call gives the same bits on any number of cores, and its
    runner may be called from several threads; 0 where every number gives the same.
    """

    name: str
    summary: str
    precisions: tuple[str, ...]
    scheme: str
    wide: str
    needs_onnx: bool
    devices: tuple[str, ...]
    build_needs: tuple[str, ...]
    run_needs: tuple[str, ...]
    extra: str
    ready: Callable[[], None]
    fingerprint: Callable[[], dict[str, Any]]
    check: Callable[[Any], None]
    build: Callable[[Any, CompileSpec, Path], CompiledModel]
    runner: Callable[[CompiledModel, str, int], AbstractContextManager[Runner]]
    lanes: OpensLanes | None = None
    graph_runner: Callable[[CompiledModel, str, int], AbstractContextManager[Runner]] | None = None
    batching: Callable[[CompiledModel, str], Batching] = default_batching
    lint: Callable[[Path, int | None], Sequence[Diagnostic]] | None = None
    float_rest: str = "fp32"
    int8_tables: bool = True
    profiled: Callable[[CompileSpec, Sequence[int], int], CompileSpec] | None = None
    accept: Callable[[CompileSpec, int], None] = lambda spec, max_tokens: None
    timed: bool = True
    portable: Target | None = None
    graphs: Mapping[str, str] = field(default_factory=dict)
    furnish: Callable[[Furnishing], Mapping[str, Any]] | None = None
    variant: Callable[[CompileSpec], Target] | None = None
    steady_threads: int = 0


def names() -> list[str]:
    """The targets there are, without importing any."""
    return plugins.names(__name__)


def load(name: str) -> Target:
    """Import one target. Raises UnknownTargetError naming the nearest."""
    target: Target = plugins.load(
        __name__, name, record="TARGET", kind="target", error=UnknownTargetError
    )
    return target


def up_to(target: Target, stage: str) -> Target:
    """The same target for a build that ends after `stage`: '' (all of it) or 'compile'.

    Raises UnknownTargetError where there is nothing to stop before.
    """
    if not stage:
        return target
    if target.portable is None:
        raise UnknownTargetError(
            f"target '{target.name}' is whole after one build: there is no --until for it",
            evidence="it needs no engine of another machine",
            fix="leave --until away",
        )
    return target.portable


def as_set(target: Target, spec: CompileSpec) -> Target:
    """The target as settings of [compile] make it: another device to run and be judged on."""
    return target.variant(spec) if target.variant is not None else target


def check_precision(target: Target, precision: str) -> None:
    """Raise PrecisionError unless the target takes this precision."""
    if precision not in target.precisions:
        raise PrecisionError(
            f"target '{target.name}' has no precision '{precision}'",
            evidence=f"it has: {', '.join(target.precisions)}",
            fix=nearest(precision, target.precisions),
        )


def profiled(
    target: Target, spec: CompileSpec, lengths: Sequence[int], max_tokens: int
) -> CompileSpec:
    """A target's settings for texts of these lengths, in tokens.

    Raises RecipeError where lengths decide nothing.
    """
    if target.profiled is None:
        raise RecipeError(
            f"target '{target.name}' is not tuned to the lengths of texts",
            evidence="it has no optimization profiles",
            fix="leave --profile-from away",
        )
    return target.profiled(spec, lengths, max_tokens)


def check_installed(modules: tuple[str, ...], *, extra: str, purpose: str) -> None:
    """Raise DependencyError, naming the extra to install, when a module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"{purpose} needs {', '.join(missing)}",
            evidence="not installed in this environment",
            fix=f'pip install "jexport[{extra}]"',
        )
