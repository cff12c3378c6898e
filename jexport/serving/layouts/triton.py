"""triton: built artifacts (onnx, trt) -> a model repository that Triton serves, one model a task.

    <out>/<model>_<task>/config.pbtxt
    <out>/<model>_<task>/warmup/        what the warm-up inputs in it name
    <out>/<model>_<task>/<number>/      one artifact, byte for byte

Triton takes a folder for a version when its name begins with a number (`1_Pooling` would be version
1) and opens only the engine's file in it, so the whole artifact lies there: `jexport verify` works
on it, and a client finds tokenizer, prompt and pooling beside the engine that it asks.
Files are copied, never linked: a repository is mounted into a container or sent to a bucket without
what a link points to, onnx refuses linked weights, and by a hard link an edit of the artifact would
reach the server. This module knows no engine and starts no server.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.artifacts import identity, manifest, store
from jexport.errors import ArtifactError, LayoutError, OutputPathError
from jexport.serving.layouts import Layout, Wishes, Written
from jexport.serving.layouts._triton_config import (
    BACKENDS,
    MASK,
    WARMUP,
    Plan,
    is_sealed,
    plan,
    text,
)
from jexport.tasks import NONE
from jexport.types import Artifact
from jexport.workspace.run import is_out_of_space, open_run

CONFIG = "config.pbtxt"
SUFFIX = {"onnx": ".onnx", "trt": ".plan"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""A model's name is its folder's, and part of every URL that asks it."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One artifact on its way in. known: manifests of the versions there are, by number.

    edited: somebody changed the config, which is then left as it is.
    """

    artifact: Artifact
    name: str
    plan: Plan
    number: int
    known: Mapping[int, Mapping[str, Any]]
    edited: bool

    @property
    def new(self) -> bool:
        return self.number not in self.known


def write(artifacts: Sequence[Artifact], out: Path, wishes: Wishes) -> list[Written]:
    """Put artifacts into a model repository.

    An artifact that is there already keeps its number; another one of the same task gets the next,
    which Triton then serves. Nothing is put in place before everything is copied and checked.

    Args:
        artifacts: each is verified again.
        out: the repository, which is made when it is missing.
        wishes: what the user asks for.

    Returns:
        Each artifact as it stands there, in the order given.

    Raises:
        ArtifactError: one was changed, here or there.
        LayoutError: one is not for Triton or of another checkpoint, or two are of one task.
        OutputPathError: `out` holds something else, or a config that somebody changed.
        DiskFullError: no space is left.
    """
    checked = [_checked(artifact, out) for artifact in artifacts]
    _check_repository(out)
    jobs = [_job(artifact, out, wishes) for artifact in checked]
    _check_apart(jobs)
    with open_run(out, doing="package") as run:
        staged = {job.name: _stage(job, run.folder) for job in jobs}
        for job in jobs:
            _place(job, staged[job.name], out)
    return [
        Written(
            name=job.name,
            version=job.number,
            path=out / job.name / str(job.number),
            new=job.new,
            notes=(*job.plan.notes, *_remarks(job)),
        )
        for job in jobs
    ]


def model_name(content: Mapping[str, Any]) -> str:
    """The model's name in Triton: `<model>_<task>`, or the model's alone for the task `none`.

    Args:
        content: the artifact's manifest.

    Returns:
        The name, also its folder's.

    Raises:
        LayoutError: it cannot be a folder's name and part of a URL.
    """
    task = content["task"]
    name = content["name"] if task == NONE else f"{content['name']}_{task}"
    if not NAME.fullmatch(name):
        raise LayoutError(
            f"'{name}' cannot be a model's name in Triton",
            evidence="it is a folder's name and part of a URL: letters, digits, '.', '_' and '-'",
            fix="set another name in the recipe and build again",
        )
    return str(name)


