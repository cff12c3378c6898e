"""An artifact that comes from a node: written beside the store, verified, then placed.

What a node says is not believed: names stay inside the folder, and every byte is compared with the
manifest before the artifact gets its name.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import IO

from jexport.artifacts import identity, manifest, store
from jexport.errors import ArtifactError
from jexport.jobs.matrix import Job
from jexport.jobs.ray import node
from jexport.types import Artifact


class Receiver:
    """One artifact on its way.

    work_dir: a folder of the store's file system, for what is not whole.

    Raises ArtifactError, and OutputPathError as `store.check_name` does.
    """

    def __init__(
        self, header: node.ArtifactHeader, work_dir: Path, out: Path, *, replace: bool = False
    ) -> None:
        self._replace = replace
        self._folder = work_dir / secrets.token_hex(8)
        self._folder.mkdir()
        if hashlib.sha256(header.manifest).hexdigest() != header.sha256:
            raise refused("its manifest is not the one that was announced")
        (self._folder / manifest.NAME).write_bytes(header.manifest)
        content = manifest.read(self._folder).content
        self._listed = {entry["path"]: entry["size_bytes"] for entry in content["files"]}
        # A manifest that names a file outside of its folder is refused by `manifest.read`.
        self._awaited = set(self._listed)
        self._open: tuple[str, IO[bytes]] | None = None
        self._slot = store.Slot(
            out=out,
            model=content["name"],
            task=content["task"],
            target=content["target"],
            precision=content["precision"],
            version=content["version"],
        )
        # Before its files come; the names that it lists are known to be plain by now.
        store.check_name(self._slot, identity.of_manifest(content), replace=replace)

    def held(self) -> Artifact:
        """The artifact of this version that the store has already, verified."""
        existing = store.find(self._slot)
        if existing is None:
            raise refused(f"{self._slot.path} was here when the job began, and is no more")
        store.point_latest(self._slot, work_dir=self._folder, replace=self._replace)
        self.drop()
        return existing

    def write(self, piece: node.FileChunk) -> None:
        """The next piece of a file; files come one after the other, pieces in order.

        Args:
            piece: of a file that the manifest lists.

        Raises:
            ArtifactError: a file that is not listed, comes twice or is longer than listed.
        """
        if self._open is None or self._open[0] != piece.path:
            self._close()
            if piece.path not in self._awaited:
                raise refused(f"{piece.path!r:.80} is not in its manifest, or came twice")
            self._awaited.remove(piece.path)
            path = self._folder / piece.path
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open = (piece.path, open(path, "xb"))  # noqa: SIM115 (closed by _close)
        stream = self._open[1]
        if stream.tell() + len(piece.content) > self._listed[piece.path]:
            raise refused(f"{piece.path} is longer than its manifest says")
        stream.write(piece.content)

    def place(self) -> Artifact:
        """Verify every file and give the artifact its name. Raises ArtifactError."""
        self._close()
        try:
            manifest.verify(self._folder)
            return store.place(self._folder, self._slot, replace=self._replace)
        finally:
            self.drop()

    def drop(self) -> None:
        """Forget what came so far."""
        with contextlib.suppress(OSError):  # a full disk speaks up at the last bytes, too
            self._close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _close(self) -> None:
        if self._open is not None:
            stream, self._open = self._open[1], None
            stream.close()


def versions(out: Path, job: Job) -> tuple[str, ...]:
    """The versions of a job's artifact that are in a store, of whichever model.

    Args:
        out: the store's folder.
        job: its task, use, target and precision count.

    Returns:
        Names of versions, sorted, without `latest`.
    """
    manifests = out.glob(
        f"*/{glob.escape(job.task_name)}/{job.target}-{job.precision}/*/{manifest.NAME}"
    )
    return tuple(sorted(path.parent.name for path in manifests if not path.parent.is_symlink()))


def keep_beside(sent: node.SidecarFile, job: Job, work_dir: Path, out: Path) -> None:
    """Put a file beside the versions of a job's artifact, in one step.

    Args:
        sent: the file, as its node names it.
        job: whose file it must be.
        work_dir: a folder of the store's file system, for what is not whole.
        out: the store's folder.

    Raises:
        ArtifactError: its name is not that of a report of this job.
    """
    parts = sent.path.split("/")
    plain = all(part and not part.startswith(".") and "\0" not in part for part in parts)
    own = parts[1:3] == [job.task_name, f"{job.target}-{job.precision}"]
    if len(parts) != 4 or not plain or not own or not parts[3].endswith(".json"):
        raise refused(f"{sent.path!r:.80} is no report of {job.key}")
    place = out.joinpath(*parts)
    if place.is_dir():
        raise refused(f"{sent.path!r:.80} is a folder here")
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = work_dir / secrets.token_hex(8)
    fresh.write_bytes(sent.content)
    os.replace(fresh, place)


def refused(evidence: str) -> ArtifactError:
    """The error for an artifact that is not what its node said.

    Args:
        evidence: what shows that.

    Returns:
        The error, to be raised.
    """
    return ArtifactError(
        "an artifact from a node was refused",
        evidence=evidence,
        fix="run the job again; when it happens again, look at that node's disk and memory",
    )
