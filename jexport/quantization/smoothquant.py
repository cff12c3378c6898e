"""SmoothQuant: move the range of activations' channels into the weight (Xiao et al. 2022).

The formula knows largest values alone. What rounding loses is known better: uniform noise of a step
squared / 12 on either side of the product, so the factors are moved to where the sum of both is
smallest, each side of a range for itself (a Gelu reaches far to one side only).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jexport.quantization.quant_params import MIN_RANGE, STEPS, SYMMETRIC

Array = NDArray[np.float32]
Exact = NDArray[np.float64]

ITERATIONS, STEP = 60, 0.1
"""Of Adam, on logarithms of the factors; the step falls to 0. 400 smaller ones gained below 1 %."""

NORM = 24
"""Maxima are taken as this p-norm, so that more than the largest channel has a gradient; at 12 the
noise found was 5 to 10 % more (MiniLM)."""

MAX_COLUMNS = 512
"""Columns of the weight that are looked at, spread evenly: all of 1,536 gave 1 % less noise."""

GPTQ_SHARE = 0.8
"""Of the noise of a weight rounded to nearest, what GPTQ leaves: 0.4 to 0.85 in MiniLM's layers."""


def smoothing_factors(minimum: Array, maximum: Array, weight: Array, strength: float) -> Array:
    """What each input channel is divided by, and the weight's row multiplied by.

    max|x|^strength / max|W|^(1 - strength), arXiv 2211.10438, equation 4; then divided by their
    geometric mean.

    Args:
        minimum: float32 [in_features], smallest activation of each channel.
        maximum: float32 [in_features], largest.
        weight: float32 [in_features, out_features].
        strength: SmoothQuant's alpha, 0 (none) to 1.

    Returns:
        float32 [in_features] with geometric mean 1.
    """
    if not strength:
        return np.ones(len(minimum), np.float32)
    reach = np.maximum(np.maximum(np.abs(minimum), np.abs(maximum)), MIN_RANGE)
    width = np.maximum(np.abs(weight).max(axis=1), MIN_RANGE)
    factors = reach**strength / width ** (1 - strength)
    factors = np.maximum(factors, MIN_RANGE)
    balanced: Array = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return balanced


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """What an activation's channels hold, over the calibration tokens.

    Args:
        minimum: float32 [in_features].
        maximum: float32 [in_features].
        energy: float [in_features], mean square.
        scheme: of the activation, one of quant_params.SCHEMES.
        steps: that the activation's range is cut into, quant_params.STEPS or RESIDUAL_STEPS.
    """

    minimum: Array
    maximum: Array
    energy: NDArray[np.floating]
    scheme: str
    steps: int = STEPS

    def sides(self) -> tuple[Exact, Exact]:
        """How far each channel reaches below and above 0; the same where steps are symmetric.

        Returns:
            Two of float64 [in_features], MIN_RANGE at least.
        """
        low, high = -self.minimum.astype(np.float64), self.maximum.astype(np.float64)
        if self.scheme == SYMMETRIC:
            low = high = np.maximum(low, high)
        return np.maximum(low, MIN_RANGE), np.maximum(high, MIN_RANGE)


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """The rounding noise of x / f times f W, and its gradient.

    low, high: reach of the channels, [in_features]. rows: sum of squares of W's rows. powers:
    (|W| / largest) ** NORM, [in_features, columns]. energy: of x, [in_features]. steps: of x.
    """

    low: Exact
    high: Exact
    rows: Exact
    powers: Array
    largest: float
    energy: Exact
    steps: int

    def gradient(self, logs: Exact) -> tuple[float, Exact]:
        """Mean square of the output's noise, summed over columns, up to a factor.

        Args:
            logs: of the factors f, float64 [in_features].

        Returns:
            Its logarithm, and the gradient of that by `logs`.
        """
        factors = np.exp(logs)
        low, low_share = _norm(self.low / factors)
        high, high_share = _norm(self.high / factors)
        rows = self.rows * factors**2
        inputs = ((low + high) / self.steps) ** 2 * rows.sum()
        inputs_gradient = 2 * rows / rows.sum() - 2 * (low * low_share + high * high_share) / (
            low + high
        )
        furthest = factors.max()
        raised = (factors / furthest) ** NORM
        columns = np.maximum(raised.astype(np.float32) @ self.powers, np.finfo(np.float32).tiny)
        reach = columns.astype(np.float64) ** (2 / NORM)
        energy = self.energy / factors**2
        scale = (self.largest * furthest / 127) ** 2
        weight = GPTQ_SHARE * scale * reach.sum() * energy.sum()
        by_row = self.powers @ (reach / columns).astype(np.float32)
        weight_gradient = 2 * raised * by_row / reach.sum() - 2 * energy / energy.sum()
        total = inputs + weight
        gradient: Exact = (inputs * inputs_gradient + weight * weight_gradient) / total
        return float(np.log(total)), gradient


def _norm(values: Exact) -> tuple[float, Exact]:
    """The NORM-norm of positive values, and the share of each in its gradient's logarithm."""
    largest = values.max()
    raised = (values / largest) ** NORM
    total = raised.sum()
    return float(largest * total ** (1 / NORM)), raised / total


def balance_factors(factors: Array, inputs: InputRange, weight: Array) -> Array:
    """Factors with less rounding noise in the layer's output than those that they start from.

    Both noises are uniform, independent and of a step squared / 12 (Widrow 1956): the activations'
    has one step, which the furthest channel decides, and meets the weight's rows; the weight's has
    a step a column and meets the activations' energy.

    Args:
        factors: float32 [in_features], from smoothing_factors.
        inputs: what the layer reads.
        weight: float32 [in_features, out_features].

    Returns:
        float32 [in_features] with geometric mean 1; `factors` where nothing is less.
    """
    width = weight.shape[1]
    columns = np.linspace(0, width - 1, num=min(width, MAX_COLUMNS), dtype=np.int64)
    magnitudes = np.abs(weight[:, columns])
    largest = float(magnitudes.max())
    energy = inputs.energy.astype(np.float64)
    if not largest or not energy.sum():
        return factors
    low, high = inputs.sides()
    noise = _Noise(
        low=low,
        high=high,
        rows=np.square(magnitudes, dtype=np.float64).sum(axis=1),
        powers=np.asarray((magnitudes / np.float32(largest)) ** NORM, np.float32),
        largest=largest,
        energy=energy,
        steps=inputs.steps,
    )
    logs = np.log(factors.astype(np.float64))
    best, least = logs, np.inf
    mean, square = np.zeros_like(logs), np.zeros_like(logs)
    for number in range(ITERATIONS):
        value, gradient = noise.gradient(logs)
        if value < least:
            best, least = logs, value
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        direction = mean / (1 - 0.9 ** (number + 1))
        direction /= np.sqrt(square / (1 - 0.99 ** (number + 1))) + 1e-9
        logs = logs - STEP * (1 - number / ITERATIONS) * direction
    balanced: Array = np.exp(best - best.mean()).astype(np.float32)
    return balanced
