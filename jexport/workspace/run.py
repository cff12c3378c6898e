"""One run: its work folder, its timer, its progress and the record of each stage.

Knows no stage by name and prints nothing: what happens goes to `listen`, which `cli/` provides.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import gc
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from jexport.errors import DiskError, DiskFullError, JexportError, OutputPathError
from jexport.types import StageRecord
from jexport.workspace import locks

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EIO, errno.EROFS)
WORK = ".work"
"""Folder of the runs in progress, beside the artifacts so that a rename can put one in place."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something to tell the user.

    Args:
        kind: 'start', 'progress', 'done' or 'note'.
        stage: whose it is.
        text: the note, or what the stage is at.
        done: steps finished, of 'progress'.
        total: steps in all, of 'progress'.
        seconds: how long the stage took, of 'done'.
        peak_memory_mib: the most that the process had meanwhile, of 'done'.
    """

    kind: str
    stage: str
    text: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    peak_memory_mib: float = 0.0


Listener: TypeAlias = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener that tells nobody.

    Args:
        event: what happened.
    """


@dataclass
class Run:
    """A build in progress. Use through `open_run`.

    Args:
        folder: its work folder.
        listen: gets every event.
        records: of the stages that ended, in order.
    """

    folder: Path
    listen: Listener
    records: list[StageRecord] = field(default_factory=list)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time one stage, and keep its record.

        Foreign exceptions pass through untouched, with a note that names the stage; those of a full
        or broken disk become ours.

        Args:
            name: the stage's.

        Yields:
            To call with a note for the record.

        Raises:
            DiskFullError, DiskError: the disk is full, broken or read-only.
        """
        note: list[str] = []
        self.listen(Event(kind="start", stage=name))
        begin = time.perf_counter()
        with _MemoryWatch() as watch:
            try:
                yield note.append
            except JexportError:
                raise
            except Exception as error:
                trouble = disk_trouble(name, self.folder, error)
                if trouble is not None:
                    raise trouble from error
                error.add_note(f"jexport: during stage '{name}'")
                raise
            finally:
                give_back_memory()
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

    def progress(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Tell the listener how far a stage is.

        Args:
            stage: its name.
            done: steps finished.
            total: steps in all.
            text: what it is at.
        """
        self.listen(Event(kind="progress", stage=stage, done=done, total=total, text=text))

    def measured(self) -> dict[str, Any]:
        """Seconds and memory of the stages so far, JSON-ready."""
        return {"stages": [dataclasses.asdict(record) for record in self.records]}

    def work_dir(self, name: str) -> Path:
        """A new folder for one stage to write in.

        Args:
            name: the stage's; a stage that is run again gets a number after it.

        Returns:
            The folder, empty.
        """
        folder, turn = self.folder / name, 1
        while folder.exists():  # a stage that is run again
            turn += 1
            folder = self.folder / f"{name}-{turn}"
        folder.mkdir()
        return folder


def disk_full(stage: str, folder: Path, error: BaseException) -> DiskFullError:
    """The error for a full disk, with what was free when it was noticed.

    Args:
        stage: what was stopped.
        folder: on the full disk; need not be there.
        error: what was raised.

    Returns:
        The error, to be raised.
    """
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


def disk_trouble(stage: str, folder: Path, error: BaseException) -> JexportError | None:
    """The error of ours for a disk that is full, broken or read-only.

    Args:
        stage: what was stopped.
        folder: on that disk.
        error: what was raised.

    Returns:
        The error, to be raised; None for any other error.
    """
    if is_out_of_space(error):
        return disk_full(stage, folder, error)
    if not isinstance(error, OSError) or error.errno not in BROKEN:
        return None
    return DiskError(
        f"{stage}: the disk cannot be written or read",
        evidence=str(error),
        fix="look at the disk and how it is mounted (dmesg), or build elsewhere with --out DIR",
    )


def is_out_of_space(error: BaseException) -> bool:
    """Whether an error says that the disk is full or a quota reached.

    Args:
        error: what was raised, also by libraries that put the number into a text.

    Returns:
        True for ENOSPC and EDQUOT.
    """
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    # Rust and C++ writers (safetensors, onnxruntime) and shutil wrap the number in a text.
    text = str(error)
    return any(word in text for word in ("No space left on device", "os error 28", "StorageFull"))


@contextlib.contextmanager
def open_run(out: Path, listen: Listener = silent, *, doing: str = "build") -> Iterator[Run]:
    """A run with a work folder below `out`/.work, removed at the end however the run ends.

    A lock file tells a live run from one that was killed; the leavings of killed runs are removed.
    `out` itself goes too when this run made it and leaves nothing in it.

    Args:
        out: where results go; made when it is missing.
        listen: gets every event.
        doing: what errors of the disk say that stopped.

    Yields:
        The run.

    Raises:
        OutputPathError: nothing can be written below `out`.
        DiskFullError, DiskError: the disk is full, broken or read-only.
    """
    work = out / WORK
    with contextlib.ExitStack() as stack:
        if not out.exists():
            stack.callback(_remove_empty, out)
        try:
            folder = stack.enter_context(own_folder(work))
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
        except OSError as error:  # between two stages, or after the last
            trouble = disk_trouble(doing, folder, error)
            if trouble is None:
                raise
            raise trouble from error


@contextlib.contextmanager
def own_folder(work: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards, as are those of killed runs.

    Args:
        work: it is made below.

    Yields:
        The folder, empty.
    """
    with _own_lock(work) as lock:
        sweep(work)
        folder = lock.with_suffix("")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def tidy(work: Path) -> None:
    """Remove what killed runs left, and the folder itself when that was all.

    Args:
        work: the folder of the runs in progress.
    """
    with contextlib.suppress(OSError):
        sweep(work)
        work.rmdir()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def exclusive(work: Path, name: str) -> Iterator[None]:
    """Hold a lock, waiting for whoever holds it, and leave nothing.

    Args:
        work: its file is below; made when it is missing.
        name: the lock's.

    Yields:
        Nothing, once the lock is held.
    """
    with _own_lock(work, name):
        yield


@contextlib.contextmanager
def _own_lock(work: Path, name: str = "") -> Iterator[Path]:
    """Hold a lock file below `work`, which is made, and removed when it is empty.

    name: '' for a new one.
    """
    path = work / f"{name or f'{os.getpid()}-{secrets.token_hex(4)}'}.lock"
    lock = locks.acquire(path)
    assert lock is not None
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.close()
        _remove_empty(work)  # stays while another run is using it


def sweep(work: Path) -> None:
    """Remove what killed runs left: every folder whose lock nobody holds.

    What cannot be removed (another user's, say) is left: it is in nobody's way.

    Args:
        work: the folder of the runs in progress.
    """
    for path in sorted(work.iterdir()):
        lock_path = path if path.suffix == ".lock" else path.with_name(f"{path.name}.lock")
        with contextlib.suppress(OSError):
            lock = locks.acquire(lock_path, wait=False)
            if lock is not None:  # else a run that is alive
                with lock:
                    shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
                    lock_path.unlink(missing_ok=True)


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


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def give_back_memory() -> None:
    """Collect garbage and return freed pages to the system.

    Export leaves cycles that hold a whole model, and glibc keeps freed blocks of up to 32 MiB: at
    full size 3 GB stayed resident while validate loaded the next model.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_mib() -> float:
    """Resident memory of this process in MiB (0.0 where /proc is missing)."""
    try:
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
