"""Two clean builds give the same bytes: elsewhere, later, and on another number of threads."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jexport.artifacts import manifest

TASK = "retrieval.query"
RECIPE = """
name = "small"
tasks = ["retrieval.query", "retrieval.passage"]
[load]
model = "{model}"
[quantize]
samples = 48
max_tokens = 64
cosine_mean = 0.9
cosine_p1 = 0.5
top10_overlap = 0.1
pair_top10_overlap = 0.1
allow_slower = true
[validate]
budget_tokens = 1
max_tokens = 64
[validate.gates.int8]
cosine_mean = 0.9
"""


def command(recipe: Path, out: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jexport",
        "build",
        "--recipe",
        str(recipe),
        "--out",
        str(out),
        *words,
    ]


def build(recipe: Path, out: Path, *words: str, threads: int = 1) -> list[Path]:
    """Build in a process of its own; the artifacts' paths."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command(recipe, out, *words), capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def check_same(first: Path, second: Path) -> None:
    assert first != second
    names = files(first)
    assert names == files(second)
    _, differing, errors = filecmp.cmpfiles(first, second, names, shallow=False)
    assert differing + errors == []
    assert manifest.read(first).content["sha256"] == manifest.verify(second).content["sha256"]


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("onnx", "fp32"),
        pytest.param("onnx", "fp16", marks=pytest.mark.rare),
        ("onnx", "int8"),
        pytest.param("openvino", "fp32", marks=pytest.mark.rare),
        ("openvino", "int8"),
        ("hf", "fp32"),
        pytest.param("hf", "bf16", marks=pytest.mark.rare),
    ],
)
def test_whole_folders_are_the_same(
    target: str, precision: str, small: Path, tmp_path: Path
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino_tokenizers")
    made = []
    for number, threads in enumerate((1, 3)):
        # The checkpoint, too, lies elsewhere; its folder's name is part of what is said of it.
        room = tmp_path / ("deeper/" * number) / f"{number}"
        model = Path(shutil.copytree(small, room / small.name))
        recipe = room / "recipe.toml"
        recipe.write_text(RECIPE.format(model=model))
        words = ("--task", TASK, "--target", target, "--precision", precision)
        [path] = build(recipe, room / "out", *words, threads=threads)
        made.append(path)
        beside = json.loads((path.parent / f"{path.name}.run.json").read_text())
        assert beside["artifact"] == manifest.read(path).content["sha256"]
        assert all(one["seconds"] >= 0 for one in beside["stages"])
        text = b"".join((path / name).read_bytes() for name in files(path) if "json" in name)
        assert str(tmp_path).encode() not in text
    check_same(*made)


@pytest.fixture
def recipe(small: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model=small))
    return path


def all_of(*more: str) -> Sequence[str]:
    return ("--task", "all", "--target", "hf", "--target", "onnx", "--precision", "fp32", *more)


@pytest.mark.rare
def test_several_at_once_give_what_one_after_another_gives(recipe: Path, tmp_path: Path) -> None:
    serial = build(recipe, tmp_path / "serial", *all_of())
    at_once = build(recipe, tmp_path / "at_once", *all_of("--jobs", "2"))
    assert len(serial) == 4
    for first, second in zip(serial, at_once, strict=True):
        check_same(first, second)
    assert not (tmp_path / "at_once" / ".work").exists()


def test_ctrl_c_stops_all_of_them(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A session of its own: the signal goes to the program alone, which passes it on.
    process = subprocess.Popen(
        command(recipe, out, *all_of("--jobs", "2")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while not list((out / ".work").glob("*/")) and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "interrupted; nothing half-made was left"
    assert not (out / ".work").exists()
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:
            continue
        assert str(out).encode() not in words
