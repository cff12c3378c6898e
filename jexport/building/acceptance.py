"""Whether a compiled model may become an artifact, and how an int8 one compares with float.

Every model is held to its gates. int8 is also run beside the float models of its target, and its
vectors beside those of the other half of a retrieval pair.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport import targets, tasks
from jexport.artifacts import manifest, store
from jexport.building import cache_keys, float_comparison
from jexport.building.calibration_texts import TokenizedTexts
from jexport.building.plan import BuildPlan
from jexport.cache.stages import StageKey
from jexport.evaluation import int8_checks
from jexport.evaluation.candidate import Candidate
from jexport.evaluation.reference_set import ReferenceSet
from jexport.gates import GateFailure
from jexport.recipe import CompileSpec
from jexport.stages import compile as compile_stage
from jexport.stages import export, validate
from jexport.targets import Target
from jexport.types import Acceptance, Artifact, CompiledModel, OnnxModel
from jexport.workspace.run import cores


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The other half of a retrieval pair.

    Args:
        texts: of its task.
        built: its int8 artifact, None before there is one.
    """

    texts: TokenizedTexts
    built: Artifact | None


@dataclass(frozen=True, kw_only=True)
class Int8Inputs:
    """What an int8 model is compared with.

    Args:
        float_graph: the graph that it was made of.
        texts: whose held-out part is embedded and timed.
        pair: or why it is not compared with one; '' where the task has none.
    """

    float_graph: OnnxModel
    texts: TokenizedTexts
    pair: Pair | str


@dataclass(frozen=True, kw_only=True)
class AcceptanceInputs:
    """A compiled model and all that decides whether it is accepted.

    Args:
        plan: the build.
        compiled: the model.
        int8: what it is compared with; None for another precision.
    """

    plan: BuildPlan
    compiled: CompiledModel
    int8: Int8Inputs | None

    def key(self) -> StageKey:
        """The key of the acceptance: the engine's very bytes, and the processor it ran on."""
        plan, compiled = self.plan, self.compiled
        recipe = plan.recipe.resolved()
        files = [
            manifest.file_digest(compiled.folder / name, root=compiled.folder)
            for name in compiled.files
        ]
        inputs: dict[str, Any] = {
            **cache_keys.checkpoint_inputs(plan.model),
            "compiled": manifest.listed(files),
            "facts": compiled.facts,
            "target": plan.target.name,
            "runs_on": plan.target.fingerprint(),
            "precision": compiled.precision,
            "texts": [plan.validation.name, plan.validation.sha256],
            "reference": reference_key(plan).name,
            "spec": recipe["validate"],
            "processor": cache_keys.processor(),
        }
        if self.int8 is not None:
            inputs |= {
                "graph": self.int8.float_graph.sha256,
                "quantize": recipe["quantize"],
                "export": recipe["export"],
                "precisions": list(plan.recipe.precisions),
                "held_out": self.int8.texts.parts.held_out.sha256,
                "pair": _pair_inputs(self.int8.pair),
            }
        return StageKey(stage="validate", inputs=inputs, description=plan.describe())


def reference_key(plan: BuildPlan) -> StageKey:
    """The key of the reference vectors: the same for every target and precision of a task.

    Args:
        plan: a build of the task.

    Returns:
        The key.
    """
    spec, load = plan.recipe.validate, plan.recipe.resolved()["load"]
    inputs = {
        **cache_keys.checkpoint_inputs(plan.model),
        "folder": cache_keys.folder_inputs(plan.model),
        "load": {key: load[key] for key in ("prompts", "use", "max_tokens", "trust_remote_code")},
        "texts": [plan.validation.name, plan.validation.sha256],
        "spec": [spec.budget_tokens, spec.max_tokens],
        "processor": cache_keys.processor(),
    }
    return StageKey(
        stage="reference", inputs=inputs, description=plan.describe("reference vectors")
    )


def _pair_inputs(pair: Pair | str) -> Any:
    if isinstance(pair, str):
        return pair
    artifact = pair.built and pair.built.manifest.content["sha256"]
    return [pair.texts.parts.held_out.sha256, artifact]


