"""The stages of one build: each is timed, announced, and taken from the cache where it is there.

pipeline.build calls them in order. A stage's own work is in `jexport.stages`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jexport import targets
from jexport.artifacts import manifest, reference, store
from jexport.artifacts.report import quantization as quantization_report
from jexport.building import acceptance, cache_keys, calibration_texts
from jexport.building.acceptance import AcceptanceInputs
from jexport.building.build_command import build_command
from jexport.building.plan import BuildPlan
from jexport.cache.stages import Cache, Lease, Result, StageKey
from jexport.errors import ParityError
from jexport.evaluation import edge_texts, reference_set
from jexport.quantization.trial_log import TrialLog
from jexport.stages import compile as compile_stage
from jexport.stages import export as export_stage
from jexport.stages import merge as merge_stage
from jexport.stages import package as package_stage
from jexport.stages import quantize as quantize_stage
from jexport.stages import validate
from jexport.targets import PackageContext
from jexport.types import (
    Acceptance,
    Artifact,
    CompiledModel,
    LoadedModel,
    MergedModel,
    OnnxModel,
)
from jexport.workspace.run import Event, Listener, Run

Model = OnnxModel | MergedModel


@dataclass(frozen=True, kw_only=True)
class BuildSession:
    """A build in progress.

    Args:
        plan: what is built, and where it belongs.
        run: times the stages and has their folders.
        lease: the cached results that it uses.
        cache: where they are kept, and checkpoints that are open already.
        listen: is told of every stage.
        replace: the recipe's name may go from another checkpoint to this one.
    """

    plan: BuildPlan
    run: Run
    lease: Lease
    cache: Cache
    listen: Listener
    replace: bool

    def run_stage(
        self,
        stage: str,
        key: Callable[[], StageKey],
        build: Callable[[Path], Result],
        *,
        summary: Callable[[Result], Iterable[str]] = lambda result: (),
    ) -> Result:
        """One stage, timed: its result from the cache, or what `build` gives.

        Args:
            stage: its name in events and records.
            key: gives the cache key, inside the stage's time.
            build: given an empty folder, gives the result.
            summary: notes for the stage's record.

        Returns:
            The result, its files verified where they come from the cache.
        """
        with self.run.stage(stage) as note:
            result = self.lease.get_or_build(
                key(), build, work_dir=lambda: self.run.work_dir(stage), notify=note
            )
            for line in summary(result):
                note(line)
            return result

    def merge(self) -> LoadedModel:
        """The checkpoint with its adapter merged; as it is where it has none."""
        model = self.plan.model
        if not model.adapter:
            return model
        with self.run.stage("merge") as note:
            merged = merge_stage.run(model)
            note(f"{len(model.adapter)} matrices, merged as they are read")
        return merged

    def export(self, merged: LoadedModel) -> Model:
        """The ONNX graph; the weights themselves for a target that takes no graph.

        Args:
            merged: as `merge` gives it.

        Returns:
            The graph in the plan's `graph_precision`, or the checkpoint.
        """
        plan = self.plan
        if not plan.target.needs_onnx:
            return MergedModel(model=merged, precision=plan.precision)
        return self.run_stage(
            "export",
            lambda: plan.key("export"),
            lambda folder: export_stage.run(
                merged,
                plan.recipe.export,
                precision=plan.graph_precision,
                samples=plan.range_samples,
                out_dir=folder,
                will_be_half=plan.will_be_half,
            ),
        )

    def accepted_model(self, exported: Model) -> tuple[Model, CompiledModel, Acceptance]:
        """Quantize, compile and validate until a model is accepted.

        An int8 candidate that its engine's gates refuse leads to the next one of the search.

        Args:
            exported: as `export` gives it.

        Returns:
            The graph to compile, what the engine opens, and its acceptance.

        Raises:
            JexportError: a stage's; for int8 QuantizationError once no candidate is left.
        """
        refused: dict[tuple[str, ...], tuple[str, ...]] = {}
        while True:
            model = self.quantize(exported, refused)
            compiled = self.compile(model)
            try:
                return model, compiled, self.accept(compiled, exported)
            except ParityError as error:
                if not self.plan.is_int8 or not error.missed_gates:
                    raise
                assert isinstance(model, OnnxModel)
                fallback = quantize_stage.chosen_fallback(_report_of(model))
                if fallback in refused:
                    raise
                refused[fallback] = error.missed_gates
                self._quantize_note(f"{self.plan.target.name} refused it: {error.missed_gates[0]}")

    def quantize(
        self, exported: Model, refused: Mapping[tuple[str, ...], tuple[str, ...]] | None = None
    ) -> Model:
        """The int8 graph, where int8 is asked for.

        Args:
            exported: the float graph.
            refused: what validate said of candidates before, by their layers at higher precision.

        Returns:
            The int8 graph, its report beside it; `exported` for another precision.
        """
        plan = self.plan
        if not plan.is_int8:
            return exported
        assert isinstance(exported, OnnxModel), f"{plan.target.name} has int8 and takes no graph"
        graph = exported

        def key() -> StageKey:
            one = plan.key("quantize", graph)
            if not refused or one.inputs is None:
                return one
            return dataclasses.replace(
                one, inputs={**one.inputs, "refused": [list(fallback) for fallback in refused]}
            )

        return self.run_stage(
            "quantize",
            key,
            lambda folder: self._quantize(graph, folder, refused or {}),
            summary=lambda quantized: [
                quantization_report.summary(quantized.path.with_name(quantize_stage.REPORT))
            ],
        )

    def compile(self, model: Model) -> CompiledModel:
        """What the engine opens.

        Args:
            model: the graph, or the checkpoint.

        Returns:
            The compiled model.
        """
        plan = self.plan
        settled = dataclasses.replace(model, precision=plan.precision)
        return self.run_stage(
            "compile",
            lambda: plan.key("compile", settled),
            lambda folder: compile_stage.run(
                settled, plan.target, plan.recipe.compile, out_dir=folder
            ),
            summary=lambda compiled: [_fusions(compiled)],
        )

    def accept(self, compiled: CompiledModel, exported: Model) -> Acceptance:
        """Hold the compiled model to its gates.

        Args:
            compiled: the candidate.
            exported: the float graph that an int8 one is compared with.

        Returns:
            The acceptance, from the cache where the same engine passed before.

        Raises:
            JexportError: as `acceptance.run`.
        """
        inputs = AcceptanceInputs(
            plan=self.plan, compiled=compiled, int8=self._int8_inputs(exported)
        )
        with self.run.stage("validate") as note:
            accepted = self.lease.get_or_build(
                inputs.key(),
                lambda folder: acceptance.run(
                    inputs,
                    reference=partial(self._reference, acceptance.reference_key(self.plan), note),
                    out_dir=folder,
                    float_dir=lambda: self.run.work_dir("beside"),
                    progress=lambda done, total: self.run.progress("validate", done, total),
                ),
                work_dir=lambda: self.run.work_dir("validate"),
                notify=note,
            )
            for line in accepted.notes:
                note(line)
        return accepted

    def package(self, compiled: CompiledModel, accepted: Acceptance, model: Model) -> Artifact:
        """Write the artifact's folder and put it in place.

        Args:
            compiled: its files go into the artifact.
            accepted: its report goes into the artifact.
            model: the graph that was compiled; an int8 one has a report of its own.

        Returns:
            The artifact, in place.
        """
        plan = self.plan
        with self.run.stage("package"):
            shown = plan.model
            if plan.target.needs_onnx:
                shown = export_stage.as_shipped(shown, plan.recipe.export)
            folder = package_stage.run(
                shown,
                compiled,
                accepted.report,
                self._package_spec(accepted, self._extra_files(accepted, model)),
                out_dir=self.run.work_dir("package"),
                transfer=self.lease.copy_or_move,
            )
            artifact = store.place(folder, plan.slot, replace=self.replace)
            self.trial_log.delete()
        measured = {**self.run.measured(), **accepted.measured}
        store.keep_measured(artifact, measured, work_dir=self.run.folder)
        return artifact

    @cached_property
    def trial_log(self) -> TrialLog:
        """Trials of the int8 search that a killed build measured already."""
        return TrialLog(self.plan.trial_log if self.plan.is_int8 else None)

    def _quantize(
        self,
        graph: OnnxModel,
        folder: Path,
        refused: Mapping[tuple[str, ...], tuple[str, ...]],
    ) -> OnnxModel:
        """The int8 graph; what is not int8 in float16 where the engine wants that."""
        plan = self.plan
        recipe, int8 = plan.recipe, plan.int8
        int8_folder = folder / "float" if plan.will_be_half else folder
        int8_folder.mkdir(exist_ok=True)
        reference = self._reference(acceptance.reference_key(plan), self._quantize_note)
        quantized = quantize_stage.run(
            graph,
            calibration_texts.calibration_data(plan.calibration_texts, recipe.quantize),
            recipe.quantize,
            quantize_stage.QuantizationTarget(
                scheme=int8.scheme,
                precision=plan.precision,
                fallback=int8.fallback,
                gates=recipe.validate.gates.get(plan.precision, {}),
                tables=int8.tables,
                refused=refused,
                refusals=lambda model: acceptance.refusals(
                    plan, model, reference, self.run.work_dir("candidate")
                ),
            ),
            runtime=targets.load(targets.REFERENCE_RUNTIME),
            out_dir=int8_folder,
            callbacks=self._quantize_callbacks(),
        )
        if plan.will_be_half:
            quantized = export_stage.in_half(quantized, recipe.export, folder)
            shutil.move(int8_folder / quantize_stage.REPORT, folder)
            shutil.rmtree(int8_folder)
        return quantized

    def _quantize_callbacks(self) -> quantize_stage.Callbacks:
        return quantize_stage.Callbacks(
            progress=lambda done, total, text: self.run.progress("quantize", done, total, text),
            message=self._quantize_note,
            trial_log=self.trial_log,
        )

    def _quantize_note(self, text: str) -> None:
        self.listen(Event(kind="note", stage="quantize", text=text))

    def _reference(self, key: StageKey, note: Callable[[str], None]) -> reference_set.ReferenceSet:
        """The reference library's vectors of the validation texts, made once for a task."""
        plan = self.plan
        files = self.lease.get_or_build(
            key,
            lambda folder: reference_set.run(
                plan.model,
                plan.recipe.load,
                plan.validation,
                plan.recipe.validate,
                out_dir=folder,
                progress=lambda done, total: self.run.progress("validate", done, total),
            ),
            work_dir=lambda: self.run.work_dir("reference"),
            notify=lambda text: note(f"reference vectors: {text}"),
        )
        note(f"judged by {files.library}")
        return reference_set.read(files.folder / reference_set.FILE)

    def _int8_inputs(self, exported: Model) -> acceptance.Int8Inputs | None:
        """What only int8 is compared with: its float graph, and the pair's other task."""
        plan = self.plan
        if not plan.is_int8:
            return None
        assert isinstance(exported, OnnxModel)
        other = plan.counterpart(self.cache)
        pair: acceptance.Pair | str = ""
        if isinstance(other, BuildPlan):
            pair = acceptance.Pair(texts=other.calibration_texts, built=store.find(other.slot))
        else:
            pair = other
        return acceptance.Int8Inputs(float_graph=exported, texts=plan.calibration_texts, pair=pair)

    def _extra_files(self, accepted: Acceptance, model: Model) -> list[Path]:
        """Files that go into the artifact beside the engine's and the tokenizer's."""
        plan = self.plan
        files = [accepted.folder / reference.NAME] if plan.until else []
        if plan.is_int8:
            assert isinstance(model, OnnxModel)
            name = plan.model.source.name
            more = {
                "command": build_command(plan.recipe, plan.slot, name, plan.until),
                "sizes": accepted.sizes,
            }
            files += quantization_report.write(
                _report_of(model),
                accepted.folder / validate.REPORT,
                more,
                plan.slot,
                self.run.work_dir("reports"),
            )
        return files

    def _package_spec(
        self, accepted: Acceptance, extras: Sequence[Path]
    ) -> package_stage.PackageSpec:
        plan = self.plan
        return package_stage.PackageSpec(
            model_name=plan.recipe.name,
            version=plan.slot.version,
            inputs_sha256=manifest.sha256_of(plan.inputs),
            recipe=plan.recipe.resolved(),
            tools=plan.inputs["tools"],
            inputs=cache_keys.input_digests(plan.inputs),
            runs_on=plan.target.fingerprint(),
            report_path=accepted.folder / validate.REPORT,
            extras=tuple(extras),
            finalize=self._finalize,
        )

    def _finalize(self, folder: Path) -> Mapping[str, Any]:
        """What the target adds to a packaged folder; facts of it for the manifest."""
        plan, tokenizer = self.plan, self.plan.tokenizer
        if plan.target.finalize_package is None:
            return {}
        return plan.target.finalize_package(
            PackageContext(
                folder=folder,
                precision=plan.precision,
                tokenize=tokenizer.model_ids,
                texts=[sample.text for sample in plan.validation.samples],
                pad_id=tokenizer.pad_id,
                max_tokens=tokenizer.max_tokens,
                cut=tokenizer.cut,
                edge=edge_texts.short(),
            )
        )


def _report_of(quantized: OnnxModel) -> Path:
    return quantized.path.with_name(quantize_stage.REPORT)


def _fusions(compiled: CompiledModel) -> str:
    fused = compiled.facts.get("fused") or {}
    return ", ".join(f"{count} {name}" for name, count in fused.items() if count)
