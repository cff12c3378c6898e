"""SmoothQuant: its formula, and a layer whose outputs stay the same."""

from __future__ import annotations

import numpy as np
import pytest

from jexport.quantization import quant_params
from jexport.quantization.gptq import gptq
from jexport.quantization.smoothquant import InputRange, balance_factors, smoothing_factors


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


def gelu_like(rows: int) -> np.ndarray:
    """Inputs that reach far to one side, in some channels much further than in others."""
    rng = np.random.default_rng(5)
    wide = rng.normal(size=(rows, 128)) * np.exp(rng.normal(size=128))
    made: np.ndarray = np.maximum(wide, -0.2).astype(np.float32)
    return made


def observed(inputs: np.ndarray, scheme: str) -> InputRange:
    return InputRange(
        minimum=inputs.min(axis=0),
        maximum=inputs.max(axis=0),
        energy=np.square(inputs).mean(axis=0),
        scheme=scheme,
    )


def lost(factors: np.ndarray, inputs: np.ndarray, weight: np.ndarray, scheme: str) -> float:
    """What int8 loses of the product: activations and weight really rounded."""
    small, large = inputs / factors, factors[:, None] * weight
    params = quant_params.activation_params(float(small.min()), float(small.max()), scheme)
    scales = quant_params.weight_scales(large)
    rounded = gptq(large, small.T @ small, scales) * scales
    return float(np.square(params.fake_quantize(small) @ rounded - inputs @ weight).mean())


@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
@pytest.mark.parametrize("strength", [0.5, 0.85])
def test_balanced_factors_lose_less_than_the_formulas(strength: float, scheme: str) -> None:
    inputs = gelu_like(2000)
    rng = np.random.default_rng(6)
    weight = (rng.normal(size=(128, 600)) * np.exp(rng.normal(size=(128, 1)) / 2)).astype(
        np.float32
    )
    formula = smoothing_factors(inputs.min(axis=0), inputs.max(axis=0), weight, strength)
    balanced = balance_factors(formula, observed(inputs, scheme), weight)
    assert balanced.dtype == np.float32
    assert np.exp(np.log(balanced.astype(np.float64)).mean()) == pytest.approx(1.0, abs=1e-5)
    before, after = (lost(one, inputs, weight, scheme) for one in (formula, balanced))
    assert after < 0.85 * before


def test_balanced_factors_do_not_depend_on_where_they_start() -> None:
    inputs = gelu_like(500)
    weight = np.random.default_rng(7).normal(size=(128, 40)).astype(np.float32)
    low, high = inputs.min(axis=0), inputs.max(axis=0)
    starts = [smoothing_factors(low, high, weight, strength) for strength in (0.5, 0.9)]
    made = [balance_factors(one, observed(inputs, "uint8"), weight) for one in starts]
    first, second = (lost(one, inputs, weight, "uint8") for one in made)
    assert first == pytest.approx(second, rel=0.1)


def test_balancing_survives_dead_channels_and_dead_layers() -> None:
    inputs = gelu_like(50)
    inputs[:, :30] = 0
    weight = np.random.default_rng(8).normal(size=(128, 9)).astype(np.float32)
    weight[20:60] = 0
    factors = np.ones(128, np.float32)
    made = balance_factors(factors, observed(inputs, "uint8"), weight)
    assert np.isfinite(made).all()
    assert (made > 0).all()
    for some, other in ((inputs * 0, weight), (inputs, weight * 0)):
        np.testing.assert_array_equal(
            balance_factors(factors, observed(some, "uint8"), other), factors
        )
