"""Solve a whole path of strengths C: upwards, each started from the solved ones below it.

Shapes: J strengths in ascending order, B heads for each (folds, labels), K outputs, D columns;
head (j, b) is number j * B + b of the objective. The optimum is a smooth function of log C, and
where classes can be separated nearly a line: extrapolation through three solved strengths leaves
little to do. It may also lead too far, where a class begins to be separable, so the way there is
searched along like any step. Strengths about a decade apart are solved so, one after the other;
those between are interpolated and solved at once, halving the distance each time.
How hard a neighbour was says which preconditioner is worth building. benchmarks/README.md has what
it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from features.memory import available
from probe.solve.gap import BOUND_SLACK, FLOOR, gradient_bound
from probe.solve.inverse_choice import build_preconditioner
from probe.solve.line_search import line_search
from probe.solve.objective import HeadObjective, Point
from probe.solve.solver import CUBIC_UNKNOWN, SolverSettings, Start, minimise

CURVATURE_BYTES = 2 << 30  # a batch keeps its curvature, N x heads x K numbers, within this
MEMORY_SHARES = 8  # of the memory that is left, one for a batch: five copies are alive at most
POINTS = 3  # solved strengths that a start beyond the last one is drawn through
MAX_GAP = 1.1  # in log10 C: strengths further apart than this are not interpolated over

# heads done, heads in all, passes of the batch at work
HeadProgress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class WarmStart:
    """Where heads may start, theta (J * B, K, D), and the solved head at which each stands now.

    near (J * B,) is the number of that head.
    """

    theta: Tensor
    near: Tensor


@dataclass
class RegularizationPath:
    """theta (J, B, K, D) as far as it is solved, and per head (J, B) how well."""

    log_c: Sequence[float]
    theta: Tensor
    value: Tensor = field(init=False)
    gap: Tensor = field(init=False)
    converged: Tensor = field(init=False)
    passes: Tensor = field(init=False)
    cg_iterations: Tensor = field(init=False)
    cubic_coefficient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from nothing solved."""
        shape, device = self.theta.shape[:2], self.theta.device
        self.value = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.gap = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        self.converged = torch.zeros(shape, dtype=torch.bool, device=device)
        self.passes = torch.zeros(shape, dtype=torch.long, device=device)
        self.cg_iterations = torch.zeros(shape, dtype=torch.long, device=device)
        self.cubic_coefficient = torch.full(
            shape, CUBIC_UNKNOWN, dtype=torch.float64, device=device
        )

    def check(self, objective: HeadObjective, *, tol: float) -> None:
        """Set converged to False where a bound, in float64, says much more than the tolerance."""
        theta, l2 = self.theta.flatten(0, 1), objective.l2
        step = batch_size(objective, self.theta)
        for heads in torch.split(torch.arange(len(l2), device=l2.device), step):
            mine = objective.select(heads)
            point = mine(theta[heads].to(l2.dtype))
            allowed = tol * point.value.clamp_min(FLOOR)
            far = gradient_bound(mine, point) > BOUND_SLACK * allowed
            self.converged.view(-1)[heads[far]] = False
            self.gap.view(-1)[heads[far]] = torch.inf

    def solve(
        self,
        objective: HeadObjective,
        settings: SolverSettings,
        progress: HeadProgress | None = None,
    ) -> None:
        """Solve every head that is not converged to a relative gap of settings.tol."""
        J, B = self.gap.shape
        begun = ~self.value.isnan()  # solved before, now to a smaller gap or in another type
        solved = [j for j in range(J) if bool(begun[j].all())]
        together = not objective.rows.in_memory
        # A wave's heads are independent; what is extrapolated from are the waves before it.
        resumed = len(solved) == J
        for wave in [[*range(J)]] if resumed else waves(self.log_c, together=together):
            # A strength with a head that was given up is no node: it would lead others astray.
            nodes = [n for n in solved if n not in wave and bool(self.converged[n].all())]
            warm = self._warm_start(wave, nodes, begun) if nodes and not resumed else None
            self.converged[wave] &= self.gap[wave] <= settings.tol
            left = [j * B + b for j in wave for b in range(B) if not self.converged[j, b]]
            seen = begun.flatten().tolist()
            for heads, start in (
                ([h for h in left if seen[h]], None),
                ([h for h in left if not seen[h]], warm),
            ):
                step = batch_size(objective, self.theta)
                for i in range(0, len(heads), step):
                    batch = torch.tensor(heads[i : i + step], device=self.theta.device)
                    self._solve_batch(objective, batch, start, settings, progress)
            solved = sorted({*solved, *wave})
            if settings.hopeless is not None and self._given_up(wave) >= settings.hopeless:
                break

    def _given_up(self, wave: list[int]) -> float:
        """Return the share of a wave's heads that did not converge."""
        return float((~self.converged[wave]).double().mean())

    def _solve_batch(
        self,
        objective: HeadObjective,
        heads: Tensor,
        warm: WarmStart | None,
        settings: SolverSettings,
        progress: HeadProgress | None,
    ) -> None:
        """Solve the heads of an index (H',) together, and write what is found over what was."""
        done, total = int(self.converged.sum()), self.converged.numel()

        def report(passes: int, heads_left: int) -> None:
            if progress:
                progress(done + len(heads) - heads_left, total, passes)

        theta, point = self.theta.flatten(0, 1)[heads], None
        batch = objective.select(heads)
        if warm:
            # From the neighbour's optimum, whose point costs no pass, towards the extrapolation:
            # where that leads too far the line search stops before it.
            known = self._point_of_neighbour(objective, heads, warm.near[heads])
            searched = line_search(batch, theta, known, warm.theta[heads] - theta)
            theta, point = searched.theta, searched.point
            self.passes.view(-1)[heads] += searched.evaluations
        start = Start(
            theta=theta,
            point=point,
            cg_iterations=self.cg_iterations.view(-1)[heads],
            cubic_coefficient=self.cubic_coefficient.view(-1)[heads],
        )
        solution = minimise(batch, start, build_preconditioner, settings, report)
        self.theta.flatten(0, 1)[heads] = solution.theta  # views: what is written to them stays
        for name in ("value", "gap", "converged", "cg_iterations", "cubic_coefficient"):
            getattr(self, name).view(-1)[heads] = getattr(solution, name)
        self.passes.view(-1)[heads] += solution.passes

    def _warm_start(self, wave: list[int], nodes: list[int], begun: Tensor) -> WarmStart:
        """Put a wave's heads where their nearest solved strength is; return where they may go.

        Those that were begun (J, B) stay where they are.
        """
        J, B = self.gap.shape
        theta, near = self.theta.clone(), torch.arange(J * B, device=self.gap.device).view(J, B)
        for j in wave:
            n = min(nodes, key=lambda n: abs(n - j))
            theta[j], near[j] = self._extrapolated(j, nodes), near[n]
            for mine in (
                self.theta,
                self.value,
                self.gap,
                self.cg_iterations,
                self.cubic_coefficient,
            ):
                stays = begun[j].view(-1, *[1] * (mine.ndim - 2))
                mine[j] = torch.where(stays, mine[j], mine[n])
        return WarmStart(theta.flatten(0, 1), near.flatten())

    def _point_of_neighbour(self, objective: HeadObjective, heads: Tensor, near: Tensor) -> Point:
        """Return the point of heads (H',) that stand at the optimum of others: only l2 differs.

        near (H',) are these others. Their value was estimated; its upper estimate, value + gap, is
        taken.
        """
        theta = self.theta.flatten(0, 1)[heads]
        # f_2 = f_1 + (l2_2 - l2_1) / 2 |W|^2, and g_1 = 0 at the optimum of f_1.
        theta[..., -1] = 0
        more = objective.l2[heads] - objective.l2[near]
        value = self.value.view(-1)[heads]
        value = value + self.gap.view(-1)[heads] * value.clamp_min(FLOOR)
        value += more.double() / 2 * theta.double().square().sum((1, 2))
        no_curvature = theta[..., :0]  # a line search needs none
        return Point(value, more[:, None, None] * theta, no_curvature)

    def _extrapolated(self, j: int, solved: list[int]) -> Tensor:
        """Return theta[j] (B, K, D) by a polynomial in log C through up to four solved strengths.

        They stand on both sides of j where they can. Beyond the last one, the weights of separable
        heads grow like log C, and those of others slow down.
        """
        x = self.log_c
        below, above = [n for n in solved if n < j], [n for n in solved if n > j]
        # Cubic between (two on each side), quadratic beyond the last (three below).
        near = below[-2:] + above[:2] if below and above else below[-POINTS:] or above[:1]
        gap = min(abs(x[n] - x[j]) for n in near)
        near = [n for n in near if abs(x[n] - x[j]) <= max(2 * MAX_GAP, gap)]
        # Over a gap wider than a decade a polynomial says nothing: the nearest one's theta.
        if gap > MAX_GAP:
            near = [min(near, key=lambda n: abs(x[n] - x[j]))]
        out = torch.zeros_like(self.theta[j])
        for n in near:
            # Lagrange's polynomial in x = log C: prod_m (x_j - x_m) / (x_n - x_m).
            share = 1.0
            for m in near:
                if m != n:
                    share *= (x[j] - x[m]) / (x[n] - x[m])
            out += share * self.theta[n]
        return out


