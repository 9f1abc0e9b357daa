"""The losses of a row, as functions of its logits: softmax of K classes, sigmoid of one label.

Shapes: H heads, K outputs, n rows of one block, which are of one class `row_class`. Logits and all
that is made of them are (H, K, n): every step then runs along memory. Nothing here knows features
or penalties.

    softmax  loss = log(1 + sum_{k != y} exp m_k), m_k = logit_k - logit_y
             by the logits: p - e_y; curvature diag(p) - p p'
    sigmoid  loss = log(1 + exp m), m = -logit where the label is 1, logit where it is 0
             by the logit: p - y; curvature p (1 - p)

Everything is taken relative to the true class, never as a difference of large numbers: a loss of
1e-9 keeps its digits in float32. What is kept of a point is one number per row and output, from
which products with the curvature are made: p of softmax, p (1 - p) of sigmoid.
docs/solver.md, "What is minimised".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

TINY_PROBABILITY = 1e-20  # a probability below this counts as none
LINEAR = 40  # log(1 + exp m) is m from here on, to 4e-18


class Loss(Protocol):
    """What an objective needs of the loss of its rows."""

    @property
    def column(self) -> Tensor | None:
        """Return which column of labels each head has, (H,), where there are any."""
        ...

    def select(self, heads: Tensor) -> Self:
        """Keep the heads of an index (H',)."""
        ...

    def evaluate(
        self, logits: Tensor, rows: slice, row_class: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (H, n), its derivative by the logits (H, K, n), and curvature (H, K, n).

        rows: where the block's lie among all. The logits (H, K, n) may be overwritten.
        """
        ...

    def curvature_product(self, curvature: Tensor, A: Tensor, row_class: int) -> Tensor:
        """Return each row's curvature times A (H, K, n), over A."""
        ...

    def class_curvature(self, weighted: Tensor, curvature: Tensor) -> Tensor:
        """Return sum_i w_i (curvature of row i), (H, K, K), of softmax without the diag(p) part.

        curvature (H, K, n), weighted is w times it.
        """
        ...

    def intercept_curvature(self, weighted: Tensor, curvature: Tensor) -> Tensor:
        """Return sum_i w_i (curvature of row i), (H, K, K): the Hessian by the intercepts."""
        ...


@dataclass(frozen=True)
class Softmax:
    """One of K classes, that of the block."""

    column: None = None

    def select(self, heads: Tensor) -> Softmax:
        """Return the loss of some heads (H',), the same: rows say their class themselves."""
        return self

    def evaluate(
        self, logits: Tensor, rows: slice, row_class: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (H, n), its derivative p - e_y (H, K, n), and p (H, K, n)."""
        m = logits  # m_k = logit_k - logit_y, so m_y = 0
        m -= m[:, row_class : row_class + 1].clone()
        top = m.amax(1, keepdim=True)  # >= 0, and 0 where the true class wins
        # With t = max m: exp(m - t) never overflows, and exp(-t) is the true class's own term.
        down = torch.exp(-top)
        e = floored(torch.exp(m.sub_(top)))
        e[:, row_class] = 0
        others = e.sum(1, keepdim=True)
        # log(sum_k exp m_k) = t + log(exp(-t) + others) = t + log1p(others + expm1(-t)): where the
        # true class wins t = 0, and others, as small as 1e-9, are all that log1p sees.
        loss = top + torch.log1p(others + torch.expm1(-top))
        total = others + down  # p_k = e_k / total, p_y = exp(-t) / total
        R = e.div_(total)
        p = R.clone()
        R[:, row_class] = (-others / total)[:, 0]  # p_y - 1 without its rounding
        p[:, row_class] = down.div_(total)[:, 0]
        return loss[:, 0], R, p

    def curvature_product(self, curvature: Tensor, A: Tensor, row_class: int) -> Tensor:
        """Return (diag(p) - p p') A, (H, K, n), over A: what all classes share changes nothing."""
        # (diag(p) - p p') 1 = 0: A may be taken relative to the true class, whose p is nearly 1 and
        # would cancel; then p (A - p'A), by classes.
        A -= A[:, row_class : row_class + 1].clone()
        A -= (curvature * A).sum(1, keepdim=True)
        return A.mul_(curvature)

    def class_curvature(self, weighted: Tensor, curvature: Tensor) -> Tensor:
        """Return -sum_i w_i p_i p_i', (H, K, K).

        The diagonal of sum_i w_i (diag(p_i) - p_i p_i') is what makes its rows sum to zero, and is
        had from the rest to the last bit: see Preconditioner.kronecker.
        """
        return -torch.einsum("hkn,hln->hkl", weighted, curvature)

    def intercept_curvature(self, weighted: Tensor, curvature: Tensor) -> Tensor:
        """Return sum_i w_i (diag(p_i) - p_i p_i'), (H, K, K)."""
        return torch.diag_embed(weighted.sum(2)) + self.class_curvature(weighted, curvature)


@dataclass(frozen=True)
class Sigmoid:
    """A label of 0 or 1: labels (L, N), of which each head has a column, (H,)."""

    labels: Tensor
    column: Tensor

    def select(self, heads: Tensor) -> Sigmoid:
        """Keep the heads of an index (H',)."""
        return replace(self, column=self.column[heads])

    def evaluate(
        self, logits: Tensor, rows: slice, row_class: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss (H, n), its derivative p - y (H, 1, n), and p (1 - p) (H, 1, n)."""
        sign = 1 - 2 * self.labels[:, rows][self.column][:, None]  # -1 where the label is 1
        m = sign * logits  # the label's own log-odds, with the sign that makes small losses small
        p = floored(torch.sigmoid(m))
        curvature = p * torch.sigmoid(-m)
        loss = torch.nn.functional.softplus(m[:, 0], threshold=LINEAR)
        return loss, sign * p, curvature

    def curvature_product(self, curvature: Tensor, A: Tensor, row_class: int) -> Tensor:
        """Return p (1 - p) A, (H, 1, n), over A."""
        return A.mul_(curvature)

    def class_curvature(self, weighted: Tensor, curvature: Tensor) -> Tensor:
        """Return sum_i w_i p_i (1 - p_i), (H, 1, 1)."""
        return weighted.sum(2)[..., None]

    def intercept_curvature(self, weighted: Tensor, curvature: Tensor) -> Tensor:
        """Return sum_i w_i p_i (1 - p_i), (H, 1, 1)."""
        return self.class_curvature(weighted, curvature)


def floored(p: Tensor) -> Tensor:
    """Return p (any shape) with what is below TINY_PROBABILITY as zero.

    Products of such probabilities leave float32's normal range, where processors are slow: the
    passes of separable heads took 40 times as long.
    """
    return torch.nn.functional.threshold(p, TINY_PROBABILITY, 0)