def _checked(artifact: Artifact, out: Path) -> Artifact:
    """The artifact as verified now; refuses what this layout cannot take."""
    verified = manifest.verify(artifact.path)
    content = verified.content
    target, engine = content["target"], content["engine"]["files"][0]
    if target not in BACKENDS:
        raise LayoutError(
            f"Triton's layout does not take artifacts of target '{target}'",
            evidence=f"{artifact.path}; it takes: {', '.join(BACKENDS)}",
            fix=f"build it with --target {next(iter(BACKENDS))}",
        )
    if not engine.endswith(SUFFIX[target]):
        raise LayoutError(
            f"{artifact.path} holds no engine that Triton opens",
            evidence=f"its engine is {engine}, a {target} engine ends in {SUFFIX[target]}",
            fix="finish it with `jexport compile` on the GPU machine",
        )
    if out.resolve().is_relative_to(artifact.path.resolve()):
        raise OutputPathError(
            "a repository inside an artifact would change the artifact",
            evidence=f"{out} is in {artifact.path}",
            fix="choose another folder with --out DIR",
        )
    return Artifact(path=artifact.path, manifest=verified)


def _check_repository(out: Path) -> None:
    """Refuse a folder that holds anything but Triton models: files and dot folders are ignored."""
    if os.path.lexists(out) and not out.is_dir():
        raise _not_a_repository(out, "it is not a folder")
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.is_dir() and not path.name.startswith(".") and not (path / CONFIG).is_file():
            raise _not_a_repository(out, f"{path.name} is a folder without {CONFIG}")


def _job(artifact: Artifact, out: Path, wishes: Wishes) -> _Job:
    content = artifact.manifest.content
    name = model_name(content)
    known = _known(out / name, content["target"])
    edited = bool(known) and not is_sealed(_config(out / name))
    same = [n for n, other in known.items() if other["sha256"] == content["sha256"]]
    if edited and not same:
        raise OutputPathError(
            f"{out / name / CONFIG} was changed since jexport wrote it",
            evidence="a new version may need another config, and yours would be lost",
            fix="write to an empty folder with --out DIR and bring the two together by hand",
        )
    if known and not same and not wishes.replace:
        _check_checkpoint(content, known[max(known)], out / name)
    number = same[0] if same else max(known, default=0) + 1
    if same:
        manifest.verify(out / name / str(number))
    newest = content if number >= max(known, default=0) else known[max(known)]
    return _Job(
        artifact=artifact,
        name=name,
        plan=plan(newest, wishes),
        number=number,
        known=known,
        edited=edited,
    )


def _check_checkpoint(content: Mapping[str, Any], newest: Mapping[str, Any], model: Path) -> None:
    """Refuse a version that is another model: Triton would serve it under the same name."""
    one, other = identity.of_manifest(content), identity.of_manifest(newest)
    if one.differences(other):
        raise LayoutError(
            f"{model} serves another checkpoint",
            evidence=f"its newest version: {other}\nthis one: {one}",
            fix="build it with a name of its own (--name NAME); where it is the next state of the"
            " same model, say so with --replace: Triton then serves it",
        )


def _known(model: Path, target: str) -> dict[int, Mapping[str, Any]]:
    """Manifests of the versions of a model by number; refuses a model that is not jexport's."""
    if not os.path.lexists(model):
        return {}
    known = {}
    for path in sorted(model.iterdir()) if model.is_dir() else ():
        if path.name.isdecimal() and str(int(path.name)) == path.name:
            try:
                known[int(path.name)] = manifest.read(path).content
            except ArtifactError as error:
                raise _not_ours(model, f"{error.what}: {error.evidence}") from error
    if not known:
        raise _not_ours(model, "it holds no version that is an artifact")
    others = {content["target"] for content in known.values()} - {target}
    if others:
        raise LayoutError(
            f"{model} serves target '{others.pop()}', this artifact is for '{target}'",
            evidence="all versions of a Triton model share one config, and so one backend",
            fix="choose another folder with --out DIR",
        )
    return known


def _check_apart(jobs: Sequence[_Job]) -> None:
    paths: dict[str, Path] = {}
    for job in jobs:
        if job.name in paths:
            raise LayoutError(
                f"two artifacts would be the Triton model '{job.name}'",
                evidence=f"{paths[job.name]}\n{job.artifact.path}",
                fix="give one artifact a task; run again for a second version",
            )
        paths[job.name] = job.artifact.path


