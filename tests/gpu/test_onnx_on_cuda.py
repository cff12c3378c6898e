"""What only a GPU can show of the onnx target: CUDA graphs, full memory, steps for CUDA alone."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jexport
from jexport import recipe
from jexport.artifacts import manifest
from jexport.errors import DeviceError, DeviceMemoryError, UnsupportedGraphError
from jexport.runtime.tokenise import TextTokenizer

pytestmark = [pytest.mark.device, pytest.mark.cuda]

PASSAGE = "retrieval.passage"
STEPS = ("all", *recipe.CUDA_STEPS)
TEXTS = ["a ferry", "an early boat takes passengers across", "profits rose", "x", "two of them"]


def ids_of(path: Path, texts: list[str]) -> list[list[int]]:
    embedding = manifest.read(path).content["embedding"]
    tokenizer = TextTokenizer.open(path, max_tokens=embedding["max_tokens"])
    return tokenizer.model_ids(texts, prefix=embedding["prompt"])


def lowest_cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    one, two = found.astype(np.float64), wanted.astype(np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    return float(((one * two).sum(-1) / lengths).min())


@pytest.mark.parametrize("step", STEPS)
def test_an_artifact_that_is_made_for_cuda(
    step: str, artifacts: Callable[..., Path], truth: Callable[[str], Any]
) -> None:
    path = artifacts(PASSAGE, "fp16", cuda=(step,))
    texts = [*TEXTS, "a much longer text than the others " * 40]
    wanted = truth(PASSAGE).vectors(ids_of(path, texts))
    with jexport.open_artifact(path, device="cuda") as model:
        found = model.encode(texts)
        alone = np.stack([model.encode(text) for text in texts])
    assert lowest_cosine(found, wanted) > recipe.DEFAULT_GATES["fp16"]["cosine_min"]
    assert lowest_cosine(found, alone) > recipe.DEFAULT_GATES["fp16"]["batch_cosine_min"]
    with pytest.raises(DeviceError):
        jexport.open_artifact(path, device="cpu")


def test_tf32_comes_only_by_name(
    artifacts: Callable[..., Path], truth: Callable[[str], Any]
) -> None:
    path = artifacts(PASSAGE, "tf32")
    wanted = truth(PASSAGE).vectors(ids_of(path, TEXTS))
    with jexport.open_artifact(path, device="cuda") as model:
        found = model.encode(TEXTS)
    assert lowest_cosine(found, wanted) > recipe.DEFAULT_GATES["tf32"]["cosine_min"]
    # It is another arithmetic than fp32's, whose largest difference is below 1e-5.
    assert np.abs(found - wanted).max() > 1e-6


def test_cuda_graphs_give_the_same_vectors(artifacts: Callable[..., Path]) -> None:
    path = artifacts(PASSAGE, "fp16", cuda=("all",))
    texts = [f"text {n} of {size} words " * size for n in range(4) for size in (1, 2, 3)]
    with jexport.open_artifact(path, device="cuda") as model:
        wanted = [model.encode(text) for text in texts]
        together = model.encode(texts)
    with jexport.open_artifact(path, device="cuda", cuda_graphs=True) as model:
        for _ in range(2):  # the second time every shape is replayed
            for text, right in zip(texts, wanted, strict=True):
                assert lowest_cosine(model.encode(text), right) > 0.99999
        assert lowest_cosine(model.encode(texts), together) > 0.9999


def test_cuda_graphs_are_not_slower(artifacts: Callable[..., Path]) -> None:
    path = artifacts(PASSAGE, "fp16", cuda=("all",))

    def median_s(*, cuda_graphs: bool) -> float:
        with jexport.open_artifact(path, device="cuda", cuda_graphs=cuda_graphs) as model:
            for _ in range(20):
                model.encode("one short text")
            seconds = []
            for _ in range(200):
                begin = time.perf_counter()
                model.encode("one short text")
                seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    assert median_s(cuda_graphs=True) < 1.1 * median_s(cuda_graphs=False)


def test_a_graph_with_branches_is_not_captured(artifacts: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedGraphError, match="CUDA graph"):
        jexport.open_artifact(artifacts(PASSAGE, "fp16"), device="cuda", cuda_graphs=True)


# --- memory -------------------------------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[Callable[[int], None]]:
    """`little_memory(bytes)`: leave so much of the GPU's memory free."""
    import torch

    held: list[Any] = []

    def take(left: int) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        held.append(torch.empty(max(0, free - left), dtype=torch.uint8, device="cuda"))

    yield take
    held.clear()
    torch.cuda.empty_cache()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_full_memory_loses_nothing(
    artifacts: Callable[..., Path], little_memory: Callable[[int], None]
) -> None:
    """A batch that is too large is halved once, then refused; the embedder works on."""
    path = artifacts(PASSAGE, "fp32")
    texts = [f"{n} " + "many words " * (3000 - 100 * n) for n in range(16)]
    with jexport.open_artifact(path, device="cuda") as model:
        wanted, few = model.encode(texts, max_batch_tokens=8192), model.encode(TEXTS)
    # Scores of a padded batch alone are heads x rows x tokens x tokens x 4 bytes: 8 GB.
    little_memory(1 << 30)
    with jexport.open_artifact(path, device="cuda") as model:
        # Halved once it may fit; if not, the error is that of full memory and no other.
        with contextlib.suppress(DeviceMemoryError):
            found = model.encode(texts, max_batch_tokens=16 * 8192)
            assert lowest_cosine(found, wanted) > 0.99999
        assert lowest_cosine(model.encode(TEXTS), few) > 0.99999


def test_batches_are_the_devices(artifacts: Callable[..., Path]) -> None:
    """Default batches on a GPU are larger than a CPU's."""
    counts: dict[str, list[int]] = {"cpu": [], "cuda": []}
    texts = [f"text {n} of about a dozen words, as they come and go" for n in range(256)]
    for device, seen in counts.items():
        path = artifacts(PASSAGE, "fp16")
        with jexport.open_artifact(path, device=device, verify=False) as model:
            model.encode(texts, on_batch=seen.append)
    assert max(counts["cuda"]) > 2 * max(counts["cpu"])
    assert sum(counts["cuda"]) == sum(counts["cpu"]) == len(texts)


def test_auto_without_a_visible_gpu_takes_the_cpu(
    artifacts: Callable[..., Path], tmp_path: Path
) -> None:
    lines, out = tmp_path / "texts.txt", tmp_path / "vectors.npy"
    lines.write_text("a text\n", encoding="utf-8")
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "jexport",
            "embed",
            str(artifacts(PASSAGE, "fp32")),
            "--input",
            str(lines),
            "--output",
            str(out),
            "--device",
            "auto",
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert np.isfinite(np.load(out)).all()
