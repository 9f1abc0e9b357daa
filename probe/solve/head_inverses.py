"""Inverses of single heads' Hessians, for heads that the Kronecker product serves badly.

Shapes: one head, K classes, D columns, q class directions. All are in the coordinates of the head's
basis (coordinates.py), and apply to a gradient G (K, D). inverse_choice.py says which head gets
which. docs/solver.md, "Preconditioners", has what they saved.

    Inverse   of one output: the whole Hessian, (D, D)
    Dense     of softmax with few parameters: the whole Hessian along class contrasts, ((K-1) D)^2
    Woodbury  of softmax with a rare class: the Kronecker product, and the few rows that hold the
              class's curvature counted out one by one
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.solve import factors
from probe.solve.coordinates import Basis

LOW_CURVATURE = 1e-6  # of the largest of class directions: below it the penalty counts as much
MAX_LOW_DIRECTIONS = 4  # that take a Gram matrix (R, R) of their own; more cost too much
TINY = 1e-300  # a curvature that counts as none


@dataclass(frozen=True)
class Inverse:
    """The inverse of a matrix (n, n), kept as that of the matrix scaled to a diagonal of ones.

    scale (n,). Scaling so is within n of the best diagonal one (van der Sluis 1969).
    """

    inverse: Tensor
    scale: Tensor

    @classmethod
    def from_hessian(cls, hessian: Tensor, dtype: torch.dtype) -> Inverse | None:
        """Invert a Hessian, (n, n) in float64; None if rounding has left none to invert."""
        scale = hessian.diagonal().clamp_min(TINY).rsqrt()
        inverted = factors.inverse(hessian * torch.outer(scale, scale))
        scale = scale.to(dtype)
        if inverted is None or not bool(scale.isfinite().all()):
            return None
        return cls(inverted.to(dtype), scale)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it holds in memory."""
        return self.inverse.nbytes

    def __call__(self, G: Tensor) -> Tensor:
        """Return the inverse times each row of G (1, n), or G (n,)."""
        return (G * self.scale) @ self.inverse * self.scale


@dataclass(frozen=True)
class KroneckerHead:
    """What M ⊗ Gram + l2 is of one head: class directions Q (K, q) of curvature m (q,), ascending.

    basis: where Gram is diagonal. l2: the penalty.
    """

    basis: Basis
    Q: Tensor
    m: Tensor
    l2: Tensor


@dataclass(frozen=True)
class Woodbury:
    """The inverse of A + V V', A = M ⊗ Gram + l2, V's columns f_a ⊗ z_a of rows a = 1 ... R.

    By Woodbury's identity (A + V V')^-1 = A^-1 - A^-1 V S^-1 V' A^-1, S = 1 + V' A^-1 V (R, R)
    (Golub & Van Loan 2013, equation 2.1.4). In class directions q: scale (q, D) is A^-1, which is
    diagonal, f (R, q), Y (R, D) = z B, factor is Cholesky's of S.
    """

    Q: Tensor
    scale: Tensor
    f: Tensor
    Y: Tensor
    factor: Tensor

    @classmethod
    def from_rows(cls, kronecker: KroneckerHead, f: Tensor, Z: Tensor) -> Woodbury | None:
        """Build it from rows Z (R, D) and their f (R, K), float64; None if it can't be had.

        The first direction, and others with hardly any curvature
        that the rows move, each take a Gram matrix of the rows. The rest share one l2 / m, which is
        little beside their curvature, so that one Gram matrix serves them all.
        """
        basis, Q, m = kronecker.basis, kronecker.Q, kronecker.m
        spectrum, some = basis.spectrum.double(), Q.any(0)
        penalty = torch.full_like(spectrum, float(kronecker.l2))
        penalty[-1] = 0
        Q, m = Q[:, some], m[some]
        f, Y = f @ Q.double(), Z @ basis.B.to(Z.dtype)
        # Below the rounding of Q is nothing to divide by, as in Preconditioner.kronecker.
        m = m.maximum(torch.finfo(Z.dtype).eps * m.max().clamp_min(0))
        # Directions with so little curvature that l2 counts beside it each keep their own diagonal
        # m_q spectrum + l2; the first is the rare class's, which the rows counted out left bare.
        low = m <= LOW_CURVATURE * m.max()
        low[0] = True
        scale = m[:, None] * spectrum + penalty
        rest = spectrum
        # The others share m_q (spectrum + l2 / mean m): l2 / m is little beside their spectrum.
        if not bool(low.all()):
            rest = spectrum + penalty / m[~low].mean()
            scale[~low] = m[~low, None] * rest
        scale = torch.where(scale > 0, 1 / scale, 0)
        alone = (low & (f != 0).any(0)).nonzero()[:, 0].tolist()
        if len(alone) > MAX_LOW_DIRECTIONS:
            return None
        # S = 1 + V'A^-1 V, summed over directions: those alone, and the rest as one Gram matrix.
        S = torch.eye(len(f), dtype=torch.float64, device=f.device)
        for q in alone:
            G = Y.double() * (f[:, q : q + 1] * scale[q].sqrt())
            S.addmm_(G, G.T)
        G = Y * torch.where(rest > 0, rest.rsqrt(), 0).to(Y.dtype)
        S += (f[:, ~low] / m[~low]) @ f[:, ~low].T * (G @ G.T).double()
        factor = factors.cholesky(S)
        if factor is None:
            return None
        scale, f, factor = (t.to(Z.dtype) for t in (scale, f, factor))
        return cls(Q, scale, f, Y, factor)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it holds in memory, mostly."""
        return self.Y.nbytes + self.factor.nbytes

    def __call__(self, G: Tensor) -> Tensor:
        """Return the inverse times G (K, D)."""
        T = (self.Q.T @ G) * self.scale
        # A^-1 G - A^-1 V S^-1 V'A^-1 G
        along = (T @ self.Y.T * self.f.T).sum(0)  # (R,)
        share = torch.cholesky_solve(along[:, None], self.factor)[:, 0]
        return self.Q @ (T - (self.f.T * share) @ self.Y * self.scale)


@dataclass(frozen=True)
class Dense:
    """The inverse Hessian of a softmax head with few parameters, of (K-1) D: class contrasts U."""

    U: Tensor
    inverse: Inverse

    @classmethod
    def from_blocks(cls, blocks: Tensor, l2: Tensor, dtype: torch.dtype, U: Tensor) -> Dense | None:
        """Invert the curvature of classes k and l, (K, K, D, D) in float64; None if it can't be.

        U (K, K-1) are the directions of classes; those that are zero are left out.
        """
        U = U[:, U.any(0)]
        q, D = U.shape[1], blocks.shape[2]
        # H_(a, b) = sum_kl U_ka U_lb blocks_kl: the Hessian between contrasts a and b.
        H = torch.einsum("ka,lb,klde->adbe", U, U, blocks).reshape(q * D, q * D)
        penalty = H.new_full((q, D), float(l2))
        penalty[:, -1] = 0
        H.diagonal().add_(penalty.flatten())
        inverse = Inverse.from_hessian(H, dtype)
        return None if inverse is None else cls(U.to(dtype), inverse)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it holds in memory."""
        return self.inverse.nbytes

    def __call__(self, G: Tensor) -> Tensor:
        """Return the inverse times G (K, D)."""
        T = self.U.T @ G
        return self.U @ self.inverse(T.flatten()).view_as(T)


HeadInverse = Inverse | Woodbury | Dense
