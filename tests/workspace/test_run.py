"""run: the work folder, its lock, what is swept, and what a stage's errors become."""

from __future__ import annotations

import errno
import fcntl
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jexport.errors import DiskFullError, OutputPathError, RecipeError
from jexport.workspace import locks, run
from jexport.workspace.run import Event, open_run


def left_in(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))


def test_work_folder_is_gone_after_a_run(tmp_path: Path) -> None:
    with open_run(tmp_path) as current:
        (current.work_dir("export") / "model.onnx").write_text("half")
        assert current.folder.is_relative_to(tmp_path / run.WORK)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_work_folder_is_gone_after_any_exception(
    tmp_path: Path, error: type[BaseException]
) -> None:
    out = tmp_path / "new"
    with pytest.raises(error):  # noqa: PT012, SIM117
        with open_run(out) as current, current.stage("export"):
            (current.work_dir("export") / "model.onnx").write_text("half")
            raise error
    assert not out.exists()  # the run made it, and left nothing in it


def test_an_output_folder_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x"), open_run(tmp_path):
        raise ValueError("x")
    assert tmp_path.is_dir()


def test_leavings_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    work = tmp_path / run.WORK
    for name in ("123-abc", "124-without-a-lock"):
        (work / name / "export").mkdir(parents=True)
        (work / name / "export" / "model.onnx_data").write_bytes(b"x" * 1000)
    (work / "123-abc.lock").touch()
    (work / "125-lock-alone.lock").touch()
    with open_run(tmp_path) as current:
        assert [p.name for p in sorted(work.iterdir())] == [
            current.folder.name,
            f"{current.folder.name}.lock",
        ]
    assert left_in(tmp_path) == []


def test_a_live_run_is_not_swept(tmp_path: Path) -> None:
    with open_run(tmp_path) as first:
        (first.work_dir("export") / "model.onnx").write_text("mine")
        with open_run(tmp_path) as second:
            assert second.folder != first.folder
        assert (first.folder / "export" / "model.onnx").read_text() == "mine"
    assert left_in(tmp_path) == []


def test_a_run_in_another_process_is_not_swept(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom jexport.workspace.run import open_run\n"
        "with open_run(pathlib.Path(sys.argv[1])) as run:\n"
        "    (run.folder / 'mine').touch()\n    print(run.folder, flush=True)\n"
        "    sys.stdin.read()\n    assert (run.folder / 'mine').exists()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    folder = Path(other.stdout.readline().strip())
    with open_run(tmp_path):
        assert (folder / "mine").exists()
    assert other.communicate("")[0] == ""
    assert other.returncode == 0
    assert left_in(tmp_path) == []


def test_a_killed_process_is_swept(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib, signal\nfrom jexport.workspace.run import open_run\n"
        "with open_run(pathlib.Path(sys.argv[1])) as run:\n"
        "    (run.folder / 'half').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert any(name.endswith("/half") for name in left_in(tmp_path))
    with open_run(tmp_path):
        pass
    assert left_in(tmp_path) == []


def test_runs_that_begin_and_end_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """`.work` goes with the last run: one that begins then must make it again."""
    trouble: list[BaseException] = []
    stop = time.monotonic() + 1.5

    def begin_and_end() -> None:
        try:
            while time.monotonic() < stop:
                with open_run(tmp_path / "out") as current:
                    (current.work_dir("a") / "b").touch()
                    assert (current.folder / "a" / "b").exists()
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=begin_and_end) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not trouble
    assert left_in(tmp_path) in ([], ["out"])  # the last one may have found `out` made by another


def test_what_cannot_be_swept_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / run.WORK / "123-abc").mkdir(parents=True)
    flock = fcntl.flock

    def refuse(lock: object, how: int) -> None:
        if "123-abc" in str(getattr(lock, "name", "")):
            raise PermissionError(errno.EACCES, "another user's")
        flock(lock, how)  # type: ignore[arg-type]

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with open_run(tmp_path) as current:
        assert current.folder.is_dir()


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/nowhere", "/dev/null"])
def test_a_place_that_cannot_be_written_to(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(OutputPathError, match="cannot write below") as caught,
        open_run(tmp_path / name),
    ):
        pass
    assert "--out" in caught.value.fix
    assert (tmp_path / "file").read_text() == "mine"
    assert left_in(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_the_start(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(*_: object, **__: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", fill_up)
    with pytest.raises(DiskFullError, match="no space left"), open_run(tmp_path / "out"):
        pass
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
        RuntimeError("SafetensorError: IoError(Os { code: 28, kind: StorageFull })"),
        RuntimeError("write failed: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_in_a_stage(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(DiskFullError, match="export: no space left") as caught,
        open_run(tmp_path) as current,
        current.stage("export"),
    ):
        raise error
    assert "MiB free" in caught.value.evidence
    assert caught.value.__cause__ is error
    assert left_in(tmp_path) == []


def test_foreign_exceptions_pass_with_a_note_and_deliberate_ones_without(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as caught, open_run(tmp_path) as current, current.stage("merge"):
        raise KeyError("bug")
    assert caught.value.__notes__ == ["jexport: during stage 'merge'"]
    meant = RecipeError("a", evidence="b", fix="c")
    with pytest.raises(RecipeError) as deliberate, open_run(tmp_path) as run_2, run_2.stage("x"):
        raise meant
    assert deliberate.value is meant
    assert not getattr(meant, "__notes__", [])


def test_records_and_events(tmp_path: Path) -> None:
    heard: list[Event] = []
    with open_run(tmp_path, heard.append) as current:
        with current.stage("load") as note:
            block = bytearray(64 << 20)
            time.sleep(0.12)
            note("one")
            note("two")
        del block
        current.progress("validate", 3, 4)
        [record] = current.records
    assert (record.stage, record.note) == ("load", "one; two")
    assert 0.1 < record.seconds < 5
    assert record.peak_memory_mib > 64
    assert [(e.kind, e.stage, e.done, e.total) for e in heard] == [
        ("start", "load", 0, 0),
        ("done", "load", 0, 0),
        ("progress", "validate", 3, 4),
    ]
    assert heard[1].seconds == record.seconds
