"""jexport.runtime.batches: every row once, within the limit, in few shapes, with little padding."""

from __future__ import annotations

from typing import Literal

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jexport.runtime.batches import plan, plan_batches, round_up
from jexport.types import Batching

FEW_SHAPES = Batching(few_shapes="always")
"""As the target openvino asks for."""


@given(
    lengths=st.lists(st.integers(0, 500), max_size=80),
    limit=st.integers(1, 3000),
    multiple=st.sampled_from([1, 2, 8, 64]),
    few_shapes=st.sampled_from(["never", "many", "always"]),
)
def test_each_row_is_in_one_batch_that_holds_it(
    lengths: list[int],
    limit: int,
    multiple: int,
    few_shapes: Literal["never", "many", "always"],
) -> None:
    batching = Batching(length_multiple=multiple, few_shapes=few_shapes)
    batches = plan(lengths, batching, limit, 512)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        rows, tokens = batch.shape
        assert rows >= len(batch.rows) >= 1
        assert rows == 1 or rows * tokens <= limit
        assert max(1, *(lengths[row] for row in batch.rows)) <= tokens <= 512


def test_without_ladders_it_is_plan_batches() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 300, 500)]
    batches = plan(lengths, Batching(), 1024, 512)
    assert [batch.rows for batch in batches] == plan_batches(lengths, 1024)
    for batch in batches:
        longest = max(lengths[row] for row in batch.rows)
        assert batch.shape == (len(batch.rows), longest)


def test_the_ladder_of_lengths() -> None:
    assert [round_up(n, 1, 512) for n in (0, 1, 32, 33, 64, 65, 129, 257)] == [
        1,
        1,
        32,
        34,
        64,
        68,
        136,
        272,
    ]
    assert [round_up(n, 8, 8192) for n in (1, 8, 9, 256, 257, 8191)] == [8, 8, 16, 256, 272, 8192]
    assert round_up(250, 16, 250) == 250  # never beyond the model's limit
    for multiple in (1, 8, 64):
        for length in range(32 * multiple, 9000):
            assert length <= round_up(length, multiple, 10**6) <= length * 17 / 16


def short_texts(count: int, seed: int) -> list[int]:
    """Tokens of texts of 3 to 25 words."""
    rng = np.random.default_rng(seed)
    words = rng.integers(3, 26, count)
    return [int(n) for n in words + 2 + rng.binomial(words, 0.25)]


def mixed_texts(count: int, seed: int) -> list[int]:
    """Tokens of docstrings, about: lognormal, half of them below 30, cut at 256."""
    return [int(n) for n in np.clip(np.random.default_rng(seed).lognormal(3.4, 0.9, count), 3, 256)]


def padding(shapes: list[tuple[int, int]], lengths: list[int]) -> float:
    return sum(rows * tokens for rows, tokens in shapes) / sum(lengths) - 1


def shapes_of(lengths: list[int]) -> list[tuple[int, int]]:
    return [batch.shape for batch in plan(lengths, FEW_SHAPES, FEW_SHAPES.tokens, 256)]


def test_calls_of_a_hundred_to_thousands_of_texts_pad_little() -> None:
    for count, most in ((100, 0.08), (150, 0.06), (200, 0.05), (640, 0.04), (4096, 0.02)):
        for texts in (short_texts, mixed_texts):
            calls = [texts(count, seed) for seed in range(10 if count < 1000 else 1)]
            shapes = [shape for call in calls for shape in shapes_of(call)]
            assert padding(shapes, [n for call in calls for n in call]) <= most, (count, texts)


def test_the_life_of_a_process_meets_few_numbers_of_tokens() -> None:
    """What is compiled is compiled for rows x tokens; calls of any size share 48 of those."""
    rng = np.random.default_rng(0)
    shapes: set[tuple[int, int]] = set()
    for call in range(120):
        texts = short_texts if call % 2 else mixed_texts
        shapes |= set(shapes_of(texts(int(rng.integers(1, 700)), seed=call)))
    assert len({rows * tokens for rows, tokens in shapes}) <= 48
    assert len(shapes) <= 300
    assert all(tokens <= 256 and rows * tokens <= 1024 for rows, tokens in shapes)


def test_more_texts_meet_hardly_a_number_of_tokens_that_20_000_did_not() -> None:
    calls = [set(shapes_of(short_texts(4096, seed=window))) for window in range(16)]
    first, every = set().union(*calls[:5]), set().union(*calls)
    assert len(every) <= 1.1 * len(first) <= 55  # of hundreds that any shape would give
    # Their code, which is what takes memory, is that of the numbers of tokens.
    sizes = [{rows * tokens for rows, tokens in shapes} for shapes in (first, every)]
    assert len(sizes[1]) <= 1.1 * len(sizes[0]) <= 22


def test_what_fills_a_batch_counts_as_padding() -> None:
    """Calls of 16 texts, as 16 threads make them: filled up after cutting, 64 %."""
    calls = [short_texts(16, seed=seed) for seed in range(40)]
    shapes = [shape for call in calls for shape in shapes_of(call)]
    assert padding(shapes, [n for call in calls for n in call]) <= 0.3
    assert shapes_of([240, 10]) == [(1, 240), (1, 16)]


def test_one_text_alone_runs_in_a_length_of_the_ladder() -> None:
    for limit, longest in ((512, 512), (500, 500)):  # the model's limit may be on no ladder
        plans = [plan([n], FEW_SHAPES, 1024, limit)[0].shape for n in (0, 1, 16, 17, 490)]
        assert plans == [(1, 16), (1, 16), (1, 16), (1, 32), (1, min(496, longest))]
    assert plan([500], FEW_SHAPES, 64, 500)[0].shape == (1, 500)  # over the limit of a pass


def test_many_texts_have_few_shapes_and_few_texts_their_own() -> None:
    """hf: rows repeat from two full batches on; below that nothing is filled up."""
    rng = np.random.default_rng(0)
    batching = Batching(few_shapes="many")
    many = [int(length) for length in rng.integers(5, 30, 4096)]
    shapes = [batch.shape for batch in plan(many, batching, 1024, 512)]
    assert len(set(shapes)) <= 32
    assert sum(rows * tokens for rows, tokens in shapes) <= 1.05 * sum(many)
    few = many[:16]
    assert plan(few, batching, 1024, 512) == plan(few, Batching(), 1024, 512)
