"""The stages in order, as one function to be read aloud.

load, merge (when the task has an adapter), export (when the target takes a graph), quantize (when
int8 is asked for), compile, validate, package. What is cheap to refuse is refused before the first
weight is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jexport import targets, tasks
from jexport.artifacts import identity, manifest, reference, store
from jexport.building import acceptance, cache_keys, estimate, int8_checks
from jexport.cache.stages import FOLDER, Cache, Lease
from jexport.datasets import calibration, sampling
from jexport.errors import (
    ArtifactError,
    CalibrationError,
    PrecisionError,
    UnknownTargetError,
    UnknownTaskError,
    nearest,
)
from jexport.evaluation import edge_texts, reference_set
from jexport.quantization.trial_log import Journal
from jexport.recipe import PRECISIONS, Recipe
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import compile as compile_stage
from jexport.stages import export, load, merge, package, quantize, validate
from jexport.targets import Furnishing, Target
from jexport.tasks import NONE
from jexport.types import (
    Artifact,
    CalibrationSet,
    CompiledModel,
    LoadedModel,
    MergedModel,
    OnnxModel,
)
from jexport.workspace.run import Event, Listener, Run, open_run, silent

RANGE_TEXTS = 40
"""Texts whose activations are checked against float16's range: one a language, and long ones."""


