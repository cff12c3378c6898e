"""Artifact folders: <out>/<model>/<task>/<target>-<precision>/<version>/, written whole or not.

A folder appears under its final name by one rename, after every byte is on the disk. `latest` in
the parent names the newest version. This module knows nothing of what is in an artifact.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.artifacts import identity, manifest
from jexport.artifacts.identity import Checkpoint
from jexport.errors import ArtifactError, JexportError, OutputPathError, ParityError
from jexport.types import Artifact
from jexport.workspace.run import NO_SPACE, WORK, exclusive, tidy

LATEST = "latest"
RUN = "run.json"
NAMES = "names"
"""The lock under which `latest` is moved."""

SHOWN_FILES = 4
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
"""What rename says when another run's artifact has the name already."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one artifact lives below the folder of all artifacts.

    Args:
        out: the folder of all artifacts.
        model: the model's name.
        task: as the checkpoint names it.
        target: name of the engine.
        precision: of the artifact.
        version: the recipe's, with the digest of all that went into the artifact.

    Raises:
        OutputPathError: a part below `out` is not a plain name.
    """

    out: Path
    model: str
    task: str
    target: str
    precision: str
    version: str

    def __post_init__(self) -> None:
        for part in (self.model, self.task, self.target, self.precision, self.version):
            if part in ("", ".", "..") or set(part) & set("/\0"):
                raise OutputPathError(
                    "cannot name an artifact's folder",
                    evidence=f"{part!r} is not a plain name",
                    fix="rename the task in the checkpoint's config.json",
                )

    @property
    def parent(self) -> Path:
        """The folder of all versions."""
        return self.out / self.model / self.task / f"{self.target}-{self.precision}"

    @property
    def path(self) -> Path:
        """The folder of this version."""
        return self.parent / self.version


def find(slot: Slot) -> Artifact | None:
    """The artifact in a slot, verified.

    Args:
        slot: where it would be.

    Returns:
        The artifact; None when there is none.

    Raises:
        ArtifactError: there is one and it was changed: nobody should build over it unasked.
        OutputPathError: a file stands where the slot's folders belong.
    """
    if os.path.lexists(slot.path):
        return Artifact(path=slot.path, manifest=manifest.verify(slot.path))
    above = next(f for f in (slot.parent, *slot.parent.parents) if os.path.lexists(f))
    if not above.is_dir():
        raise _cannot_place(slot, f"{above} is not a folder")
    return None


def check_name(slot: Slot, checkpoint: Checkpoint, *, replace: bool) -> None:
    """Refuse to let a name go from one checkpoint to another, unless that is meant.

    Where the slot has a `latest`, its checkpoint counts; in a new slot the model's other slots do,
    of which one must be of this checkpoint. By what is on the disk, so that two names that a file
    system holds for one are one here as well.

    Args:
        slot: where the artifact is to go.
        checkpoint: what it is made of.
        replace: the name may go from another checkpoint to this one; nothing is checked.

    Raises:
        OutputPathError: the name is another checkpoint's.
    """
    if replace:
        return
    own = identity.of_folder(slot.parent / LATEST)
    held = {slot.parent: own} if own is not None else _others(slot)
    odd = {place: one for place, one in held.items() if checkpoint.differences(one)}
    if not odd or len(odd) < len(held):
        return
    place, other = next(iter(odd.items()))
    names = checkpoint.differences(other)
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    raise OutputPathError(
        f"'{slot.model}' is the name of another checkpoint in {slot.out}",
        evidence=f"{place / LATEST}: {other}\nthis one: {checkpoint}\n"
        f"other files: {', '.join(names[:SHOWN_FILES])}{more}",
        fix="give this one a name of its own (jexport build --name NAME, or name in the recipe), or"
        " another folder with --out DIR; where it is the next state of the same model, say so with"
        " --replace: `latest` then moves to it",
    )


def _others(slot: Slot) -> dict[Path, Checkpoint]:
    """The checkpoints that `latest` names in all slots of the model, by slot."""
    others = {}
    for path in sorted((slot.out / slot.model).glob(f"*/*/{LATEST}/{manifest.NAME}")):
        one = identity.of_folder(path.parent)
        if one is not None:
            others[path.parent.parent] = one
    return others


def place(staged: Path, slot: Slot, *, replace: bool = False) -> Artifact:
    """Move a finished and verified folder into its slot in one step and point `latest` at it.

    When another run placed the same version first, that one is kept and `staged` is dropped.

    Args:
        staged: the folder, on the file system of the slot; its parent takes the new link.
        slot: where it goes.
        replace: as in `check_name`, which is asked again here: another run may have been faster.

    Returns:
        The artifact, in place.

    Raises:
        OutputPathError: as `check_name`; a folder cannot be made, or `latest` is not a link.
        ArtifactError: the version that another run placed was changed.
        OSError: the disk is full.
    """
    sync_tree(staged)
    checkpoint = identity.of_manifest(manifest.read(staged).content)
    with exclusive(slot.out / WORK, NAMES):
        check_name(slot, checkpoint, replace=replace)
        try:
            slot.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged, slot.path)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            if error.errno not in TAKEN or not slot.path.is_dir():
                raise _cannot_place(slot, str(error)) from error
            manifest.verify(slot.path)
            shutil.rmtree(staged, ignore_errors=True)
        sync(slot.parent)
        _point(slot, work_dir=staged.parent)
    return Artifact(path=slot.path, manifest=manifest.read(slot.path))


def point_latest(slot: Slot, *, work_dir: Path, replace: bool = False) -> None:
    """Make `latest` beside the version name this version, unless it does already.

    Args:
        slot: the version, in place.
        work_dir: a folder of the same file system that is removed in any case; the link is made
            there, so that a run killed in between leaves nothing among the versions.
        replace: as in `check_name`.

    Raises:
        OutputPathError: as `check_name`; or `latest` is not a link.
    """
    link = slot.parent / LATEST
    if link.is_symlink() and os.readlink(link) == slot.version:
        tidy(slot.out / WORK)  # of a run that was killed when it had moved the link
        return
    checkpoint = identity.of_manifest(manifest.read(slot.path).content)
    with exclusive(slot.out / WORK, NAMES):
        check_name(slot, checkpoint, replace=replace)
        _point(slot, work_dir=work_dir)


def _point(slot: Slot, *, work_dir: Path) -> None:
    link = slot.parent / LATEST
    if link.is_symlink() and os.readlink(link) == slot.version:
        return
    if link.exists() and not link.is_symlink():
        raise OutputPathError(
            f"{link} is not a link, so it cannot name the newest version",
            evidence=f"it was left as it is; the artifact is in {slot.path}",
            fix="remove it and build again, or copy artifacts with links kept (cp -a)",
        )
    fresh = work_dir / f"{LATEST}-{secrets.token_hex(4)}"
    fresh.symlink_to(slot.version)
    os.replace(fresh, link)
    sync(slot.parent)


def keep_measured(artifact: Artifact, measured: Mapping[str, Any], *, work_dir: Path) -> None:
    """Put what this run measured beside the artifact: `<version>.run.json`.

    Seconds, memory and speeds are never twice the same, so they are no part of what is verified
    and published.

    Args:
        artifact: in place.
        measured: JSON-ready, by name.
        work_dir: as in `point_latest`.
    """
    fresh = work_dir / RUN
    manifest.write_json(fresh, {"artifact": artifact.manifest.content["sha256"], **measured})
    sync(fresh)
    os.replace(fresh, artifact.path.parent / f"{artifact.path.name}.{RUN}")


def measured(folder: Path) -> Mapping[str, Any]:
    """What was measured when an artifact was built.

    One of manifest format 1 says it itself; a newer one's file may not be with it.

    Args:
        folder: of the artifact, or a link to it.

    Returns:
        `stages`, `speed` and `pair`, as far as they were measured; {} where unknown.

    Raises:
        ArtifactError: as `manifest.read`.
    """
    content = manifest.read(folder).content
    if "stages" in content:
        return {key: content[key] for key in ("stages", "speed") if key in content}
    path = folder.resolve()
    try:
        measures = json.loads((path.parent / f"{path.name}.{RUN}").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(measures, dict) and measures.get("artifact") == content["sha256"]
    return measures if known else {}


def keep_report(report: Path, slot: Slot) -> Path | None:
    """Move the report of a failed build to `<version>.failed.json` beside the versions.

    Args:
        report: of the validation.
        slot: the artifact that is not to be.

    Returns:
        Where it is now; None when there was none.
    """
    if not report.is_file():
        return None
    slot.parent.mkdir(parents=True, exist_ok=True)
    kept = slot.parent / f"{slot.version}.failed.json"
    os.replace(report, kept)
    return kept


@contextlib.contextmanager
def kept_report(report: Path, slot: Slot) -> Iterator[None]:
    """When validation fails, keep its report beside the versions and say where it is.

    Args:
        report: where the validation writes it.
        slot: the artifact that is validated.

    Yields:
        Nothing; a ParityError goes on, with a note of where its report is.
    """
    try:
        yield
    except ParityError as error:
        try:
            kept = keep_report(report, slot)
            if kept is not None:
                error.add_note(f"  report: {kept}")
        except OSError as trouble:
            error.add_note(f"  its report could not be kept: {trouble}")
        raise


def _cannot_place(slot: Slot, evidence: str) -> OutputPathError:
    return OutputPathError(
        f"cannot put an artifact into {slot.parent}",
        evidence=evidence,
        fix="move that away, or choose another folder with --out DIR",
    )


def artifacts(out: Path) -> Iterator[Artifact]:
    """Every readable artifact below a folder, by path; `latest` links are not followed.

    Args:
        out: the folder of all artifacts.

    Yields:
        Each with its manifest; its files are not read.
    """
    for path in sorted(out.glob(f"*/*/*/*/{manifest.NAME}")):
        folder = path.parent
        if folder.is_symlink() or folder.parts[len(out.parts)].startswith("."):
            continue
        with contextlib.suppress(ArtifactError):
            yield Artifact(path=folder, manifest=manifest.read(folder))


def is_latest(artifact: Artifact) -> bool:
    """Whether `latest` names this artifact.

    Args:
        artifact: in place.

    Returns:
        True where the link beside it names its version.
    """
    link = artifact.path.parent / LATEST
    return link.is_symlink() and os.readlink(link) == artifact.path.name


def sync_tree(folder: Path) -> None:
    """Have every byte of a folder on the disk before it gets its name.

    Args:
        folder: whose files and folders are written to the disk.
    """
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have one file, or the names in one folder, on the disk.

    Args:
        path: of the file or folder.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain(error: JexportError, slot: Slot) -> JexportError:
    """Say of a changed artifact in the way of a build how to get past it.

    Args:
        error: what `find` raised.
        slot: where the build would have written.

    Returns:
        The same error, with a note.
    """
    error.add_note(f"  (the build would have written {slot.path}; move that folder away first)")
    return error
