"""Environments of their own for what does not fit requirements.lock: installed once, then reused.

Each folder here has a requirements.txt with every version pinned. `make test-servers` runs the
check_*.py files; `make test` does not, since an environment takes minutes and hundreds of MB.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
KEPT = PROJECT / ".servers"


@pytest.fixture(scope="session")
def environment() -> Callable[[str], Path]:
    """`environment("mem0")`: the Python of that environment, made when its pins are new."""

    def python(name: str) -> Path:
        pins = PROJECT / "tests" / "servers" / name / "requirements.txt"
        digest = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
        home = KEPT / f"{name}-{digest}"
        if not (home / "ready").is_file():
            shutil.rmtree(home, ignore_errors=True)  # an installation that was cut off
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            subprocess.run(
                [home / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-input",
                 "--disable-pip-version-check", "-r", pins], check=True)  # fmt: skip
            (home / "ready").touch()
        return home / "bin" / "python"

    return python


@pytest.fixture(scope="session")
def run(environment: Callable[[str], Path]) -> Callable[..., str]:
    """`run("mem0", "examples/x.py", "word")`: that script there, offline; what it printed."""

    def run(name: str, script: str, *words: object, home: Path) -> str:
        done = subprocess.run(
            [environment(name), PROJECT / "tests" / "offline.py", PROJECT / script,
             *map(str, words)],
            capture_output=True, text=True, check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(PROJECT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
