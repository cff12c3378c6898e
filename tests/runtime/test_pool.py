"""jexport.runtime.pool against the formulas written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexport.errors import UnsupportedGraphError
from jexport.runtime.pool import MODES, finish, mean_by_group, pool


def written_out(tokens: np.ndarray[Any, np.dtype[np.float64]], mode: str) -> Any:
    """The formula of one mode for one text: float64 [tokens, dim] -> [dim]."""
    return {
        "mean": lambda: tokens.sum(0) / max(len(tokens), 1e-9),
        "mean_sqrt_len": lambda: tokens.sum(0) / np.sqrt(max(len(tokens), 1e-9)),
        "weightedmean": lambda: np.average(tokens, axis=0, weights=range(1, len(tokens) + 1)),
        "cls": lambda: tokens[0],
        "last": lambda: tokens[-1],
        "max": lambda: tokens.max(0),
    }[mode]()


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    left=st.booleans(),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_mode_on_padded_batches(lengths: list[int], left: bool, mode: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    longest = max(lengths)
    hidden = rng.standard_normal((len(lengths), longest, 6)).astype(np.float32)
    columns = np.arange(longest)[::-1] if left else np.arange(longest)
    mask = (columns < np.array(lengths)[:, None]).astype(np.int64)
    hidden[mask == 0] = 1e6  # what stands in a padded place must not show
    expected = [
        written_out(row[keep > 0].astype(np.float64), mode)
        for row, keep in zip(hidden, mask, strict=True)
    ]
    pooled = pool(hidden, mask, mode)
    assert pooled.dtype == np.float32
    assert pooled.shape == (len(lengths), 6)
    np.testing.assert_allclose(pooled, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_tokens_is_zero(mode: str) -> None:
    hidden = np.ones((2, 3, 4), dtype=np.float32)
    mask = np.array([[0, 0, 0], [1, 1, 0]])
    pooled = pool(hidden, mask, mode)
    assert (pooled[0] == 0).all()
    assert (pooled[1] > 0).all()
    assert (hidden == 1).all(), "the input is left as it was"


def test_a_long_mean_is_accurate() -> None:
    rng = np.random.default_rng(1)
    hidden = (rng.standard_normal((1, 8192, 32)) + 0.5).astype(np.float32)
    pooled = pool(hidden, np.ones((1, 8192), dtype=np.int64), "mean")
    np.testing.assert_allclose(pooled[0], hidden[0].astype(np.float64).mean(0), atol=5e-6)


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(UnsupportedGraphError, match="no pooling mode 'means'") as caught:
        pool(np.ones((1, 1, 1), dtype=np.float32), np.ones((1, 1), dtype=np.int64), "means")
    assert "did you mean 'mean'" in caught.value.fix


@given(
    owners=st.lists(st.integers(-1, 3), max_size=30),
    seed=st.integers(0, 2**32 - 1),
)
def test_mean_by_group(owners: list[int], seed: int) -> None:
    group = np.array([*owners, 0, 1, 2, 3])  # each group has a token
    hidden = np.random.default_rng(seed).standard_normal((len(group), 5)).astype(np.float32)
    expected = [hidden[group == one].astype(np.float64).mean(0) for one in range(4)]
    means = mean_by_group(hidden, group, 4)
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, expected, rtol=1e-6, atol=1e-6)


def test_finish_cuts_before_it_normalises() -> None:
    vectors = np.array([[3.0, 4.0, 12.0]], dtype=np.float32)
    assert finish(vectors, dimensions=2, normalize=False).tolist() == [[3.0, 4.0]]
    np.testing.assert_allclose(finish(vectors, dimensions=2, normalize=True), [[0.6, 0.8]])
    np.testing.assert_allclose(
        finish(vectors, dimensions=None, normalize=True), vectors / np.float32(13), rtol=1e-6
    )
    assert vectors.tolist() == [[3.0, 4.0, 12.0]], "the input is left as it was"


def test_finish_keeps_a_zero_vector() -> None:
    zero = np.zeros((1, 4), dtype=np.float32)
    finished = finish(zero, dimensions=None, normalize=True)
    assert (finished == 0).all()
    assert finished.dtype == np.float32
