"""Scales and zero points, and rounding to them: what every int8 tensor is made with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

UINT8, SYMMETRIC = "uint8", "symmetric"
SCHEMES = (UINT8, SYMMETRIC)
"""Of activations: uint8 with a zero point, or int8 around zero. Weights are always symmetric."""

STEPS = 255
RESIDUAL_STEPS = STEPS * 254
"""Steps of an activation's range in one int8 term, and in two (QuantParams.residual)."""

MIN_RANGE = 1e-5

MIN_SCALE = np.float32(2.0**-23)
"""Of a column of zeros; float16 has this number, and TensorRT takes no scale of 0."""


@dataclass(frozen=True, kw_only=True)
class QuantParams:
    """Per-tensor parameters of an activation, as ONNX's QuantizeLinear defines them.

    q = round(x / scale) + zero_point; x = (q - zero_point) * scale.

    Args:
        scale: the size of one step.
        zero_point: the step that stands for 0.0.
        scheme: one of SCHEMES.
    """

    scale: float
    zero_point: int
    scheme: str

    @property
    def dtype(self) -> type[np.generic]:
        """uint8 or int8."""
        return np.uint8 if self.scheme == UINT8 else np.int8

    def fake_quantize(self, values: Array) -> Array:
        """Values after QuantizeLinear and DequantizeLinear.

        Args:
            values: float32, of any shape.

        Returns:
            float32, the shape of `values`.
        """
        low, high = (0, 255) if self.scheme == UINT8 else (-128, 127)
        quantized = np.clip(np.rint(values / np.float32(self.scale)) + self.zero_point, low, high)
        restored: Array = ((quantized - self.zero_point) * np.float32(self.scale)).astype(
            np.float32
        )
        return restored

    def residual(self) -> QuantParams:
        """Parameters for this one's rounding error, which is half a step to either side at most."""
        zero_point = 128 if self.scheme == UINT8 else 0
        return QuantParams(
            scale=self.scale * STEPS / RESIDUAL_STEPS, zero_point=zero_point, scheme=self.scheme
        )


def activation_params(minimum: float, maximum: float, scheme: str) -> QuantParams:
    """The parameters for values of a range; 0.0 is always exact (padding, Gelu's tail).

    Args:
        minimum: smallest value.
        maximum: largest value.
        scheme: one of SCHEMES.

    Returns:
        Parameters whose range holds both, and 0.0.
    """
    minimum, maximum = min(minimum, 0.0), max(maximum, 0.0)
    if scheme == SYMMETRIC:
        scale = max(-minimum, maximum, MIN_RANGE) / 127
        return QuantParams(scale=scale, zero_point=0, scheme=scheme)
    scale = max(maximum - minimum, MIN_RANGE) / 255
    zero_point = int(np.clip(round(-minimum / scale), 0, 255))
    return QuantParams(scale=scale, zero_point=zero_point, scheme=scheme)


def weight_scales(weight: Array) -> Array:
    """Per-channel scales of a weight, symmetric to +-127.

    Args:
        weight: float32 [in_features, out_features].

    Returns:
        float32 [out_features].
    """
    reach = np.abs(weight).max(axis=0) / 127
    scales: Array = np.maximum(reach, MIN_SCALE).astype(np.float32)
    return scales


def round_to_nearest(weight: Array, scales: Array) -> NDArray[np.int8]:
    """A weight in steps of its scales, each rounded by itself.

    Args:
        weight: float32.
        scales: float32, broadcast to `weight`, such as one per column.

    Returns:
        int8, -127 to 127, the shape of `weight`.
    """
    qweight: NDArray[np.int8] = np.clip(np.rint(weight / scales), -127, 127).astype(np.int8)
    return qweight


def fake_quantize_weight(weight: Array) -> Array:
    """A weight rounded to nearest, as float again.

    Args:
        weight: float32 [in_features, out_features].

    Returns:
        float32, the shape of `weight`.
    """
    scales = weight_scales(weight)
    restored: Array = round_to_nearest(weight, scales).astype(np.float32) * scales
    return restored
