"""Artifact folders: <out>/<model>/<task>/<target>-<precision>/<version>/, written whole or not at all.

A folder appears under its final name by one rename, after every byte is on the disk. `latest` in
the parent names the newest version. This module knows nothing of what is in an artifact.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jexport import manifest
from jexport.errors import ArtifactError, JexportError
from jexport.flow import Artifact

LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one artifact lives below the folder of all artifacts."""

    out: Path
    model: str
    task: str
    target: str
    precision: str
    version: str

    @property
    def parent(self) -> Path:
        """The folder of all versions."""
        return self.out / self.model / self.task / f"{self.target}-{self.precision}"

    @property
    def path(self) -> Path:
        """The folder of this version."""
        return self.parent / self.version


def find(slot: Slot) -> Artifact | None:
    """The artifact in a slot, verified; None when there is none.

    Raises ArtifactError when there is one and it was changed: nobody should build over it unasked.
    """
    if not slot.path.exists():
        return None
    return Artifact(path=slot.path, manifest=manifest.verify(slot.path))


def place(staged: Path, slot: Slot) -> Artifact:
    """Move a finished folder into its slot in one step and point `latest` at it.

    When another run placed the same version first, that one is kept and `staged` is dropped.
    """
    _sync_tree(staged)
    slot.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(staged, slot.path)
    except OSError:
        if not slot.path.exists():
            raise
        shutil.rmtree(staged, ignore_errors=True)
    _sync(slot.parent)
    point_latest(slot)
    return Artifact(path=slot.path, manifest=manifest.verify(slot.path))


def point_latest(slot: Slot) -> None:
    """Make `latest` beside the version name this version, unless it does already."""
    link = slot.parent / LATEST
    if link.is_symlink() and os.readlink(link) == slot.version:
        return
    fresh = slot.parent / f".{LATEST}-{secrets.token_hex(4)}"
    os.symlink(slot.version, fresh)
    try:
        os.replace(fresh, link)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    _sync(slot.parent)


def keep_report(report: Path, slot: Slot) -> Path | None:
    """Copy the report of a failed build to `<version>.failed.json` beside the versions."""
    if not report.is_file():
        return None
    slot.parent.mkdir(parents=True, exist_ok=True)
    kept = slot.parent / f"{slot.version}.failed.json"
    shutil.copyfile(report, kept)
    return kept


def artifacts(out: Path) -> Iterator[Artifact]:
    """Every readable artifact below a folder, by path; `latest` links are not followed."""
    for path in sorted(out.glob(f"*/*/*/*/{manifest.NAME}")):
        folder = path.parent
        if folder.is_symlink() or folder.parts[len(out.parts)].startswith("."):
            continue
        with contextlib.suppress(ArtifactError):
            yield Artifact(path=folder, manifest=manifest.read(folder))


def is_latest(artifact: Artifact) -> bool:
    """Whether `latest` names this artifact."""
    link = artifact.path.parent / LATEST
    return link.is_symlink() and os.readlink(link) == artifact.path.name


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain(error: JexportError, slot: Slot) -> JexportError:
    """Say of a changed artifact in the way of a build how to get past it."""
    error.add_note(f"  (the build would have written {slot.path}; move that folder away first)")
    return error
