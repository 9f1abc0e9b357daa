"""Shorten steps until the objective falls as it should, each head for itself.

Shapes: H heads, theta and steps (H, K, D). docs/solver.md, "The length of a step".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.solve.gap import dot, times
from probe.solve.objective import Objective, Point

ARMIJO = 1e-4  # of the decrease that the slope promises (Nocedal & Wright 2006, chapter 3)
OVERSHOOT = 0.5  # of the first slope: a trial that rises more steeply than that lies too far
SHRINK = 0.1, 0.7  # the least and the most of its length that a step keeps in one try
MAX_TRIALS = 30  # 0.7^30 = 2e-5 of the first length
ROUNDING = 4  # units in the last place of f within which a rise counts as level


@dataclass(frozen=True)
class Searched:
    """Where H heads came: theta (H, K, D), its point, who moved (H,), evaluations (H,)."""

    theta: Tensor
    point: Point
    moved: Tensor
    evaluations: Tensor


def line_search(objective: Objective, theta: Tensor, point: Point, step: Tensor) -> Searched:
    """Return where each head comes from theta (H, K, D), whose point is given, along its step.

    A step must lower f as Armijo's rule asks, and not go past the lowest point on the line. A head
    stays where it was, and has not moved, if its step isn't finite, doesn't lead down, or lowers f
    at no length that was tried.
    """
    # The slope of f along the step, g's < 0 where it leads down.
    step = torch.where(step.isfinite().all(2).all(1)[:, None, None], step, 0)
    slope = dot(point.gradient, step)
    rounding = ROUNDING * torch.finfo(theta.dtype).eps * point.value.abs()
    length = torch.where(slope < 0, torch.ones_like(point.value), 0)
    evaluations = torch.ones_like(length, dtype=torch.long)
    trial = objective(theta + times(length, step)) if len(theta) else point
    for _ in range(MAX_TRIALS):
        lower = trial.value <= point.value + ARMIJO * length * slope + rounding
        trial_slope = dot(trial.gradient, step)
        # Told apart from rounding only where the slope is more than that.
        past = (trial_slope > -OVERSHOOT * slope) & (-slope > rounding)
        again = ((~lower | past) & (slope < 0)).nonzero()[:, 0]
        if not len(again):
            break
        # The secant of the two slopes crosses zero at slope / (slope - trial_slope) of the length,
        # where a parabola is lowest.
        shorter = (slope / (slope - trial_slope)).clamp(*SHRINK)
        length[again] *= shorter[again]
        evaluations[again] += 1
        moved = theta[again] + times(length[again], step[again])
        trial.assign(again, objective.select(again)(moved))
    worse = (~(trial.value <= point.value + rounding)).nonzero()[:, 0]
    if len(worse):
        length[worse] = 0
        trial.assign(worse, objective.select(worse)(theta[worse]))
    return Searched(theta + times(length, step), trial, length > 0, evaluations)
