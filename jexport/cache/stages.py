"""What stages made, kept under the SHA-256 of everything that decided it.

One that was kept is verified and handed out; one that was not is made, by one builder while others
wait for it. A cache that cannot be written or read only costs time: the stage then runs as without.
Knows no stage by name; what decides a stage's result is said by whoever asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from jexport.artifacts import manifest
from jexport.cache import entries
from jexport.cache.entries import CONTENT, MAKE, USE, Damaged
from jexport.types import (
    CompiledModel,
    OnnxModel,
    ParityReport,
    ReferenceFiles,
    Signature,
    TensorSpec,
    Verdict,
)
from jexport.workspace.run import WORK, own_folder

FOLDER = ".cache"
"""Below the folder of all artifacts; the dot keeps it out of lists of models."""

LIMIT_GIB = 32
"""Six graphs and engines of full size in fp32, or all that one task needs in every precision."""

SPARE_BYTES = 64 << 20
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

Kept: TypeAlias = OnnxModel | CompiledModel | ReferenceFiles | Verdict
Noun = TypeVar("Noun", OnnxModel, CompiledModel, ReferenceFiles, Verdict)
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One stage's result. decided_by: JSON-ready, everything that matters to it; None: not kept.

    about: what it is, for people. taken: its files will be copied into an artifact, so it is kept
    only where the disk has room for both.
    """

    stage: str
    decided_by: Mapping[str, Any] | None
    about: str = ""
    taken: bool = False

    @property
    def name(self) -> str:
        """The name of its entry."""
        return f"{self.stage}-{manifest.sha256_of([entries.FORMAT, self.stage, self.decided_by])}"


@dataclass
class Cache:
    """Where results are kept, root None for nowhere; and what this process has opened already."""

    root: Path | None = None
    limit_bytes: int = LIMIT_GIB << 30
    _opened: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """What is taken out or put in meanwhile stays until the end."""
        with contextlib.ExitStack() as stack:
            if self.root is not None:
                stack.callback(entries.tidy, self.root)
            yield Lease(self, stack)

    def opened(self, key: object, make: Callable[[], Any]) -> Any:
        """Something in memory that several builds of one process share. key: JSON-ready."""
        name = manifest.sha256_of(key)
        if name not in self._opened:
            self._opened[name] = make()
        return self._opened[name]

    def peeked(self, wanted: Wanted) -> Kept | None:
        """What an entry says of itself, None when there is none; nothing is verified."""
        if self.root is None or wanted.decided_by is None:
            return None
        try:
            text = (self.root / wanted.name / entries.RECORD).read_text(encoding="utf-8")
            return _unpacked(json.loads(text)["value"], self.root / wanted.name / CONTENT)
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Lease:
    """The results that one build uses. Use through `Cache.lease`."""

    def __init__(self, cache: Cache, stack: contextlib.ExitStack) -> None:
        self._cache, self._stack = cache, stack
        self._work: Path | None = None
        self._kept: set[Path] = set()

    def obtain(
        self,
        wanted: Wanted,
        make: Callable[[Path], Noun],
        *,
        spare: Callable[[], Path],
        tell: Tell = lambda text: None,
    ) -> Noun:
        """What was kept, or what make(folder) gives.

        spare: a folder to make it in where there is no cache. tell: a few words on what happened.
        """
        root = self._cache.root
        if root is None or wanted.decided_by is None:
            return make(spare())
        with contextlib.ExitStack() as making:
            try:
                found = self._found(root, wanted.name, tell, making)
                if found is not None:
                    tell("from the cache")
                    return _unpacked(found["value"], root / wanted.name / CONTENT)  # type: ignore[return-value]
                room = self._room(root, wanted.name)
            except OSError as error:
                tell(f"without the cache: {error}")
                return make(spare())
            try:
                made = make(room / CONTENT)
            except BaseException:
                shutil.rmtree(room, ignore_errors=True)
                raise
            return self._keep(root, wanted, made, room, tell)

    def take(self, source: Path, place: Path) -> None:
        """Put a made file into an artifact: copied where the cache keeps it, else moved."""
        if source.parent in self._kept:
            copy(source, place)
        else:
            shutil.move(source, place)

    def _found(
        self, root: Path, name: str, tell: Tell, making: contextlib.ExitStack
    ) -> dict[str, Any] | None:
        """A whole entry; or None, with the right to make it held until `making` ends."""
        entry = self._used(root, name, tell)
        if entry is not None:
            return entry
        mine = entries.lock(root, name, MAKE, shared=False, wait=False)
        if mine is None:
            tell("waited for another build that made it")
            mine = entries.lock(root, name, MAKE, shared=False, wait=True)
        assert mine is not None
        making.enter_context(mine)
        return self._used(root, name, tell, drop=True)

    def _used(
        self, root: Path, name: str, tell: Tell, *, drop: bool = False
    ) -> dict[str, Any] | None:
        """A whole entry, its use lock held until the lease ends."""
        if not drop and not os.path.lexists(root / name):
            return None
        held: IO[str] | None = entries.lock(root, name, USE, shared=True, wait=True)
        assert held is not None
        try:
            entry = entries.read(root, name)
        except Damaged as error:
            entry = None
            if drop:
                tell(f"made again, for the cache's was damaged ({error})")
                entries.drop(root, name, self._scratch(root))
        if entry is None and not drop:
            held.close()
            return None
        # Whoever makes it keeps this lock as well, so that nobody removes it before it is used.
        self._stack.enter_context(held)
        if entry is not None:
            self._kept.add(root / name / CONTENT)
        return entry

    def _scratch(self, root: Path) -> Path:
        if self._work is None:
            self._work = self._stack.enter_context(own_folder(root / WORK))
        return self._work

    def _room(self, root: Path, name: str) -> Path:
        room = self._scratch(root) / name
        shutil.rmtree(room, ignore_errors=True)
        (room / CONTENT).mkdir(parents=True)
        return room

    def _keep(self, root: Path, wanted: Wanted, made: Noun, room: Path, tell: Tell) -> Noun:
        """The made thing under its name; where that fails, as it lies, for this build only."""
        # Through JSON in any case: the first build and those that read it must not differ.
        value = _packed(made, room / CONTENT)
        place = room
        try:
            size = sum(path.stat().st_size for path in (room / CONTENT).rglob("*"))
            free = shutil.disk_usage(root).free
            if wanted.taken and free < size + SPARE_BYTES:
                tell(f"not kept in the cache: {free >> 20} MiB are free")
            else:
                entries.put(root, wanted.name, room, value, wanted.about)
                place = root / wanted.name
                self._kept.add(place / CONTENT)
                entries.shrink(root, self._cache.limit_bytes)
        except (OSError, Damaged) as error:
            tell(f"not kept in the cache: {error}")
        return _unpacked(value, place / CONTENT)  # type: ignore[return-value]