def build(
    recipe: Recipe,
    *,
    task: str,
    target: str,
    precision: str = "fp32",
    until: str = "",
    lengths_of: Sequence[str] = (),
    out: Path = Path("artifacts"),
    cache: Cache | None = None,
    memory_bytes: int | None = None,
    replace: bool = False,
    listen: Listener = silent,
) -> Artifact:
    """Turn the recipe's checkpoint and one task into a verified artifact below `out`.

    An artifact that was built of the same inputs before is verified and returned; nothing is
    touched then. until: 'compile' stops before an engine that this machine cannot make, with a
    portable artifact for `portable.complete`. lengths_of: texts like those to come, for engines
    that are tuned to lengths. cache: where finished stages are kept, so that a killed build
    goes on from there; None for `out`/.cache. memory_bytes: what may be used, None for
    what there is. replace: the recipe's name may go from another checkpoint to this one.
    Raises a JexportError for all that is foreseen.
    """
    engine = _engine(recipe, task, target, precision, until)
    is_int8 = precision in (int8_checks.INT8, int8_checks.INT8_WEIGHTS)
    needs = (*engine.build_needs, *(quantize.NEEDS if is_int8 else ()))
    targets.check_installed(needs, extra="build", purpose=f"building for {target}")
    engine.ready()
    estimate.check_memory(recipe.load.model, is_int8=is_int8, limit_bytes=memory_bytes)
    texts = calibration.read(recipe.validate.texts, task)
    parts = calibration.parts(recipe.quantize.calibration, task) if is_int8 else None
    cache = cache or Cache(root=out / FOLDER)
    with open_run(out, listen) as run, cache.lease() as kept:
        with run.stage("load"):
            loaded = _loaded(cache, recipe, task)
            export.check_dimension(recipe.export, loaded)
            tokenizer = TextTokenizer.open(
                loaded.tokenizer_files[0].parent, max_tokens=loaded.embedding.max_tokens
            )
            # As the runtime will make them: tokenizer.json, prompt, truncation.
            candidate_ids = partial(tokenizer.model_ids, prefix=loaded.embedding.prompt)
            if lengths_of:
                lengths = list(map(len, candidate_ids(lengths_of)))
                spec = targets.profiled(engine, recipe.compile, lengths, tokenizer.max_tokens)
                recipe = dataclasses.replace(recipe, compile=spec)
            engine.accept(recipe.compile, loaded.embedding.max_tokens)
        made_of = cache_keys.of(recipe, loaded, engine, precision, texts, parts)
        slot = cache_keys.slot(recipe, loaded, engine, precision, out, made_of)
        store.check_name(slot, identity.of_loaded(loaded), replace=replace)
        with _explained(slot):
            done = store.find(slot)
        if done is not None:
            store.point_latest(slot, scratch=run.folder, replace=replace)
            listen(Event(kind="note", stage="package", text="already built of the same inputs"))
            return done

        if loaded.adapter:
            with run.stage("merge") as note:
                merged = merge.run(loaded)
                note(f"{len(loaded.adapter)} matrices, merged as they are read")
        else:
            merged = loaded
        exported: OnnxModel | MergedModel = MergedModel(model=merged, precision=precision)
        if engine.needs_onnx:
            with run.stage("export") as note:
                graph = "fp32" if is_int8 else engine.graphs.get(precision, precision)
                will_be_half = is_int8 and engine.float_rest == "fp16"
                samples = _in_range(texts, candidate_ids, loaded, graph, will_be_half)
                exported = kept.obtain(
                    cache_keys.of_export(recipe, loaded, precision=graph, samples=samples),
                    lambda room: export.run(
                        merged,
                        recipe.export,
                        precision=graph,
                        samples=samples,
                        out_dir=room,
                        will_be_half=will_be_half,
                    ),
                    spare=lambda: run.room("export"),
                    tell=note,
                )
        journal = Journal(cache_keys.journal_path(slot, made_of) if is_int8 else None)
        plain: OnnxModel | None = None
        if parts is not None:
            assert isinstance(exported, OnnxModel), f"{target} has int8 and takes no graph"
            plain = exported
            own = int8_checks.Texts(parts=parts, loaded=loaded, tokenizer=tokenizer)
            with run.stage("quantize") as note:
                exported = kept.obtain(
                    cache_keys.of_quantize(recipe, loaded, engine, precision, plain, parts),
                    lambda room: _quantized(
                        plain, own, recipe, engine, precision, room, _ways(run, listen, journal)
                    ),
                    spare=lambda: run.room("quantize"),
                    tell=note,
                )
                note(int8_checks.treated(exported))
        with run.stage("compile") as note:
            model = dataclasses.replace(exported, precision=precision)
            compiled = kept.obtain(
                cache_keys.of_compile(recipe, loaded, engine, precision, model),
                lambda room: compile_stage.run(model, engine, recipe.compile, out_dir=room),
                spare=lambda: run.room("compile"),
                tell=note,
            )
            note(_fused(compiled))
        case = acceptance.Case(
            recipe=recipe,
            loaded=loaded,
            engine=engine,
            compiled=compiled,
            texts=texts,
            tokenizer=tokenizer,
            slot=slot,
            small=None
            if plain is None
            else acceptance.Small(
                plain=plain, texts=own, pair=_pair(cache, recipe, engine, precision, task, out)
            ),
        )
        with run.stage("validate") as note:
            judged = kept.obtain(
                case.wanted(),
                lambda room: acceptance.run(
                    case,
                    reference=partial(_reference, case, run, kept, note),
                    out_dir=room,
                    beside=lambda: run.room("beside"),
                    progress=lambda done, total: run.progress("validate", done, total),
                ),
                spare=lambda: run.room("validate"),
                tell=note,
            )
            for line in judged.notes:
                note(line)
        with run.stage("package"):
            extras = [judged.folder / reference.NAME] if until else []
            if plain is not None:
                told = {
                    "command": int8_checks.command(recipe, slot, loaded.source.name, until),
                    "sizes": judged.sizes,
                }
                assert isinstance(exported, OnnxModel)
                extras += int8_checks.reports(
                    exported, judged.folder / validate.REPORT, told, slot, run.room("reports")
                )
            facts = package.Facts(
                model_name=recipe.name,
                version=slot.version,
                inputs_sha256=manifest.sha256_of(made_of),
                recipe=recipe.resolved(),
                tools=made_of["tools"],
                inputs=cache_keys.digests(made_of),
                runs_on=engine.fingerprint(),
                extras=tuple(extras),
            )
            shown = export.as_shipped(loaded, recipe.export) if engine.needs_onnx else loaded
            staged = package.run(
                shown,
                compiled,
                judged.report,
                facts,
                report_path=judged.folder / validate.REPORT,
                out_dir=run.room("package"),
                furnish=_furnish(engine, precision, tokenizer, texts),
                take=kept.take,
            )
            made = store.place(staged, slot, replace=replace)
            journal.forget()
        store.keep_measured(made, {**run.measured(), **judged.measured}, scratch=run.folder)
        return made


