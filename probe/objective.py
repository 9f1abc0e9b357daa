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

from probe.preconditioner import Basis, Preconditioner

BLOCK = 1 << 21  # elements of a block's logits: 8 MB in float32, about a core's cache
TINY = 1e-20  # a probability below this counts as none
HARD = 12  # products in a Newton step after which a better preconditioner is looked for
RARE = 0.1  # a class direction is rare where this share of the rows holds its curvature
MEMORY = 1 << 30  # bytes for the inverses of rare directions


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
            p = _floored(torch.sigmoid(m))
            return (
                torch.nn.functional.softplus(m[..., 0], threshold=40),
                sign[..., None] * p,
                p * torch.sigmoid(-m),
            )
        true = self._true(rows, logits)
        m = logits - logits.gather(2, true)
        top = m.amax(2, keepdim=True)  # >= 0, and 0 where the true class wins
        e = _floored(torch.exp(m - top)).scatter_(2, true, 0)
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

    def preconditioner(self, point: Point, effort: Tensor) -> Preconditioner:
        """Return an approximate inverse of the Hessian, better where `effort` (H,) asks for it.

        effort is how many products the hardest Newton step took. Where more than HARD, and where
        they cost more than building it, the class directions whose curvature sits in a few rows (a
        rare or separable class) get the inverse of their own weighted Gram matrix.
        """
        N, D = self.Z.shape
        H, K = point.gradient.shape[:2]
        M = torch.zeros(H, K, K, dtype=torch.float64, device=self.Z.device)
        for rows, curved in point.blocks():
            wp = curved * self.weights[rows][:, self.group][..., None]
            if self.column is None:
                M -= torch.einsum("nhk,nhl->hkl", wp, curved)
            else:
                M += wp.sum(0)[..., None]
        kronecker = Preconditioner.kronecker(M, self.l2, self.bases, self.basis)
        hard = (effort > HARD).nonzero()[:, 0]
        if not len(hard):
            return kronecker
        v = self._curvature_along(point.select(hard), hard, kronecker.Q[hard])  # (N, H', K-1)
        rows_of = 1 / self.weights.square().sum(0)[self.group[hard]]  # (H',) effective rows
        share = v.sum(0).square() / v.square().sum(0).clamp_min(1e-38) / rows_of[:, None]
        rare = share < RARE
        build = rare.sum(1) * (4.0 * D**3 + 2 * RARE * N * D**2)  # float64 counts twice
        spent = effort[hard] * (4.0 * N * D * K + 4 * D**2 * K)
        rare &= (build < spent)[:, None]
        which = rare.nonzero()[: MEMORY // (self.Z.element_size() * D * D)]
        inverses = [self._inverse(v[:, i, q], int(hard[i])) for i, q in which.tolist()]
        return kronecker.with_inverses(hard[which[:, 0]], which[:, 1], inverses)

    def _curvature_along(self, point: Point, heads: Tensor, Q: Tensor) -> Tensor:
        """Return each row's weighted curvature along class directions Q (H, K, q), (N, H, q)."""
        out = []
        for rows, p in point.blocks():
            if self.column is None:
                along = torch.einsum("nhk,hkq->nhq", p, Q.square())
                along = along - torch.einsum("nhk,hkq->nhq", p, Q).square()
            else:
                along = p
            out.append(along.clamp_min(0) * self.weights[rows][:, self.group[heads]][..., None])
        return torch.cat(out)

    def _inverse(self, v: Tensor, head: int) -> Tensor:
        """Return (Z' diag(v) Z + l2)^-1, (D, D); the rows with the last percent of v as one."""
        v, rows = v.sort(descending=True)
        n = int((v.cumsum(0) < 0.99 * v.sum()).sum()) + 1
        Z = self.Z[rows[:n]].double() * v[:n, None].double().sqrt()
        gram = Z.T @ Z + v[n:].sum().double() * self.bases[int(self.basis[head])].gram
        gram.diagonal()[:-1] += self.l2[head].double()
        return torch.cholesky_inverse(torch.linalg.cholesky(gram)).to(self.Z.dtype)


def _floored(p: Tensor) -> Tensor:
    """Return p with what is below TINY as zero.

    Products of such probabilities leave float32's normal range, where processors are slow: the
    passes of separable heads took 40 times as long.
    """
    return torch.nn.functional.threshold(p, TINY, 0)
