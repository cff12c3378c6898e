"""Builds that are killed at a step on the disk, and disks that fail at one.

A spread of the steps; `make faults` does every one and writes the counts to RELIABILITY.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SPREAD = 9
"""Steps of each kind that are tried here: first, last and evenly between."""


def spread(count: int) -> list[int]:
    return sorted({1 + round(n * (count - 1) / (SPREAD - 1)) for n in range(SPREAD)})


@pytest.mark.parametrize("target", ["hf", "onnx"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_killed_build_resumes_to_the_same_digest(
    target: str, warm: bool, harness: Any, nursery: Any, tmp_path: Path
) -> None:
    count = harness.steps(nursery, target, tmp_path, warm)
    assert count > 50
    for nth in spread(count):
        harness.killed_at(nursery, target, nth, warm, tmp_path)


@pytest.mark.parametrize("mode", ["full", "broken", "short", "read-only"])
def test_a_disk_that_fails_is_told_clearly(
    mode: str, harness: Any, nursery: Any, tmp_path: Path
) -> None:
    count = harness.steps(nursery, "hf", tmp_path, beside="onnx")
    found = [harness.failed_at(nursery, "hf", "onnx", mode, nth, tmp_path) for nth in spread(count)]
    assert sum(failed for failed, _ in found) > (0 if mode == "short" else SPREAD / 2)
    assert any(refused for _, refused in found) == (mode != "short")


def test_a_cache_that_is_read_only_costs_time_only(
    harness: Any, nursery: Any, tmp_path: Path
) -> None:
    for warm in (False, True):
        out = harness.prepared(nursery, "hf", tmp_path / f"out-{warm}", warm)
        answer = nursery.build("hf", out, mode="read-only", nth=0, below=out / harness.CACHE)
        assert answer["code"] == 0, answer
        assert answer["failed"] > 0
        assert harness.sha256(Path(answer["path"])) == nursery.digest("hf", tmp_path)
