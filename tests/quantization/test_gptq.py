"""GPTQ against rounding to nearest, on inputs as a transformer has them."""

from __future__ import annotations

import numpy as np
import pytest

from jexport.quantization import quant_params
from jexport.quantization.gptq import gptq


def correlated(rows: int, channels: int) -> np.ndarray:
    """Inputs as a transformer has them: a few directions hold most of the energy."""
    rng = np.random.default_rng(3)
    few = rng.normal(size=(rows, channels // 6)) @ rng.normal(size=(channels // 6, channels))
    made: np.ndarray = (few + 0.1 * rng.normal(size=(rows, channels))).astype(np.float32)
    return made


def lost(inputs: np.ndarray, weight: np.ndarray, qweight: np.ndarray, scales: np.ndarray) -> float:
    return float(np.linalg.norm(inputs @ (weight - qweight.astype(np.float32) * scales)))


@pytest.mark.parametrize("channels", [64, 300])  # 300: more than two blocks
def test_gptq_loses_less_than_rounding_to_nearest(channels: int) -> None:
    inputs = correlated(1000, channels)
    weight = np.random.default_rng(5).normal(size=(channels, 48)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    qweight = gptq(weight, inputs.T @ inputs, scales)
    assert qweight.dtype == np.int8
    assert qweight.shape == weight.shape
    assert -127 <= qweight.min() < qweight.max() <= 127
    plain = quant_params.round_to_nearest(weight, scales)
    assert lost(inputs, weight, qweight, scales) < 0.7 * lost(inputs, weight, plain, scales)


def test_gptq_pays_on_texts_it_has_not_seen() -> None:
    inputs = correlated(2000, 128)
    seen, other = inputs[:1000], inputs[1000:]
    weight = np.random.default_rng(6).normal(size=(128, 32)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    qweight = gptq(weight, seen.T @ seen, scales)
    plain = quant_params.round_to_nearest(weight, scales)
    assert lost(other, weight, qweight, scales) < 0.8 * lost(other, weight, plain, scales)


def test_a_row_that_no_input_reaches_is_rounded_to_nearest() -> None:
    inputs = correlated(500, 96)
    inputs[:, [5, 90]] = 0
    weight = np.random.default_rng(7).normal(size=(96, 20)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    qweight = gptq(weight, inputs.T @ inputs, scales)
    plain = quant_params.round_to_nearest(weight, scales)
    np.testing.assert_array_equal(qweight[[5, 90]], plain[[5, 90]])
    assert lost(inputs, weight, qweight, scales) < lost(inputs, weight, plain, scales)


def test_without_any_energy_all_rows_are_rounded_to_nearest() -> None:
    weight = np.random.default_rng(8).normal(size=(70, 9)).astype(np.float32)
    scales = quant_params.weight_scales(weight)
    qweight = gptq(weight, np.zeros((70, 70), np.float32), scales)
    np.testing.assert_array_equal(qweight, quant_params.round_to_nearest(weight, scales))
