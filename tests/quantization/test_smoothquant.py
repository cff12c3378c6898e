"""SmoothQuant: its formula, and a layer whose outputs stay the same."""

from __future__ import annotations

import numpy as np
import pytest

from jexport.quantization.smoothquant import smoothing_factors


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.85, 1.0])
def test_smoothing_changes_the_sides_and_not_the_product(strength: float) -> None:
    rng = np.random.default_rng(1)
    inputs = (rng.normal(size=(50, 96)) * np.exp(rng.normal(size=96) * 2)).astype(np.float32)
    weight = rng.normal(size=(96, 40)).astype(np.float32)
    factors = smoothing_factors(inputs.min(axis=0), inputs.max(axis=0), weight, strength)
    assert factors.dtype == np.float32
    assert factors.shape == (96,)
    assert (factors > 0).all()
    assert np.exp(np.log(factors.astype(np.float64)).mean()) == pytest.approx(1.0, abs=1e-5)
    truth = inputs.astype(np.float64) @ weight
    made = (inputs / factors).astype(np.float64) @ (factors[:, None] * weight)
    np.testing.assert_allclose(made, truth, atol=1e-5 * np.abs(truth).max())
    before, after = (np.abs(x).max(axis=0) for x in (inputs, inputs / factors))
    assert after.max() / after.min() < 0.7 * before.max() / before.min()  # outliers are tamed


def test_smoothing_follows_the_papers_formula() -> None:
    low, high = np.array([-8, -1], np.float32), np.array([2, 1], np.float32)
    weight = np.array([[0.5, -2], [4, 1]], np.float32)
    wanted = np.array([8**0.75 / 2**0.25, 1 / 4**0.25])
    made = smoothing_factors(low, high, weight, 0.75)
    np.testing.assert_allclose(made, wanted / np.sqrt(wanted.prod()), rtol=1e-5)


def test_no_smoothing_is_ones() -> None:
    weight = np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32)
    made = smoothing_factors(-weight[:, 0], 9 * weight[:, 1], weight, 0.0)
    np.testing.assert_array_equal(made, np.ones(7, np.float32))


def test_smoothing_survives_a_dead_channel_and_a_dead_row() -> None:
    low, high = np.array([0, -1, 0], np.float32), np.array([0, 3, 0], np.float32)
    made = smoothing_factors(low, high, np.array([[0], [2], [1]], np.float32), 0.85)
    assert np.isfinite(made).all()
    assert (made > 0).all()
