"""The penalised loss of many heads at once: value, gradient and curvature.

Shapes: H heads, K outputs of a head, N rows z of D columns, the last of ones, so that the intercept
is a coordinate like any other (coordinates.py); theta (H, K, D).

    f_h(theta) = sum_i w_i loss(y_i, theta z_i) + l2_h / 2 |theta without its last column|^2,
    sum_i w_i = 1

    gradient   sum_i w_i r_i z_i' + l2 theta             r_i: the loss's derivative by its logits
    Hessian    sum_i w_i C_i (x) z_i z_i' + l2           C_i (K, K): the loss's curvature
    times V    sum_i w_i (C_i V z_i) z_i' + l2 V         two products with the rows

All are products over blocks of rows, and sums over blocks: the rows may lie in memory, in a file
(LocalObjective), or in several processes (RemoteObjective, probe/cluster.py).
docs/solver.md, "What is minimised".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from probe.solve.head_set import HeadSet
from probe.solve.rows import LocalRows, Rows

BLOCK_ELEMENTS = 1 << 19  # of a block's logits: 2 MB in float32, near a core's own cache
BLOCK_ROWS = 512, 2048  # the least, below which products are slow, and the most
CURVATURE_ROWS = 4096  # whose curvature is summed at once


@dataclass(frozen=True)
class Point:
    """f at a theta: value (H,) float64, gradient (H, K, D), and the curvature of each row.

    curvature is what the objective needs for products with the Hessian there: (H, K, N) of losses'
    curvature, or where others hold that (RemoteCurvature). It is indexed and assigned by heads.
    """

    value: Tensor
    gradient: Tensor
    curvature: Any

    def select(self, heads: Tensor) -> Point:
        """Keep the heads of an index (H',)."""
        return Point(self.value[heads], self.gradient[heads], self.curvature[heads])

    def assign(self, heads: Tensor, other: Point) -> None:
        """Write another point's heads (H') over those of an index (H',)."""
        self.value[heads] = other.value
        self.gradient[heads] = other.gradient
        self.curvature[heads] = other.curvature


class Objective(Protocol):
    """What the solver knows of H objectives, each l2-strongly convex but for its last column."""

    @property
    def l2(self) -> Tensor:
        """Return the penalties, (H,)."""
        ...

    @property
    def bf16(self) -> Self | None:
        """Return the same over rows at bfloat16, or None where that isn't faster.

        Its Hessian products are in the coordinates of the basis, and with a matrix a little other
        than the Hessian; for one matrix V must have no more digits than bfloat16.
        """
        ...

    def select(self, heads: Tensor) -> Self:
        """Keep the heads of an index (H',)."""
        ...

    def __call__(self, theta: Tensor) -> Point:
        """Evaluate all heads at theta (H, K, D)."""
        ...

    def hessian_product(self, point: Point, V: Tensor) -> Tensor:
        """Return the Hessian at a point times V, both (H, K, D)."""
        ...

    def to_basis(self, gradients: Tensor) -> Tensor:
        """Return gradients (H, K, D) in the coordinates of the preconditioner."""
        ...

    def from_basis(self, steps: Tensor) -> Tensor:
        """Return steps (H, K, D) that are given in the coordinates of the preconditioner."""
        ...

    def centred(self, theta: Tensor) -> Tensor:
        """Return theta (H, K, D) less what changes no f."""
        ...


class HeadObjective(Objective, Protocol):
    """An objective over rows: what a choice of preconditioners needs beside."""

    @property
    def heads(self) -> HeadSet:
        """Return the heads."""
        ...

    @property
    def rows(self) -> Rows:
        """Return the rows."""
        ...

    def mean_curvature(self, point: Point) -> Tensor:
        """Return sum_i w_i C_i, (H, K, K) in float64; of softmax without the diag(p) part."""
        ...

    def curvature_of(self, point: Point, head: int) -> Tensor:
        """Return the curvature of one head at all rows, (K, N)."""
        ...


class OverHeads:
    """What objectives over rows have of their heads alone."""

    heads: HeadSet

    @property
    def l2(self) -> Tensor:
        """Return the penalties, (H,)."""
        return self.heads.l2

    def to_basis(self, gradients: Tensor) -> Tensor:
        """Return gradients (H, K, D) in the coordinates of their bases."""
        return self.heads.to_basis(gradients)

    def from_basis(self, steps: Tensor) -> Tensor:
        """Return steps (H, K, D) that are given in the coordinates of their bases."""
        return self.heads.from_basis(steps)

    def centred(self, theta: Tensor) -> Tensor:
        """Return theta (H, K, D) less what moves all classes together, which changes no softmax."""
        return self.heads.centred(theta)


@dataclass(frozen=True)
class LocalObjective(OverHeads):
    """H penalised losses over rows of this process.

    bf16_rows: the rows at bfloat16, in the coordinates of the one basis, where that is faster.
    """

    heads: HeadSet
    rows: LocalRows
    bf16_rows: LocalRows | None = None

    @property
    def bf16(self) -> LocalObjective | None:
        """Return the same over the rows at bfloat16, where there are any."""
        if self.bf16_rows is None:
            return None
        return replace(self, rows=self.bf16_rows, bf16_rows=None)

    def select(self, heads: Tensor) -> LocalObjective:
        """Keep the heads of an index (H',)."""
        return replace(self, heads=self.heads.select(heads))

    def blocks(self, outputs: int) -> Iterator[tuple[slice, Tensor, int]]:
        """Yield rows, Z (n, D) and class of blocks whose logits hold about BLOCK_ELEMENTS."""
        # A block's logits stay in a core's cache between one product, the loss and the other.
        least, most = BLOCK_ROWS
        n = BLOCK_ELEMENTS // (len(self.l2) * outputs)
        return self.rows.blocks(min(max(least, n), most))

    def __call__(self, theta: Tensor) -> Point:
        """Evaluate all heads at theta (H, K, D)."""
        H, K, _ = theta.shape
        # f = l2/2 |W|^2 + sum_i w_i loss_i; g = l2 W + sum_i w_i r_i z_i'.
        value, gradient = self.heads.penalty(theta), self.heads.penalty_gradient(theta)
        curvature = theta.new_empty(H, K, len(self.rows))
        for rows, Z, row_class in self.blocks(K):
            w = self.heads.weights_of(rows)
            loss, R, curvature[..., rows] = self.heads.loss.evaluate(
                logits(Z, theta), rows, row_class
            )
            # In float64: N losses of a tolerance of 1e-6 would lose it in float32's sum.
            value += torch.einsum("hn,hn->h", w.double(), loss.double())
            accumulate_gradient(gradient, R.mul_(w[:, None]), Z)
        return Point(value, gradient, curvature)

    def hessian_product(self, point: Point, V: Tensor) -> Tensor:
        """Return the Hessian at a point times V, both (H, K, D)."""
        # H V = l2 V + sum_i w_i (C_i V z_i) z_i': V z_i are the logits of V.
        out = self.heads.penalty_gradient(V)
        for rows, Z, row_class in self.blocks(V.shape[1]):
            # A = V z, then C A w, then back: (H K, D) x (D, n), and (H K, n) x (n, D).
            A = logits(Z, V)  # (H, K, n)
            A = self.heads.loss.curvature_product(point.curvature[..., rows], A, row_class)
            accumulate_gradient(out, A.mul_(self.heads.weights_of(rows)[:, None]), Z)
        return out

    def mean_curvature(self, point: Point) -> Tensor:
        """Return sum_i w_i C_i, (H, K, K) in float64; of softmax without the diag(p) part."""
        H, K = point.gradient.shape[:2]
        M = torch.zeros(H, K, K, dtype=torch.float64, device=point.gradient.device)
        for start in range(0, len(self.rows), CURVATURE_ROWS):
            rows = slice(start, start + CURVATURE_ROWS)
            # float32 within CURVATURE_ROWS, float64 over them: M is a sum of probabilities.
            curvature = point.curvature[..., rows]
            weighted = curvature * self.heads.weights_of(rows)[:, None]
            M += self.heads.loss.class_curvature(weighted, curvature)
        return M

    def curvature_of(self, point: Point, head: int) -> Tensor:
        """Return the curvature of one head at all rows, (K, N)."""
        curvature: Tensor = point.curvature[head]
        return curvature


def logits(Z: Tensor, theta: Tensor) -> Tensor:
    """Return theta Z', (H, K, n), of a block Z (n, D) and theta (H, K, D), multiplied as Z is."""
    H, K, D = theta.shape
    return (theta.reshape(H * K, D).to(Z.dtype) @ Z.T).to(theta.dtype).view(H, K, -1)


def accumulate_gradient(out: Tensor, R: Tensor, Z: Tensor) -> None:
    """Add R Z to `out` (H, K, D): what residuals R (H, K, n) of a block Z (n, D) give."""
    out, R = out.view(-1, out.shape[2]), R.flatten(0, 1)
    # In place where types agree; a product at bfloat16 is added to a sum of more digits.
    if Z.dtype == out.dtype:
        out.addmm_(R, Z)
    else:
        out += R.to(Z.dtype) @ Z
