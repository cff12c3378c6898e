"""locks: who waits for whom, between processes, while lock files come and go."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jexport.workspace import locks

OTHER = """
import sys
from pathlib import Path
from jexport.workspace import locks
held = locks.acquire(Path(sys.argv[1]), shared=sys.argv[2] == "shared", wait=False)
print("taken" if held is None else "free")
"""


def other(path: Path, kind: str) -> str:
    command = [sys.executable, "-c", OTHER, str(path), kind]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("ours", "theirs", "result"),
    [
        ("shared", "shared", "free"),
        ("shared", "alone", "taken"),
        ("alone", "shared", "taken"),
        ("alone", "alone", "taken"),
    ],
)
def test_another_process(tmp_path: Path, ours: str, theirs: str, result: str) -> None:
    path = tmp_path / "deep" / "folder" / "one.lock"
    held = locks.acquire(path, shared=ours == "shared")
    assert held is not None
    assert other(path, theirs) == result
    held.close()
    assert other(path, theirs) == "free"


def test_who_waited_for_a_removed_file_takes_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "one.lock"
    held = locks.acquire(path)
    assert held is not None
    results: list[object] = []
    waiting = threading.Thread(target=lambda: results.append(locks.acquire(path)))
    waiting.start()
    waiting.join(0.1)
    assert not results
    path.unlink()
    held.close()
    waiting.join(10)
    [late] = results
    assert late is not None
    assert other(path, "alone") == "taken"  # the lock of the file that has the name now
    late.close()  # type: ignore[attr-defined]


def test_a_folder_that_goes_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def no_folder(self: Path, *args: object, **kwargs: object) -> None:
        tries.append(self)
        raise FileExistsError(17, "File exists", str(self))

    monkeypatch.setattr(Path, "mkdir", no_folder)
    with pytest.raises(FileExistsError):
        locks.acquire(tmp_path / "gone" / "one.lock")
    assert len(tries) == locks.ATTEMPTS


def test_a_file_in_the_folder_s_place(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        locks.acquire(tmp_path / "file" / "one.lock")