def waves(log_c: Sequence[float], *, together: bool = False) -> list[list[int]]:
    """Order a path's indices: some one by one, then what lies between at once, and again.

    The first are as far apart as MAX_GAP allows: a pass of one head takes as long as one of four,
    because both wait for the rows, so what can be solved together should be. Where rows come from
    a file a pass of nine heads takes hardly longer than one of one, and the first are solved
    `together`: with twice the products, in a third of the passes.
    """
    n, step = len(log_c), 1
    while 2 * step < n and log_c[2 * step] - log_c[0] <= MAX_GAP:
        step *= 2
    first = sorted({*range(0, n, step), n - 1})
    order, known = [first] if together else [[j] for j in first], {*first}
    while step > 1:
        step //= 2
        between = [j for j in range(0, n, step) if j not in known]
        order += [between] if between else []
        known |= {*between}
    return order


def batch_size(objective: HeadObjective, theta: Tensor) -> int:
    """Return how many of the heads theta (J, B, K, D) are solved at once.

    Their curvature stays within CURVATURE_BYTES, and within a share of the free memory.
    """
    most = min(CURVATURE_BYTES, available(theta.device) // MEMORY_SHARES)
    numbers = objective.rows.rows_per_process * theta.shape[2]  # of one head's curvature
    return max(1, most // (theta.element_size() * numbers))
