"""The build of a portable artifact on the machine that has its engine: compile, validate, package.

Needs neither the checkpoint nor torch: the graph, the profiles, the gates and the reference vectors
are in the artifact. The portable artifact is left as it is, for the next machine.
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
from jexport.building import cache_keys
from jexport.cache import entries
from jexport.cache.stages import FOLDER, Cache, Lease, StageKey
from jexport.errors import ArtifactError, EngineError, ParityError
from jexport.evaluation import int8_checks, speed
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
class PortableArtifact:
    """A portable artifact, verified and opened.

    Args:
        path: its folder.
        content: its manifest.
        target: the engine to compile.
        recipe: its own, with this machine's changes.
        stored: the reference vectors and the texts that they are of.
        tokenizer: as the runtime will use it.
    """

    path: Path
    content: Mapping[str, Any]
    target: Target
    recipe: Recipe
    stored: reference.Stored
    tokenizer: TextTokenizer


def compile_portable(
    path: Path,
    *,
    out: Path | None = None,
    cache: Cache | None = None,
    allow_slower: bool = False,
    replace: bool = False,
    listen: Listener = silent,
    **compile_changes: Any,
) -> Artifact:
    """Compile the engine of a portable artifact here, and write an artifact with it.

    An artifact that was compiled before on such a machine is verified and returned.

    Args:
        path: the portable artifact.
        out: the folder of all artifacts; None for the one that the portable artifact is in.
        cache: keeps the engine, so that a run that was killed goes on from there; None for
            `out`/.cache.
        allow_slower: keep int8 that is not faster than fp16.
        replace: its name may go from another checkpoint to this one.
        listen: is told of every stage.
        compile_changes: values of [compile] that this machine wants otherwise (timing_cache,
            weight_stripped, refit_from).

    Returns:
        The artifact, in place.

    Raises:
        ArtifactError: it is not portable, or was changed.
        ParityError, QuantizationError: a gate was not passed.
        JexportError: what the target raises for a machine that it cannot compile on.
    """
    portable = _opened(path, compile_changes)
    slot = _slot(portable, compile_changes, out)
    cache = cache or Cache(root=slot.out / FOLDER)
    key = cache_keys.portable_build_key(portable.content, portable.recipe, portable.target)
    with _forgotten_if_wrong(cache, key), open_run(slot.out, listen) as run, cache.lease() as lease:
        store.check_name(slot, identity.of_manifest(portable.content), replace=replace)
        existing = store.find(slot)
        if existing is not None:
            store.point_latest(slot, work_dir=run.folder, replace=replace)
            listen(Event(kind="note", stage="package", text="already compiled for this machine"))
            return existing
        session = _Session(portable=portable, slot=slot, run=run, lease=lease)
        compiled = session.compile(key)
        allow_slower = allow_slower or portable.recipe.quantize.allow_slower
        report, speeds = session.validate(compiled, allow_slower=allow_slower)
        artifact = store.place(session.package(compiled, report), slot, replace=replace)
        measured = run.measured() | {"speed": int8_checks.speed_rows(speeds)}
        store.keep_measured(artifact, measured, work_dir=run.folder)
        return artifact


@dataclass(frozen=True, kw_only=True)
class _Session:
    """One portable build in progress; slot: where its artifact belongs."""

    portable: PortableArtifact
    slot: store.Slot
    run: Run
    lease: Lease

    @property
    def report_dir(self) -> Path:
        return self.run.folder / "validate"

    def compile(self, key: StageKey) -> CompiledModel:
        portable = self.portable
        with self.run.stage("compile") as note:
            return self.lease.get_or_build(
                key,
                lambda folder: compile_stage.run(
                    _graph(portable), portable.target, portable.recipe.compile, out_dir=folder
                ),
                work_dir=lambda: self.run.work_dir("compile"),
                notify=note,
            )

    def validate(
        self, compiled: CompiledModel, *, allow_slower: bool
    ) -> tuple[ParityReport, dict[str, float]]:
        """The engine's vectors beside the stored ones; texts a second by precision for int8."""
        portable, run = self.portable, self.run
        target, report_dir = portable.target, run.work_dir(self.report_dir.name)
        candidate = Candidate(
            tokenizer=portable.tokenizer,
            open=lambda: target.runner(compiled, target.devices[0], 0),
            embedding=embedding_of(portable.content),
            outputs=compiled.signature.outputs,
        )
        with (
            run.stage("validate") as note,
            store.kept_report(report_dir / validate.REPORT, self.slot),
        ):
            report = validate.against(
                portable.stored,
                candidate,
                spec=portable.recipe.validate,
                precision=portable.content["precision"],
                out_dir=report_dir,
                progress=lambda done, total: run.progress("validate", done, total),
            )
            note(f"lowest cosine {report.metrics['overall']['cosine_min']:.8f}")
            speeds = _speeds(portable, self.slot, compiled)
            for line in _speed_notes(speeds, self.slot, allow_slower=allow_slower):
                note(line)
        return report, speeds

    def package(self, compiled: CompiledModel, report: ParityReport) -> Path:
        """The artifact's folder, not yet in its place."""
        portable = self.portable
        with self.run.stage("package"):
            engine_dir = self.run.work_dir("engine")
            for name in compiled.files:
                self.lease.copy_or_move(compiled.folder / name, engine_dir / name)
            spec = package.PortableSpec(
                version=self.slot.version,
                runs_on=portable.target.fingerprint(),
                report_path=self.report_dir / validate.REPORT,
            )
            return package.complete(
                portable.path,
                portable.content,
                dataclasses.replace(compiled, folder=engine_dir),
                report,
                spec,
                out_dir=self.run.work_dir("package"),
            )


