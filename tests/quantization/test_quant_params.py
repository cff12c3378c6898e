"""Scales, zero points and rounding to them, against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from jexport.quantization import quant_params

RANGES = [(-3.0, 5.0), (-1.0, 1.007), (0.0, 7.0), (-4.0, 0.0), (2.0, 9.0), (-9.0, -2.0), (0.0, 0.0)]


@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_grid_has_zero_and_loses_half_a_step_at_most(scheme: str, low: float, high: float) -> None:
    params = quant_params.activation_params(low, high, scheme)
    values = np.linspace(min(low, 0), max(high, 0), 4001, dtype=np.float32)
    back = params.fake_quantize(values)
    assert params.fake_quantize(np.zeros(1, np.float32))[0] == 0.0
    assert np.abs(back - values).max() <= params.scale * 0.5001
    assert params.scale > 0
    assert len(np.unique(back)) <= 256
    limits = np.iinfo(np.dtype(params.dtype))
    assert limits.min <= params.zero_point <= limits.max


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_symmetric_grid_has_its_zero_at_0(low: float, high: float) -> None:
    params = quant_params.activation_params(low, high, quant_params.SYMMETRIC)
    assert params.zero_point == 0
    assert params.dtype is np.int8
    values = np.linspace(min(low, 0), max(high, 0), 1001, dtype=np.float32)
    np.testing.assert_array_equal(params.fake_quantize(-values), -params.fake_quantize(values))


def test_uint8_grid_spends_its_steps_on_the_range() -> None:
    params = quant_params.activation_params(-0.17, 8.0, quant_params.UINT8)
    assert params.dtype is np.uint8
    assert params.scale == pytest.approx(8.17 / 255)
    assert params.zero_point == round(0.17 / params.scale)
    assert (
        params.scale
        < 0.6 * quant_params.activation_params(-0.17, 8.0, quant_params.SYMMETRIC).scale
    )


@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
def test_values_beyond_the_range_are_clipped(scheme: str) -> None:
    params = quant_params.activation_params(-1.0, 2.0, scheme)
    back = params.fake_quantize(np.array([-1e6, 1e6], np.float32))
    assert back[1] == pytest.approx(2.0, abs=params.scale)
    assert -2.0 - 2 * params.scale <= back[0] <= -1.0 + params.scale


@pytest.mark.parametrize("scheme", quant_params.SCHEMES)
@pytest.mark.parametrize(("low", "high"), RANGES[:-1])
def test_rest_makes_it_fifty_times_as_exact(scheme: str, low: float, high: float) -> None:
    params = quant_params.activation_params(low, high, scheme)
    rng = np.random.default_rng(0)
    values = rng.uniform(min(low, 0), max(high, 0), 20_000).astype(np.float32)
    first = params.fake_quantize(values)
    both = first + params.residual().fake_quantize(values - first)
    assert 50 * np.abs(both - values).max() <= np.abs(first - values).max()
    assert params.residual().fake_quantize(np.zeros(1, np.float32))[0] == 0.0


def test_nearest_is_half_a_step_off_at_most() -> None:
    weight = np.random.default_rng(4).normal(size=(80, 30)).astype(np.float32)
    weight[:, 3] = 0
    scales = quant_params.weight_scales(weight)
    qweight = quant_params.round_to_nearest(weight, scales)
    assert qweight.dtype == np.int8
    assert np.abs(qweight.astype(int)).max() == 127
    assert (np.abs(qweight * scales - weight) <= scales * 0.5001).all()
    assert not qweight[:, 3].any()
