"""Two checkpoints of one folder name, from the command line: told apart before any weight work."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jexport.artifacts import identity, store

from_separation = ("--task", "separation", "--target", "onnx")


@pytest.fixture
def twins(small: Path, tmp_path: Path) -> tuple[Path, Path]:
    """a/final and b/final, whose weights differ in one bit."""
    first = Path(shutil.copytree(small, tmp_path / "a" / "final"))
    second = Path(shutil.copytree(small, tmp_path / "b" / "final"))
    with open(second / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    return first, second


def build(cli: Callable[..., Any], model: Path, out: Path, *more: object) -> Any:
    return cli("build", "--model", model, *from_separation, "--out", out, "--quiet", *more)


@pytest.mark.usefixtures("canned")
def test_the_second_is_refused_before_any_weight_work(
    cli: Callable[..., Any],
    twins: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jexport.stages import merge as merge_stage

    out, latest = tmp_path / "out", "final/separation/onnx-fp32/latest"
    made = build(cli, twins[0], out)
    assert made.code == 0, made.err
    with monkeypatch.context() as patch:
        patch.setattr(merge_stage, "run", lambda model: pytest.fail("weights were worked on"))
        refused = build(cli, twins[1], out)
        planned = build(cli, twins[1], out, "--plan")
    assert refused.code == planned.code == 26
    first = identity.of_folder(out / latest)
    assert first is not None
    assert first.digest[:12] in refused.err
    assert refused.err.count("checkpoint ") >= 2
    assert (out / latest).resolve() == made.path.resolve()

    named = build(cli, twins[1], out, "--name", "final-b")
    assert named.code == 0, named.err
    assert named.path.parts[-4:-1] == ("final-b", "separation", "onnx-fp32")
    assert json.loads((named.path / "manifest.json").read_bytes())["name"] == "final-b"
    replaced = build(cli, twins[1], out, "--replace")
    assert replaced.code == 0, replaced.err
    assert (out / latest).resolve() == replaced.path.resolve()
    assert build(cli, twins[1], out).path == replaced.path
    assert build(cli, twins[0], out).code == 26  # it is there already, and `latest` stays


@pytest.mark.usefixtures("canned")
def test_many_builds(cli: Callable[..., Any], twins: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert build(cli, twins[0], out, "--jobs", "1").code == 0
    refused = build(cli, twins[1], out, "--jobs", "1")
    assert refused.code == 26
    assert "another checkpoint" in refused.err
    assert build(cli, twins[1], out, "--jobs", "1", "--replace").code == 0


def test_a_name_that_is_none(cli: Callable[..., Any], small: Path, nothing_left: Path) -> None:
    for name in ("", ".x", "a/b", "a b", "x" * 61):
        answer = build(cli, small, nothing_left, "--name", name)
        assert answer.code == 5, name
        assert "'name'" in answer.err


def test_two_at_once(artifact: Path, tmp_path: Path) -> None:
    """Whoever is second learns it when it places: `latest` has one checkpoint."""
    from jexport.artifacts import manifest
    from jexport.errors import OutputPathError
    from jexport.workspace.run import open_run

    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    content = json.loads((other / manifest.NAME).read_text())
    for one in content["checkpoint"]["files"]:
        one["sha256"] = "cd" * 32
    content.pop("sha256")
    manifest.write_json(other / manifest.NAME, {**content, "sha256": manifest.sha256_of(content)})
    ends: list[str] = []
    start = threading.Barrier(2)

    def place(folder: Path, version: str) -> None:
        slot = store.Slot(
            out=tmp_path / "out",
            model="m",
            task="none",
            target="onnx",
            precision="fp32",
            version=version,
        )
        with open_run(slot.out) as run:
            staged = Path(shutil.copytree(folder, run.folder / "package"))
            start.wait()
            try:
                store.place(staged, slot)
            except OutputPathError:
                ends.append("refused")
            else:
                ends.append(version)

    runs = [threading.Thread(target=place, args=one) for one in ((artifact, "a"), (other, "b"))]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(ends) in (["a", "refused"], ["b", "refused"])
    latest = tmp_path / "out" / "m" / "none" / "onnx-fp32" / "latest"
    assert latest.resolve().name in ends
