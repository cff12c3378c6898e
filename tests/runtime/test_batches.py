"""jexport.runtime.batches: every row once, within the limit, in few shapes, with little padding."""

from __future__ import annotations

from typing import Literal

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jexport.runtime.batches import plan, plan_batches, round_up
from jexport.types import Batching

FEW_SHAPES = Batching(fixed_rows="always", single_multiple=16)
"""As the target openvino asks for."""


@given(
    lengths=st.lists(st.integers(0, 500), max_size=80),
    limit=st.integers(1, 3000),
    multiple=st.sampled_from([1, 2, 8, 64]),
    fixed_rows=st.sampled_from(["never", "many", "always"]),
    single_multiple=st.sampled_from([0, 16]),
)
def test_each_row_is_in_one_batch_that_holds_it(
    lengths: list[int],
    limit: int,
    multiple: int,
    fixed_rows: Literal["never", "many", "always"],
    single_multiple: int,
) -> None:
    batching = Batching(
        length_multiple=multiple, fixed_rows=fixed_rows, single_multiple=single_multiple
    )
    batches = plan(lengths, batching, limit, 512)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        rows, tokens = batch.shape
        assert rows >= len(batch.rows) >= 1
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


def test_few_shapes_pad_little_and_repeat() -> None:
    """A million texts meet no shape that 20,000 have not met, and pad less than 5 %."""
    shapes: set[tuple[int, int]] = set()
    padded = real = 0
    first: set[tuple[int, int]] = set()
    for window in range(60):
        lengths = short_texts(4096, seed=window)
        batches = plan(lengths, FEW_SHAPES, FEW_SHAPES.tokens, 512)
        shapes |= {batch.shape for batch in batches}
        padded += sum(rows * tokens for rows, tokens in (batch.shape for batch in batches))
        real += sum(lengths)
        if window == 4:
            first = set(shapes)
    assert padded <= 1.05 * real
    assert len(first) < 40
    assert len(shapes) <= 1.1 * len(first)


def test_small_calls_share_shapes() -> None:
    shapes = set()
    rng = np.random.default_rng(0)
    for _ in range(2000):
        lengths = [int(n) for n in rng.integers(3, 36, rng.integers(2, 17))]
        batches = plan(lengths, FEW_SHAPES, FEW_SHAPES.tokens, 512)
        shapes |= {batch.shape for batch in batches}
    assert all(rows & (rows - 1) == 0 and tokens % 4 == 0 for rows, tokens in shapes)
    assert len(shapes) <= 5 * 9
    [long, short] = plan([500, 10], FEW_SHAPES, FEW_SHAPES.tokens, 512)
    assert (long.shape, short.shape) == ((1, 512), (1, 12))


def test_what_fills_rows_and_lengths_counts_as_padding() -> None:
    """Calls of 16 texts, as 16 threads make them, and of 256: filled up after cutting, 64, 63 %."""
    for count, most in ((16, 1.4), (256, 1.35)):
        padded = real = 0
        for seed in range(40):
            lengths = short_texts(count, seed=seed)
            shapes = [batch.shape for batch in plan(lengths, FEW_SHAPES, FEW_SHAPES.tokens, 512)]
            assert all(rows * tokens <= FEW_SHAPES.tokens for rows, tokens in shapes)
            padded += sum(rows * tokens for rows, tokens in shapes)
            real += sum(lengths)
        assert padded <= most * real


def test_one_text_alone_has_a_ladder_of_its_own() -> None:
    assert [plan([n], FEW_SHAPES, FEW_SHAPES.tokens, 512)[0].shape for n in (1, 16, 17, 500)] == [
        (1, 16),
        (1, 16),
        (1, 32),
        (1, 512),
    ]


def test_many_texts_have_few_shapes_and_few_texts_their_own() -> None:
    """hf: rows repeat from two full batches on; below that nothing is filled up."""
    rng = np.random.default_rng(0)
    batching = Batching(fixed_rows="many")
    many = [int(length) for length in rng.integers(5, 30, 4096)]
    shapes = [batch.shape for batch in plan(many, batching, 1024, 512)]
    assert len(set(shapes)) <= 32
    assert sum(rows * tokens for rows, tokens in shapes) <= 1.05 * sum(many)
    few = many[:16]
    assert plan(few, batching, 1024, 512) == plan(few, Batching(), 1024, 512)
