"""SmoothQuant: move the range of activations' channels into the weight (Xiao et al. 2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jexport.quantization.quant_params import MIN_RANGE

Array = NDArray[np.float32]


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
