"""Serving needs numpy, tokenizers and onnxruntime: no torch, no transformers.

Makes a new virtual environment, installs this project's wheel with the extra [onnx] alone, and
embeds there with an artifact that was built here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import jexport

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
ABSENT = (
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "peft",
    "sentence_transformers",
    "scipy",
)


def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command that sees nothing of this environment but its PATH and pip's settings."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=Path(sys.executable).parent,
    )
    assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", PROJECT, "-w", out)
    [made] = out.glob("jexport-*.whl")
    return made


@pytest.fixture(scope="module")
def serving(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the extra [onnx] and nothing else."""
    home = tmp_path_factory.mktemp("serving") / "venv"
    run(sys.executable, "-m", "venv", home)
    run(
        home / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        f"{wheel}[onnx]",
    )
    return home / "bin"


def test_wheel_has_what_jexport_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [*PROJECT.glob("recipes/*.toml"), *PROJECT.glob("calibration_data/*/*")]
    assert len(shipped) >= 4
    for path in shipped:
        assert f"jexport/{path.relative_to(PROJECT).as_posix()}" in names
    assert "jexport/artifacts/manifest.schema.json" in names
    assert "jexport/py.typed" in names  # type checkers read its annotations
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for path in PROJECT.glob("jexport/**/*.py"):
        assert path.relative_to(PROJECT).as_posix() in names
    assert not [n for n in names if n.startswith("tests/") or "__pycache__" in n]


def test_nothing_of_a_training_stack_is_installed(serving: Path) -> None:
    code = (
        "import importlib.util, json\n"
        f"print(json.dumps([n for n in {ABSENT!r} if importlib.util.find_spec(n)]))\n"
        "import jexport; print(jexport.__file__)"
    )
    present, where = run(serving / "python", "-c", code).stdout.splitlines()
    assert json.loads(present) == []
    assert Path(where).is_relative_to(serving.parent)
    run(serving / "python", "-m", "pip", "check")


def test_it_embeds_what_was_built_elsewhere(
    serving: Path, artifact: Path, texts: list[str], tmp_path: Path
) -> None:
    with jexport.open_artifact(artifact) as model:
        wanted = model.encode(texts)
        chunks = model.late_chunking(["One part. ", "Another part."])
    code = (
        "import sys, json, numpy, jexport\n"
        "texts = json.load(open(sys.argv[2]))\n"
        "with jexport.open_artifact(sys.argv[1]) as model:\n"
        "    numpy.save(sys.argv[3], model.encode(texts))\n"
        "    numpy.save(sys.argv[4], model.late_chunking(['One part. ', 'Another part.']))\n"
    )
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    names = [tmp_path / name for name in ("texts.json", "v.npy", "c.npy")]
    run(serving / "python", "-W", "error", "-c", code, artifact, *names)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), wanted, atol=1e-6)
    np.testing.assert_allclose(np.load(tmp_path / "c.npy"), chunks, atol=1e-6)


def test_the_command_line_works(
    serving: Path, artifact: Path, builds: Callable[..., object], tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    done = run(
        serving / "jexport",
        "embed",
        artifact,
        "--input",
        tmp_path / "in.txt",
        "--output",
        tmp_path / "out.npy",
        "--quiet",
    )
    assert (done.stdout, done.stderr) == (f"{tmp_path / 'out.npy'}\n", "")
    with jexport.open_artifact(artifact) as model:
        np.testing.assert_allclose(
            np.load(tmp_path / "out.npy"), model.encode(["one", "two"]), atol=1e-6
        )
    assert "all as built" in run(serving / "jexport", "verify", artifact).stdout
    assert "retrieval.query" in run(serving / "jexport", "inspect", artifact).stdout
    assert str(artifact.name) in run(serving / "jexport", "list", artifact.parents[3]).stdout
    shown = run(serving / "jexport", "recipe", "show").stdout.split()
    recipes = Path(__file__).parents[2] / "recipes"
    assert sorted(shown) == sorted(path.stem for path in recipes.glob("*.toml"))


def test_a_build_says_what_to_install(serving: Path, small: Path, tmp_path: Path) -> None:
    for words in (("--model", small), ()):
        done = run(
            serving / "jexport",
            "build",
            *words,
            "--task",
            "none",
            "--target",
            "onnx",
            "--out",
            tmp_path / "out",
            code=15,
        )
        assert done.stdout == ""
        assert "needs torch, transformers, " in done.stderr
        assert 'pip install "jexport[build]"' in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_doctor_knows_what_can_be_done_here(serving: Path) -> None:
    told = run(serving / "jexport", "doctor").stdout
    assert "target onnx       build: no   run: yes" in told
    assert 'to build: pip install "jexport[build]"' in told
    assert "torch             not installed" in told
