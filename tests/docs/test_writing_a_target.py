"""The target on the page "Writing a target" is a whole one.

Exactly its block becomes a file of a copy of jexport; there the contract of tests/targets runs over
it, and a build of the small checkpoint passes every gate.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]
PAGE = PROJECT / "docs" / "writing-a-target.md"
LINES = 80
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA")
BUILD = """
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

import jexport
from jexport import recipe


def test_built_on_the_small_checkpoint(small: Path, tmp_path: Path) -> None:
    assert Path(jexport.__file__).is_relative_to({copy!r})
    made = recipe.for_model(str(small))
    few = dataclasses.replace(made.validate, budget_tokens=1500, max_tokens=64)
    made = dataclasses.replace(made, validate=few)
    artifact = jexport.build(made, task="separation", target="reference", out=tmp_path)
    with jexport.open_artifact(artifact.path) as model:
        vectors = model.encode(["a text", "another"])
    assert vectors.shape == (2, model.embedding.dimension)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
"""


def block() -> str:
    """The page's one Python block."""
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return str(code)


def test_a_whole_target_is_short() -> None:
    assert len(block().splitlines()) < LINES


def test_the_pages_target_keeps_the_contract_and_builds(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "jexport", copy / "jexport", ignore=leave)
    shutil.copytree(PROJECT / "tests" / "targets", copy / "tests" / "targets", ignore=leave)
    for name in ("pyproject.toml", "recipes", "calibration_data"):
        (copy / name).symlink_to(PROJECT / name)
    for name in ("conftest.py", "fixtures", "contract"):
        (copy / "tests" / name).symlink_to(PROJECT / "tests" / name)
    (copy / "jexport" / "targets" / "reference.py").write_text(block(), encoding="utf-8")
    built = copy / "tests" / "targets" / "test_page.py"
    built.write_text(BUILD.format(copy=str(copy)), encoding="utf-8")
    done = subprocess.run(
        [*PYTEST, "tests/targets/test_contract.py", built, "-k", "reference or built or import_no"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = set(re.findall(r"^PASSED \S*::(\w+)", done.stdout, re.MULTILINE))
    assert {
        "test_built_on_the_small_checkpoint",
        "test_build_then_run_gives_the_signature",
        "test_the_record_is_complete",
        "test_names_and_load_import_no_engine",
    } <= passed