def copy(source: Path, place: Path) -> None:
    """Copy a file inside the kernel, sharing its blocks where the file system can; never a link."""
    with open(source, "rb") as taken, open(place, "wb") as made:
        left = os.fstat(taken.fileno()).st_size
        try:
            while left and (sent := os.copy_file_range(taken.fileno(), made.fileno(), left)):
                left -= sent
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
        if left:
            taken.seek(made.seek(0, os.SEEK_END))
            shutil.copyfileobj(taken, made, manifest.CHUNK_BYTES)


def _packed(noun: Kept, folder: Path) -> dict[str, Any]:
    """A noun whose files are in `folder`, JSON-ready."""
    said = dataclasses.asdict(noun)
    place = noun.path.parent if isinstance(noun, OnnxModel) else noun.folder
    assert place == folder, f"{place} is not {folder}"
    if isinstance(noun, OnnxModel):
        said["path"] = noun.path.name
    else:
        del said["folder"]
    return dict(json.loads(json.dumps({**said, "noun": type(noun).__name__})))


def _unpacked(said: Mapping[str, Any], folder: Path) -> Kept:
    value = dict(said)
    noun = value.pop("noun")
    if noun == ReferenceFiles.__name__:
        return ReferenceFiles(**value, folder=folder)
    if noun == Verdict.__name__:
        report = {**value["report"], "failures": tuple(value["report"]["failures"])}
        notes = tuple(value["notes"])
        return Verdict(**{**value, "report": ParityReport(**report), "notes": notes}, folder=folder)
    value["signature"] = Signature(
        **{
            side: tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs)
            for side, specs in value["signature"].items()
        }
    )
    if noun == OnnxModel.__name__:
        return OnnxModel(**{**value, "path": folder / value["path"]})
    return CompiledModel(**{**value, "files": tuple(value["files"])}, folder=folder)
