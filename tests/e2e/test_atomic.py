"""Whatever happens to a build, a reader sees a whole artifact or none, and nothing is left behind.

Real builds of the small checkpoint, in processes that are killed, interrupted, run beside each
other or out of disk space.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import manifest
from jexport.cache import entries
from jexport.stages import package
from jexport.stages import package as package_stage

HERE = Path(__file__).parent
KILLS = 8


@dataclass(frozen=True, kw_only=True)
class Command:
    """One jexport command in a process of its own."""

    nursery: Nursery
    pid: int
    out: Path
    err: Path

    def wait(self) -> int:
        """Its exit code; -9 when it was killed."""
        code: int = self.nursery.ask(do="wait", pid=self.pid)["code"]
        return code

    def stop(self, how: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, how)

    def said(self, stage: str) -> bool:
        """Whether a stage was reported as done."""
        return any(line.split()[:1] == [stage] for line in self.err.read_text().splitlines())

    def until(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < limit, self.err.read_text()
            time.sleep(0.002)


class Nursery:
    """A warm process that starts commands (forked_builds.py)."""

    def __init__(self, folder: Path, small: Path) -> None:
        # One thread: a pool of OpenMP's would not survive the fork.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.recipe = folder / "quick.toml"
        self.recipe.write_text('name = "small"\n[validate]\nbudget_tokens = 1\nmax_tokens = 99\n')
        self.folder, self.small, self.count = folder, small, 0
        self.warm_out, self.warm_err = folder / "warm.out", folder / "warm.err"
        program = [str(HERE / "forked_builds.py"), str(self.warm_out), str(self.warm_err)]
        self.process = subprocess.Popen(
            [sys.executable, *program, *self.words(folder / "warm"), "--quiet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self.process.stdout is not None
        self.warm_code = json.loads(self.process.stdout.readline())["code"]

    def words(self, out: Path, *, task: str = "separation", tokens: int = 99) -> list[str]:
        """A build; another number of tokens is another version."""
        return [
            *("build", "--recipe", str(self.recipe), "--model", str(self.small), "--task", task),
            *("--target", "onnx", "--out", str(out), "--validate-tokens", str(tokens)),
        ]

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, words: list[str]) -> Command:
        self.count += 1
        out, err = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        err.touch()
        pid = self.ask(do="start", words=words, out=str(out), err=str(err))["pid"]
        return Command(nursery=self, pid=pid, out=out, err=err)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery"), small)
    yield made
    made.close()


def check_readers_view(out: Path) -> list[Path]:
    """Every version that a reader can see is whole, and `latest` leads to one. The versions."""
    versions = []
    for path in sorted(out.glob("[!.]*/*/*/*")):
        if path.name == "latest":
            manifest.verify(path)
        elif not path.name.endswith(".run.json"):
            versions.append(path)
            manifest.verify(path)
    return versions


def everything_below(out: Path) -> list[str]:
    """All but the cache: what was finished there stays."""
    found = (path.relative_to(out) for path in out.rglob("*"))
    return sorted(path.as_posix() for path in found if ".cache" not in path.parts)


def test_a_new_process_writes_the_path_alone_and_quiet_is_quiet(nursery: Nursery) -> None:
    """The warm-up is a build in a new process, where libraries say what they say on import."""
    assert (nursery.warm_code, nursery.warm_err.read_text()) == (0, "")
    [line] = nursery.warm_out.read_text().splitlines()
    manifest.verify(Path(line))


def test_killed_at_any_moment(nursery: Nursery, tmp_path: Path) -> None:
    begin = time.monotonic()
    assert nursery.start(nursery.words(tmp_path / "timing")).wait() == 0
    duration_s = time.monotonic() - begin
    out, left = tmp_path / "out", 0
    for number in range(KILLS):
        command = nursery.start(nursery.words(out, tokens=100 + number))
        moment = time.monotonic() + duration_s * (number + 0.7) / KILLS
        while time.monotonic() < moment:
            check_readers_view(out)
            time.sleep(0.005)
        command.stop(signal.SIGKILL)
        assert command.wait() in (-9, 0)
        check_readers_view(out)
        left += (out / ".work").exists()
    assert left > KILLS / 3  # most were killed in the middle of things
    last = nursery.start(nursery.words(out, tokens=400))
    assert last.wait() == 0, last.err.read_text()
    versions = check_readers_view(out)
    made = Path(last.out.read_text().strip())
    assert made in versions
    assert (made.parent / "latest").resolve() == made
    assert not (out / ".work").exists()
    assert sorted(p.name for p in made.parent.iterdir() if p.suffix != ".json") == sorted(
        ["latest", *(p.name for p in versions)]
    )


def test_builds_at_once(nursery: Nursery, tmp_path: Path) -> None:
    tasks = ("separation", "separation", "classification")
    commands = [nursery.start(nursery.words(tmp_path, task=task)) for task in tasks]
    assert [command.wait() for command in commands] == [0, 0, 0]
    paths = {Path(command.out.read_text().strip()) for command in commands}
    assert len(paths) == 2
    assert set(check_readers_view(tmp_path)) == paths
    assert not (tmp_path / ".work").exists()


@pytest.mark.parametrize(
    ("after", "delay_s"),
    [("load", 0.0), ("merge", 0.5), ("compile", 0.0), ("compile", 0.1)],
)
def test_ctrl_c_leaves_nothing(
    after: str, delay_s: float, nursery: Nursery, tmp_path: Path
) -> None:
    """`merge` is followed by export, `compile` by validate."""
    out = tmp_path / "out"
    command = nursery.start(nursery.words(out))
    command.until(lambda: command.said(after))
    time.sleep(delay_s)
    command.stop(signal.SIGINT)
    assert command.wait() == 130, command.err.read_text()
    lines = command.err.read_text().splitlines()
    assert lines[-1] == "interrupted; nothing half-made was left"
    assert all(line.startswith(("jexport build:", "  ")) for line in lines[:-1]), lines
    assert "Traceback" not in command.err.read_text()
    assert command.out.read_text() == ""
    # What was finished by then is kept, whole; see tests/faults for what may be in there.
    assert not out.exists() or [path.name for path in out.iterdir()] == [".cache"]
    assert not (out / ".cache" / ".work").exists()
    if after == "compile":
        assert len(list((out / ".cache").glob("[!.]*"))) == 2


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of that size, where this user may mount one."""
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if sys.platform == "linux"
        else None
    )
    if mounted is None or mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted and mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kib", [4, 900, 1500])
