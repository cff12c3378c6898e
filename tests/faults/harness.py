"""What the tests of this folder share with `run_all.py`: builds on a disk that fails, and checks.

An outcome is judged by what a user would see: the digest of the artifact, what is left in the
folder, and whether what was there before is still whole.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from jexport.artifacts import manifest
from jexport.cache import entries

HERE = Path(__file__).parent
CACHE = ".cache"


def compiled(folder: Path) -> Path:
    """failing_disk.c as a library; raises FileNotFoundError without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        raise FileNotFoundError("no C compiler, or not Linux")
    library = folder / "failing_disk.so"
    source = HERE / "failing_disk.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True
    )
    return library


class Nursery:
    """A warm process that builds in children on a failing disk (nursery.py)."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        env = {
            **os.environ,
            "LD_PRELOAD": str(compiled(folder)),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with open(folder / "said", "wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "nursery.py"), str(checkpoint), str(folder / "warm")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=env,
            )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first, (folder / "said").read_text()
        self.digests: dict[str, str] = {}

    def build(
        self,
        target: str,
        out: Path,
        *,
        mode: str = "count",
        nth: int = 0,
        below: Path | None = None,
    ) -> dict[str, Any]:
        """One build; see nursery.py for what it answers."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {
            "target": target,
            "out": str(out),
            "below": str(below or out),
            "mode": mode,
            "nth": nth,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def digest(self, target: str, room: Path) -> str:
        """The manifest's digest of an undisturbed build."""
        if target not in self.digests:
            answer = self.build(target, room / f"undisturbed-{target}")
            assert answer["code"] == 0, answer
            self.digests[target] = sha256(Path(answer["path"]))
        return self.digests[target]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def sha256(artifact: Path) -> str:
    """The digest of a whole artifact, every file of which was verified."""
    found: str = manifest.verify(artifact).content["sha256"]
    return found


def steps(nursery: Nursery, target: str, room: Path, warm: bool = False, beside: str = "") -> int:
    """How many steps on the disk an undisturbed build takes."""
    out = prepared(nursery, target, room / "counted", warm)
    if beside:
        nursery.build(beside, out)
    answer = nursery.build(target, out)
    assert answer["code"] == 0, answer
    shutil.rmtree(out)
    return int(answer["seen"])


def killed_at(nursery: Nursery, target: str, nth: int, warm: bool, room: Path) -> None:
    """Kill a build at a step; it resumes to the same digest, and nothing of it is left."""
    out = prepared(nursery, target, room / f"out-{nth}", warm)
    answer = nursery.build(target, out, mode="kill", nth=nth)
    assert answer["code"] == -9, (nth, answer)
    check_resumed(nursery, target, out, room)
    shutil.rmtree(out)


DISK_ERRORS = (12, 26, 39)
"""Exit codes: DiskFullError, OutputPathError, DiskError."""


def failed_at(
    nursery: Nursery, target: str, beside: str, mode: str, nth: int, room: Path
) -> tuple[bool, bool]:
    """Have the disk fail at a step: whether it did, and whether the build ended with an error.

    That must be one of ours; what was there before stays whole; building again works.
    """
    out = prepared(nursery, target, room / f"out-{mode}-{nth}", False)
    before = nursery.build(beside, out)
    assert before["code"] == 0, before
    answer = nursery.build(target, out, mode=mode, nth=nth)
    if answer["code"]:
        assert mode != "short", answer["error"]
        assert answer["code"] in DISK_ERRORS, (nth, answer["error"])
        assert "fix: " in answer["error"]
    else:
        assert sha256(Path(answer["path"])) == nursery.digest(target, room)
    assert sha256(Path(before["path"])) == nursery.digest(beside, room)
    again = nursery.build(target, out)
    assert again["code"] == 0, again
    assert sha256(Path(again["path"])) == nursery.digest(target, room)
    shutil.rmtree(out)
    return answer["failed"] > 0, answer["code"] != 0


def prepared(nursery: Nursery, target: str, out: Path, warm: bool) -> Path:
    """A folder to build in: new, or with the stages of the same build in its cache."""
    shutil.rmtree(out, ignore_errors=True)
    if warm:
        kept = out.with_name(f"kept-{target}")
        if not kept.exists():
            answer = nursery.build(target, kept)
            assert answer["code"] == 0, answer
        out.mkdir(parents=True)
        shutil.copytree(kept / CACHE, out / CACHE)
    return out


def check_resumed(nursery: Nursery, target: str, out: Path, room: Path) -> None:
    """Building again gives the undisturbed artifact, and `gc` leaves nothing that is nobody's."""
    for _, problem in entries.verify(out / CACHE):
        assert not problem, problem  # what is in the cache is whole, also before the next build
    finished = {one.name: one.stat().st_ino for one in (out / CACHE).glob("[!.]*")}
    again = nursery.build(target, out)
    assert again["code"] == 0, again
    kept = {one.name: one.stat().st_ino for one in (out / CACHE).glob("[!.]*")}
    assert finished.items() <= kept.items()  # what was finished is not done again
    path = Path(again["path"])
    assert sha256(path) == nursery.digest(target, room)
    assert (path.parent / "latest").resolve() == path.resolve()
    entries.shrink(out / CACHE, 1 << 40)
    check_nothing_else(out, path)


def check_nothing_else(out: Path, artifact: Path) -> None:
    """Below `out` there is the artifact, what stands beside it, and whole entries of the cache."""
    beside = {artifact.name, f"{artifact.name}.run.json", "latest"}
    assert {one.name for one in artifact.parent.iterdir()} <= beside
    assert {one.name for one in out.iterdir()} == {CACHE, artifact.relative_to(out).parts[0]}
    kept = {one.name for one in (out / CACHE).iterdir() if one.name != entries.LOCKS}
    assert not any(name.startswith(".") for name in kept), kept
    assert {path.stem for path in (out / CACHE / entries.LOCKS).iterdir()} <= kept
    entries.shrink(out / CACHE, 0)
    assert not (out / CACHE).exists()
