"""Solve a whole path of strengths C: coarse to fine, each wave started from its solved neighbours.

Shapes: J strengths in ascending order, B heads for each (folds, labels), K outputs, D columns;
head (j, b) is number j * B + b of the objective. The optimum is a smooth function of log C, so
cubic interpolation between solved strengths leaves little to do: for the 45 of dinov2-logreg
two thirds of the heads start so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.objective import Objective
from probe.solver import minimise

CURVATURE_BYTES = (
    2 << 30
)  # a batch of heads keeps its curvature, N x heads x K numbers, within this
DECADE = 1.0  # strengths further apart than this are not interpolated over

Progress = Callable[[int, int, int], None]  # heads done, heads in all, passes of the batch at work


@dataclass
class Path:
    """theta (J, B, K, D) as far as it is solved, and per head (J, B) how well."""

    log_c: list[float]
    theta: Tensor
    value: Tensor = field(init=False)
    gap: Tensor = field(init=False)
    converged: Tensor = field(init=False)
    passes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing solved."""
        shape, device = self.theta.shape[:2], self.theta.device
        self.value = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.gap = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        self.converged = torch.zeros(shape, dtype=torch.bool, device=device)
        self.passes = torch.zeros(shape, dtype=torch.long, device=device)

    def solve(self, objective: Objective, *, tol: float, progress: Progress | None = None) -> None:
        """Solve every head that is not converged, in waves, to a relative gap of tol."""
        J, B = self.gap.shape
        solved: list[int] = []
        for wave in waves(J):
            for j in wave:
                nodes = [n for n in solved if bool(self.converged[n].all())]
                if self.value[j].isnan().all() and nodes:
                    self.theta[j] = self._interpolate(j, nodes)
            self.converged[wave] &= self.gap[wave] <= tol
            heads = torch.tensor(
                [j * B + b for j in wave for b in range(B) if not self.converged[j, b]]
            )
            step = batch_size(objective, self.theta.shape[2])
            for start in range(0, len(heads), step):
                batch = heads[start : start + step].to(self.theta.device)
                self._solve(objective, batch, tol, progress)
            solved = sorted(solved + wave)

    def _solve(
        self, objective: Objective, heads: Tensor, tol: float, progress: Progress | None
    ) -> None:
        done, total = int(self.converged.sum()), self.converged.numel()

        def report(passes: int, left: int) -> None:
            if progress:
                progress(done + len(heads) - left, total, passes)

        theta = self.theta.flatten(0, 1)  # views: what is written to them stays
        found = minimise(objective.select(heads), theta[heads], tol=tol, progress=report)
        theta[heads] = found.theta
        for name in ("value", "gap", "converged"):
            getattr(self, name).view(-1)[heads] = getattr(found, name)
        self.passes.view(-1)[heads] += found.passes

    def _interpolate(self, j: int, nodes: list[int]) -> Tensor:
        """Return theta[j] as solved neighbours suggest: Lagrange through up to four, in log C."""
        x = self.log_c
        below = [n for n in nodes if n < j][-2:]
        above = [n for n in nodes if n > j][:2]
        if not below or not above or x[above[0]] - x[below[-1]] > DECADE:
            # Too far to interpolate: the neighbour below, which has the smaller weights.
            return self.theta[below[-1] if below else above[0]]
        near = below + above
        near = [n for n in near if abs(x[n] - x[j]) <= 2 * DECADE]
        out = torch.zeros_like(self.theta[j])
        for n in near:
            others = [m for m in near if m != n]
            share = 1.0
            for m in others:
                share *= (x[j] - x[m]) / (x[n] - x[m])
            out += share * self.theta[n]
        return out


def waves(n: int) -> list[list[int]]:
    """Order a path's indices coarse to fine: every 4th and the last, those half-way, the rest."""
    first = sorted({*range(0, n, 4), n - 1})
    second = [i for i in range(2, n, 4) if i not in first]
    return [w for w in (first, second, sorted({*range(n)} - {*first, *second})) if w]


def batch_size(objective: Objective, outputs: int) -> int:
    """Return how many heads at once keep their curvature within CURVATURE_BYTES."""
    return max(1, CURVATURE_BYTES // (objective.Z.element_size() * len(objective.Z) * outputs))
