"""The same bits on any number of threads, on AVX2's kernels too, whatever this processor has.

Run as a program this file prints digests of the numbers; the test runs it with 1, 2 and 3 threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

KERNELS = {
    "own": {},
    "AVX2": {
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
TEXTS, TOKENS, CHANNELS, COLUMNS = 120, 77, 384, 320


def inputs() -> np.ndarray:
    rng = np.random.default_rng(5)
    made: np.ndarray = rng.normal(size=(TEXTS, TOKENS, CHANNELS)).astype(np.float32)
    return made


def quantization() -> Iterator[tuple[str, Any]]:
    """Statistics of one input and the weight that is rounded with them."""
    from jexport.quantization import observers
    from jexport.quantization.config import QuantizationConfig
    from jexport.quantization.layer_quantization import quantize_layers
    from jexport.quantization.layers import LinearLayer

    table = inputs().reshape(-1, CHANNELS)

    def pad(ids: Any) -> dict[str, np.ndarray]:
        return {"input_ids": np.array(ids), "attention_mask": np.ones((len(ids), TOKENS), np.int64)}

    ids = np.arange(TEXTS * TOKENS).reshape(TEXTS, TOKENS).tolist()
    stats = observers.collect_stats(
        lambda feeds: {"x": table[feeds["input_ids"]]}, {"x": CHANNELS}, ids, pad=pad
    )
    yield "gram", stats["x"].gram
    weight = np.random.default_rng(6).normal(size=(CHANNELS, COLUMNS)).astype(np.float32)
    item = LinearLayer(
        name="p",
        input="x",
        weight="w",
        in_features=CHANNELS,
        out_features=COLUMNS,
        share=1.0,
        block=0,
    )
    chosen = QuantizationConfig(scheme="uint8", smoothing=0.5)
    with tempfile.TemporaryDirectory() as folder:
        made = quantize_layers([item], lambda name: weight, stats, chosen, out_dir=Path(folder))[
            "p"
        ]
        yield "rounded", made.quantization.qweight()
    yield "errors", np.array([made.error_naive, *made.errors.values()])


def quality() -> Iterator[tuple[str, Any]]:
    """What is measured of two sides' vectors."""
    from jexport.evaluation import int8_checks, parity, ranking

    vectors = np.random.default_rng(7).normal(size=(2, 77, CHANNELS)).astype(np.float32)
    labels = parity.Labels(languages=("en",) * 77, lengths=(8,) * 77, dimensions=(64, CHANNELS))
    sides = [parity.Outputs(embeddings=one) for one in vectors]
    yield "parity", np.array([json.dumps(parity.compare(*sides, labels))])
    yield "similarities", int8_checks._similarities(*vectors)
    levels = np.random.default_rng(8).permuted(np.tile(np.arange(1_500_001), (2, 1)), axis=1)
    yield "spearman", np.array(ranking.spearman(*levels))


def weights() -> Iterator[tuple[str, Any]]:
    """An adapter of rank 16, merged."""
    import torch

    from jexport.stages import merge
    from jexport.types import LowRank

    maker = torch.Generator().manual_seed(9)
    base, up, down = (
        torch.randn(size, generator=maker) for size in ((1024, 1024), (1024, 16), (16, 1024))
    )
    delta = LowRank(up=lambda: up, down=lambda: down, scaling=0.5)
    yield "merged", merge._merged("w", lambda: base, delta)().numpy()


def digests() -> dict[str, str]:
    numbers = [*quantization(), *quality(), *weights()]
    return {name: hashlib.sha256(np.ascontiguousarray(one)).hexdigest() for name, one in numbers}


def printed(kernels: str, threads: int) -> dict[str, str]:
    """The digests in a new process: the libraries read these settings when they are loaded."""
    counts = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "OPENBLAS", "MKL")}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **KERNELS[kernels], **counts},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made: dict[str, str] = json.loads(done.stdout)
    return made


@pytest.mark.parametrize("kernels", KERNELS)
def test_numbers_are_the_same_on_any_number_of_threads(kernels: str) -> None:
    one = printed(kernels, 1)
    assert len(one) == 7
    for threads in (2, 3):
        assert printed(kernels, threads) == one


def test_pooling_does_not_know_threads_kernels_or_batch() -> None:
    """A text's vector is the same alone, beside longer texts, and wherever it stands."""
    from jexport.runtime.pool import pool

    hidden = inputs()[:7]
    for tokens in (1, 9, 40, TOKENS):
        text = hidden[:1, :tokens]
        alone = pool(text, np.ones((1, tokens), np.int64), "mean")
        for width in (tokens, tokens + 3, 200):
            batch = np.full((7, width, CHANNELS), 3.25, np.float32)
            mask = np.zeros((7, width), np.int64)
            mask[:, :1] = 1
            batch[5, :tokens], mask[5, :tokens] = text[0], 1
            np.testing.assert_array_equal(pool(batch, mask, "mean")[5], alone[0])


if __name__ == "__main__":
    json.dump(digests(), sys.stdout)
