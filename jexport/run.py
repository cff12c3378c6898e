"""One run: its work folder, its timer, its progress and the record of each stage.

Knows no stage by name and prints nothing: what happens goes to `listen`, which `cli/` provides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

from jexport.errors import DiskFullError, JexportError, OutputPathError
from jexport.flow import StageRecord

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to tell the user: kind is 'start', 'progress', 'done' or 'note'."""

    kind: str
    stage: str
    text: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0


Listener: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener that tells nobody."""


@dataclass
class Run:
    """A build in progress. Use through `open_run`."""

    folder: Path
    listen: Listener
    records: list[StageRecord] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time one stage; the value is called with a note for the record.

        Foreign exceptions pass through untouched, with a note that names the stage; a full disk
        becomes a DiskFullError.
        """
        note: list[str] = []
        self.listen(Event(kind="start", stage=name))
        begin = time.perf_counter()
        with _MemoryWatch() as watch:
            try:
                yield note.append
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise disk_full(name, self.folder, error) from error
                error.add_note(f"jexport: during stage '{name}'")
                raise
            except JexportError:
                raise
            except Exception as error:
                if _is_out_of_space(error):
                    raise disk_full(name, self.folder, error) from error
                error.add_note(f"jexport: during stage '{name}'")
                raise
        record = StageRecord(
            stage=name,
            seconds=round(time.perf_counter() - begin, 3),
            peak_memory_mib=round(watch.peak_mib, 1),
            note="; ".join(note),
        )
        self.records.append(record)
        self.listen(
            Event(
                kind="done",
                stage=name,
                text=record.note,
                seconds=record.seconds,
                peak_memory_mib=record.peak_memory_mib,
            )
        )

    def progress(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` steps of a stage are finished."""
        self.listen(Event(kind="progress", stage=stage, done=done, total=total))

    def room(self, name: str) -> Path:
        """A new folder for one stage to write in."""
        folder = self.folder / name
        folder.mkdir()
        return folder


def disk_full(stage: str, folder: Path, error: BaseException) -> DiskFullError:
    """The error for a full disk, with what was free when it was noticed."""
    try:
        free_mib = shutil.disk_usage(folder if folder.exists() else folder.parent).free >> 20
        evidence = f"{free_mib} MiB free below {folder.parent}: {error}"
    except OSError:
        evidence = str(error)
    return DiskFullError(
        f"{stage}: no space left on the disk",
        evidence=evidence,
        fix="free some space, or build elsewhere with --out DIR; nothing half-made was left",
    )


def _is_out_of_space(error: BaseException) -> bool:
    # Rust and C++ writers (safetensors, onnxruntime) wrap the error number in their own text.
    text = str(error)
    return "No space left on device" in text or "os error 28" in text or "StorageFull" in text


@contextlib.contextmanager
def open_run(out: Path, listen: Listener = silent) -> Iterator[Run]:
    """A run with a work folder below `out`/.work, removed at the end however the run ends.

    A lock file tells a live run from one that was killed; the leavings of killed runs are removed.
    """
    work = out / ".work"
    try:
        work.mkdir(parents=True, exist_ok=True)
        _sweep(work)
        name, lock = _own_lock(work)
        folder = work / name
        folder.mkdir()
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_full("start", work, error) from error
        raise OutputPathError(
            f"cannot write below {out}",
            evidence=str(error),
            fix="choose another folder with --out DIR",
        ) from error
    try:
        yield Run(folder=folder, listen=listen)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            (work / f"{name}.lock").unlink()
        lock.close()
        with contextlib.suppress(OSError):
            work.rmdir()  # only when no other run is using it


def _own_lock(work: Path) -> tuple[str, IO[str]]:
    """A name of our own and the held lock file of that name; the folder comes after the lock."""
    while True:
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        path = work / f"{name}.lock"
        lock = open(path, "w")  # noqa: SIM115 (held open for the whole run)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A sweeping run may have removed the file between open and flock: then try another.
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            return name, lock
        lock.close()


def _sweep(work: Path) -> None:
    """Remove what killed runs left: every folder whose lock nobody holds."""
    for path in sorted(work.iterdir()):
        lock_path = path if path.suffix == ".lock" else path.with_name(f"{path.name}.lock")
        try:
            with open(lock_path, "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
                lock_path.unlink(missing_ok=True)
        except BlockingIOError:
            continue  # a run that is alive


class _MemoryWatch:
    """Peak resident memory of this process, sampled; never resets the kernel's own peak."""

    PERIOD_S = 0.05

    def __init__(self) -> None:
        self.peak_mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _MemoryWatch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.PERIOD_S):
            self._sample()

    def _sample(self) -> None:
        self.peak_mib = max(self.peak_mib, resident_mib())


def resident_mib() -> float:
    """Resident memory of this process in MiB (0.0 where /proc is missing)."""
    try:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
