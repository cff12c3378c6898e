"""What one product becomes: plain numbers, free of any framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jexport.quantization.quant_params import Affine

INT8, TWICE, WEIGHTS = "int8", "int8x2", "int8-weights"
TREATMENTS = (INT8, TWICE, WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What one product becomes.

    kind: 'int8', 'int8x2' (activations as two int8 terms) or 'int8-weights' (float activations).
    divisors: float32 [rows], what activations are divided by before rounding, None for nothing; the
    weight carries them. grid: of the activations. steps, scales: the weight, int8 [rows, columns]
    (read when it is written) and float32 [columns].
    """

    kind: str
    divisors: NDArray[np.float32] | None
    grid: Affine
    steps: Callable[[], NDArray[np.int8]]
    scales: NDArray[np.float32]