def refusals(
    plan: BuildPlan, model: OnnxModel, reference: ReferenceSet, work_dir: Path
) -> tuple[GateFailure, ...]:
    """The gates for which a quantized graph would not be accepted, see `validate.refusals`.

    It is compiled and run by the target that runs graphs here, as all trials are: one search serves
    every engine that takes the graph, and needs none of them.

    Args:
        plan: the build.
        model: the graph.
        reference: the reference library's vectors.
        work_dir: an empty folder, removed here.

    Returns:
        The gates that do not hold; empty for a graph that would be accepted.
    """
    engine = targets.load(targets.REFERENCE_RUNTIME)
    compiled = compile_stage.run(model, engine, CompileSpec(), out_dir=work_dir)
    failures = validate.refusals(
        reference,
        _candidate(plan, engine, compiled),
        spec=plan.recipe.validate,
        precision=plan.precision,
    )
    shutil.rmtree(work_dir)
    return failures


def _candidate(plan: BuildPlan, engine: Target, compiled: CompiledModel) -> Candidate:
    """A compiled model behind the runtime that users open."""
    model = plan.model
    shown = export.as_shipped(model, plan.recipe.export) if engine.needs_onnx else model
    return Candidate(
        tokenizer=plan.tokenizer,
        open=lambda: engine.runner(compiled, engine.devices[0], engine.runtime.steady_threads),
        at_once=cores() if engine.runtime.steady_threads else 1,
        embedding=shown.embedding,
        outputs=compiled.signature.outputs,
    )


def run(
    inputs: AcceptanceInputs,
    *,
    reference: Callable[[], ReferenceSet],
    out_dir: Path,
    float_dir: Callable[[], Path],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Acceptance:
    """Hold a compiled model to its gates. Writes out_dir/parity.json.

    The report is kept beside the artifact's versions when a gate fails.

    Args:
        inputs: the model and what it is compared with.
        reference: gives the reference library's vectors; called once.
        out_dir: takes the report, and the reference vectors for a portable artifact.
        float_dir: gives an empty folder for float models; called for int8 only.
        progress: called with tokens done and in all.

    Returns:
        The report and, for int8, what was measured beside float models.

    Raises:
        ParityError, RecipeError: as `validate.run`.
        QuantizationError: int8 is slower than float, or does not keep the pair's ranking.
    """
    plan, compiled = inputs.plan, inputs.compiled
    with store.kept_report(out_dir / validate.REPORT, plan.slot):
        report = validate.run(
            reference,
            _candidate(plan, plan.target, compiled),
            spec=plan.recipe.validate,
            precision=compiled.precision,
            out_dir=out_dir,
            progress=progress,
        )
        lowest = report.metrics["overall"]["cosine_min"]
        notes = [f"{report.metrics['texts']} texts, lowest cosine {lowest:.8f}"]
        sizes: Mapping[str, int] = {}
        measured: dict[str, Any] = {}
        if inputs.int8 is not None:
            sizes, measured = _compare_with_float(inputs, inputs.int8, float_dir(), notes)
    return Acceptance(
        folder=out_dir, report=report, sizes=sizes, measured=measured, notes=tuple(notes)
    )


def _compare_with_float(
    inputs: AcceptanceInputs, int8: Int8Inputs, work_dir: Path, notes: list[str]
) -> tuple[Mapping[str, int], dict[str, Any]]:
    """Sizes by precision, and what was measured; a note is added for each comparison."""
    plan, compiled = inputs.plan, inputs.compiled
    target, spec = plan.target, plan.recipe.quantize
    comparison = float_comparison.compare_with_float(
        target, int8.float_graph, compiled, int8.texts, plan.recipe, work_dir
    )
    measured: dict[str, Any] = {"speed": int8_checks.speed_rows(comparison.speeds)}
    if target.runtime.timed:
        speeds, precision = comparison.speeds, compiled.precision
        notes.append(int8_checks.check_speed(speeds, precision, allow_slower=spec.allow_slower))
    if isinstance(int8.pair, Pair):
        other = float_comparison.counterpart_vectors(int8.pair.texts, target, int8.pair.built)
        is_query = plan.model.embedding.task == tasks.QUERIES
        measured["pair"] = int8_checks.pair_ranking(comparison, other, own_are_queries=is_query)
        notes.append(int8_checks.check_ranking(measured["pair"], spec.pair_top10_overlap))
    elif int8.pair:
        notes.append(int8.pair)
    return comparison.sizes, measured
