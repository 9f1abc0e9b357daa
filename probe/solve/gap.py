"""How far heads are from their optimum: two estimates that cost next to nothing.

Shapes: H heads, K outputs, D columns, gradients g (H, K, D). docs/solver.md, "When a head is done".
certificate.py has the bound that is never too small, which costs a few passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.solve.objective import Objective, Point
from probe.solve.preconditioner import Preconditioner

FLOOR = 1e-3  # a gap is measured against max(objective, FLOOR): near 0 a relative gap says nothing
BOUND_SLACK = 10  # times the estimate of a gap that its bound may be, where a bound is asked for


def newton_decrement(objective: Objective, point: Point, inverse: Preconditioner) -> Tensor:
    """Return g' P g / 2, (H,), about the gap where P is about the inverse Hessian.

    With P = H^-1 it is half the squared Newton decrement, which is the gap to second order (Boyd &
    Vandenberghe 2004, section 9.5).
    """
    g = objective.to_basis(point.gradient)
    return 0.5 * dot(g, inverse(g))


def gradient_bound(objective: Objective, point: Point) -> Tensor:
    """Return nearly |g|^2 / (2 l2), (H,): the certificate's bound without its passes.

    f is l2-strongly convex in all but the intercept (certificate.py). The intercept's gradient is
    nearly zero next to the optimum, and counts as much as a row's size, D, times itself: rows have
    unit mean square, so that |z|^2 is about D.
    """
    # |g_W|^2 + D g_b^2: the intercept's part as if it were moved to its optimum.
    g = point.gradient.double().square()
    whole = g[..., :-1].sum((1, 2)) + g.shape[2] * g[..., -1].sum(1)
    return whole / (2 * objective.l2.double())


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return each head's scalar product of a and b (H, K, D), (H,) in float64."""
    return torch.einsum("hkd,hkd->h", a.double(), b.double())


def times(scalar: Tensor, tensor: Tensor) -> Tensor:
    """Return each head's scalar (H,) times its tensor (H, K, D), in the type of the tensor."""
    return scalar.to(tensor.dtype)[:, None, None] * tensor
