"""The penalised loss of many heads at once: value, gradient and curvature.

All are products over blocks of rows.

Shapes: N rows, D columns, H heads, K outputs of a head, G columns of row weights.
Z (N, D) centred features with a last column of ones, so that the intercept is a
coordinate like any other; theta (H, K, D). With softmax a head has K classes; with
sigmoid K = 1 and a head is one column of labels.

    f_h(theta) = sum_i w_i * loss(y_i, theta z_i) + l2_h / 2 * ||theta without its last column||^2,
    sum_i w_i = 1

Everything is computed relative to the true class, so that a loss of 1e-9 keeps its digits in
float32: with margins m_k = logit_k - logit_y the loss is log(1 + sum_{k != y} exp m_k), never
a difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 1 << 21  # elements of a block's logits: 8 MB in float32, about a core's cache


@dataclass(frozen=True)
class Basis:
    """Coordinates in which the Gram matrix of one set of row weights is diagonal.

    `B' Gram B = diag(spectrum)`. B (D, D) keeps the penalty's metric (its feature part is
    orthogonal), spectrum (D,).
    """

    B: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, Z: Tensor, w: Tensor) -> Basis:
        """Diagonalise the features' covariance about their mean, both weighted by w (N,)."""
        D = Z.shape[1]
        gram = torch.zeros(D, D, dtype=torch.float64, device=Z.device)
        for start in range(0, len(Z), 16384):
            rows = slice(start, start + 16384)
            Y = Z[rows].double()
            gram += (Y * w[rows].double()[:, None]).T @ Y
        gram /= gram[-1, -1].clone()
        mean = gram[-1, :-1]  # of the features, because the last column is ones
        spectrum, V = torch.linalg.eigh(gram[:-1, :-1] - torch.outer(mean, mean))
        B = torch.zeros_like(gram)
        B[:-1, :-1] = V
        B[-1, :-1] = -mean @ V  # moving along a feature holds the mean logit still
        B[-1, -1] = 1
        spectrum = torch.cat([spectrum.clamp_min(0), spectrum.new_ones(1)])
        return cls(B.to(Z.dtype), spectrum.to(Z.dtype))


@dataclass(frozen=True)
class Point:
    """f at a theta: value (H,) float64, gradient (H, K, D), and the curvature of each block."""

    value: Tensor
    gradient: Tensor
    curvature: list[Tensor]  # softmax: probabilities (n, H, K); sigmoid: p * (1 - p) (n, H, 1)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the row ranges that the curvature was computed in, each with its curvature."""
        start = 0
        for curved in self.curvature:
            yield slice(start, start + len(curved)), curved
            start += len(curved)

    def select(self, heads: Tensor) -> Point:
        """Keep the heads of an index (H',)."""
        curvature = [c[:, heads] for c in self.curvature]
        return Point(self.value[heads], self.gradient[heads], curvature)


