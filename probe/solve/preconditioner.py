"""An approximate inverse of the Hessian of many softmax or sigmoid heads.

Shapes as in objective.py: H heads, K classes, D columns with the intercept last. A head's Hessian
is sum_i w_i (diag(p_i) - p_i p_i') ⊗ z_i z_i' + l2. Replacing the first factor by its mean M (K, K)
leaves the Kronecker product M ⊗ Gram (as in K-FAC, Martens & Grosse 2015, arXiv:1503.05671), which
is diagonal once M and Gram are. Measured at N = 16,000, D = 768, K = 8, C = 100: 73 passes over the
rows where a diagonal scaling by p (1 - p) needs over 1,000. All here is in the coordinates of the
head's basis, where Gram is diagonal: there rounding is alike in directions of much and of little
curvature.

Moving all classes together changes no softmax, and at the optimum the classes of a feature sum to
zero: that direction, which has no curvature but l2's, is left out, so q runs over K - 1 directions.

The mean misleads where rows differ in what they say of the classes. A head with few parameters, or
of one output, gets the inverse of its own Hessian: 270 heads of 233 images, 64 features and 6
classes, C up to 1e5, take 2,953 passes where the Kronecker product needs 28,144. Of a larger head
the curvature of a class may sit in few rows, as where a rare class can be separated: they are
counted out one by one, with all they couple (Woodbury). Measured on such a head at C = 1e5
(N = 12,800, 265 rows of the class, 794 counted out): 3 products where the Kronecker product needs
over 300, and the inverse of the class's own Gram matrix, which leaves out the coupling of classes,
80.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from probe.solve import factors
from probe.solve.rows import Rows

SHARED_BASIS_SHARE = 0.6  # the share of all rows from which a weighting takes the basis of all
LOW_CURVATURE = (
    1e-6  # of the largest curvature of class directions: below it the penalty counts as much
)
MAX_LOW_DIRECTIONS = (
    4  # class directions whose rows are counted out one direction at a time, at most
)


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
        """Diagonalise the covariance of features whose Gram matrix, with a one each, is gram."""
        gram = gram / gram[-1, -1]
        mean = gram[-1, :-1]  # of the features, because the last column is ones
        covariance = gram[:-1, :-1] - torch.outer(mean, mean)
        spectrum, V = factors.eigh(covariance)
        spectrum = torch.where(spectrum.isnan(), covariance.diagonal(), spectrum)  # nearly so
        B = torch.zeros_like(gram)
        B[:-1, :-1] = V
        B[-1, :-1] = -mean @ V  # moving along a feature holds the mean logit still
        B[-1, -1] = 1
        spectrum = torch.cat([spectrum.clamp_min(0), spectrum.new_ones(1)])
        return cls(B, spectrum, gram)

    def to(self, dtype: torch.dtype) -> Basis:
        """Return the coordinates in another type; gram stays float64."""
        return Basis(self.B.to(dtype), self.spectrum.to(dtype), self.gram)


def bases_of(rows: Rows, weights: Tensor) -> tuple[list[Basis], Tensor]:
    """Return bases for weightings (G, N), and which of them each weighting takes, (G,).

    Weightings that use nearly the same rows share one, that of all their rows: folds then turn in
    one matrix product, and a basis costs as much as a hundred passes of a head.
    """
    N, D = len(rows), rows.width
    share = (weights > 0).double().mean(1)
    same = weights.amax(1) == torch.where(weights > 0, weights, torch.inf).amin(1)
    alike = same & (share >= SHARED_BASIS_SHARE) & (share * N >= 10 * D)
    sets = [w for w, like in zip(weights, alike.tolist(), strict=True) if not like]
    which = torch.cumsum(~alike, 0) - 1
    if alike.any():
        sets = [torch.ones_like(weights[0]), *sets]
        which = torch.where(alike, 0, which + 1)
    return [Basis.from_gram(gram) for gram in rows.grams(sets)], which


@dataclass(frozen=True)
class Inverse:
    """A head of one output, solved by the inverse of its own Hessian, (D, D).

    The matrix is scaled to a diagonal of ones before it is inverted: scale (D,).
    """

    inverse: Tensor
    scale: Tensor

    @classmethod
    def from_hessian(cls, hessian: Tensor, dtype: torch.dtype) -> Inverse | None:
        """Invert a Hessian, (D, D) in float64; None if rounding has left none to invert."""
        scale = hessian.diagonal().clamp_min(1e-300).rsqrt()
        found = factors.inverse(hessian * torch.outer(scale, scale))
        scale = scale.to(dtype)
        if found is None or not bool(scale.isfinite().all()):
            return None
        return cls(found.to(dtype), scale)

    @property
    def nbytes(self) -> int:
        """Return what it holds in memory."""
        return self.inverse.nbytes

    def __call__(self, G: Tensor) -> Tensor:
        """Apply to G (1, D)."""
        return (G * self.scale) @ self.inverse * self.scale


@dataclass(frozen=True)
class Woodbury:
    """The inverse of M ⊗ Gram + l2 + sum_a (f_a ⊗ z_a) (f_a ⊗ z_a)', rows a = 1 ... R counted out.

    In class directions q: scale (q, D) is the inverse of the first two terms, f (R, q),
    Y (R, D) = z B. Woodbury's identity leaves a Cholesky factor (R, R) to solve with.
    """

    Q: Tensor
    scale: Tensor
    f: Tensor
    Y: Tensor
    factor: Tensor

    @classmethod
    def from_rows(
        cls, basis: Basis, Q: Tensor, m: Tensor, l2: Tensor, f: Tensor, Z: Tensor
    ) -> Woodbury | None:
        """Build it from class directions Q (K, q) of curvature m (q,), ascending; None if it can't.

        f (R, K) in float64, Z (R, D). The first direction, and others with hardly any curvature
        that the rows move, each take a Gram matrix of the rows. The rest share one l2 / m, which is
        little beside their curvature, so that one Gram matrix serves them all.
        """
        spectrum, some = basis.spectrum.double(), Q.any(0)
        penalty = torch.full_like(spectrum, float(l2))
        penalty[-1] = 0
        Q, m = Q[:, some], m[some]
        f, Y = f @ Q.double(), Z @ basis.B.to(Z.dtype)
        m = m.maximum(torch.finfo(Z.dtype).eps * m.max().clamp_min(0))  # see kronecker
        low = m <= LOW_CURVATURE * m.max()
        low[0] = True
        scale = m[:, None] * spectrum + penalty
        rest = spectrum
        if not bool(low.all()):
            rest = spectrum + penalty / m[~low].mean()
            scale[~low] = m[~low, None] * rest
        scale = torch.where(scale > 0, 1 / scale, 0)
        alone = (low & (f != 0).any(0)).nonzero()[:, 0].tolist()
        if len(alone) > MAX_LOW_DIRECTIONS:
            return None
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
        """Return what it holds in memory, mostly."""
        return self.Y.nbytes + self.factor.nbytes

    def __call__(self, G: Tensor) -> Tensor:
        """Apply to G (K, D)."""
        T = (self.Q.T @ G) * self.scale
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
        H = torch.einsum("ka,lb,klde->adbe", U, U, blocks).reshape(q * D, q * D)
        penalty = H.new_full((q, D), float(l2))
        penalty[:, -1] = 0
        H.diagonal().add_(penalty.flatten())
        found = Inverse.from_hessian(H, dtype)
        return None if found is None else cls(U.to(dtype), found)

    @property
    def nbytes(self) -> int:
        """Return what it holds in memory."""
        return self.inverse.nbytes

    def __call__(self, G: Tensor) -> Tensor:
        """Apply to G (K, D)."""
        T = self.U.T @ G
        return self.U @ self.inverse(T.flatten()).view_as(T)


HeadInverse = Inverse | Woodbury | Dense


@dataclass(frozen=True)
class Preconditioner:
    """Turn classes (Q), divide, turn back; hard heads by inverses of their own."""

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
        between = U.mT @ M @ U
        m, Q = factors.eigh(between)  # (H, K-1), (H, K-1, K-1)
        m = torch.where(m.isnan(), between.diagonal(dim1=1, dim2=2), m)  # nearly so
        m = m.nan_to_num(0)  # of a head that left float32's range: its penalty is what is known
        # Below the rounding of Q is nothing to divide by: a class without a row has no curvature.
        least = torch.finfo(l2.dtype).eps * m.amax(1, keepdim=True).clamp_min(0)
        scale = m.maximum(least)[:, :, None] * spectrum[:, None, :]
        max_curvature = scale.amax((1, 2))
        scale[..., :-1] += l2.double()[:, None, None]
        scale = torch.where(scale > 0, 1 / scale, 0).to(l2.dtype)
        return cls((U @ Q).to(l2.dtype), scale, m, max_curvature)

    def __call__(self, G: Tensor) -> Tensor:
        """Apply to G (H, K, D)."""
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
