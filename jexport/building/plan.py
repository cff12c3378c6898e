"""One build as a noun: what is asked for, the checkpoint it is made of, and where it belongs.

Made once for each build; `pipeline.build` and `pipeline.foresee` both read it. Runs no stage but
load, and writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jexport import targets, tasks
from jexport.artifacts import manifest, store
from jexport.building import cache_keys, estimate
from jexport.building.calibration_texts import TokenizedTexts
from jexport.building.shipped import check_shipped
from jexport.cache.stages import Cache, StageKey
from jexport.datasets import calibration, sampling
from jexport.errors import CalibrationError, PrecisionError, UnknownTaskError
from jexport.recipe import INT8_PRECISIONS, Recipe
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import export, load, quantize
from jexport.targets import Target
from jexport.types import CalibrationSet, LoadedModel, MergedModel, OnnxModel

RANGE_TEXTS = 40
"""Texts whose activations are checked against float16's range: one a language, and long ones."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """One artifact that is asked for; its checkpoint is not opened yet.

    Args:
        recipe: what to build from, and how.
        task: name of a task of the checkpoint, 'none' for the base model.
        target: as it is built here.
        precision: one that the target has.
        until: 'compile' for a portable build, '' for a whole one.
        validation: texts that the artifact is validated with.
        calibration: texts of an int8 build, calibration and held-out ones; None for another
            precision.
    """

    recipe: Recipe
    task: str
    target: Target
    precision: str
    until: str
    validation: CalibrationSet
    calibration: calibration.Parts | None

    @classmethod
    def of(
        cls, recipe: Recipe, *, task: str, target: str, precision: str, until: str = ""
    ) -> BuildRequest:
        """Check names against recipe and target, and read the texts.

        Args:
            recipe: what to build from, and how.
            task: name of a task of the checkpoint, 'none' for the base model.
            target: name of the engine.
            precision: one that the target has.
            until: 'compile' for a portable build, '' for a whole one.

        Returns:
            The request.

        Raises:
            UnknownTaskError, UnknownTargetError, PrecisionError: the recipe does not ship it, or
                the target does not have it.
            CalibrationError: a text set cannot be read.
        """
        check_shipped(recipe, tasks=[task], targets=[target], precisions=[precision])
        engine = targets.with_settings(targets.up_to(targets.load(target), until), recipe.compile)
        targets.check_precision(engine, precision)
        is_int8 = precision in INT8_PRECISIONS
        return cls(
            recipe=recipe,
            task=task,
            target=engine,
            precision=precision,
            until=until,
            validation=calibration.read(recipe.validate.texts, task),
            calibration=calibration.parts(recipe.quantize.calibration, task) if is_int8 else None,
        )

    @property
    def is_int8(self) -> bool:
        """Whether there is a quantize stage."""
        return self.precision in INT8_PRECISIONS

    @property
    def int8(self) -> targets.Int8Support:
        """How int8 is written for the target, which has it."""
        assert self.target.int8 is not None, f"{self.target.name} has no int8"
        return self.target.int8

    @property
    def graph_precision(self) -> str:
        """What export writes: 'fp32' or 'fp16'."""
        if self.is_int8:
            return "fp32"
        return self.target.compiling.graph_precisions.get(self.precision, self.precision)

    @property
    def will_be_half(self) -> bool:
        """Whether what is not int8 becomes float16 after quantize."""
        return self.is_int8 and self.int8.float_precision == "fp16"

    def check_machine(self, memory_bytes: int | None) -> None:
        """Refuse a machine that cannot build this, before the checkpoint is opened.

        Args:
            memory_bytes: what the build may use; None for what this machine has.

        Raises:
            DependencyError: a library is missing.
            MemoryNeedError: the build would not fit.
            EngineError, DeviceError: what the target raises for a machine it cannot compile on.
        """
        modules = (*self.target.requirements.build, *(quantize.NEEDS if self.is_int8 else ()))
        purpose = f"building for {self.target.name}"
        targets.check_installed(modules, extra="build", purpose=purpose)
        self.target.ready()
        model = self.recipe.load.model
        estimate.check_memory(model, is_int8=self.is_int8, limit_bytes=memory_bytes)


@dataclass(frozen=True, kw_only=True)
class BuildPlan(BuildRequest):
    """A request with its checkpoint opened: all that the stages of one build read.

    Args:
        model: the checkpoint, its adapter not merged.
        tokenizer: as the runtime will use it.
        slot: where the artifact belongs.
        inputs: all that decides the result, as in the version's digest.
    """

    model: LoadedModel
    tokenizer: TextTokenizer
    slot: store.Slot
    inputs: Mapping[str, Any]

    @classmethod
    def open(
        cls, request: BuildRequest, *, cache: Cache, out: Path, profile_texts: Sequence[str] = ()
    ) -> BuildPlan:
        """Open the checkpoint and decide where the artifact belongs.

        Args:
            request: what is asked for.
            cache: shares opened checkpoints among the builds of one process.
            out: the folder of all artifacts.
            profile_texts: texts like those to come, for engines that are tuned to lengths.

        Returns:
            The plan; its recipe has the profiles made of `profile_texts`.

        Raises:
            JexportError: what `load` raises, DimensionError, and ProfileError for settings that
                the target cannot meet.
        """
        recipe, target = request.recipe, request.target
        model = _load(cache, recipe, request.task)
        _check_int8(request, model)
        export.check_dimension(recipe.export, model)
        max_tokens = model.embedding.max_tokens
        tokenizer = TextTokenizer.open(model.tokenizer_files[0].parent, max_tokens=max_tokens)
        if profile_texts:
            ids = tokenizer.model_ids(list(profile_texts), prefix=model.embedding.prompt)
            lengths = [len(one) for one in ids]
            spec = targets.profiles_for(
                target, recipe.compile, lengths, model.embedding.forward_tokens
            )
            recipe = dataclasses.replace(recipe, compile=spec)
        target.compiling.accept(recipe.compile, model.embedding.forward_tokens)
        inputs = cache_keys.build_inputs(
            recipe, model, target, request.precision, request.validation, request.calibration
        )
        slot = store.Slot(
            out=out,
            model=recipe.name,
            task=tasks.with_use(model.embedding.task, model.embedding.use),
            target=target.name,
            precision=request.precision,
            version=f"{recipe.version}-{manifest.sha256_of(inputs)[:12]}",
        )
        values = {**vars(request), "recipe": recipe}
        return cls(**values, model=model, tokenizer=tokenizer, slot=slot, inputs=inputs)

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids as the runtime will make them: tokenizer.json, prompt, truncation.

        Args:
            texts: without the prompt.

        Returns:
            The ids of each text, at most the length limit.
        """
        return self.tokenizer.model_ids(texts, prefix=self.model.embedding.prompt)

    @cached_property
    def range_samples(self) -> list[list[int]]:
        """Token ids of texts whose activations must fit float16; none where nothing will be."""
        if self.graph_precision != "fp16" and not self.will_be_half:
            return []
        samples = sampling.within_budget(
            self.validation,
            self.token_ids,
            budget_tokens=1,
            max_tokens=self.model.embedding.max_tokens,
        )
        return self.token_ids([sample.text for sample in samples[:RANGE_TEXTS]])

    @property
    def calibration_texts(self) -> TokenizedTexts:
        """The texts of an int8 build with the model that embeds them."""
        assert self.calibration is not None, f"{self.precision} is not calibrated"
        return TokenizedTexts(parts=self.calibration, model=self.model, tokenizer=self.tokenizer)

    @property
    def trial_log(self) -> Path:
        """Where the trials of an int8 search are kept: by all that decides a trial's numbers.

        Goals decide which trial is taken and no number, so they are not in its name.
        """
        recipe = dict(self.inputs["recipe"])
        for key in ("name", "version", "validate", "compile"):
            recipe.pop(key, None)
        recipe["quantize"] = {
            key: value for key, value in recipe["quantize"].items() if key not in quantize.GOALS
        }
        gates = self.inputs["recipe"]["validate"]["gates"].get(self.precision, {})
        digest = manifest.sha256_of({**self.inputs, "recipe": recipe, "texts": "", "gates": gates})
        return self.slot.parent / f".search-{digest[:12]}.jsonl"

    def key(self, stage: str, model: OnnxModel | MergedModel | None = None) -> StageKey:
        """The cache key of one stage's result.

        Args:
            stage: 'export', 'quantize' or 'compile'.
            model: what the stage takes; not needed for export.

        Returns:
            The key; its inputs are None where the result must not be kept.
        """
        inputs_of: dict[str, Callable[[], dict[str, Any] | None]] = {
            "export": self._export_inputs,
            "quantize": lambda: self._quantize_inputs(model),
            "compile": lambda: self._compile_inputs(model),
        }
        what = {"export": self.graph_precision, "quantize": self.precision}
        return StageKey(
            stage=stage,
            inputs=inputs_of[stage](),
            description=self.describe(what.get(stage)),
            copied=stage == "compile",
        )

    def describe(self, what: str | None = None) -> str:
        """A stage's result in words.

        Args:
            what: the result; None for target and precision.

        Returns:
            Model, task and what it is.
        """
        what = what or f"{self.target.name}-{self.precision}"
        return f"{self.recipe.name} {self.slot.task} {what}"

    def _export_inputs(self) -> dict[str, Any]:
        return {
            **cache_keys.checkpoint_inputs(self.model),
            "spec": self.recipe.resolved()["export"],
            "precision": self.graph_precision,
            "samples": manifest.sha256_of([list(one) for one in self.range_samples]),
        }

    def _quantize_inputs(self, graph: OnnxModel | MergedModel | None) -> dict[str, Any]:
        assert isinstance(graph, OnnxModel)
        assert self.calibration is not None
        recipe, int8 = self.recipe.resolved(), self.int8
        texts = (self.calibration.calibration, self.calibration.held_out)
        return {
            **cache_keys.checkpoint_inputs(self.model),  # its tokenizer, prompt and pooling
            "graph": graph.sha256,
            "precision": self.precision,
            "spec": recipe["quantize"],
            "keep_fp32": recipe["export"]["keep_fp32"],
            "gates": recipe["validate"]["gates"].get(self.precision, {}),
            "engine": [int8.scheme, int8.fallback, int8.tables, int8.float_precision],
            "texts": [[one.name, one.sha256] for one in texts],
            "validate": [self.validation.sha256, recipe["validate"]],
        }

    def _compile_inputs(self, model: OnnxModel | MergedModel | None) -> dict[str, Any] | None:
        """None for an engine refitted from another artifact's, which may change."""
        settings, is_refitted = cache_keys.compile_settings(self.recipe)
        if is_refitted:
            return None
        return {
            **cache_keys.checkpoint_inputs(self.model),
            **({"graph": model.sha256} if isinstance(model, OnnxModel) else {}),
            "target": self.target.name,
            "runs_on": self.target.fingerprint(),
            "precision": self.precision,
            "spec": settings,
        }

    def counterpart(self, cache: Cache) -> BuildPlan | str:
        """The same build of the retrieval pair's other task (queries for passages).

        Args:
            cache: shares opened checkpoints among the builds of one process.

        Returns:
            Its plan; '' where there is no such task, or why it cannot be compared with.
        """
        other = tasks.COUNTERPART.get(self.task, "")
        if not other or (self.recipe.tasks and other not in self.recipe.tasks):
            return ""
        try:
            _load(cache, self.recipe, other)
            request = dataclasses.replace(
                self.request,
                task=other,
                validation=calibration.read(self.recipe.validate.texts, other),
                calibration=calibration.parts(self.recipe.quantize.calibration, other),
            )
        except UnknownTaskError:
            return ""
        except CalibrationError as error:
            return f"not compared with {other}: {error.what}"
        return BuildPlan.open(request, cache=cache, out=self.slot.out)

    @property
    def request(self) -> BuildRequest:
        """What was asked for, with the recipe as it was settled."""
        names = [one.name for one in dataclasses.fields(BuildRequest)]
        return BuildRequest(**{name: getattr(self, name) for name in names})


def _check_int8(request: BuildRequest, model: LoadedModel) -> None:
    """Refuse int8 for a model without layers, before the calibration texts are embedded."""
    if request.is_int8 and not model.embedding.contextual:
        raise PrecisionError(
            "a static embedding has nothing to quantize",
            evidence="it is a table of token vectors: there is no MatMul layer",
            fix="use --precision fp32 (fp16 on onnx halves the table)",
        )


def _load(cache: Cache, recipe: Recipe, task: str) -> LoadedModel:
    """The checkpoint, opened once in a process for all builds of one task that share a cache."""
    key = ["load", recipe.resolved()["load"], task]
    model: LoadedModel = cache.memoize(key, lambda: load.run(recipe.load, task=task))
    return model
