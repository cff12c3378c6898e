"""Artifacts that the integrations' tests share, and a Python that reaches no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def pair(builds: Callable[..., object]) -> tuple[Path, Path]:
    """The artifacts of retrieval.query and retrieval.passage of the small checkpoint."""
    made = [builds(task) for task in ("retrieval.query", "retrieval.passage")]
    return made[0].path, made[1].path  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def symmetric(builds: Callable[..., object]) -> Path:
    """Its artifact of text-matching."""
    path: Path = builds("text-matching").path  # type: ignore[attr-defined]
    return path


@pytest.fixture(scope="session")
def offline() -> Callable[..., str]:
    """`offline("examples/x.py", "word")`: run a script of the project, get what it printed."""

    def run(script: str, *words: object) -> str:
        done = subprocess.run(
            [sys.executable, PROJECT / "tests" / "offline.py", PROJECT / script, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
