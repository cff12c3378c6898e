"""Completing a portable artifact on the machine that has its engine: compile, validate, package.

Needs neither the checkpoint nor torch: the graph, the profiles, the gates and the checkpoint's own
vectors are in the artifact. The portable artifact is left as it is, for the next machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport import recipe, targets
from jexport.artifacts import identity, manifest, reference, store
from jexport.building import cache_keys, int8_checks
from jexport.cache import entries
from jexport.cache.stages import FOLDER, Cache, Wanted
from jexport.errors import ArtifactError, EngineError, ParityError
from jexport.evaluation import speed
from jexport.evaluation.candidate import Candidate
from jexport.recipe import Recipe
from jexport.runtime.open import compiled_model, embedding_of
from jexport.runtime.tokenise import TextTokenizer
from jexport.stages import compile as compile_stage
from jexport.stages import package, validate
from jexport.targets import Target
from jexport.types import Artifact, CompiledModel, OnnxModel, ParityReport
from jexport.workspace.run import Event, Listener, Run, open_run, silent


@dataclass(frozen=True, kw_only=True)
class Portable:
    """A portable artifact that was verified, opened. chosen: its recipe as this machine wants it.

    stored: the checkpoint's own vectors and the texts that they are of.
    """

    path: Path
    content: Mapping[str, Any]
    engine: Target
    chosen: Recipe
    stored: reference.Stored
    tokenizer: TextTokenizer


def complete(
    path: Path,
    *,
    out: Path | None = None,
    cache: Cache | None = None,
    allow_slower: bool = False,
    replace: bool = False,
    listen: Listener = silent,
    **compile_changes: Any,
) -> Artifact:
    """Build the engine of a portable artifact here, and an artifact with it.

    out: the folder of all artifacts; None for the one that the portable artifact is in. cache:
    where the engine is kept, so that a run that was killed goes on from there; None for
    `out`/.cache. allow_slower: keep int8 that is not faster than fp16. replace: its name may
    go from another checkpoint to this one. compile_changes: values of [compile] that this machine
    wants otherwise (timing_cache, weight_stripped, refit_from). An
    artifact completed before on such a machine is verified and returned. Raises ArtifactError, what
    the target raises for a machine that does not fit, ParityError, QuantizationError.
    """
    given = _opened(path, compile_changes)
    slot = _slot(given, compile_changes, out)
    cache = cache or Cache(root=slot.out / FOLDER)
    wanted = cache_keys.of_completion(given.content, given.chosen, given.engine)
    with (
        _forgotten_if_wrong(cache, wanted),
        open_run(slot.out, listen) as run,
        cache.lease() as kept,
    ):
        store.check_name(slot, identity.of_manifest(given.content), replace=replace)
        done = store.find(slot)
        if done is not None:
            store.point_latest(slot, scratch=run.folder, replace=replace)
            listen(Event(kind="note", stage="package", text="already compiled for this machine"))
            return done
        with run.stage("compile") as note:
            model, spec = _graph(given), given.chosen.compile
            compiled = kept.obtain(
                wanted,
                lambda room: compile_stage.run(model, given.engine, spec, out_dir=room),
                spare=lambda: run.room("compile"),
                tell=note,
            )
        with (
            run.stage("validate") as note,
            store.kept_report((room := run.room("validate")) / validate.REPORT, slot),
        ):
            report = _judged(given, compiled, run, room)
            note(f"lowest cosine {report.metrics['overall']['cosine_min']:.8f}")
            speeds = _speeds(given, slot, compiled)
            if len(speeds) > 1:
                allowed = allow_slower or given.chosen.quantize.allow_slower
                note(int8_checks.faster(speeds, slot.precision, allowed=allowed))
            elif slot.precision == int8_checks.INT8:
                note(f"no {slot.target}-fp16 for this machine to compare its speed with")
        with run.stage("package"):
            own = run.room("engine")
            for name in compiled.files:
                kept.take(compiled.folder / name, own / name)
            staged = package.complete(
                path,
                given.content,
                dataclasses.replace(compiled, folder=own),
                report,
                package.Completed(version=slot.version, runs_on=given.engine.fingerprint()),
                report_path=room / validate.REPORT,
                out_dir=run.room("package"),
            )
            made = store.place(staged, slot, replace=replace)
        measured = run.measured() | {"speed": int8_checks.listed(speeds)}
        store.keep_measured(made, measured, scratch=run.folder)
        return made


def _opened(path: Path, changes: Mapping[str, Any]) -> Portable:
    """Verify the artifact first of all, then that it is portable and that this machine fits."""
    content = manifest.verify(path).content
    engine = targets.load(content["target"])
    _check_portable(path, content, engine)
    targets.check_installed(engine.run_needs, extra=engine.extra, purpose="compiling here")
    engine.ready()
    chosen = recipe.from_table(content["recipe"], origin=f"{path.name}/{manifest.NAME}")
    chosen = recipe.checked(chosen.replace_compile(**changes), origin="the command line")
    return Portable(
        path=path,
        content=content,
        engine=engine,
        chosen=chosen,
        stored=reference.read(path / reference.NAME),
        tokenizer=TextTokenizer.open(path, max_tokens=embedding_of(content).max_tokens),
    )


def _judged(given: Portable, compiled: CompiledModel, run: Run, room: Path) -> ParityReport:
    """The engine's vectors beside the checkpoint's own."""
    engine, tokenizer = given.engine, given.tokenizer
    return validate.against(
        given.stored,
        Candidate(
            tokenizer=tokenizer,
            open=lambda: engine.runner(compiled, engine.devices[0], 0),
            embedding=embedding_of(given.content),
            outputs=compiled.signature.outputs,
        ),
        spec=given.chosen.validate,
        precision=given.content["precision"],
        out_dir=room,
        progress=lambda done, total: run.progress("validate", done, total),
    )


@contextlib.contextmanager
def _forgotten_if_wrong(cache: Cache, wanted: Wanted) -> Iterator[None]:
    """Keep no engine that does not open or computes something else: the next one may be right.

    TensorRT chooses by what it measures, so the same build again gives another engine.
    """
    try:
        yield
    except (EngineError, ParityError):
        if cache.root is not None:
            with contextlib.suppress(OSError):
                entries.remove_damaged(cache.root, wanted.name)
                entries.tidy(cache.root)
        raise


def _check_portable(path: Path, content: Mapping[str, Any], engine: Target) -> None:
    if content["engine"]["facts"].get("portable") is not True:
        raise ArtifactError(
            f"{path} is not a portable artifact",
            evidence=f"{content['target']}-{content['precision']}: its engine is built already "
            f"({', '.join(content['engine']['files'])})",
            fix=f"jexport compile takes what `jexport build --target {engine.name} --until compile`"
            " makes"
            if engine.portable
            else "open it as it is",
        )


def _slot(given: Portable, changes: Mapping[str, Any], out: Path | None) -> store.Slot:
    """Beside the portable one: its version, and a digest of the machine and what was asked."""
    content = given.content
    asked = {key: value for key, value in changes.items() if key != "timing_cache"}
    machine = manifest.sha256_of([given.engine.fingerprint(), content["sha256"], asked])[:8]
    parents = given.path.resolve().parents
    return store.Slot(
        out=out if out is not None else parents[3] if len(parents) > 3 else parents[0],
        model=content["name"],
        task=content["task"],
        target=content["target"],
        precision=content["precision"],
        version=f"{content['version']}-{machine}",
    )


def _graph(given: Portable) -> OnnxModel:
    """The graph that the portable artifact carries."""
    path, content = given.path, given.content
    held = compiled_model(path, content)
    facts = content["engine"]["facts"]
    digests = {one["path"]: one["sha256"] for one in content["files"]}
    return OnnxModel(
        path=path / held.files[0],
        signature=held.signature,
        precision=held.precision,
        opset=facts["opset"],
        sha256=manifest.sha256_of({name: digests[name] for name in held.files}),
        max_tokens=facts["max_tokens"],
    )


def _speeds(given: Portable, slot: store.Slot, compiled: CompiledModel) -> dict[str, float]:
    """int8 beside the fp16 artifact of this model and machine, when that was compiled before."""
    content, engine = given.content, given.engine
    if content["precision"] != int8_checks.INT8:
        return {}
    beside = dataclasses.replace(slot, precision="fp16").parent / store.LATEST
    if not (beside / manifest.NAME).is_file():
        return {}
    other = manifest.verify(beside.resolve()).content
    if other["engine"]["facts"].get("portable") or (
        other["engine"]["runs_on"] != engine.fingerprint()
    ):
        return {}
    batch = speed.feeds(given.stored.ids, content["embedding"]["max_tokens"])
    with contextlib.ExitStack() as stack:
        device = engine.devices[0]
        runners = {
            "fp16": stack.enter_context(
                engine.runner(compiled_model(beside.resolve(), other), device, 0)
            ),
            int8_checks.INT8: stack.enter_context(engine.runner(compiled, device, 0)),
        }
        return speed.compare(runners, batch)