def _reference(
    case: acceptance.Case, run: Run, kept: Lease, note: Callable[[str], None]
) -> reference_set.ReferenceSet:
    """What the judge gives for the validation texts, made once for a task."""
    found = kept.obtain(
        case.wanted_reference(),
        lambda room: reference_set.run(
            case.loaded,
            case.recipe.load,
            case.texts,
            case.recipe.validate,
            out_dir=room,
            progress=lambda done, total: run.progress("validate", done, total),
        ),
        spare=lambda: run.room("reference"),
        tell=lambda text: note(f"the judge's vectors: {text}"),
    )
    note(f"judged by {found.library}")
    return reference_set.read(found.folder / reference_set.FILE)


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a build would find done: its artifact (not verified), else stages in the cache."""

    built: Path | None
    cached: tuple[str, ...]


def foresee(
    recipe: Recipe,
    *,
    task: str,
    target: str,
    precision: str,
    out: Path,
    cache: Cache,
    replace: bool = False,
) -> Foreseen:
    """What `build` would find done; the checkpoint is opened, and nothing is written.

    Raises what `build` would raise before it begins.
    """
    engine = _engine(recipe, task, target, precision, "")
    is_int8 = precision in (int8_checks.INT8, int8_checks.INT8_WEIGHTS)
    texts = calibration.read(recipe.validate.texts, task)
    parts = calibration.parts(recipe.quantize.calibration, task) if is_int8 else None
    loaded = _loaded(cache, recipe, task)
    slot = cache_keys.slot(
        recipe,
        loaded,
        engine,
        precision,
        out,
        cache_keys.of(recipe, loaded, engine, precision, texts, parts),
    )
    store.check_name(slot, identity.of_loaded(loaded), replace=replace)
    if slot.path.is_dir():
        return Foreseen(built=slot.path, cached=())
    found: list[str] = []
    model: OnnxModel | MergedModel = MergedModel(model=loaded, precision=precision)
    tokenizer = TextTokenizer.open(
        loaded.tokenizer_files[0].parent, max_tokens=loaded.embedding.max_tokens
    )
    graph = "fp32" if is_int8 else engine.graphs.get(precision, precision)
    samples = _in_range(
        texts,
        partial(tokenizer.model_ids, prefix=loaded.embedding.prompt),
        loaded,
        graph,
        is_int8 and engine.float_rest == "fp16",
    )
    if engine.needs_onnx:
        wanted = cache_keys.of_export(recipe, loaded, precision=graph, samples=samples)
        exported = cache.peeked(wanted)
        if exported is not None and parts is not None:
            assert isinstance(exported, OnnxModel)
            found.append(wanted.stage)
            wanted = cache_keys.of_quantize(recipe, loaded, engine, precision, exported, parts)
            exported = cache.peeked(wanted)
        if not isinstance(exported, OnnxModel):
            return Foreseen(built=None, cached=tuple(found))
        found.append(wanted.stage)
        model = exported
    wanted = cache_keys.of_compile(recipe, loaded, engine, precision, model)
    if cache.peeked(wanted) is not None:
        found.append(wanted.stage)
    return Foreseen(built=None, cached=tuple(found))


def _engine(recipe: Recipe, task: str, target: str, precision: str, until: str) -> Target:
    """The target as it is built here. Raises what a recipe or target does not have."""
    _check_shipped(recipe, task, target, precision)
    engine = targets.as_set(targets.up_to(targets.load(target), until), recipe.compile)
    targets.check_precision(engine, precision)
    return engine


def _loaded(cache: Cache, recipe: Recipe, task: str) -> LoadedModel:
    """The checkpoint, opened once in a process for all builds of one task that share a cache."""
    key = ["load", recipe.resolved()["load"], task]
    loaded: LoadedModel = cache.opened(key, lambda: load.run(recipe.load, task=task))
    return loaded


def _in_range(
    texts: CalibrationSet,
    candidate_ids: Callable[[list[str]], list[list[int]]],
    loaded: LoadedModel,
    graph: str,
    will_be_half: bool,
) -> list[list[int]]:
    """Texts whose activations must fit float16, where there will be any; as token ids."""
    if graph != "fp16" and not will_be_half:
        return []
    samples = sampling.within_budget(
        texts, candidate_ids, budget_tokens=1, max_tokens=loaded.embedding.max_tokens
    )
    return candidate_ids([sample.text for sample in samples[:RANGE_TEXTS]])


def _quantized(
    plain: OnnxModel,
    own: int8_checks.Texts,
    recipe: Recipe,
    engine: Target,
    precision: str,
    room: Path,
    ways: quantize.Ways,
) -> OnnxModel:
    """The int8 graph with its report, what is not int8 in float16 where the engine wants that."""
    halved = engine.float_rest == "fp16"
    aim = quantize.Aim(
        scheme=engine.scheme,
        precision=precision,
        wide=engine.wide,
        gates=recipe.validate.gates.get(precision, {}),
        tables=engine.int8_tables,
    )
    material = int8_checks.material(own, recipe.quantize)
    judge = targets.load(targets.JUDGE)
    scratch = room / "float" if halved else room
    scratch.mkdir(exist_ok=True)
    made = quantize.run(
        plain, material, recipe.quantize, aim, judge=judge, out_dir=scratch, ways=ways
    )
    if halved:
        made = export.in_half(made, recipe.export, room)
        shutil.move(scratch / quantize.REPORT, room)
        shutil.rmtree(scratch)
    return made


def _furnish(
    engine: Target, precision: str, tokenizer: TextTokenizer, texts: CalibrationSet
) -> Callable[[Path], Mapping[str, Any]] | None:
    """What the target adds to a packaged folder, where it adds anything."""
    add = engine.furnish
    if add is None:
        return None
    return lambda folder: add(
        Furnishing(
            folder=folder,
            precision=precision,
            tokenize=tokenizer.model_ids,
            texts=[sample.text for sample in texts.samples],
            pad_id=tokenizer.pad_id,
            max_tokens=tokenizer.max_tokens,
            cut=tokenizer.cut,
            edge=edge_texts.short(),
        )
    )


def _ways(run: Run, listen: Listener, journal: Journal) -> quantize.Ways:
    return quantize.Ways(
        progress=lambda done, total, text: run.progress("quantize", done, total, text),
        tell=lambda text: listen(Event(kind="note", stage="quantize", text=text)),
        journal=journal,
    )


def _pair(
    cache: Cache, recipe: Recipe, engine: Target, precision: str, task: str, out: Path
) -> acceptance.Pair | str:
    """The task that this one's vectors are compared with; '' or why not, when there is none."""
    other = tasks.COUNTERPART.get(task, "")
    if not other or (recipe.tasks and other not in recipe.tasks):
        return ""
    try:
        loaded = _loaded(cache, recipe, other)
        found = int8_checks.Texts.of(recipe.quantize.calibration, loaded)
    except UnknownTaskError:
        return ""
    except CalibrationError as error:
        return f"not compared with {other}: {error.what}"
    texts = calibration.read(recipe.validate.texts, other)
    made_of = cache_keys.of(recipe, loaded, engine, precision, texts, found.parts)
    slot = cache_keys.slot(recipe, loaded, engine, precision, out, made_of)
    return acceptance.Pair(texts=found, built=store.find(slot))