@dataclass(frozen=True)
class Objective:
    """H penalised losses over the same rows.

    y: (N,) class index for softmax, or (N, L) of 0 and 1 for sigmoid, whose columns heads pick
        by `column` (H,).
    weights: (N, G), each column summing to 1; heads pick by `group` (H,), and from the bases
        by `basis` (H,).
    """

    Z: Tensor
    y: Tensor
    weights: Tensor
    bases: list[Basis]
    l2: Tensor
    group: Tensor
    basis: Tensor
    column: Tensor | None = None

    def select(self, heads: Tensor) -> Objective:
        """Keep the heads of an index (H',)."""
        column = None if self.column is None else self.column[heads]
        return replace(
            self, l2=self.l2[heads], group=self.group[heads], basis=self.basis[heads], column=column
        )

    def blocks(self, outputs: int) -> Iterator[slice]:
        """Row ranges whose logits stay within BLOCK elements."""
        step = max(1024, BLOCK // (len(self.l2) * outputs))
        return (slice(i, min(i + step, len(self.Z))) for i in range(0, len(self.Z), step))

    def logits(self, rows: slice, theta: Tensor) -> Tensor:
        """Return Z theta' of a block, (n, H, K)."""
        H, K, D = theta.shape
        return (self.Z[rows] @ theta.reshape(H * K, D).T).view(-1, H, K)

    def pull(self, rows: slice, R: Tensor) -> Tensor:
        """Return R' Z of a block, (H, K, D): what residuals (n, H, K) give in parameter space."""
        return (R.flatten(1).T @ self.Z[rows]).view(R.shape[1], R.shape[2], -1)

    def penalised(self, theta: Tensor) -> Tensor:
        """Return l2 * theta, zero for the intercept, (H, K, D): the penalty's gradient."""
        out = self.l2[:, None, None] * theta
        out[..., -1] = 0
        return out

    def __call__(self, theta: Tensor) -> Point:
        """Evaluate all heads at theta (H, K, D)."""
        K = theta.shape[1]
        value = 0.5 * self.l2.double() * theta[..., :-1].double().square().sum((1, 2))
        gradient = self.penalised(theta)
        curvature = []
        for rows in self.blocks(K):
            w = self.weights[rows][:, self.group]  # (n, H)
            loss, R, curved = self._loss(rows, self.logits(rows, theta))
            value += torch.einsum("nh,nh->h", w.double(), loss.double())
            gradient += self.pull(rows, R * w[..., None])
            curvature.append(curved)
        return Point(value, gradient, curvature)

    def _loss(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (n, H), its derivative by the logits (n, H, K), and curvature (n, H, K)."""
        if self.column is not None:
            sign = 1 - 2 * self.y[rows][:, self.column].to(logits.dtype)  # -1 where the label is 1
            m = sign[..., None] * logits
            p = torch.sigmoid(m)
            return (
                torch.nn.functional.softplus(m[..., 0], threshold=40),
                sign[..., None] * p,
                p * torch.sigmoid(-m),
            )
        true = self._true(rows, logits)
        m = logits - logits.gather(2, true)
        top = m.amax(2, keepdim=True)  # >= 0, and 0 where the true class wins
        e = torch.exp(m - top).scatter_(2, true, 0)
        others = e.sum(2, keepdim=True)
        loss = top + torch.log1p(others + torch.expm1(-top))
        total = others + torch.exp(-top)
        R = (e / total).scatter_(2, true, -others / total)
        p = R.scatter(2, true, torch.exp(-top) / total)
        return loss[..., 0], R, p

    def _true(self, rows: slice, like: Tensor) -> Tensor:
        """Return each row's class as an index into (n, H, K)."""
        return self.y[rows][:, None, None].expand(-1, like.shape[1], 1)

    def hessian_product(self, point: Point, V: Tensor) -> Tensor:
        """Return the Hessian at a point times V, both (H, K, D)."""
        out = self.penalised(V)
        for rows, curved in point.blocks():
            A = self.logits(rows, V)  # (n, H, K)
            if self.column is None:  # (diag(p) - p p') A, taken relative to the true class
                A = A - A.gather(2, self._true(rows, A))
                A = A - (curved * A).sum(2, keepdim=True)
            A = A.mul_(curved).mul_(self.weights[rows][:, self.group][..., None])
            out += self.pull(rows, A)
        return out

    def preconditioner(self, point: Point) -> Preconditioner:
        """Return the inverse of M ⊗ Gram + l2, M (K, K) each head's mean curvature in class space.

        The Hessian is sum_i w_i (diag(p_i) - p_i p_i') ⊗ z_i z_i'. Replacing the first factor by
        its mean M leaves a Kronecker product (as in K-FAC, Martens & Grosse 2015,
        arXiv:1503.05671), which is diagonal once M and Gram are. Measured at N = 16,000, D = 768,
        K = 8: 73 passes where a diagonal scaling by p (1 - p) needs over 1,000 (C = 100). Moving
        all classes together changes no softmax, and at the optimum the classes of a feature sum to
        zero: that direction, which has no curvature but l2's, is left out.
        """
        H, K = point.gradient.shape[:2]
        M = torch.zeros(H, K, K, dtype=torch.float64, device=self.Z.device)
        for rows, curved in point.blocks():
            wp = curved * self.weights[rows][:, self.group][..., None]
            if self.column is None:
                M -= torch.einsum("nhk,nhl->hkl", wp, curved)
            else:
                M += wp.sum(0)[..., None]
        U = torch.ones(1, 1, dtype=torch.float64, device=M.device)
        if self.column is None:
            M.diagonal(dim1=1, dim2=2).zero_()
            M.diagonal(dim1=1, dim2=2).sub_(M.sum(2))  # rows of diag(p) - p p' sum to zero
            U = _contrasts(K).to(M.device)
        m, Q = torch.linalg.eigh(U.T @ M @ U)  # (H, K-1), (H, K-1, K-1)
        m, Q = m.clamp_min(0), U @ Q
        dtype = point.gradient.dtype
        spectrum = torch.stack([b.spectrum for b in self.bases]).double()[self.basis]  # (H, D)
        scale = m[:, :, None] * spectrum[:, None, :]
        scale[..., :-1] += self.l2.double()[:, None, None]
        scale = torch.where(scale > 0, 1 / scale, 0).to(dtype)
        return Preconditioner(self.bases, self.basis, Q.to(dtype), scale)


@dataclass(frozen=True)
class Preconditioner:
    """An approximate inverse Hessian: rotate features (B) and classes (Q), divide, rotate back."""

    bases: list[Basis]
    basis: Tensor  # (H,) an index into bases
    Q: Tensor  # (H, K, K-1)
    scale: Tensor  # (H, K-1, D)

    def __call__(self, G: Tensor) -> Tensor:
        """Apply to G (H, K, D)."""
        T = torch.einsum("hkq,hkd->hqd", self.Q, self._rotate(G, transpose=False)) * self.scale
        return self._rotate(torch.einsum("hkq,hqd->hkd", self.Q, T), transpose=True)

    def select(self, heads: Tensor) -> Preconditioner:
        """Keep the heads of an index (H',)."""
        return Preconditioner(self.bases, self.basis[heads], self.Q[heads], self.scale[heads])

    def _rotate(self, G: Tensor, *, transpose: bool) -> Tensor:
        if len(self.bases) == 1:
            B = self.bases[0].B
            return G @ (B.T if transpose else B)
        out = torch.empty_like(G)
        for g, one in enumerate(self.bases):
            heads = (self.basis == g).nonzero()[:, 0]
            if len(heads):
                out[heads] = G[heads] @ (one.B.T if transpose else one.B)
        return out


def _contrasts(K: int) -> Tensor:
    """Return an orthonormal basis of the vectors summing to zero, (K, K-1): Helmert contrasts."""
    U = torch.triu(torch.ones(K, K - 1, dtype=torch.float64))
    U[torch.arange(1, K), torch.arange(K - 1)] = -torch.arange(1, K, dtype=torch.float64)
    return U / U.square().sum(0).sqrt()
