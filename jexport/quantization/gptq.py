"""GPTQ: round a weight so that errors cancel on real inputs (Frantar et al. 2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from jexport.quantization.quant_params import round_to_nearest
from jexport.workspace.threads import one_blas_thread

Array = NDArray[np.float32]

BLOCK = 128
DAMPING = 0.01
"""Share of the Gram matrix's mean diagonal that is added to it (GPTQ's own default)."""


def gptq(weight: Array, gram: Array, scales: Array) -> NDArray[np.int8]:
    """Round row after row; the rows not yet rounded make up for what a row loses.

    arXiv 2210.17323, rows in order of falling energy (`act_order`). A row that no input ever
    reached is rounded to nearest. On one thread: last bits of LAPACK's Cholesky, and on AVX2 of
    products, depend on their number, and now and then a weight would be rounded the other way.

    Args:
        weight: float32 [in_features, out_features].
        gram: float32 [in_features, in_features], sum of x^T x of the inputs.
        scales: float32 [out_features].

    Returns:
        int8 [in_features, out_features].
    """
    import scipy.linalg  # type: ignore[import-untyped]  # noqa: F401  # its BLAS is limited only once it is loaded

    with one_blas_thread():
        return _round_by_energy(weight, gram, scales)


def _round_by_energy(weight: Array, gram: Array, scales: Array) -> NDArray[np.int8]:
    energy = np.diag(gram).astype(np.float64)
    order = np.argsort(-energy, kind="stable")
    hessian = gram[np.ix_(order, order)].astype(np.float64)
    diagonal = np.diag(hessian).copy()
    mean = diagonal.mean() or 1.0
    hessian[np.diag_indices_from(hessian)] = np.where(diagonal > 0, diagonal, mean) + DAMPING * mean
    upper = _inverse_factor(hessian).astype(np.float32)
    del hessian
    remaining = weight[order].astype(np.float32)
    ordered = np.empty(remaining.shape, np.int8)
    for begin in range(0, len(remaining), BLOCK):
        end = min(begin + BLOCK, len(remaining))
        block, factor = remaining[begin:end].copy(), upper[begin:end, begin:end]
        errors = np.empty_like(block)
        for row in range(end - begin):
            ordered[begin + row] = round_to_nearest(block[row], scales)
            errors[row] = (block[row] - ordered[begin + row] * scales) / factor[row, row]
            block[row:] -= np.outer(factor[row, row:], errors[row])
        remaining[end:] -= upper[begin:end, end:].T @ errors
    qweight = np.empty_like(ordered)
    qweight[order] = ordered
    return qweight


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
