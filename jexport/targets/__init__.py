"""What an engine is to jexport: a record of functions; the folder is the registry.

To add one: copy onnx.py to <engine>.py, fill the functions, add an extra in pyproject.toml. Nothing
outside that file names the engine; tests/targets/test_contract.py runs over every file here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jexport.errors import DependencyError, PrecisionError, UnknownTargetError, nearest
from jexport.findings import Finding
from jexport.flow import CompiledModel, OnnxModel, Runner
from jexport.recipe import CompileSpec

PLANNED: Mapping[str, str] = {
    "trt": "TensorRT engines",
    "hf": "a merged checkpoint for transformers and sentence-transformers",
    "vllm": "a merged checkpoint for vLLM and TEI",
}
"""Targets that have no file yet: asking for one says so instead of guessing at a typo."""


@dataclass(frozen=True, kw_only=True)
class Furnishing:
    """A packaged folder, before its manifest is written, and how its texts become token ids.

    tokenize(texts): ids as the runtime makes them, prompt aside, cut to max_tokens at the end
    `cut`. texts: those of the parity set.
    """

    folder: Path
    precision: str
    tokenize: Callable[[list[str]], list[list[int]]]
    texts: Sequence[str]
    pad_id: int
    max_tokens: int
    cut: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine.

    precisions: those it takes. scheme: the quantization scheme it needs for int8. wide: what a
    product becomes that plain int8 hurts (int8/treatment.py). needs_onnx: whether export runs.
    build_needs, run_needs: modules. extra: what pip installs to run it. ready(): refuses a
    machine that cannot compile for it, before any work. fingerprint(): where an artifact of this
    target may run. check(model): refuses what the engine cannot take. build(model, spec, out_dir):
    compiles. runner(compiled, device, threads): opens.
    graphs: the precision of the graph that export writes, where it is not the artifact's own.
    furnish(room): adds what the engine's servers read beside the graph; returns facts of it.
    lint(path, max_tokens): everything in a graph that the engine would not take, when the target
    can tell without the engine.
    """

    name: str
    summary: str
    precisions: tuple[str, ...]
    scheme: str
    wide: str
    needs_onnx: bool
    build_needs: tuple[str, ...]
    run_needs: tuple[str, ...]
    extra: str
    ready: Callable[[], None]
    fingerprint: Callable[[], dict[str, Any]]
    check: Callable[[OnnxModel], None]
    build: Callable[[OnnxModel, CompileSpec, Path], CompiledModel]
    runner: Callable[[CompiledModel, str, int], AbstractContextManager[Runner]]
    lint: Callable[[Path, int | None], Sequence[Finding]] | None = None
    graphs: Mapping[str, str] = field(default_factory=dict)
    furnish: Callable[[Furnishing], Mapping[str, Any]] | None = None


def names() -> list[str]:
    """The targets there are, without importing any."""
    folder = Path(__file__).parent
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> Target:
    """Import one target. Raises UnknownTargetError naming the nearest."""
    if name not in names():
        if name in PLANNED:
            raise UnknownTargetError(
                f"target '{name}' is not made yet",
                evidence=f"planned: {name}, {PLANNED[name]}; there today: {', '.join(names())}",
                fix=f"use --target {names()[0]}",
            )
        raise UnknownTargetError(
            f"unknown target '{name}'",
            evidence=f"there are: {', '.join(names())}; planned: {', '.join(PLANNED)}",
            fix=nearest(name, [*names(), *PLANNED]),
        )
    target: Target = importlib.import_module(f"jexport.targets.{name}").TARGET
    return target


def check_precision(target: Target, precision: str) -> None:
    """Raise PrecisionError unless the target takes this precision."""
    if precision not in target.precisions:
        raise PrecisionError(
            f"target '{target.name}' has no precision '{precision}'",
            evidence=f"it has: {', '.join(target.precisions)}",
            fix=nearest(precision, target.precisions),
        )


def check_installed(modules: tuple[str, ...], *, extra: str, purpose: str) -> None:
    """Raise DependencyError, naming the extra to install, when a module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"{purpose} needs {', '.join(missing)}",
            evidence="not installed in this environment",
            fix=f'pip install "jexport[{extra}]"',
        )
