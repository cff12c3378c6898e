"""Whether a compiled model may become an artifact, and what is worth knowing of it beside float.

Every one is held to its gates. int8 is also run beside the float models of its target, and its
vectors beside those of the other half of a retrieval pair. Knows no folder of artifacts but to look
for that other half.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport import tasks
from jexport.artifacts import manifest, store
from jexport.building import cache_keys, int8_checks
from jexport.cache.stages import Wanted
from jexport.evaluation.candidate import Candidate
from jexport.evaluation.reference_set import ReferenceSet
from jexport.recipe import Recipe
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import export, validate
from jexport.targets import Target
from jexport.types import Artifact, CalibrationSet, CompiledModel, LoadedModel, OnnxModel, Verdict
from jexport.workspace.run import cores

STAGE = "validate"
REFERENCE = "reference"
PROCESSOR = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The other half of a retrieval pair; built: its int8 artifact, None before there is one."""

    texts: int8_checks.Texts
    built: Artifact | None


@dataclass(frozen=True, kw_only=True)
class Small:
    """What only int8 has. plain: the float graph that it was made of.

    pair: or why it is not compared with one; '' where the task has none.
    """

    plain: OnnxModel
    texts: int8_checks.Texts
    pair: Pair | str


@dataclass(frozen=True, kw_only=True)
class Case:
    """A compiled model and all that it is judged by.

    tokenizer: the artifact's. slot: where it would be placed.
    """

    recipe: Recipe
    loaded: LoadedModel
    engine: Target
    compiled: CompiledModel
    texts: CalibrationSet
    tokenizer: TextTokenizer
    slot: store.Slot
    small: Small | None

    def wanted_reference(self) -> Wanted:
        """What decides what the judge gives: the same for every target and precision of a task."""
        validate_spec, load = self.recipe.validate, self.recipe.resolved()["load"]
        decided = {
            **cache_keys.of_weights(self.loaded),
            "folder": cache_keys.of_folder(self.loaded),
            "load": {key: load[key] for key in ("prompts", "max_tokens", "trust_remote_code")},
            "texts": [self.texts.name, self.texts.sha256],
            "spec": [validate_spec.budget_tokens, validate_spec.max_tokens],
            "processor": _processor(),
        }
        about = cache_keys.about(self.recipe, self.loaded, "the judge's vectors")
        return Wanted(stage=REFERENCE, decided_by=decided, about=about)

    def wanted(self) -> Wanted:
        """What decides the verdict: the very bytes of the engine, and the processor it ran on."""
        said = self.recipe.resolved()
        files = [
            manifest.file_digest(self.compiled.folder / name, root=self.compiled.folder)
            for name in self.compiled.files
        ]
        decided: dict[str, Any] = {
            **cache_keys.of_weights(self.loaded),
            "compiled": manifest.listed(files),
            "facts": self.compiled.facts,
            "target": self.engine.name,
            "runs_on": self.engine.fingerprint(),
            "precision": self.compiled.precision,
            "texts": [self.texts.name, self.texts.sha256],
            "reference": self.wanted_reference().name,
            "spec": said["validate"],
            "processor": _processor(),
        }
        if self.small is not None:
            own, pair = self.small.texts, self.small.pair
            beside: Any = pair
            if isinstance(pair, Pair):
                built = pair.built and pair.built.manifest.content["sha256"]
                beside = [pair.texts.parts.held_out.sha256, built]
            decided |= {
                "graph": self.small.plain.sha256,
                "quantize": said["quantize"],
                "export": said["export"],
                "precisions": list(self.recipe.precisions),
                "held_out": own.parts.held_out.sha256,
                "pair": beside,
            }
        about = cache_keys.about(
            self.recipe, self.loaded, f"{self.engine.name}-{self.compiled.precision}"
        )
        return Wanted(stage=STAGE, decided_by=decided, about=about)


def run(
    case: Case,
    *,
    reference: Callable[[], ReferenceSet],
    out_dir: Path,
    beside: Callable[[], Path],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Judge. Writes out_dir/parity.json, which is kept beside the versions when a gate fails.

    reference: gives what the judge gives. beside: an empty folder for float models. Raises what
    `validate.run` does; for int8 QuantizationError when it is slower than float, or does not keep
    the pair's ranking.
    """
    engine, compiled, loaded = case.engine, case.compiled, case.loaded
    shown = export.as_shipped(loaded, case.recipe.export) if engine.needs_onnx else loaded
    with store.kept_report(out_dir / validate.REPORT, case.slot):
        report = validate.run(
            reference,
            Candidate(
                tokenizer=case.tokenizer,
                open=lambda: engine.runner(compiled, engine.devices[0], engine.steady_threads),
                at_once=cores() if engine.steady_threads else 1,
                embedding=shown.embedding,
                outputs=compiled.signature.outputs,
            ),
            spec=case.recipe.validate,
            precision=compiled.precision,
            out_dir=out_dir,
            progress=progress,
        )
        lowest = report.metrics["overall"]["cosine_min"]
        notes = [f"{report.metrics['texts']} texts, lowest cosine {lowest:.8f}"]
        sizes: Mapping[str, int] = {}
        measured: dict[str, Any] = {}
        if case.small is not None:
            sizes, measured = _beside_float(case, case.small, beside(), notes)
    return Verdict(
        folder=out_dir, report=report, sizes=sizes, measured=measured, notes=tuple(notes)
    )


def _beside_float(
    case: Case, small: Small, room: Path, notes: list[str]
) -> tuple[Mapping[str, int], dict[str, Any]]:
    engine, precision, spec = case.engine, case.compiled.precision, case.recipe.quantize
    beside = int8_checks.beside_float(
        engine, small.plain, case.compiled, small.texts, case.recipe, room
    )
    measured: dict[str, Any] = {"speed": int8_checks.listed(beside.speeds)}
    if engine.timed:
        notes.append(int8_checks.faster(beside.speeds, precision, allowed=spec.allow_slower))
    if isinstance(small.pair, Pair):
        other = int8_checks.counterpart(small.pair.texts, engine, small.pair.built)
        measured["pair"] = int8_checks.ranking_kept(
            beside, other, own_are_queries=case.loaded.embedding.task == tasks.QUERIES
        )
        notes.append(int8_checks.check_ranking(measured["pair"], spec.pair_top10_overlap))
    elif small.pair:
        notes.append(small.pair)
    return beside.sizes, measured


def _processor() -> str:
    """What decides a CPU's last bits and speeds, in one digest: its model and instructions."""
    try:
        lines = PROCESSOR.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return manifest.sha256_of([platform.machine(), *sorted(told)])
