"""An upper bound on how far heads are from their optimum, from the gradient alone.

f(W, b) = g(W, b) + l2/2 |W|^2 with g convex in both. The smallest value over the free intercept b,
min_b f(W, b), is therefore l2-strongly convex in W, and its gradient is that of f by W where the
gradient by b is zero. So there f - min f <= |grad_W f|^2 / (2 l2), whatever solver found W
(strong convexity: Boyd & Vandenberghe 2004, section 9.1). The intercept is brought to its optimum
for the W at hand, by Newton's method on K numbers, and what f loses on the way belongs to the gap.
All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.solve import factors
from probe.solve.gap import FLOOR
from probe.solve.objective import LocalObjective, Point

MAX_STEPS = 30  # steps of the intercept at most: from next to its optimum it takes two
ZERO_GRADIENT = 1e-14  # the intercept's gradient, per unit of weight, that counts as zero


@torch.no_grad()
def certify(objective: LocalObjective, theta: Tensor) -> Tensor:
    """Return the bound on each head's gap, relative to max(f, 1e-3), (H,).

    It says much where l2 is not tiny: at C = 1e5 it asks for a gradient of 1e-9. Infinity where the
    intercept did not settle.
    """
    # Newton's method on the K intercepts: grad_b f = sum_i w_i r_i, M its derivative.
    theta = theta.clone()
    first = point = objective(theta)
    for _ in range(MAX_STEPS):
        unsettled = point.gradient[..., -1].abs().amax(1) > ZERO_GRADIENT
        if not unsettled.any():
            break
        M = curvature_of_intercepts(objective, point)
        # Moving all classes together changes nothing, so M has a zero: the least-norm step.
        step = factors.pinv(M) @ point.gradient[..., -1:]
        theta[..., -1] -= step[..., 0]
        point = objective(theta)
    # |grad_W f|^2 / (2 l2) at this intercept, and what f fell on the way to it.
    slope = point.gradient[..., :-1].square().sum((1, 2)) / (2 * objective.l2)
    settled = point.gradient[..., -1].abs().amax(1) <= 100 * ZERO_GRADIENT
    # f(theta) - min f = (f(theta) - f(theta')) + (f(theta') - min f), theta' with the best b.
    gap = slope + (first.value - point.value).clamp_min(0)
    gap = (gap / point.value.clamp_min(FLOOR)).nan_to_num(torch.inf, torch.inf)
    return torch.where(settled, gap, torch.inf)


def curvature_of_intercepts(objective: LocalObjective, point: Point) -> Tensor:
    """Return the Hessian by the intercepts, (H, K, K)."""
    weighted = point.curvature * objective.heads.weights_of(slice(None))[:, None]
    return objective.heads.loss.intercept_curvature(weighted, point.curvature)
