"""`make bench-threads`: many threads, first calls and padding, for the artifacts in ARTIFACTS.

Three questions. How fast are 16 threads that send a text each beside one thread that sends the same
texts in calls of 16, and all at once? How much slower is a length's first call than its second?
How many of the tokens of an `encode` are padding? Compared ways run in turn in one process; their
ratio is one round's. THREAD_CALLS: calls a thread (500). The more the texts' lengths differ, the
more 16 of them are padded, so that one call with all texts is the faster: both kinds are measured.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

import jexport
from benchmarks import memory, table, texts
from jexport.datasets import calibration
from jexport.runtime import Embedder
from jexport.runtime.batches import plan

THREADS, ROUNDS, OPENINGS, MOST_TEXTS = 16, 3, 3, 1500
LENGTHS = tuple(int(n) for n in np.unique(np.geomspace(3, 250, 40).astype(int)))[:30]


def main() -> None:
    """Measure every folder that ARTIFACTS (separated like PATH) names, and write the table."""
    calls = int(os.environ.get("THREAD_CALLS", "500"))
    rows = []
    for folder in os.environ["ARTIFACTS"].split(os.pathsep):
        for row in _rows(folder, calls):
            rows.append(row)
            print(*row, sep=" | ", flush=True)
    note = (
        f"{THREADS} threads x {calls} calls of one text; {ROUNDS} rounds, the ways in turn, a "
        "ratio is one round's: lowest / **median** / highest. First calls: CPU time of the first "
        f"call of each of {len(LENGTHS)} lengths after opening, by the median of its next five; "
        f"the median of {OPENINGS} openings. Padding: of one `encode` of calibration texts as they "
        "are. CPU s: of the whole process. Shared machine: read ratios."
    )
    head = [
        "artifact",
        "texts",
        "threads / calls of 16",
        "threads / all at once",
        "CPU s: threads, 16, all",
        "opening, s",
        "first / next calls: median, highest",
        "over 1.5",
        "padding",
    ]
    table.write("Threads, first calls, padding", "make bench-threads", note, head, rows)


def _rows(folder: str, calls: int) -> Iterator[list[str]]:
    """A row for each kind of texts."""
    openings, firsts = [], []
    for _ in range(OPENINGS):
        begin = time.perf_counter()
        with jexport.open_artifact(folder, device="cpu", verify=False) as model:
            openings.append(time.perf_counter() - begin)
            firsts.append([_first_by_next(model.encode, length) for length in LENGTHS])
            padding = _padding(model)
    first = [statistics.median(ratios) for ratios in zip(*firsts, strict=True)]
    kinds = {
        "3 to 25 words": list(memory.texts(THREADS * calls)),
        "docstrings": texts.docstrings(THREADS * calls),
    }
    for kind, sentences in kinds.items():
        with jexport.open_artifact(folder, device="cpu", verify=False) as model:
            ways = _compare(model.encode, sentences)
        seconds = {name: [wall for wall, _ in rounds] for name, rounds in ways.items()}
        cpu = [statistics.median(used for _, used in rounds) for rounds in ways.values()]
        yield [
            "/".join(Path(folder).parts[-4:-1]),
            kind,
            _ratios(seconds["16"], seconds["threads"]),
            _ratios(seconds["all"], seconds["threads"]),
            ", ".join(f"{one:.1f}" for one in cpu),
            f"{statistics.median(openings):.2f}",
            f"{statistics.median(first):.2f}, {max(first):.2f}",
            f"{sum(one > 1.5 for one in first)} of {len(first)}",
            f"{padding:.1%}",
        ]


def _ratios(other: Sequence[float], threads: Sequence[float]) -> str:
    """Throughput of the threads by that of the other way, round by round."""
    ratios = [one / two for one, two in zip(other, threads, strict=True)]
    return f"{min(ratios):.2f} / **{statistics.median(ratios):.2f}** / {max(ratios):.2f}"


def _compare(
    encode: Callable[..., np.ndarray], sentences: list[str]
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each way in each round; the ways must give the same vectors."""
    ways: dict[str, Callable[[], np.ndarray]] = {
        "threads": lambda: _in_threads(encode, sentences),
        "16": lambda: np.concatenate(
            [encode(sentences[n : n + THREADS]) for n in range(0, len(sentences), THREADS)]
        ),
        "all": lambda: encode(sentences),
    }
    wanted = encode(sentences)  # also the warm-up
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            begin = time.perf_counter(), time.process_time()
            found = way()
            seconds[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
            if np.abs(found - wanted).max() > 1e-5:
                raise SystemExit(f"{name}: other vectors")
    return seconds


def _in_threads(encode: Callable[..., np.ndarray], sentences: list[str]) -> np.ndarray:
    """Each text in a call of its own, from THREADS threads."""
    found: list[np.ndarray] = [np.empty(0)] * len(sentences)

    def work(number: int) -> None:
        for place in range(number, len(sentences), THREADS):
            found[place] = encode(sentences[place])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return np.stack(found)


def _first_by_next(encode: Callable[..., np.ndarray], length: int) -> float:
    """CPU time of the first call with so many words by the median of the next five."""
    used = []
    for _ in range(6):
        begin = time.process_time()
        encode("word " * length)
        used.append(time.process_time() - begin)
    return used[0] / statistics.median(used[1:])


def _padding(model: Embedder) -> float:
    """Padded tokens beyond the real ones, by the real ones, of one `encode` of natural texts."""
    samples = calibration.read("parity", task="none").samples[:MOST_TEXTS]
    limit, batching = model.embedding.max_tokens, model._batching
    lengths = [len(ids) for ids in model._tokenizer.model_ids([one.text for one in samples])]
    shapes = [batch.shape for batch in plan(lengths, batching, batching.tokens, limit)]
    return sum(rows * tokens for rows, tokens in shapes) / sum(lengths) - 1


if __name__ == "__main__":
    main()