def test_a_disk_that_fills_up(kib: int, nursery: Nursery, tmp_path: Path) -> None:
    """From too small for the graph to too small for the last files of the package."""
    with small_disk(tmp_path / "disk", kib) as disk:
        command = nursery.start(nursery.words(disk / "out"))
        code, said = command.wait(), command.err.read_text()
        assert code == 12, said
        assert everything_below(disk) in ([], ["out"])  # "out" where the cache could keep a graph
        assert all(not problem for _, problem in entries.verify(disk / "out" / ".cache"))
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "no space left on the disk" in error
    assert "Traceback" not in said
    assert command.out.read_text() == ""


def test_a_full_disk_leaves_what_was_there(nursery: Nursery, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 6000) as disk:
        first = nursery.start(nursery.words(disk / "out"))
        assert first.wait() == 0, first.err.read_text()
        # Guards the test above: what stopped those builds is the disk and nothing else.
        assert len(check_readers_view(disk / "out")) == 1
        before = everything_below(disk)
        while os.statvfs(disk).f_bfree * os.statvfs(disk).f_bsize > 900 << 10:
            with open(disk / "ballast", "ab") as ballast:
                ballast.write(bytes(50 << 10))
        second = nursery.start(nursery.words(disk / "out", task="classification"))
        assert second.wait() == 12, second.err.read_text()
        assert everything_below(disk) == sorted([*before, "ballast"])
        assert len(check_readers_view(disk / "out")) == 1


def test_embed_on_a_full_disk(artifact: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    texts = "".join(f"text {number}\n" for number in range(500)).encode()
    with small_disk(tmp_path / "disk", 64) as disk:
        (disk / "out.npy").write_bytes(b"kept")
        for name in ("out.npy", "out.jsonl"):
            answer = cli("embed", artifact, "--input", "-", "--output", disk / name, stdin=texts)
            assert answer.code == 12
            assert answer.out == ""
            assert "the disk is full" in answer.err
        assert everything_below(disk) == ["out.npy"]
        assert (disk / "out.npy").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (os, "copy_file_range", 1),
        (shutil, "copyfile", 1),
        (shutil, "copyfile", 3),
        (package, "write_json", 1),
        (package, "write_json", 4),
        (Path, "write_text", 1),
        (os, "fsync", 1),
        (os, "rename", 1),
        (Path, "symlink_to", 1),
        (os, "replace", 1),
    ],
)
def test_no_space_at_any_step_of_the_last_stage(
    owner: Any,
    name: str,
    nth: int,
    canned: Any,
    cli: Callable[..., Any],
    tmp_path: Path,
    as_separation: tuple[object, ...],
) -> None:
    real, calls = getattr(owner, name), []
    run = package_stage.run

    def full(*words: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return real(*words, **options)

    with pytest.MonkeyPatch.context() as patch:

        def from_here(*words: Any, **options: Any) -> Any:
            patch.setattr(owner, name, full)
            return run(*words, **options)

        patch.setattr(package_stage, "run", from_here)
        answer = cli(*as_separation, "--out", tmp_path)
    assert len(calls) >= nth
    assert (answer.code, answer.out) == (12, "")
    assert "no space left" in answer.err
    assert not (tmp_path / ".work").exists()
    placed = name in ("symlink_to", "replace")  # whole and in its place by then, and may stay
    assert len(check_readers_view(tmp_path)) == placed
    again = cli(*as_separation, "--out", tmp_path)
    assert again.code == 0
    assert (again.path.parent / "latest").resolve() == again.path
    assert sorted(p.name for p in again.path.parent.iterdir() if p.suffix != ".json") == [
        again.path.name,
        "latest",
    ]