def _check_shipped(recipe: Recipe, task: str, target: str, precision: str) -> None:
    """Refuse what the recipe does not list, naming the nearest that it does; `none` always goes."""
    whose = f"the recipe {recipe.name}"
    if recipe.tasks and task not in (*recipe.tasks, NONE):
        raise UnknownTaskError(
            f"unknown task '{task}'",
            evidence=f"{whose} has: {', '.join((*recipe.tasks, NONE))}",
            fix=nearest(task, (*recipe.tasks, NONE)),
        )
    if recipe.targets and target in targets.names() and target not in recipe.targets:
        raise UnknownTargetError(
            f"{whose} does not ship the target '{target}'",
            evidence=f"it lists: {', '.join(recipe.targets)}",
            fix="add it to the recipe's targets, or use one of those",
        )
    if recipe.precisions and precision in PRECISIONS and precision not in recipe.precisions:
        raise PrecisionError(
            f"{whose} does not ship the precision '{precision}'",
            evidence=f"it lists: {', '.join(recipe.precisions)}",
            fix="add it to the recipe's precisions, or use one of those",
        )


def _fused(compiled: CompiledModel) -> str:
    fused = compiled.facts.get("fused") or {}
    return ", ".join(f"{count} {name}" for name, count in fused.items() if count)


@contextlib.contextmanager
def _explained(slot: store.Slot) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        raise store.explain(error, slot) from None
