"""store: a folder appears whole under its name, `latest` names it, and nothing else is left."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jexport
from jexport.artifacts import manifest, store
from jexport.errors import ArtifactError, OutputPathError
from jexport.types import Artifact
from jexport.workspace.run import open_run

SLOT = store.Slot(
    out=Path(), model="m", task="none", target="onnx", precision="fp32", version="1.0-abc"
)


def slot_in(out: Path, **changes: str) -> store.Slot:
    return dataclasses.replace(SLOT, out=out, **changes)


def staged_in(folder: Path, artifact: Path) -> Path:
    return Path(shutil.copytree(artifact, folder / "package"))


def placed(slot: store.Slot, artifact: Path) -> Artifact:
    with open_run(slot.out) as run:
        return store.place(staged_in(run.folder, artifact), slot)


def left_in(out: Path) -> list[str]:
    """Names two levels around the versions, and everything hidden."""
    parent = slot_in(out).parent
    hidden = [p.relative_to(out).as_posix() for p in out.rglob(".*")]
    return sorted([p.name for p in parent.iterdir()] + hidden)


def test_place(tmp_path: Path, artifact: Path) -> None:
    slot = slot_in(tmp_path)
    made = placed(slot, artifact)
    assert made.path == tmp_path / "m" / "none" / "onnx-fp32" / "1.0-abc"
    assert left_in(tmp_path) == ["1.0-abc", "latest"]
    assert os.readlink(slot.parent / "latest") == "1.0-abc"  # relative: the folder can be moved
    found = store.find(slot)
    assert found is not None
    assert found.manifest == made.manifest
    assert store.is_latest(found)


def test_latest_names_the_newest_build(tmp_path: Path, artifact: Path) -> None:
    for version in ("2.0-bbb", "1.0-aaa", "3.0-ccc"):  # newest is what was built last
        placed(slot_in(tmp_path, version=version), artifact)
        latest = slot_in(tmp_path).parent / "latest"
        assert os.readlink(latest) == version
        manifest.verify(latest)
        with jexport.open_artifact(latest) as model:
            assert model.encode(["x"]).shape == (1, 64)


def test_pointing_at_the_same_version_touches_nothing(tmp_path: Path, artifact: Path) -> None:
    slot = slot_in(tmp_path)
    placed(slot, artifact)
    before = os.lstat(slot.parent / "latest"), os.stat(slot.parent)
    with open_run(tmp_path) as run:
        store.point_latest(slot, work_dir=run.folder)
    after = os.lstat(slot.parent / "latest"), os.stat(slot.parent)
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [(s.st_ino, s.st_mtime_ns) for s in after]


def test_find_nothing(tmp_path: Path) -> None:
    assert store.find(slot_in(tmp_path)) is None


def test_find_refuses_a_changed_artifact(tmp_path: Path, artifact: Path) -> None:
    slot = slot_in(tmp_path)
    (placed(slot, artifact).path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not what was built"):
        store.find(slot)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_file_in_the_way_is_found_before_anything_is_built(depth: int, tmp_path: Path) -> None:
    slot = slot_in(tmp_path)
    blocked = tmp_path.joinpath(*slot.path.relative_to(tmp_path).parts[:depth])
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("mine")
    with pytest.raises(OutputPathError, match="cannot put an artifact") as caught:
        store.find(slot)
    assert str(blocked) in caught.value.evidence
    assert blocked.read_text() == "mine"


def test_a_file_with_the_name_of_the_version(tmp_path: Path) -> None:
    slot = slot_in(tmp_path)
    slot.parent.mkdir(parents=True)
    for make in (slot.path.touch, lambda: slot.path.symlink_to("nowhere")):
        make()
        with pytest.raises(ArtifactError, match="not a jexport artifact"):
            store.find(slot)
        slot.path.unlink()


def test_an_empty_folder_with_the_name_of_the_version_is_replaced(
    tmp_path: Path, artifact: Path
) -> None:
    slot = slot_in(tmp_path)
    slot.path.mkdir(parents=True)
    placed(slot, artifact)
    manifest.verify(slot.path)


def test_of_two_runs_that_place_the_same_version_the_first_one_stays(
    tmp_path: Path, artifact: Path
) -> None:
    slot = slot_in(tmp_path)
    first = os.stat(placed(slot, artifact).path / "manifest.json")
    second = placed(slot, artifact)
    assert os.stat(second.path / "manifest.json").st_ino == first.st_ino
    assert left_in(tmp_path) == ["1.0-abc", "latest"]


def test_a_changed_artifact_is_not_taken_for_the_other_runs(tmp_path: Path, artifact: Path) -> None:
    slot = slot_in(tmp_path)
    (placed(slot, artifact).path / "extra").touch()
    with pytest.raises(ArtifactError, match="is not what was built"):
        placed(slot, artifact)


def test_latest_that_is_a_folder_is_left(tmp_path: Path, artifact: Path) -> None:
    slot = slot_in(tmp_path)
    (slot.parent / "latest").mkdir(parents=True)
    (slot.parent / "latest" / "mine").touch()
    with pytest.raises(OutputPathError, match="is not a link"):
        placed(slot, artifact)
    assert (slot.parent / "latest" / "mine").exists()
    manifest.verify(slot.path)  # what was built is there, and said where
    assert left_in(tmp_path) == ["1.0-abc", "latest"]


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_renamed_to(
    number: int, tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store.os, "rename", refuse)
    with pytest.raises(OutputPathError, match="cannot put an artifact"):
        placed(slot_in(tmp_path), artifact)
    assert not slot_in(tmp_path).path.exists()


KILLED = """
import os, pathlib, shutil, signal, sys
from jexport.artifacts import store
from jexport.workspace.run import open_run

