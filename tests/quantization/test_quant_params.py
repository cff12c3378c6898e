"""Ranges, smoothing and rounding, against what they promise of themselves."""

from __future__ import annotations

import numpy as np
import pytest

from jexport.quantization import quant_params

RANGES = [(-3.0, 5.0), (-1.0, 1.007), (0.0, 7.0), (-4.0, 0.0), (2.0, 9.0), (-9.0, -2.0), (0.0, 0.0)]


def correlated(rows: int, channels: int) -> np.ndarray:
    """Inputs as a transformer has them: a few directions hold most of the energy."""
    rng = np.random.default_rng(3)
    few = rng.normal(size=(rows, channels // 6)) @ rng.normal(size=(channels // 6, channels))
    made: np.ndarray = (few + 0.1 * rng.normal(size=(rows, channels))).astype(np.float32)
    return made


def lost(inputs: np.ndarray, weight: np.ndarray, steps: np.ndarray, scales: np.ndarray) -> float:
    return float(np.linalg.norm(inputs @ (weight - steps.astype(np.float32) * scales)))


@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_grid_has_zero_and_loses_half_a_step_at_most(scheme: str, low: float, high: float) -> None:
    grid = quant_params.affine(low, high, scheme)
    values = np.linspace(min(low, 0), max(high, 0), 4001, dtype=np.float32)
    back = grid.there_and_back(values)
    assert grid.there_and_back(np.zeros(1, np.float32))[0] == 0.0
    assert np.abs(back - values).max() <= grid.scale * 0.5001
    assert grid.scale > 0
    assert len(np.unique(back)) <= 256
    limits = np.iinfo(np.dtype(grid.dtype))
    assert limits.min <= grid.zero <= limits.max


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_symmetric_grid_has_its_zero_at_0(low: float, high: float) -> None:
    grid = quant_params.affine(low, high, quant_params.SYMMETRIC)
    assert grid.zero == 0
    assert grid.dtype is np.int8
    values = np.linspace(min(low, 0), max(high, 0), 1001, dtype=np.float32)
    np.testing.assert_array_equal(grid.there_and_back(-values), -grid.there_and_back(values))


def test_uint8_grid_spends_its_steps_on_the_range() -> None:
    grid = quant_params.affine(-0.17, 8.0, quant_params.UINT8)
    assert grid.dtype is np.uint8
    assert grid.scale == pytest.approx(8.17 / 255)
    assert grid.zero == round(0.17 / grid.scale)
    assert grid.scale < 0.6 * quant_params.affine(-0.17, 8.0, quant_params.SYMMETRIC).scale


@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
def test_values_beyond_the_range_are_clipped(scheme: str) -> None:
    grid = quant_params.affine(-1.0, 2.0, scheme)
    back = grid.there_and_back(np.array([-1e6, 1e6], np.float32))
    assert back[1] == pytest.approx(2.0, abs=grid.scale)
    assert -2.0 - 2 * grid.scale <= back[0] <= -1.0 + grid.scale


@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
@pytest.mark.parametrize(("low", "high"), RANGES[:-1])
def test_rest_makes_it_fifty_times_as_exact(scheme: str, low: float, high: float) -> None:
    grid = quant_params.affine(low, high, scheme)
    rng = np.random.default_rng(0)
    values = rng.uniform(min(low, 0), max(high, 0), 20_000).astype(np.float32)
    first = grid.there_and_back(values)
    both = first + grid.rest().there_and_back(values - first)
    assert 50 * np.abs(both - values).max() <= np.abs(first - values).max()
    assert grid.rest().there_and_back(np.zeros(1, np.float32))[0] == 0.0


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.85, 1.0])
def test_smoothing_changes_the_sides_and_not_the_product(strength: float) -> None:
    rng = np.random.default_rng(1)
    inputs = (rng.normal(size=(50, 96)) * np.exp(rng.normal(size=96) * 2)).astype(np.float32)
    weight = rng.normal(size=(96, 40)).astype(np.float32)
    divisors = quant_params.smoothing(inputs.min(axis=0), inputs.max(axis=0), weight, strength)
    assert divisors.dtype == np.float32
    assert divisors.shape == (96,)
    assert (divisors > 0).all()
    assert np.exp(np.log(divisors.astype(np.float64)).mean()) == pytest.approx(1.0, abs=1e-5)
    truth = inputs.astype(np.float64) @ weight
    made = (inputs / divisors).astype(np.float64) @ (divisors[:, None] * weight)
    np.testing.assert_allclose(made, truth, atol=1e-5 * np.abs(truth).max())
    before, after = (np.abs(x).max(axis=0) for x in (inputs, inputs / divisors))
    assert after.max() / after.min() < 0.7 * before.max() / before.min()  # outliers are tamed