def _speed_notes(
    speeds: Mapping[str, float], slot: store.Slot, *, allow_slower: bool
) -> Iterator[str]:
    if len(speeds) > 1:
        yield int8_checks.check_speed(speeds, slot.precision, allow_slower=allow_slower)
    elif slot.precision == int8_checks.INT8:
        yield f"no {slot.target}-fp16 for this machine to compare its speed with"


def _opened(path: Path, changes: Mapping[str, Any]) -> PortableArtifact:
    """Verify the artifact first of all, then that it is portable and that this machine fits."""
    content = manifest.verify(path).content
    target = targets.load(content["target"])
    _check_portable(path, content, target)
    needs = target.requirements
    targets.check_installed(needs.run, extra=needs.extra, purpose="compiling here")
    target.ready()
    own = recipe.from_table(content["recipe"], origin=f"{path.name}/{manifest.NAME}")
    settled = recipe.checked(own.replace_compile(**changes), origin="the command line")
    return PortableArtifact(
        path=path,
        content=content,
        target=target,
        recipe=settled,
        stored=reference.read(path / reference.NAME),
        tokenizer=TextTokenizer.open(path, max_tokens=embedding_of(content).max_tokens),
    )


@contextlib.contextmanager
def _forgotten_if_wrong(cache: Cache, key: StageKey) -> Iterator[None]:
    """Keep no engine that does not open or computes something else: the next one may be right.

    TensorRT chooses by what it measures, so the same build again gives another engine.
    """
    try:
        yield
    except (EngineError, ParityError):
        if cache.root is not None:
            with contextlib.suppress(OSError):
                entries.remove_damaged(cache.root, key.name)
                entries.tidy(cache.root)
        raise


def _check_portable(path: Path, content: Mapping[str, Any], target: Target) -> None:
    if content["engine"]["facts"].get("portable") is not True:
        raise ArtifactError(
            f"{path} is not a portable artifact",
            evidence=f"{content['target']}-{content['precision']}: its engine is built already "
            f"({', '.join(content['engine']['files'])})",
            fix=f"jexport compile takes what `jexport build --target {target.name} --until compile`"
            " makes"
            if target.compiling.portable
            else "open it as it is",
        )


def _slot(portable: PortableArtifact, changes: Mapping[str, Any], out: Path | None) -> store.Slot:
    """Beside the portable one: its version, and a digest of the machine and what was asked."""
    content = portable.content
    changed = {key: value for key, value in changes.items() if key != "timing_cache"}
    machine = manifest.sha256_of([portable.target.fingerprint(), content["sha256"], changed])[:8]
    parents = portable.path.resolve().parents
    return store.Slot(
        out=out if out is not None else parents[3] if len(parents) > 3 else parents[0],
        model=content["name"],
        task=content["task"],
        target=content["target"],
        precision=content["precision"],
        version=f"{content['version']}-{machine}",
    )


def _graph(portable: PortableArtifact) -> OnnxModel:
    """The graph that the portable artifact carries."""
    path, content = portable.path, portable.content
    compiled = compiled_model(path, content)
    facts = content["engine"]["facts"]
    digests = {one["path"]: one["sha256"] for one in content["files"]}
    return OnnxModel(
        path=path / compiled.files[0],
        signature=compiled.signature,
        precision=compiled.precision,
        opset=facts["opset"],
        sha256=manifest.sha256_of({name: digests[name] for name in compiled.files}),
        max_tokens=facts["max_tokens"],
    )


def _speeds(
    portable: PortableArtifact, slot: store.Slot, compiled: CompiledModel
) -> dict[str, float]:
    """int8 beside the fp16 artifact of this model and machine, when that was compiled before."""
    content, target = portable.content, portable.target
    if content["precision"] != int8_checks.INT8:
        return {}
    half = dataclasses.replace(slot, precision="fp16").parent / store.LATEST
    if not (half / manifest.NAME).is_file():
        return {}
    other = manifest.verify(half.resolve()).content
    if other["engine"]["facts"].get("portable") or (
        other["engine"]["runs_on"] != target.fingerprint()
    ):
        return {}
    batch = speed.feeds(portable.stored.ids, content["embedding"]["max_tokens"])
    with contextlib.ExitStack() as stack:
        device = target.devices[0]
        runners = {
            "fp16": stack.enter_context(
                target.runner(compiled_model(half.resolve(), other), device, 0)
            ),
            int8_checks.INT8: stack.enter_context(target.runner(compiled, device, 0)),
        }
        return speed.compare(runners, batch)
