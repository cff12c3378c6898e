"""A publisher and a puller killed with -9 at each change of a file system, one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import jexport
from jexport.artifacts import manifest, store
from jexport.publishing import listing, pull, registries
from jexport.publishing.registries import Access, folder
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

SCRIPT = Path(__file__).with_name("killed.py")
PROJECT = Path(str(jexport.__file__)).parents[1]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )


def killed_at_each(words: Callable[[int], tuple[object, ...]]) -> int:
    """How many changes there are; a run was killed at each of them."""
    whole = run(0, *words(0))
    assert whole.returncode == 0, whole.stderr
    count = int(whole.stdout)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda last: run(last, *words(last)), range(1, count + 1)))
    assert {each.returncode for each in done} == {-signal.SIGKILL}
    return count


@pytest.mark.rare
def test_a_publisher(made: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = made(attest={"model.sig": b"signed"})
    count = killed_at_each(lambda last: ("publish", artifact.path, tmp_path / f"r{last}"))
    assert count > 30
    visible = []
    for last in range(1, count + 1):
        place = tmp_path / f"r{last}"
        if folder.is_registry(place):
            found = listing.read(registries.parse(str(place)), Access())
            assert not found.troubles
            visible.append(len(found.rows))
            for row in found.rows:
                back = pull.run(registries.parse(row.ref), tmp_path / f"o{last}")
                assert manifest.verify(back.path)
        done = publish.run(artifact, str(place), PublishSpec(tags=("latest",)))
        [row] = listing.read(registries.parse(str(place)), Access()).rows
        assert (row.ref, row.tags) == (done.ref, ("latest",))
    assert set(visible) == {0, 1}


@pytest.mark.rare
def test_a_puller(
    made: Callable[..., Artifact], files_in: Callable[[Path], Any], tmp_path: Path
) -> None:
    artifact = made(attest={"model.sig": b"signed"})
    done = publish.run(artifact, str(tmp_path / "r"), PublishSpec())
    count = killed_at_each(lambda last: ("pull", done.ref, tmp_path / f"out{last}"))
    assert count > 30
    states = set()
    for last in range(1, count + 1):
        out = tmp_path / f"out{last}"
        seen = list(store.artifacts(out))
        for each in seen:  # visible: then whole, and its signatures with it
            assert manifest.verify(each.path)
            assert (each.path.with_name(f"{each.path.name}.attest") / "model.sig").is_file()
        states.add(len(seen))
        back = pull.run(registries.parse(done.ref), out)
        assert files_in(back.path) == files_in(artifact.path)
        assert (back.path.parent / "latest").resolve() == back.path
        assert sorted(path.name for path in out.iterdir()) == ["m"]
    assert states == {0, 1}
