"""Minimise many convex objectives at once by Newton's method with conjugate gradients.

Shapes: H heads, theta (H, K, D). The solver knows an Objective (objective.py) and something that
returns an approximate inverse Hessian, and no rows. Heads share every product with the rows; each
has its own step length and its own stopping, and leaves the batch when it is done.

A head is done when its gap f - min f is at most tol * max(f, FLOOR). After a step the gap is
taken for SAFETY times what conjugate gradients left, and what f fell otherwise than its model; or
g'P g / 2 with the preconditioner P and the new gradient, if that is more: once the first two were
1e-6 by chance and the gap was 2e-5. docs/solver.md, "When a head is done".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from probe.solve.gap import BOUND_SLACK, FLOOR, gradient_bound, newton_decrement
from probe.solve.head_inverses import HeadInverse
from probe.solve.line_search import line_search
from probe.solve.newton_step import (
    BF16_ROUNDING,
    EASY_STEP,
    MAX_ITERATIONS,
    SAFETY,
    TINY_DECREASE,
    Step,
    StepTolerance,
    newton_step,
)
from probe.solve.objective import Objective, Point
from probe.solve.preconditioner import Preconditioner

CUBIC_UNKNOWN = 10.0  # what a cubic coefficient is taken for before it was measured
CUBIC_RANGE = 0.1, 1e3  # the least and the most that it is taken for
TIGHTEN = 1e-2  # times what a step may leave, once the bound is found to be more

SomeObjective = TypeVar("SomeObjective", bound=Objective)
HeadInverses = Mapping[int, HeadInverse]  # by head
# (objective, point, iterations of each head's hardest step (H,), inverses that are still good)
Precondition = Callable[[SomeObjective, Point, Tensor, HeadInverses], Preconditioner]


@dataclass(frozen=True)
class SolverSettings:
    """When a head is done, and when it is given up.

    tol: the gap, relative to max(f, FLOOR). bounded asks also for a bound on the gap of BOUND_SLACK
    times tol at most, which takes float64. max_newton: steps of a head. max_stalled: steps of
    a head that rounding has spoiled: by its model it was done and by its gradient not, or
    MAX_ITERATIONS products weren't enough with an inverse of its own Hessian. hopeless: the share
    of a strength's heads whose giving up ends the path; what is left isn't tried.
    """

    tol: float = 1e-6
    bounded: bool = False
    max_newton: int = 100
    max_stalled: int = 10
    hopeless: float | None = None


@dataclass(frozen=True)
class Start:
    """Where heads start: theta (H, K, D), and what is known of it.

    point is the objective there. cg_iterations (H,) and cubic_coefficient (H,) are what a similar
    head had at its end.
    """

    theta: Tensor
    point: Point | None = None
    cg_iterations: Tensor | None = None
    cubic_coefficient: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """theta (H, K, D); per head (H,) value, gap (relative), converged, passes over the rows.

    cg_iterations (H,) is the number of products that the hardest Newton step needed: a better
    preconditioner is worth its price where it is large. cubic_coefficient c (H,) is how far f
    leaves its quadratic model: for a model that falls by q, by c q^1.5, its third-order term. Where
    |f'''| <= 2 M f''^1.5 on every line, as for a self-concordant function of constant M (Boyd &
    Vandenberghe 2004, section 9.6), c is at most M 2^1.5 / 3 for a Newton step.
    """

    theta: Tensor
    value: Tensor
    gap: Tensor
    converged: Tensor
    passes: Tensor
    cg_iterations: Tensor
    cubic_coefficient: Tensor


@torch.no_grad()
def minimise(
    objective: SomeObjective,
    start: Start,
    precondition: Precondition[SomeObjective],
    settings: SolverSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Minimise every head from its start on.

    A head that can't be minimised keeps its last theta, with converged False.
    progress(passes, heads left) is called once per Newton step; a pass is one product with the rows
    and one back.
    """
    point = start.point or objective(start.theta)
    solution = _nothing_solved(start, point)
    zeros = torch.zeros_like(point.value)
    active = torch.arange(len(zeros), device=zeros.device)
    batch = _Batch(
        active=active,
        objective=objective,
        theta=start.theta,
        point=point,
        inverses={},
        expected=zeros,
        tightening=torch.ones_like(zeros),
        stalled=torch.zeros_like(active),
    )
    for _ in range(settings.max_newton):
        hardest = solution.cg_iterations[batch.active]
        inverse = precondition(batch.objective, batch.point, hardest, batch.inverses)
        if inverse.head_inverses:
            decrement = newton_decrement(batch.objective, batch.point, inverse)
            sound = decrement >= -TINY_DECREASE  # which NaN is not
            inverse = inverse.without(~sound)
        tolerance = StepTolerance(
            gap=batch.gap_allowed(settings) * batch.tightening,
            cubic_coefficient=solution.cubic_coefficient[batch.active],
            cg_iterations=hardest,
            # Rows off by e of themselves give a Gram matrix off by e^2 where e is at random.
            bf16_unsafe=BF16_ROUNDING**2 * inverse.max_curvature > batch.objective.l2,
            expected=batch.expected,
        )
        step = newton_step(batch.objective, batch.point, inverse, tolerance)
        moved = _move(batch, inverse, step, tolerance, settings)
        _record(solution, batch, step, moved)
        if progress:
            progress(int(solution.passes.max()), int(moved.go.sum()))
        if not moved.go.any():
            break
        batch = _remaining(batch, inverse, step, moved)
    return solution


@dataclass(frozen=True)
class _Batch(Generic[SomeObjective]):
    """The heads at work: which of all (H,), where they stand, and what the next step should know.

    inverses: of heads whose last step was easy with them. expected, see StepTolerance. tightening:
    times the tolerance, below 1 where the bound was found to be more than the estimate. stalled:
    see SolverSettings, so far.
    """

    active: Tensor
    objective: SomeObjective
    theta: Tensor
    point: Point
    inverses: HeadInverses
    expected: Tensor
    tightening: Tensor
    stalled: Tensor

    def gap_allowed(self, settings: SolverSettings) -> Tensor:
        """Return the gap f - min f at which a head is done, (H,)."""
        return settings.tol * self.point.value.clamp_min(FLOOR)


@dataclass(frozen=True)
class _Moved:
    """What a step came to: theta (H, K, D), and (H,) each value, gap and whether it goes on.

    evaluated is the index of heads whose objective was evaluated there, H' of them: trial is their
    point, evaluations (H',) how often.
    """

    theta: Tensor
    value: Tensor
    gap: Tensor
    done: Tensor
    go: Tensor
    cubic_coefficient: Tensor
    tightening: Tensor
    stalled: Tensor
    evaluated: Tensor
    trial: Point
    evaluations: Tensor


def _nothing_solved(start: Start, point: Point) -> Solution:
    passes = torch.full_like(point.value, int(start.point is None), dtype=torch.long)
    unknown = torch.full_like(point.value, CUBIC_UNKNOWN)
    iterations, cubic = start.cg_iterations, start.cubic_coefficient
    return Solution(
        theta=start.theta.clone(),
        value=point.value.clone(),
        gap=torch.full_like(point.value, torch.inf),
        converged=torch.zeros_like(passes, dtype=torch.bool),
        passes=passes,
        cg_iterations=torch.zeros_like(passes) if iterations is None else iterations.clone(),
        cubic_coefficient=unknown if cubic is None else cubic.clone(),
    )


def _move(
    batch: _Batch[SomeObjective],
    inverse: Preconditioner,
    step: Step,
    tolerance: StepTolerance,
    settings: SolverSettings,
) -> _Moved:
    """Take the steps, and say how far from its optimum each head then is."""
    # q: what the model falls by. Half the squared Newton decrement is q + cg_error.
    q, allowed = step.decrease, batch.gap_allowed(settings)
    cubic = tolerance.cubic_coefficient.clone()
    # |f(theta + s) - f - (-q)| = c q^1.5 to third order; twice that to be sure.
    # Where the model's own error is known to be small f need not be evaluated again. It always is
    # where a bound is asked for, and where rounding may have spoiled the model (bf16_unsafe).
    model_error = 2 * cubic * q**1.5
    sure = (q <= allowed) & (SAFETY * step.cg_error + model_error <= allowed)
    evaluated = (tolerance.bf16_unsafe | ~sure | settings.bounded).nonzero()[:, 0]
    part, before = batch.objective.select(evaluated), batch.point.select(evaluated)
    searched = line_search(part, batch.theta[evaluated], before, step.step[evaluated])
    theta, value = batch.theta + step.step, batch.point.value - q
    theta[evaluated], value[evaluated] = searched.theta, searched.point.value
    # Below the tolerance what f falls otherwise than q is rounding: nothing to measure c by.
    measured = evaluated[q[evaluated] > allowed[evaluated]]
    model_error[measured] = (batch.point.value - value - q)[measured].abs()
    cubic[measured] = (model_error[measured] / q[measured] ** 1.5).clamp(*CUBIC_RANGE)
    # f - min f = (q* - q) + (f - model) to this order: what is left, and the model's error.
    gap, tightening = SAFETY * step.cg_error + model_error, batch.tightening
    by_model = (q <= allowed) & (gap <= allowed)
    # A second witness, from the gradient where f was evaluated: see the module's docstring.
    decrement = newton_decrement(part, searched.point, inverse.select(evaluated))
    gap[evaluated] = gap[evaluated].maximum(decrement)
    if settings.bounded:
        # Called done by the estimate and not by the bound: the next step leaves a hundredth.
        tightening = torch.where(gap <= allowed, tightening * TIGHTEN, tightening)
        gap = gap.maximum(gradient_bound(part, searched.point) / BOUND_SLACK)
    gap = gap.nan_to_num(torch.inf, torch.inf)  # NaN is never done
    done = gap <= allowed
    exhausted = step.cg_iterations == MAX_ITERATIONS
    exhausted &= torch.tensor([h in inverse.head_inverses for h in range(len(q))], device=q.device)
    stalled = batch.stalled + (by_model | exhausted)
    go = ~done & (stalled < settings.max_stalled)
    go[evaluated] &= searched.moved
    return _Moved(
        theta=theta,
        value=value,
        gap=gap,
        done=done,
        go=go,
        cubic_coefficient=cubic,
        tightening=tightening,
        stalled=stalled,
        evaluated=evaluated,
        trial=searched.point,
        evaluations=searched.evaluations,
    )


def _record(solution: Solution, batch: _Batch[SomeObjective], step: Step, moved: _Moved) -> None:
    """Write what a step came to over what was known."""
    active = batch.active
    solution.theta[active], solution.value[active] = moved.theta, moved.value
    solution.converged[active] = moved.done
    solution.gap[active] = moved.gap / batch.point.value.clamp_min(FLOOR)
    solution.passes[active] += step.products
    solution.passes[active[moved.evaluated]] += moved.evaluations
    # The hardest step so far: a good preconditioner makes steps easy, and must stay.
    hardest = torch.maximum(solution.cg_iterations[active], step.cg_iterations)
    solution.cg_iterations[active] = hardest
    solution.cubic_coefficient[active] = moved.cubic_coefficient


def _remaining(
    batch: _Batch[SomeObjective], inverse: Preconditioner, step: Step, moved: _Moved
) -> _Batch[SomeObjective]:
    """Return the heads that go on, where they came."""
    keep = moved.go.nonzero()[:, 0]
    easy = step.cg_iterations[keep] <= EASY_STEP
    own = inverse.select(keep).head_inverses
    return _Batch(
        active=batch.active[keep],
        objective=batch.objective.select(keep),
        theta=moved.theta[keep],
        # Every head that goes on was evaluated: one that was not is done.
        point=moved.trial.select(moved.go[moved.evaluated].nonzero()[:, 0]),
        inverses={h: one for h, one in own.items() if easy[h]},
        # Newton's method converges quadratically: next q = (c q)^2 or so.
        expected=(moved.cubic_coefficient * step.decrease)[keep].square(),
        tightening=moved.tightening[keep],
        stalled=moved.stalled[keep],
    )