def test_smoothing_follows_the_papers_formula() -> None:
    low, high = np.array([-8, -1], np.float32), np.array([2, 1], np.float32)
    weight = np.array([[0.5, -2], [4, 1]], np.float32)
    wanted = np.array([8**0.75 / 2**0.25, 1 / 4**0.25])
    made = quant_params.smoothing(low, high, weight, 0.75)
    np.testing.assert_allclose(made, wanted / np.sqrt(wanted.prod()), rtol=1e-5)


def test_no_smoothing_is_ones() -> None:
    weight = np.random.default_rng(2).normal(size=(7, 3)).astype(np.float32)
    made = quant_params.smoothing(-weight[:, 0], 9 * weight[:, 1], weight, 0.0)
    np.testing.assert_array_equal(made, np.ones(7, np.float32))


def test_smoothing_survives_a_dead_channel_and_a_dead_row() -> None:
    low, high = np.array([0, -1, 0], np.float32), np.array([0, 3, 0], np.float32)
    made = quant_params.smoothing(low, high, np.array([[0], [2], [1]], np.float32), 0.85)
    assert np.isfinite(made).all()
    assert (made > 0).all()


def test_nearest_is_half_a_step_off_at_most() -> None:
    weight = np.random.default_rng(4).normal(size=(80, 30)).astype(np.float32)
    weight[:, 3] = 0
    scales = quant_params.weight_scales(weight)
    steps = quant_params.nearest(weight, scales)
    assert steps.dtype == np.int8
    assert np.abs(steps.astype(int)).max() == 127
    assert (np.abs(steps * scales - weight) <= scales * 0.5001).all()
    assert not steps[:, 3].any()


@pytest.mark.parametrize("channels", [64, 300])  # 300: more than two blocks
def test_compensated_loses_less_than_nearest(channels: int) -> None:
    inputs = correlated(1000, channels)
    weight = np.random.default_rng(5).normal(size=(channels, 48)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    steps = quant_params.compensated(weight, inputs.T @ inputs, scales)
    assert steps.dtype == np.int8
    assert steps.shape == weight.shape
    assert -127 <= steps.min() < steps.max() <= 127
    plain = quant_params.nearest(weight, scales)
    assert lost(inputs, weight, steps, scales) < 0.7 * lost(inputs, weight, plain, scales)


def test_compensated_pays_on_texts_it_has_not_seen() -> None:
    inputs = correlated(2000, 128)
    seen, other = inputs[:1000], inputs[1000:]
    weight = np.random.default_rng(6).normal(size=(128, 32)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    steps = quant_params.compensated(weight, seen.T @ seen, scales)
    plain = quant_params.nearest(weight, scales)
    assert lost(other, weight, steps, scales) < 0.8 * lost(other, weight, plain, scales)


def test_a_row_that_no_input_reaches_is_rounded_to_nearest() -> None:
    inputs = correlated(500, 96)
    inputs[:, [5, 90]] = 0
    weight = np.random.default_rng(7).normal(size=(96, 20)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    steps = quant_params.compensated(weight, inputs.T @ inputs, scales)
    plain = quant_params.nearest(weight, scales)
    np.testing.assert_array_equal(steps[[5, 90]], plain[[5, 90]])
    assert lost(inputs, weight, steps, scales) < lost(inputs, weight, plain, scales)


def test_without_any_energy_all_rows_are_rounded_to_nearest() -> None:
    weight = np.random.default_rng(8).normal(size=(70, 9)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    steps = quant_params.compensated(weight, np.zeros((70, 70), np.float32), scales)
    np.testing.assert_array_equal(steps, quant_params.nearest(weight, scales))
