"""The arithmetic: ranges and scales, smoothing, and rounding weights so that errors cancel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jexport.workspace.threads import one_blas_thread

Array = NDArray[np.float32]

UINT8, SYMMETRIC = "uint8", "symmetric"
SCHEMES = (UINT8, SYMMETRIC)

BLOCK = 128
DAMPING = 0.01
"""Share of the Gram matrix's mean diagonal that is added to it (GPTQ's own default)."""

_TINY = 1e-5

LEAST_SCALE = np.float32(2.0**-23)
"""Of a dead column; float16 has this number, and TensorRT takes no scale of 0."""


@dataclass(frozen=True, kw_only=True)
class Affine:
    """q = round(x / scale) + zero; x = (q - zero) * scale. scheme: of the activations."""

    scale: float
    zero: int
    scheme: str

    @property
    def dtype(self) -> type[np.generic]:
        """uint8 or int8."""
        return np.uint8 if self.scheme == UINT8 else np.int8

    def there_and_back(self, values: Array) -> Array:
        """Values as the quantized graph sees them."""
        low, high = (0, 255) if self.scheme == UINT8 else (-128, 127)
        steps = np.clip(np.rint(values / np.float32(self.scale)) + self.zero, low, high)
        restored: Array = ((steps - self.zero) * np.float32(self.scale)).astype(np.float32)
        return restored

    def rest(self) -> Affine:
        """For what this one's rounding leaves, at most half a step to either side."""
        zero = 128 if self.scheme == UINT8 else 0
        return Affine(scale=self.scale / 254, zero=zero, scheme=self.scheme)


def affine(low: float, high: float, scheme: str) -> Affine:
    """The grid for values from low to high; zero is always on it (padding, Gelu's tail)."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == SYMMETRIC:
        return Affine(scale=max(-low, high, _TINY) / 127, zero=0, scheme=scheme)
    scale = max(high - low, _TINY) / 255
    return Affine(scale=scale, zero=int(np.clip(round(-low / scale), 0, 255)), scheme=scheme)


def smoothing(low: Array, high: Array, weight: Array, strength: float) -> Array:
    """Divisors of the input channels: float32 [rows], geometric mean 1.

    max|x|^strength / max|W|^(1 - strength), SmoothQuant (Xiao et al. 2022, arXiv 2211.10438,
    equation 4). strength 0 means none. low, high: [rows]. weight: [rows, columns].
    """
    if not strength:
        return np.ones(len(low), np.float32)
    reach = np.maximum(np.maximum(np.abs(low), np.abs(high)), _TINY)
    width = np.maximum(np.abs(weight).max(axis=1), _TINY)
    divisors = reach**strength / width ** (1 - strength)
    divisors = np.maximum(divisors, _TINY)
    balanced: Array = (divisors / np.exp(np.log(divisors).mean())).astype(np.float32)
    return balanced


def weight_scales(weight: Array) -> Array:
    """One scale per column, symmetric to +-127: float32 [columns]."""
    reach = np.abs(weight).max(axis=0) / 127
    scales: Array = np.maximum(reach, LEAST_SCALE).astype(np.float32)
    return scales


def nearest(weight: Array, scales: Array) -> NDArray[np.int8]:
    """Round to nearest: int8 [rows, columns]."""
    steps: NDArray[np.int8] = np.clip(np.rint(weight / scales), -127, 127).astype(np.int8)
    return steps


def compensated(weight: Array, gram: Array, scales: Array) -> NDArray[np.int8]:
    """Round row after row; what a row loses, the rows not yet rounded make up for.

    weight: float32 [rows, columns]. gram: [rows, rows], sum of x^T x of the inputs. Returns int8
    [rows, columns]. GPTQ (Frantar et al. 2022, arXiv 2210.17323), rows in order of falling energy.
    A row that no input ever reached is rounded to nearest. On one thread: last bits of LAPACK's
    Cholesky, and on AVX2 of products, depend on their number, and now and then a weight would be
    rounded the other way.
    """
    import scipy.linalg  # type: ignore[import-untyped]  # noqa: F401  # its BLAS is limited only once it is loaded

    with one_blas_thread():
        return _compensated(weight, gram, scales)


def _compensated(weight: Array, gram: Array, scales: Array) -> NDArray[np.int8]:
    energy = np.diag(gram).astype(np.float64)
    order = np.argsort(-energy, kind="stable")
    hessian = gram[np.ix_(order, order)].astype(np.float64)
    diagonal = np.diag(hessian).copy()
    mean = diagonal.mean() or 1.0
    hessian[np.diag_indices_from(hessian)] = np.where(diagonal > 0, diagonal, mean) + DAMPING * mean
    upper = _inverse_factor(hessian).astype(np.float32)
    del hessian
    left = weight[order].astype(np.float32)
    steps = np.empty(left.shape, np.int8)
    for begin in range(0, len(left), BLOCK):
        end = min(begin + BLOCK, len(left))
        block, factor = left[begin:end].copy(), upper[begin:end, begin:end]
        lost = np.empty_like(block)
        for row in range(end - begin):
            steps[begin + row] = nearest(block[row], scales)
            lost[row] = (block[row] - steps[begin + row] * scales) / factor[row, row]
            block[row:] -= np.outer(factor[row, row:], lost[row])
        left[end:] -= upper[begin:end, end:].T @ lost
    back = np.empty_like(steps)
    back[order] = steps
    return back


def _inverse_factor(hessian: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper U with U^T U = hessian^-1."""
    from scipy.linalg import lapack

    lower, failed = lapack.dpotrf(hessian, lower=1, clean=1)
    assert not failed, "the damped Gram matrix is positive definite"
    inverse, failed = lapack.dpotri(lower, lower=1)
    assert not failed
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    upper, failed = lapack.dpotrf(inverse, lower=0, clean=1)
    assert not failed
    factor: NDArray[np.float64] = upper
    return factor
