"""Coordinates: the three in which a head can be written, and which module uses which.

    features  x (D,), as they are given. A head is coef (K, D) and intercept (K,). heads.py,
              inputs.py, sources.py, least_squares.py, knn.py.
    rows      z = ((x - shift) / scale, turned into the r directions that N < D rows span, 1), of
              `width` numbers. A head is theta (K, width), the intercept last: it is a coordinate
              like any other, but for the penalty. rows.py, objective.py, line_search.py, solver.py,
              certificate.py, path.py, gap.gradient_bound, and exact products in newton_step.py.
    basis     z B, where the Gram matrix of the weighted rows is diagonal. preconditioner.py,
              head_inverses.py, inverse_choice.py, and products at bfloat16: there rounding is alike
              in directions of much and of little curvature.

`Units` leads from rows to features, `Basis` from basis to rows. In objective.py and all above it D
is the width of a row.

Why rows and not features: centring takes the common offset out of the Gram matrix, whose condition
it would square; a scale of about 1 keeps float32 within its range. Neither changes the problem: a
shift is taken up by the intercept, which has no penalty, and a scale by l2 (inputs and fit.py).
Where N < D the optimum has no part outside the span of the rows, because its gradient there is
l2 W alone (the representer theorem).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.solve import factors


@dataclass(frozen=True)
class Units:
    """What makes rows of features: shift (D,) float64, scale, and directions (D, r) or None.

    scale is a power of two. directions have orthonormal columns, so that the penalty stays |W|^2.
    """

    shift: Tensor
    scale: float
    directions: Tensor | None = None

    def to(self, device: torch.device) -> Units:
        """Return the same on a device."""
        directions = None if self.directions is None else self.directions.to(device)
        return Units(self.shift.to(device), self.scale, directions)

    def to_features(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return coef (..., D) and intercept (...) for features, from theta (..., width)."""
        # W z + b = W directions' (x - shift) / scale + b = coef x + (b - coef shift)
        coef = theta[..., :-1] / self.scale
        if self.directions is not None:
            coef = coef @ self.directions.T
        return coef, theta[..., -1] - coef @ self.shift

    def mean_squares(self, gram: Tensor) -> Tensor:
        """Return the mean square of each feature, (D,), from a Gram matrix (width, width) of rows.

        gram is the mean of z z' over some weighting: E x^2 = shift^2 + 2 shift E(x - shift)
        + E(x - shift)^2.
        """
        mean, spread = gram[-1, :-1], gram[:-1, :-1].diagonal()
        if self.directions is not None:
            mean = self.directions @ mean
            spread = (self.directions @ gram[:-1, :-1] * self.directions).sum(1)
        mean, spread = self.scale * mean, self.scale**2 * spread
        return self.shift.square() + 2 * self.shift * mean + spread


@dataclass(frozen=True)
class Basis:
    """Coordinates in which the Gram matrix of one set of row weights is diagonal.

    `B' Gram B = diag(spectrum)`. B (D, D) keeps the penalty's metric (its feature part is
    orthogonal), spectrum (D,), gram (D, D) in float64.
    """

    B: Tensor
    spectrum: Tensor
    gram: Tensor

    @classmethod
    def from_gram(cls, gram: Tensor) -> Basis:
        """Diagonalise the covariance of rows whose Gram matrix is gram (D, D), float64."""
        gram = gram / gram[-1, -1]
        mean = gram[-1, :-1]  # of the features, because the last column is ones
        covariance = gram[:-1, :-1] - torch.outer(mean, mean)
        spectrum, V = factors.eigh(covariance)
        # Where there are no eigenvalues the axes take the place of eigenvectors: see factors.
        spectrum = torch.where(spectrum.isnan(), covariance.diagonal(), spectrum)
        # z B = (V' (z - mean), 1): decorrelated features, centred by this weighting.
        B = torch.zeros_like(gram)
        B[:-1, :-1] = V
        B[-1, :-1] = -mean @ V  # moving along a feature holds the mean logit still
        B[-1, -1] = 1
        spectrum = torch.cat([spectrum.clamp_min(0), spectrum.new_ones(1)])
        return cls(B, spectrum, gram)

    def to(self, dtype: torch.dtype) -> Basis:
        """Return the coordinates in another type; gram stays float64."""
        return Basis(self.B.to(dtype), self.spectrum.to(dtype), self.gram)
