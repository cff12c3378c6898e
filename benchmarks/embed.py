"""`make bench`: jexport's fp32 ONNX artifact against sentence-transformers' torch fp32, MiniLM.

Real texts of mixed length, end to end: tokenising, batching, forward pass, pooling. The two run in
turn in each round; a ratio is that of one round. How much is gained depends on how the lengths are
mixed, so three sets are measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import jexport
from benchmarks import table, texts, weights
from jexport import recipe
from jexport.datasets import calibration

TEXTS, ROUNDS = 1500, 5


def main() -> None:
    """Build, time, check that both give the same vectors, write the table."""
    from sentence_transformers import SentenceTransformer

    folder_of_weights = str(weights.minilm())
    chosen = recipe.read("all-MiniLM-L6-v2").replace_load(model=folder_of_weights)
    sets = {
        "docstrings": texts.docstrings(TEXTS),
        "their paragraphs": texts.paragraphs(TEXTS),
        "30 languages": [sample.text for sample in calibration.read("parity", task="none").samples],
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = jexport.build(chosen, task="none", target="onnx", out=Path(folder))
        theirs = SentenceTransformer(folder_of_weights, device="cpu")
        with jexport.open_artifact(artifact.path, device="cpu") as ours:
            for name, sentences in sets.items():
                ids = theirs.tokenizer(sentences, truncation=True, max_length=256)["input_ids"]
                tokens = statistics.mean(map(len, ids))
                row = _compare(ours.encode, _theirs(theirs), sentences)
                rows.append([name, f"{len(sentences):,}", f"{tokens:.0f}", *row])
    note = (
        f"{ROUNDS} rounds, the two in turn. Texts a second are those of the median round; a ratio "
        "is one round's: lowest / **median** / highest."
    )
    head = [
        "texts",
        "",
        "mean tokens",
        "jexport, onnx fp32",
        "sentence-transformers, torch fp32",
        "ratio",
        "lowest cosine between the two",
    ]
    table.write("Embedding with all-MiniLM-L6-v2", "make bench", note, head, rows)


def _theirs(model: object) -> Callable[[Sequence[str]], np.ndarray]:
    return lambda sentences: model.encode(  # type: ignore[attr-defined,no-any-return]
        list(sentences), batch_size=32, normalize_embeddings=True, show_progress_bar=False
    )


def _compare(
    ours: Callable[[Sequence[str]], np.ndarray],
    theirs: Callable[[Sequence[str]], np.ndarray],
    sentences: Sequence[str],
) -> list[str]:
    """Texts a second of both, their ratio, and the lowest cosine between their vectors."""
    first, second = ours(sentences), theirs(sentences)  # also the warm-up
    seconds: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        seconds.append((_seconds(ours, sentences), _seconds(theirs, sentences)))
    ratios = [slow / fast for fast, slow in seconds]
    sides = zip(*seconds, strict=True)
    rates = [f"{len(sentences) / statistics.median(side):,.0f}/s" for side in sides]
    worst = float((first * second).sum(axis=1).min())
    median = statistics.median(ratios)
    return [*rates, f"{min(ratios):.2f} / **{median:.2f}** / {max(ratios):.2f}", f"{worst:.7f}"]


def _seconds(run: Callable[[Sequence[str]], np.ndarray], sentences: Sequence[str]) -> float:
    begin = time.perf_counter()
    run(sentences)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
