"""A cache store on disk: entries are written whole or not at all, and verified when read.

<root>/<name>/ holds entry.json (a value and the digest of each file) and content/. Beside them
.locks/ holds the locks of who builds and who uses which entry, and in .work/ an entry is written
before it gets its name. The least recently used entries are removed first. Knows nothing of what is
kept, nor of why.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jexport.artifacts import manifest, store
from jexport.workspace import locks
from jexport.workspace.run import WORK, own_folder, sweep

LOCKS, RECORD, CONTENT = ".locks", "entry.json", "content"
FORMAT = 1
MAKE, USE = ".make", ".use"
"""An entry's two locks: its builder holds the first alone, all who read it share the second."""


class Damaged(Exception):
    """An entry that is not what was put there."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry as it says of itself; nothing of it was verified.

    Args:
        name: its folder's.
        about: what it is, for people; 'damaged' where that cannot be read.
        size_bytes: of all its files.
        used_s: when it was last used, seconds since the epoch.
    """

    name: str
    about: str
    size_bytes: int
    used_s: float


def lock(root: Path, name: str, kind: str, *, shared: bool, wait: bool) -> IO[str] | None:
    """Hold one of an entry's locks until the file is closed.

    Args:
        root: the cache's folder.
        name: the entry's, which need not be there.
        kind: MAKE or USE.
        shared: beside other shared locks; otherwise alone.
        wait: for those who hold it.

    Returns:
        The open file; None when the lock is taken and not `wait`.

    Raises:
        OSError: a lock cannot be made.
    """
    path = root / LOCKS / f"{name}{kind}"
    return locks.acquire(path, shared=shared, wait=wait, read_only=True)