out, source, moment = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
slot = store.Slot(out=out, model="m", task="none", target="onnx", precision="fp32",
                  version=sys.argv[4])

def killing(module, name, before):
    real = getattr(module, name)
    def call(*words, **options):
        if before:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*words, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(module, name, call)

where, when = moment.split(":")
with open_run(out) as run:
    staged = pathlib.Path(shutil.copytree(source, run.folder / "package"))
    owner = pathlib.Path if where in ("symlink_to", "mkdir") else os
    killing(owner, where, when == "before")
    store.place(staged, slot)
"""


@pytest.mark.parametrize(
    "moment",
    [
        f"{call}:{when}"
        for call in ("fsync", "mkdir", "rename", "symlink_to", "replace")
        for when in ("before", "after")
    ],
)
def test_killed_around_every_step_of_placing(moment: str, tmp_path: Path, artifact: Path) -> None:
    """A reader sees the old artifact or the new one, whole; the next run leaves no trace of it."""
    old, new = slot_in(tmp_path, version="1.0-old"), slot_in(tmp_path, version="2.0-new")
    placed(old, artifact)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(artifact), moment, new.version],
        check=False,
    )
    assert done.returncode == -9
    latest = os.readlink(old.parent / "latest")
    assert latest in (old.version, new.version)
    manifest.verify(old.parent / "latest")
    manifest.verify(old.path)
    whole = new.path.exists()
    if whole:
        manifest.verify(new.path)
    assert whole is (
        moment
        in (
            "rename:after",
            "symlink_to:before",
            "symlink_to:after",
            "replace:before",
            "replace:after",
        )
    )
    assert [a.path for a in store.artifacts(tmp_path)] == [old.path, new.path][: 1 + whole]
    placed(new, artifact)
    assert left_in(tmp_path) == ["1.0-old", "2.0-new", "latest"]
    assert os.readlink(old.parent / "latest") == new.version


def test_artifacts_lists_each_once_and_skips_what_is_none(tmp_path: Path, artifact: Path) -> None:
    good = placed(slot_in(tmp_path), artifact)
    broken = placed(slot_in(tmp_path, task="other"), artifact)
    (broken.path / "manifest.json").write_text("{}")
    with open_run(tmp_path) as run:
        (run.folder / "a" / "b").mkdir(parents=True)
        shutil.copy(artifact / "manifest.json", run.folder / "a" / "b")
        assert [a.path for a in store.artifacts(tmp_path)] == [good.path]
    assert list(store.artifacts(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("task", ["../up", "a/b", "", ".", "..", "a\0b"])
def test_a_checkpoint_cannot_name_a_task_out_of_the_folder(task: str) -> None:
    with pytest.raises(OutputPathError, match="cannot name"):
        dataclasses.replace(SLOT, task=task)


def test_keep_report(tmp_path: Path) -> None:
    report = tmp_path / "parity.json"
    assert store.keep_report(report, slot_in(tmp_path)) is None
    report.write_text(json.dumps({"passed": False}))
    kept = store.keep_report(report, slot_in(tmp_path))
    assert kept == slot_in(tmp_path).parent / "1.0-abc.failed.json"
    assert json.loads(kept.read_text()) == {"passed": False}
    assert list(store.artifacts(tmp_path)) == []


def test_a_changed_artifact_in_the_way_of_a_build(
    tmp_path: Path, canned: Any, cli: Callable[..., Any], as_separation: tuple[object, ...]
) -> None:
    path = cli(*as_separation, "--out", tmp_path).path
    (path / "model.onnx").write_bytes(b"changed")
    answer = cli(*as_separation, "--out", tmp_path)
    assert answer.code == 13
    assert "changed: model.onnx" in answer.err
    assert "move that folder away first" in answer.err
    assert (path / "model.onnx").read_bytes() == b"changed"
