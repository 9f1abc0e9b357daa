"""Factorisations of symmetric matrices that end no run: None or NaN where there is none.

All is done in float64. A matrix that is not finite has no factor. Cholesky's is that of a matrix
with a little more on its diagonal where rounding has left the given one indefinite (modified
Cholesky, Nocedal & Wright 2006, chapter 3). Eigenvectors come from LAPACK's divide and conquer
(syevd), which fails on some finite matrices, and there from its other two drivers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

JITTER = (0.0, 1e-14, 1e-12, 1e-10)  # shares of the diagonal that are added to it, in turn
RANK = 1e-14  # of the largest eigenvalue, times their number: what is below is rounding
Result = TypeVar("Result")


def cholesky(A: Tensor) -> Tensor | None:
    """Return the lower factor (n, n) of A (n, n), or of A with at most 1e-10 of its diagonal more.

    None where A is not finite or further from positive definite than that.
    """
    A = A.double()
    if not bool(A.isfinite().all()):
        return None
    # Rounding changes a Gram matrix by about n eps of its diagonal, 1e-13 at n = 500.
    for more in JITTER:
        near = A + torch.diag(more * A.diagonal()) if more else A
        factorised: tuple[Tensor, Tensor] | None = _tried(torch.linalg.cholesky_ex, near)
        if factorised is None:
            return None
        factor, failed = factorised
        if not bool(failed) and bool(factor.isfinite().all()):
            return factor
    return None


def inverse(A: Tensor) -> Tensor | None:
    """Return the inverse (n, n) of a positive definite A (n, n), or None: see cholesky."""
    factor = cholesky(A)
    inverted = None if factor is None else _tried(torch.cholesky_inverse, factor)
    return inverted if inverted is not None and bool(inverted.isfinite().all()) else None


def solve(A: Tensor, B: Tensor) -> Tensor:
    """Return A^-1 B of a positive definite A (n, n) and B (n, m); of a singular one A^+ B."""
    factor = cholesky(A)
    return pinv(A) @ B.double() if factor is None else torch.cholesky_solve(B.double(), factor)


def pinv(A: Tensor) -> Tensor:
    """Return the pseudo-inverse (..., n, n) of positive semidefinite matrices A (..., n, n).

    That of a matrix that is not finite is zero.
    """
    values, V = eigh(A)
    # A^+ = V diag(1 / values, or 0) V'
    values = values.nan_to_num(0)
    least = RANK * values.shape[-1] * values.amax(-1, keepdim=True)
    inverted = torch.where(values > least, 1 / values, 0)
    return (V * inverted[..., None, :]) @ V.mT


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (..., n), ascending, and eigenvectors (..., n, n) of A (..., n, n).

    Where they can't be had, eigenvalues are NaN and the eigenvectors are the axes.
    """
    A = A.double()
    if bool(A.isfinite().all()) and (eigen := _tried(torch.linalg.eigh, A)) is not None:
        values, V = eigen
        if bool(values.isfinite().all()) and bool(V.isfinite().all()):
            return values, V
    pairs = [_by_other_drivers(one) for one in A.reshape(-1, *A.shape[-2:])]
    values, V = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return values.view(A.shape[:-1]), V.view(A.shape)


def _by_other_drivers(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return what eigh does of one A (n, n), by whichever of LAPACK's drivers ends well."""
    n = len(A)
    if bool(A.isfinite().all()):
        size = A.abs().amax().clamp_min(torch.finfo(A.dtype).tiny)
        table = (A / size).cpu().numpy()
        for driver in ("evd", "evr", "ev"):
            try:
                values, V = scipy.linalg.eigh(table, driver=driver)
            except np.linalg.LinAlgError:
                continue
            if np.isfinite(values).all() and np.isfinite(V).all():
                return torch.from_numpy(values).to(A) * size, torch.from_numpy(V).to(A)
    return A.new_full((n,), torch.nan), torch.eye(n, dtype=A.dtype, device=A.device)


def _tried(function: Callable[..., Result], A: Tensor) -> Result | None:
    """Return function(A), or None where the library fails for another reason than memory."""
    try:
        return function(A)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # LinAlgError, and what a device's own library raises
        return None
