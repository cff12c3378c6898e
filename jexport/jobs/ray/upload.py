"""A checkpoint's folder on nodes that do not have it: sent by digest, once a node.

Only files of the listing are ever read, and each is compared with its SHA-256 where it arrives.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jexport.artifacts import manifest
from jexport.errors import CheckpointError
from jexport.types import FileDigest

PIECE_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder on offer.

    Args:
        folder: where it is on the driver's machine.
        files: all that is on offer, with their digests.
        source: the Ray actor that reads them, a `Source`.
    """

    folder: Path
    files: tuple[FileDigest, ...]
    source: Any

    @property
    def digest(self) -> str:
        """SHA-256 of the listing."""
        return manifest.sha256_of(manifest.listed(self.files))


class Source:
    """On the driver's machine: reads pieces of the listed files for the nodes."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._folder, self._names = folder, frozenset(names)

    def read(self, name: str, offset: int) -> bytes:
        """Up to PIECE_BYTES of a listed file.

        Args:
            name: of the file, as listed.
            offset: bytes before the piece.

        Returns:
            The piece; empty at the file's end.

        Raises:
            PermissionError: the file is not on offer.
        """
        if name not in self._names:
            raise PermissionError(f"{name} is not on offer")
        with open(self._folder / name, "rb") as stream:
            stream.seek(offset)
            return stream.read(PIECE_BYTES)


@contextlib.contextmanager
def offered(folder: Path) -> Iterator[Checkpoint]:
    """Offer a folder's files to the nodes, until the block ends.

    Args:
        folder: of the checkpoint.

    Yields:
        What a node needs to fetch them.

    Raises:
        CheckpointError: no file is in it, or there is no such folder.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    files = listed(folder)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Source).options(num_cpus=0, scheduling_strategy=here, max_concurrency=4)
    source = actor.remote(folder.resolve(), [one.path for one in files])
    try:
        yield Checkpoint(folder=folder.resolve(), files=files, source=source)
    finally:
        ray.kill(source)


def listed(folder: Path) -> tuple[FileDigest, ...]:
    """Every file below a folder, links followed: a hub's cache is made of links.

    Args:
        folder: of the checkpoint; hidden folders in it are left out.

    Returns:
        The files' digests.

    Raises:
        CheckpointError: no file is in it, or there is no such folder.
    """
    paths = []
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        paths += [Path(parent) / name for name in sorted(files)]
    if not paths:
        raise CheckpointError(
            f"no checkpoint in {folder}",
            evidence="no file is in it" if folder.is_dir() else "there is no such folder",
            fix="give the folder that has config.json",
        )
    return tuple(manifest.file_digest(path, root=folder) for path in paths)


def there(sent: Checkpoint, kept: Path) -> Path:
    """The checkpoint's folder on this node: the same path, what was sent before, or sent now.

    Args:
        sent: the folder on offer.
        kept: where checkpoints that were sent stay on this node.

    Returns:
        A folder that has the same files.

    Raises:
        CheckpointError: a file changed while it was sent.
    """
    if same(sent.folder, sent.files):
        return sent.folder
    # Its own name stays: a manifest says what a checkpoint was called.
    place = kept / sent.digest / sent.folder.name
    if same(place, sent.files):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = place.parent / f".{secrets.token_hex(8)}"
    try:
        _fetch(sent, staged)
        _put(staged, place, sent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return place


def same(folder: Path, files: tuple[FileDigest, ...]) -> bool:
    """Whether a folder has these files, byte for byte.

    Args:
        folder: may have more, or be missing.
        files: with their digests.

    Returns:
        False also where one cannot be read.
    """
    try:
        return all(manifest.file_digest(folder / one.path, root=folder) == one for one in files)
    except OSError:
        return False


def _fetch(sent: Checkpoint, staged: Path) -> None:
    import ray

    def read(name: str, offset: int) -> bytes:
        piece: bytes = ray.get(sent.source.read.remote(name, offset))
        return piece

    for one in sent.files:
        _copy(one, staged, read)


def _copy(one: FileDigest, staged: Path, read: Callable[[str, int], bytes]) -> None:
    path = staged / one.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        while stream.tell() < one.size_bytes:
            piece = read(one.path, stream.tell())
            if not piece:
                break
            stream.write(piece)
    if manifest.file_digest(path, root=staged) != one:
        raise CheckpointError(
            f"{one.path} changed while it was sent",
            evidence=f"its SHA-256 is not {one.sha256}",
            fix="let nothing write into the checkpoint's folder during a build, and start again",
        )


def _put(staged: Path, place: Path, sent: Checkpoint) -> None:
    """Into its place in one step; another job of this node may have been first."""
    try:
        os.rename(staged, place)
    except OSError:
        if same(place, sent.files):
            return
        shutil.rmtree(place, ignore_errors=True)  # changed, or cut off
        os.rename(staged, place)
