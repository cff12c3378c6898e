"""jexport.runtime.inference: every text once, padded as its batch, back in its own place."""

from __future__ import annotations

import ast
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import jexport
from jexport.runtime import inference
from jexport.runtime.inference import TextBatch
from jexport.types import Tensors

OWN = {"batches.py", "combine.py", "embedder.py", "engine.py", "inference.py", "windows.py"}
"""Modules of runtime/ that may plan: the loop, and what the Embedder plans for its engine."""


def token_ids(count: int) -> list[list[int]]:
    """Texts of 1 to 300 tokens; the first token of each is its number."""
    seeded = random.Random(5)
    return [[row, *[7] * seeded.randrange(300)] for row in range(count)]


def pad(ids: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
    longest = max(map(len, ids))
    mask = np.array([[1] * len(one) + [0] * (longest - len(one)) for one in ids], np.int64)
    rows = np.array([[*one, *[0] * (longest - len(one))] for one in ids], np.int64)
    return {"input_ids": rows, "attention_mask": mask}


def runner(feeds: Tensors) -> Tensors:
    """The number of each text and its number of tokens."""
    counts = feeds["attention_mask"].sum(axis=1)
    return {"answer": np.stack([feeds["input_ids"][:, 0], counts], axis=1)}


def test_outputs_come_back_in_the_order_of_the_texts() -> None:
    ids = token_ids(200)
    batches = inference.plan_by_tokens(ids, 512)
    assert len(batches) > 20
    assert sorted(row for batch in batches for row in batch.rows) == list(range(200))
    answers, done = [], 0
    for batch, mask, outputs in inference.run_padded(runner, batches, pad=pad):
        assert mask.shape == batch.shape
        assert mask.size <= 512
        answers.append((batch, outputs["answer"]))

    def count(rows: Sequence[int]) -> None:
        nonlocal done
        done += len(rows)

    answers_by_text = inference.in_text_order((one for one in answers), 200, count)
    assert [list(one) for one in answers_by_text] == [[n, len(one)] for n, one in enumerate(ids)]
    assert done == 200


def test_a_limit_of_one_token_runs_each_text_alone() -> None:
    assert all(len(batch.rows) == 1 for batch in inference.plan_by_tokens(token_ids(9), 1))


def test_no_text_is_no_batch() -> None:
    assert inference.plan_by_tokens([]) == []
    assert inference.in_text_order((one for one in ()), 0) == []


def test_streams_give_what_one_stream_gives() -> None:
    ids = token_ids(100)
    batches = inference.plan_by_tokens(ids, 256)

    def forward(_: int, batch: TextBatch[list[int]]) -> list[int]:
        return [one[0] for one in batch.ids]

    for streams in (1, 3):
        results = inference.run_batches(batches, range(streams), forward)
        assert inference.in_text_order(results, 100) == list(range(100))


def test_streams_are_free_once_progress_raised() -> None:
    batches = inference.plan_by_tokens(token_ids(100), 256)

    def forward(_: int, batch: TextBatch[list[int]]) -> list[int]:
        return batch.rows

    def stop(rows: Sequence[int]) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    results = inference.run_batches(batches, range(3), forward)
    with pytest.raises(KeyboardInterrupt):
        inference.in_text_order(results, 100, stop)
    assert threading.active_count() == before  # though `results` is still held


def test_a_text_without_a_result_is_an_error() -> None:
    [batch] = inference.plan_by_tokens([[1], [2]])
    with pytest.raises(ValueError, match="zip"):
        inference.in_text_order((one for one in [(batch, [5])]), 2)
    with pytest.raises(KeyError):
        inference.in_text_order((one for one in [(batch, [5, 6])]), 3)


def test_nobody_else_plans_batches() -> None:
    # One loop: whoever wants to run a model over many texts takes it from here.
    root = Path(str(jexport.__file__)).parent
    planners = []
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "jexport.runtime.batches":
                planners.append(path.relative_to(root).as_posix())
    assert set(planners) <= {f"runtime/{name}" for name in OWN}
    assert "runtime/inference.py" in planners
