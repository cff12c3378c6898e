"""A build that does not fit the memory there is says what it needs, at once."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jexport.building import estimate

WEIGHTS = 559_000_000
LIMITS_GIB = (24, 20, 16, 12, 10, 8, 7, 6, 5, 4)
REFUSED = 38
SECONDS = 5.0


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The header of a checkpoint of jina-embeddings-v3's size; its weights are a hole."""
    folder = tmp_path_factory.mktemp("full")
    header = {"weight": {"dtype": "BF16", "shape": [WEIGHTS], "data_offsets": [0, 2 * WEIGHTS]}}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + 2 * WEIGHTS)
    return folder


def build(checkpoint: Path, out: Path, *words: str, limit_gib: int = 0) -> tuple[int, str, float]:
    def limit() -> None:
        if limit_gib:
            resource.setrlimit(resource.RLIMIT_AS, (limit_gib << 30, limit_gib << 30))

    begin = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "jexport",
            "build",
            "--model",
            str(checkpoint),
            "--task",
            "none",
            "--target",
            "onnx",
            "--out",
            str(out),
            *words,
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    return done.returncode, done.stderr, time.monotonic() - begin


@pytest.mark.parametrize("limit_gib", LIMITS_GIB)
def test_refused_within_seconds_with_the_need_stated(
    limit_gib: int, full_size: Path, tmp_path: Path
) -> None:
    count = estimate.weights(str(full_size))
    assert count == WEIGHTS
    need = estimate.memory(WEIGHTS, is_int8=False)
    code, said, seconds = build(full_size, tmp_path / "out", "--memory-budget", str(limit_gib))
    assert not (tmp_path / "out").exists()
    if need > limit_gib << 30:
        assert code == REFUSED, said
        assert f"needs about {need / (1 << 30):.1f} GiB" in said
        assert f"{limit_gib}.0 GiB may be used" in said
        assert seconds < SECONDS
    else:  # it goes on, and finds that this checkpoint has no config.json
        assert code not in (0, REFUSED), said
        assert "GiB" not in said


@pytest.mark.parametrize("limit_gib", [6, 4])
def test_a_limit_of_the_process_is_heeded(limit_gib: int, full_size: Path, tmp_path: Path) -> None:
    code, said, seconds = build(full_size, tmp_path / "out", limit_gib=limit_gib)
    assert code == REFUSED, said
    assert "needs about" in said
    assert seconds < SECONDS


def test_a_small_build_finishes_under_the_lowest_limit(small: Path, tmp_path: Path) -> None:
    code, said, _ = build(
        small, tmp_path / "out", "--memory-budget", str(LIMITS_GIB[-1]), "--validate-tokens", "64"
    )
    assert code == 0, said