def read(root: Path, name: str) -> dict[str, Any] | None:
    """The record of an entry whose every file is as it was put there.

    Args:
        root: the cache's folder.
        name: the entry's.

    Returns:
        The record, the value among it; None when there is no entry.

    Raises:
        Damaged: it is not what was put there; says what is wrong with it.
    """
    folder = root / name
    if not os.path.lexists(folder):
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT or record["name"] != name:
            raise Damaged(f"{RECORD} is of another entry or format")
        if record["sha256"] != manifest.seal(record):
            raise Damaged(f"{RECORD} was changed")
        listed = {one["path"]: one for one in record["files"]}
        present = dict(_files(folder / CONTENT))
        if set(present) != set(listed):
            raise Damaged(
                f"its files are not those listed: {sorted(set(present) ^ set(listed))[:3]}"
            )
        for path, one in listed.items():
            digest = manifest.file_digest(present[path], root=folder / CONTENT)
            if (digest.size_bytes, digest.sha256) != (one["size_bytes"], one["sha256"]):
                raise Damaged(f"{path} was changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error
    with contextlib.suppress(OSError):
        os.utime(folder / RECORD)  # when it was last used
    return dict(record)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise Damaged(f"{path.name} is a link or a special file")
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def put(root: Path, name: str, folder: Path, value: Mapping[str, Any], about: str) -> None:
    """Give `folder` (with its files in content/) its name in one step, once it is on the disk.

    Called under the entry's make lock.

    Args:
        root: the cache's folder, on the same file system.
        name: the entry's.
        folder: becomes the entry.
        value: JSON-ready.
        about: what it is, for people.

    Raises:
        Damaged: a link or a special file is among the files.
        OSError: it cannot be written.
    """
    content = folder / CONTENT
    files = [manifest.file_digest(path, root=content) for _, path in _files(content)]
    record = {
        "format": FORMAT,
        "name": name,
        "about": about,
        "value": dict(value),
        "files": manifest.listed(files),
    }
    record["sha256"] = manifest.seal(record)
    manifest.write_json(folder / RECORD, record)
    store.sync_tree(folder)
    os.rename(folder, root / name)
    with contextlib.suppress(OSError):  # it is verified when it is read
        store.sync(root)


def drop(root: Path, name: str, work_dir: Path) -> None:
    """Take an entry away in one step, then remove it.

    Args:
        root: the cache's folder.
        name: the entry's.
        work_dir: a folder of the caller's own, on the same file system.
    """
    aside = work_dir / f"dropped-{name}"
    os.rename(root / name, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _about(record: Path) -> str:
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["about"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "damaged"


def listed(
    root: Path, *, record_name: str = RECORD, about: Callable[[Path], str] = _about
) -> list[Entry]:
    """All entries, the least recently used first; damaged ones too.

    Args:
        root: the cache's folder.
        record_name: the file whose time is when an entry was last used.
        about: reads a description from that file.

    Returns:
        The entries; none where there is no such folder.
    """
    all_entries = []
    for folder in root.glob("[!.]*") if root.is_dir() else ():
        with contextlib.suppress(OSError):
            sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
            record = folder / record_name
            used_s = (record if record.is_file() else folder).stat().st_mtime
            all_entries.append(
                Entry(name=folder.name, about=about(record), size_bytes=sum(sizes), used_s=used_s)
            )
    return sorted(all_entries, key=lambda one: (one.used_s, one.name))


def shrink(
    root: Path, limit_bytes: int, *, listing: Callable[[Path], list[Entry]] = listed
) -> list[Entry]:
    """Remove what was used least recently until the rest fits; never what is in use.

    Also what killed builds left.

    Args:
        root: the cache's folder.
        limit_bytes: what may stay.
        listing: what there is, the least recently used first.

    Returns:
        What was removed.
    """
    if not root.is_dir():
        return []
    removed = []
    with contextlib.suppress(OSError):
        sweep(root / WORK)
    entries = listing(root)
    total = sum(one.size_bytes for one in entries)
    for one in entries:
        if total <= limit_bytes:
            break
        if _remove(root, one.name):
            removed.append(one)
        elif os.path.lexists(root / one.name):  # in use
            continue
        total -= one.size_bytes
    tidy(root)
    return removed


def tidy(root: Path) -> None:
    """Remove lock files that belong to no entry, and folders that hold nothing.

    Args:
        root: the cache's folder; goes too when nothing is in it.
    """
    with contextlib.suppress(OSError):
        _drop_idle_locks(root)
    for folder in (root / LOCKS, root / WORK, root):
        with contextlib.suppress(OSError):
            folder.rmdir()  # only when nothing is in it


def _remove(root: Path, name: str) -> bool:
    """Remove an entry that nobody makes or uses; whether it was, and by us."""
    with contextlib.ExitStack() as stack:
        for kind in (MAKE, USE):
            held = lock(root, name, kind, shared=False, wait=False)
            if held is None:
                return False
            stack.enter_context(held)
        was_there = os.path.lexists(root / name)  # else another process was faster
        if was_there:
            drop(root, name, stack.enter_context(own_folder(root / WORK)))
        for kind in (MAKE, USE):
            (root / LOCKS / f"{name}{kind}").unlink(missing_ok=True)
    return was_there


def _drop_idle_locks(root: Path) -> None:
    """Remove lock files of entries that are not there and that nobody is about to make."""
    for path in sorted((root / LOCKS).glob("*")):
        if (root / path.stem).exists():
            continue
        with contextlib.suppress(OSError):
            held = lock(root, path.stem, path.suffix, shared=False, wait=False)
            if held is not None:
                with held:
                    path.unlink(missing_ok=True)


def verify(root: Path) -> Iterator[tuple[str, str]]:
    """Read every entry, each while its use lock is held.

    Args:
        root: the cache's folder.

    Yields:
        Its name and what is wrong with it, '' for nothing.
    """
    for one in listed(root):
        with contextlib.ExitStack() as stack:
            held = lock(root, one.name, USE, shared=True, wait=True)
            if held is not None:
                stack.enter_context(held)
            try:
                problem = "" if read(root, one.name) else "it was removed meanwhile"
            except Damaged as error:
                problem = str(error)
        yield one.name, problem


def remove_damaged(root: Path, name: str) -> bool:
    """Remove one entry, unless it is in use.

    Args:
        root: the cache's folder.
        name: the entry's.

    Returns:
        Whether it was removed.
    """
    return os.path.lexists(root / name) and _remove(root, name)
