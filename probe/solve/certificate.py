"""An upper bound on how far heads are from their optimum, from the gradient alone.

f(W, b) = g(W, b) + l2/2 |W|^2 with g convex in both. The smallest value over the free intercept b,
min_b f(W, b), is therefore l2-strongly convex in W, and its gradient is that of f by W where the
gradient by b is zero. So there f - min f <= |grad_W f|^2 / (2 l2), whatever solver found W
(Boyd & Vandenberghe 2004, equation 9.9). The intercept is brought to its optimum for the W at hand,
by Newton's method on K numbers, and what f loses on the way belongs to the gap. All in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.solve import factors
from probe.solve.objective import Objective, Point
from probe.solve.solver import FLOOR

NEWTON = 30  # steps of the intercept at most: from next to its optimum it takes two
SETTLED = 1e-14  # the intercept's gradient, per unit of weight, that counts as zero


@torch.no_grad()
def certify(objective: Objective, theta: Tensor) -> Tensor:
    """Return the bound on each head's gap, relative to max(f, 1e-3), (H,).

    It says much where l2 is not tiny: at C = 1e5 it asks for a gradient of 1e-9. Infinity where the
    intercept did not settle.
    """
    theta = theta.clone()
    first = here = objective(theta)
    for _ in range(NEWTON):
        loose = here.gradient[..., -1].abs().amax(1) > SETTLED
        if not loose.any():
            break
        M = curvature_of_intercepts(objective, here)
        # Moving all classes together changes nothing, so M has a zero: the least-norm step.
        step = factors.pinv(M) @ here.gradient[..., -1:]
        theta[..., -1] -= step[..., 0]
        here = objective(theta)
    slope = here.gradient[..., :-1].square().sum((1, 2)) / (2 * objective.l2)
    settled = here.gradient[..., -1].abs().amax(1) <= 100 * SETTLED
    gap = slope + (first.value - here.value).clamp_min(0)
    gap = (gap / here.value.clamp_min(FLOOR)).nan_to_num(torch.inf, torch.inf)
    return torch.where(settled, gap, torch.inf)


def curvature_of_intercepts(objective: Objective, here: Point) -> Tensor:
    """Return the Hessian by the intercepts, (H, K, K)."""
    w = objective.weighted(slice(None))
    wp = here.curvature * w[:, None]
    if objective.y is not None:
        return wp.sum(2)[..., None]
    return torch.diag_embed(wp.sum(2)) - torch.einsum("hkn,hln->hkl", wp, here.curvature)