def _stage(job: _Job, folder: Path) -> Path:
    """All that will be put in place for one model, below `folder`, copied and checked."""
    model = folder / job.name
    (model / WARMUP).mkdir(parents=True)
    content = job.artifact.manifest.content
    if job.new:
        version = model / str(job.number)
        shutil.copytree(job.artifact.path, version)
        if manifest.verify(version).content["sha256"] != content["sha256"]:
            raise ArtifactError(
                f"artifact {job.artifact.path} changed while it was copied",
                evidence="its manifest is another one now",
                fix="run again when nothing writes to it",
            )
    every = {**job.known, job.number: content}
    served = every[max(every)]
    for one in job.plan.warmups:
        for spec in served["engine"]["inputs"]:
            if spec["name"] == MASK:
                path = model / WARMUP / one.mask_file(spec["dtype"])
                path.write_bytes(one.mask(spec["dtype"]))
    if not job.edited:
        held = {n: f"{of['version']} {of['precision']} {of['sha256']}" for n, of in every.items()}
        config = text(job.name, served, job.plan, held)
        (model / CONFIG).write_text(config, encoding="utf-8")
    store.sync_tree(model)
    return model


def _place(job: _Job, staged: Path, out: Path) -> None:
    """A new model in one step; a new version before the config that names it.

    Whoever is stopped between the two finds the version again by its digest and writes the config.
    """
    model = out / job.name
    try:
        if not job.known:
            os.rename(staged, model)
        else:
            (model / WARMUP).mkdir(exist_ok=True)
            for path in sorted((staged / WARMUP).iterdir()):
                os.replace(path, model / WARMUP / path.name)
            if job.new:
                os.rename(staged / str(job.number), model / str(job.number))
            if not job.edited:
                os.replace(staged / CONFIG, model / CONFIG)
            store.sync(model)
        store.sync(out)
    except OSError as error:
        if is_out_of_space(error):
            raise
        raise OutputPathError(
            f"cannot put {job.name}, version {job.number}, into {out}",
            evidence=str(error),
            fix="run again; if it stays, move that folder away",
        ) from error


def _config(model: Path) -> str:
    return (model / CONFIG).read_text(encoding="utf-8", errors="replace")


def _remarks(job: _Job) -> Iterator[str]:
    yield from _prompt_notes(job.artifact.manifest.content["embedding"])
    if job.edited:
        yield f"{job.name}/{CONFIG} was changed by somebody and is left as it is"
    newest = max((*job.known, job.number))
    if newest != job.number:
        yield (
            f"version {job.number} was there already; Triton serves {newest}: "
            f"remove {job.name}/{newest} to go back"
        )


def _prompt_notes(embedding: Mapping[str, Any]) -> Iterator[str]:
    """The prompts, which a client has to put before its texts: Triton is sent token ids."""
    if embedding["prompt"]:
        yield f"the client puts the prompt before each text: {embedding['prompt']!r}"
    named = {
        name: text
        for name, text in embedding.get("prompts", {}).items()
        if text and text != embedding["prompt"]
    }
    if named:
        listed = ", ".join(f"{name} {text!r}" for name, text in named.items())
        yield f"Triton knows no prompt by its name; the client puts it before each text: {listed}"


def _not_ours(model: Path, evidence: str) -> OutputPathError:
    return OutputPathError(
        f"{model} is not a Triton model of jexport's",
        evidence=evidence,
        fix="move it away, or choose another folder with --out DIR",
    )


def _not_a_repository(out: Path, evidence: str) -> OutputPathError:
    return OutputPathError(
        f"{out} is not a Triton model repository",
        evidence=evidence,
        fix="name an empty or a new folder with --out DIR",
    )


LAYOUT = Layout(
    name="triton",
    summary="a model repository for NVIDIA Triton Inference Server",
    targets=tuple(BACKENDS),
    write=write,
)
