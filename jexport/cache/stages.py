"""The stage cache: results of stages, each under the SHA-256 of everything that decides it.

A result that is there is verified and handed out; one that is not is built, by one builder while
others wait for it. A cache that cannot be written or read only costs time: the stage then runs as
without. Knows no stage by name; callers say what decides a result.
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
    Acceptance,
    CompiledModel,
    OnnxModel,
    ParityReport,
    ReferenceFiles,
    Signature,
    TensorSpec,
)
from jexport.workspace.run import WORK, own_folder

FOLDER = ".cache"
"""Below the folder of all artifacts; the dot keeps it out of lists of models."""

LIMIT_GIB = 32
"""Six graphs and engines of full size in fp32, or all that one task needs in every precision."""

RESERVED_BYTES = 64 << 20
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

StageResult: TypeAlias = OnnxModel | CompiledModel | ReferenceFiles | Acceptance
Result = TypeVar("Result", OnnxModel, CompiledModel, ReferenceFiles, Acceptance)
Notify = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StageKey:
    """Names one stage's result by everything that decides it.

    Args:
        stage: its name, with which the entry's begins.
        inputs: JSON-ready; None for a result that must not be kept.
        description: what it is, for people.
        copied: its files will be copied into an artifact, so it is kept only where the disk has
            room for both.
    """

    stage: str
    inputs: Mapping[str, Any] | None
    description: str = ""
    copied: bool = False

    @property
    def name(self) -> str:
        """The name of its entry."""
        return f"{self.stage}-{manifest.sha256_of([entries.FORMAT, self.stage, self.inputs])}"


@dataclass
class Cache:
    """Where results are kept, and what this process has opened already.

    Args:
        root: the cache's folder; None for nowhere.
        limit_bytes: of all entries; beyond it the least recently used go.
    """

    root: Path | None = None
    limit_bytes: int = LIMIT_GIB << 30
    _memoized: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Lease]:
        """What is taken out or put in meanwhile is not removed before the end."""
        with contextlib.ExitStack() as stack:
            if self.root is not None:
                stack.callback(entries.tidy, self.root)
            yield Lease(self, stack)

    def memoize(self, key: object, build: Callable[[], Any]) -> Any:
        """An object in memory that several builds of one process share.

        Args:
            key: JSON-ready; all that decides the object.
            build: makes it, the first time only.

        Returns:
            The object, the same one for the same key.
        """
        name = manifest.sha256_of(key)
        if name not in self._memoized:
            self._memoized[name] = build()
        return self._memoized[name]

    def peek(self, key: StageKey) -> StageResult | None:
        """What an entry says of itself; nothing is verified.

        Args:
            key: names the result.

        Returns:
            The result, its files where they lie; None when there is none that can be read.
        """
        if self.root is None or key.inputs is None:
            return None
        folder = self.root / key.name
        try:
            text = (folder / entries.RECORD).read_text(encoding="utf-8")
            return _from_dict(json.loads(text)["value"], folder / CONTENT)
        except (OSError, ValueError, KeyError, TypeError):
            return None


class Lease:
    """The results that one build uses. Use through `Cache.lease`."""

    def __init__(self, cache: Cache, stack: contextlib.ExitStack) -> None:
        self._cache, self._stack = cache, stack
        self._work: Path | None = None
        self._stored: set[Path] = set()

    def get_or_build(
        self,
        key: StageKey,
        build: Callable[[Path], Result],
        *,
        work_dir: Callable[[], Path],
        notify: Notify = lambda text: None,
    ) -> Result:
        """A stage's result: verified and from the cache, or built and put there.

        Args:
            key: names the result.
            build: given an empty folder, writes the result's files there and returns it. One
                builder at a time builds a key; others wait for it.
            work_dir: gives an empty folder where there is no cache, or none that can be used.
            notify: told in a few words what happened.

        Returns:
            The result; its files stay where they are until the lease ends.
        """
        root = self._cache.root
        if root is None or key.inputs is None:
            return build(work_dir())
        with contextlib.ExitStack() as locks:
            try:
                entry = self._find(root, key.name, notify, locks)
                if entry is not None:
                    notify("from the cache")
                    return _from_dict(entry["value"], root / key.name / CONTENT)  # type: ignore[return-value]
                folder = self._staging_folder(root, key.name)
            except OSError as error:
                notify(f"without the cache: {error}")
                return build(work_dir())
            try:
                result = build(folder / CONTENT)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return self._store(key, result, folder, notify)

    def copy_or_move(self, source: Path, destination: Path) -> None:
        """Put a result's file into an artifact: copied where the cache keeps it, else moved.

        Args:
            source: a file of a result of this lease.
            destination: its path in the artifact.
        """
        if self._stored.intersection(source.parents):
            copy(source, destination)
        else:
            shutil.move(source, destination)

    def _find(
        self, root: Path, name: str, notify: Notify, locks: contextlib.ExitStack
    ) -> dict[str, Any] | None:
        """A whole entry; or None, with the right to build it held until `locks` are closed."""
        entry = self._open_entry(root, name, notify)
        if entry is not None:
            return entry
        lock = entries.lock(root, name, MAKE, shared=False, wait=False)
        if lock is None:
            notify("waited for another build that made it")
            lock = entries.lock(root, name, MAKE, shared=False, wait=True)
        assert lock is not None
        locks.enter_context(lock)
        return self._open_entry(root, name, notify, remove_damaged=True)

    def _open_entry(
        self, root: Path, name: str, notify: Notify, *, remove_damaged: bool = False
    ) -> dict[str, Any] | None:
        """A whole entry, its use lock held until the lease ends.

        remove_damaged: the caller holds the make lock, and builds the entry where it is not whole.
        """
        if not remove_damaged and not os.path.lexists(root / name):
            return None
        use_lock: IO[str] | None = entries.lock(root, name, USE, shared=True, wait=True)
        assert use_lock is not None
        try:
            entry = entries.read(root, name)
        except Damaged as error:
            entry = None
            if remove_damaged:
                notify(f"made again, for the cache's was damaged ({error})")
                entries.drop(root, name, self._work_dir(root))
        if entry is None and not remove_damaged:
            use_lock.close()
            return None
        # Whoever builds it keeps this lock as well, so that nobody removes it before it is used.
        self._stack.enter_context(use_lock)
        if entry is not None:
            self._stored.add(root / name / CONTENT)
        return entry

    def _work_dir(self, root: Path) -> Path:
        if self._work is None:
            self._work = self._stack.enter_context(own_folder(root / WORK))
        return self._work

    def _staging_folder(self, root: Path, name: str) -> Path:
        folder = self._work_dir(root) / name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / CONTENT).mkdir(parents=True)
        return folder

    def _store(self, key: StageKey, result: Result, folder: Path, notify: Notify) -> Result:
        """The result under its name; where that fails, as it lies, for this build only."""
        # Through JSON in any case: the first build and those that read it must not differ.
        value = _to_dict(result, folder / CONTENT)
        root, place = self._cache.root, folder
        assert root is not None
        try:
            size = sum(path.stat().st_size for path in (folder / CONTENT).rglob("*"))
            free = shutil.disk_usage(root).free
            if key.copied and free < size + RESERVED_BYTES:
                notify(f"not kept in the cache: {free >> 20} MiB are free")
            else:
                entries.put(root, key.name, folder, value, key.description)
                place = root / key.name
                self._stored.add(place / CONTENT)
                entries.shrink(root, self._cache.limit_bytes)
        except (OSError, Damaged) as error:
            notify(f"not kept in the cache: {error}")
        return _from_dict(value, place / CONTENT)  # type: ignore[return-value]


def copy(source: Path, destination: Path) -> None:
    """Copy a file inside the kernel, sharing its blocks where the file system can; never a link.

    Args:
        source: a file.
        destination: written anew.
    """
    with open(source, "rb") as reader, open(destination, "wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left and (sent := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                left -= sent
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
        if left:
            reader.seek(writer.seek(0, os.SEEK_END))
            shutil.copyfileobj(reader, writer, manifest.CHUNK_BYTES)


def _to_dict(result: StageResult, folder: Path) -> dict[str, Any]:
    """A result whose files are in `folder`, JSON-ready."""
    value = dataclasses.asdict(result)
    place = result.path.parent if isinstance(result, OnnxModel) else result.folder
    assert place == folder, f"{place} is not {folder}"
    if isinstance(result, OnnxModel):
        value["path"] = result.path.name
    else:
        del value["folder"]
    return dict(json.loads(json.dumps({**value, "noun": type(result).__name__})))


def _from_dict(stored: Mapping[str, Any], folder: Path) -> StageResult:
    value = dict(stored)
    kind = value.pop("noun")
    if kind == ReferenceFiles.__name__:
        return ReferenceFiles(**value, folder=folder)
    if kind == Acceptance.__name__:
        report = {**value["report"], "failures": tuple(value["report"]["failures"])}
        value |= {"report": ParityReport(**report), "notes": tuple(value["notes"])}
        return Acceptance(**value, folder=folder)
    value["signature"] = Signature(
        **{
            side: tuple(TensorSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs)
            for side, specs in value["signature"].items()
        }
    )
    if kind == OnnxModel.__name__:
        return OnnxModel(**{**value, "path": folder / value["path"]})
    return CompiledModel(**{**value, "files": tuple(value["files"])}, folder=folder)
