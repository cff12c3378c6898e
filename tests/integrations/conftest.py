"""Artifacts that the integrations' tests share, and a Python that reaches no network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]

NO_NETWORK = """
import runpy, sys
def watch(event, arguments):
    if event == "socket.connect" and not isinstance(arguments[1], (str, bytes)):
        assert arguments[1][0] in ("127.0.0.1", "::1"), arguments
    if event == "socket.getaddrinfo":
        assert arguments[0] in ("localhost", "127.0.0.1", None), arguments
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script; an attempt to leave this machine is an error."""


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
            [sys.executable, "-c", NO_NETWORK, PROJECT / script, *map(str, words)],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
