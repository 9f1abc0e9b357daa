"""An approximate inverse of the Hessian of many softmax or sigmoid heads.

Shapes as in objective.py: H heads, K classes, D columns with the intercept last. A head's Hessian
is sum_i w_i (diag(p_i) - p_i p_i') ⊗ z_i z_i' + l2. Replacing the first factor by its mean M (K, K)
leaves the Kronecker product M ⊗ Gram (as in K-FAC, Martens & Grosse 2015, arXiv:1503.05671),
which is diagonal once M and Gram are. Measured at N = 16,000, D = 768, K = 8, C = 100:
73 passes over the rows where a diagonal scaling by p (1 - p) needs over 1,000. All here is in the
coordinates of the head's basis, where Gram is diagonal (coordinates.py).

Moving all classes together changes no softmax, and at the optimum the classes of a feature sum to
zero: that direction, which has no curvature but l2's, is left out, so q runs over K - 1 directions.

The mean misleads where rows differ in what they say of the classes: such heads get inverses of
their own (head_inverses.py, inverse_choice.py). docs/solver.md, "Preconditioners".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from probe.solve import factors
from probe.solve.head_inverses import HeadInverse


@dataclass(frozen=True)
class Preconditioner:
    """The Kronecker product's inverse of each head, or the head's own inverse."""

    Q: Tensor  # (H, K, K-1)
    scale: Tensor  # (H, K-1, D)
    m: Tensor  # (H, K-1) the curvature of class directions, ascending where it can be, float64
    max_curvature: Tensor  # (H,) the largest curvature that M ⊗ Gram has, float64
    head_inverses: Mapping[int, HeadInverse] = field(default_factory=dict)  # by head

    @classmethod
    def kronecker(cls, M: Tensor, l2: Tensor, spectrum: Tensor, U: Tensor) -> Preconditioner:
        """Return the inverse of M ⊗ Gram + l2 along the directions U (H, K, K-1) of classes.

        M (H, K, K) and spectrum (H, D) in float64. For K > 1 only what is off M's diagonal is read:
        the rows of diag(p) - p p' sum to zero, and so they do to the last bit.
        """
        if M.shape[1] > 1:
            M.diagonal(dim1=1, dim2=2).zero_()
            M.diagonal(dim1=1, dim2=2).sub_(M.sum(2))
        # M ⊗ Gram = (U Q) m (U Q)' ⊗ B^-T spectrum B^-1: its inverse divides by m_q spectrum_d.
        between = U.mT @ M @ U
        m, Q = factors.eigh(between)  # (H, K-1), (H, K-1, K-1)
        # Without eigenvalues the diagonal takes their place: see factors.eigh.
        m = torch.where(m.isnan(), between.diagonal(dim1=1, dim2=2), m)
        m = m.nan_to_num(0)  # of a head that left float32's range: its penalty is what is known
        # Below the rounding of Q is nothing to divide by: a class without a row has no curvature.
        least = torch.finfo(l2.dtype).eps * m.amax(1, keepdim=True).clamp_min(0)
        scale = m.maximum(least)[:, :, None] * spectrum[:, None, :]
        max_curvature = scale.amax((1, 2))
        # + l2 in every direction but the intercept's: B is orthogonal among features.
        scale[..., :-1] += l2.double()[:, None, None]
        scale = torch.where(scale > 0, 1 / scale, 0).to(l2.dtype)
        return cls((U @ Q).to(l2.dtype), scale, m, max_curvature)

    def __call__(self, G: Tensor) -> Tensor:
        """Return about the inverse Hessian times G (H, K, D)."""
        T = torch.einsum("hkq,hkd->hqd", self.Q, G) * self.scale
        out = torch.einsum("hkq,hqd->hkd", self.Q, T)
        for head, inverse in self.head_inverses.items():
            out[head] = inverse(G[head])
        return out

    def without(self, broken: Tensor) -> Preconditioner:
        """Leave out the own inverses of some heads, (H,) bool: rounding has broken them."""
        own = {h: one for h, one in self.head_inverses.items() if not broken[h]}
        return replace(self, head_inverses=own)

    def select(self, heads: Tensor) -> Preconditioner:
        """Keep the heads of an index (H',)."""
        own = {
            n: self.head_inverses[h]
            for n, h in enumerate(heads.tolist())
            if h in self.head_inverses
        }
        return Preconditioner(
            self.Q[heads], self.scale[heads], self.m[heads], self.max_curvature[heads], own
        )


def contrasts(K: int, present: Tensor | None = None) -> Tensor:
    """Return an orthonormal basis of the vectors summing to zero, (K, K-1): Helmert contrasts.

    Of the vectors that are zero but for the classes `present` (K,), where they are given: the last
    columns are zero then. Of one output all that there is, (1, 1).
    """
    if K == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if present is not None:
        out, n = torch.zeros(K, K - 1, dtype=torch.float64), int(present.sum())
        if n > 1:
            out[present, : n - 1] = contrasts(n)
        return out
    U = torch.triu(torch.ones(K, K - 1, dtype=torch.float64))
    U[torch.arange(1, K), torch.arange(K - 1)] = -torch.arange(1, K, dtype=torch.float64)
    return U / U.square().sum(0).sqrt()
