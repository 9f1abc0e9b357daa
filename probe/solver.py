"""Minimise many convex objectives at once by Newton's method.

Each step is solved by conjugate gradients. The solver knows only an objective: something that gives
value, gradient and curvature at a point, Hessian products, a preconditioner, and a selection of its
heads. Heads share every matrix product; each has its own step length and its own stopping, and
leaves the batch when it is done.

Where it stops: half the Newton decrement, g' H^-1 g / 2, is to second order the gap f - min f.
Conjugate gradients give it as the decrease q of the quadratic model, so a head is done when
q <= tol * max(f, 1e-3); the step is still taken, which leaves a gap well below q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.objective import Objective, Point
from probe.preconditioner import Preconditioner

FLOOR = 1e-3  # a gap is measured against max(objective, FLOOR)


@dataclass(frozen=True)
class Solution:
    """theta (H, K, D); per head value, gap (relative, before the last step), converged, passes.

    effort (H,) is the number of products of the hardest Newton step.
    """

    theta: Tensor
    value: Tensor
    gap: Tensor
    converged: Tensor
    passes: Tensor
    effort: Tensor


@torch.no_grad()
def minimise(
    objective: Objective,
    theta: Tensor,
    *,
    effort: Tensor | None = None,
    tol: float = 1e-6,
    max_newton: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Minimise every head from theta (H, K, D) on.

    effort (H,) is what the hardest step of a similar head took: it asks for a better
    preconditioner from the start. progress(passes, heads left) is called once per Newton step;
    a pass is one product with the rows and one back.
    """
    H = len(theta)
    done = Solution(
        theta=theta.clone(),
        value=torch.full((H,), torch.nan, dtype=torch.float64, device=theta.device),
        gap=torch.full((H,), torch.inf, dtype=torch.float64, device=theta.device),
        converged=torch.zeros(H, dtype=torch.bool, device=theta.device),
        passes=torch.ones(H, dtype=torch.long, device=theta.device),
        effort=torch.zeros(H, dtype=torch.long, device=theta.device),
    )
    active = torch.arange(H, device=theta.device)
    here = objective(theta)
    done.value[:] = here.value
    effort = torch.zeros_like(done.passes) if effort is None else effort
    for _ in range(max_newton):
        close = tol * here.value.clamp_min(FLOOR)
        step, decrease, used = newton_step(objective, here, effort, close=3 * close)
        gap = decrease / here.value.clamp_min(FLOOR)
        theta, there, moved, tried = line_search(objective, theta, here, step)
        finished = gap <= tol
        done.theta[active], done.value[active] = theta, there.value
        done.gap[active], done.converged[active] = gap, finished
        done.passes[active] += used + tried
        # The hardest step so far: a good preconditioner makes steps easy, and must stay.
        effort = torch.maximum(effort, used)
        done.effort[active] = effort
        keep = (~finished & moved).nonzero()[:, 0]
        if progress:
            progress(int(done.passes.max()), len(keep))
        if not len(keep):
            break
        active, theta, effort = active[keep], theta[keep], effort[keep]
        objective, here = objective.select(keep), there.select(keep)
    return done


def newton_step(
    objective: Objective,
    here: Point,
    effort: Tensor,
    *,
    close: Tensor,
    eta: float = 0.3,
    max_iterations: int = 250,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve H s = -g by preconditioned conjugate gradients.

    Returns s (H, K, D), the model's decrease (H,), and the products used (H,).

    A head stops when its k-th iteration adds less than eta / k of the decrease so far (Nash & Sofer
    1990, Assessing a search direction within a truncated-Newton method). Where the decrease is
    below `close` (H,) the head is about to be called done: one whose steps have been hard then goes
    on for a quarter of its hardest step, because slow directions show late. Without it the estimate
    of separable heads at C = 1e5 fell to 5e-5 in one step and was 3e-3 in the next.
    """
    precondition = objective.preconditioner(here, effort)
    step = torch.zeros_like(here.gradient)
    decrease = torch.zeros_like(here.value)
    used = torch.zeros_like(here.value, dtype=torch.long)
    live = torch.arange(len(step), device=step.device)
    state = _Search.start(-here.gradient, precondition)
    for k in range(1, max_iterations + 1):
        product = objective.hessian_product(here, state.direction)
        curvature = _dot(state.direction, product)
        ahead = (curvature > 0) & (state.energy > 0)  # else: converged to rounding
        length = torch.where(ahead, state.energy / curvature, 0)
        added = 0.5 * length * state.energy
        step[live] += _times(length, state.direction)
        decrease[live] += added
        used[live] += 1
        doubt = (4 * k < effort[live]) & (decrease[live] <= close[live])
        go = ahead & ((k * added > eta * decrease[live]) | doubt)
        if not go.any():
            break
        state = state.next(length, product, precondition)
        # Copying the curvature costs about one pass: worth it once a quarter of the batch is done.
        if go.sum() <= 0.75 * len(go):
            keep = go.nonzero()[:, 0]
            live, state = live[keep], state.select(keep)
            objective, here = objective.select(keep), here.select(keep)
            precondition = precondition.select(keep)
    return step, decrease, used


@dataclass(frozen=True)
class _Search:
    """Conjugate gradients' own variables: residual and direction (H, K, D), energy r' P r (H,)."""

    residual: Tensor
    direction: Tensor
    energy: Tensor

    @classmethod
    def start(cls, residual: Tensor, precondition: Preconditioner) -> _Search:
        direction = precondition(residual)
        return cls(residual, direction, _dot(residual, direction))

    def next(self, length: Tensor, product: Tensor, precondition: Preconditioner) -> _Search:
        residual = self.residual - _times(length, product)
        image = precondition(residual)
        energy = _dot(residual, image)
        turn = torch.where(self.energy > 0, energy / self.energy, 0)
        return _Search(residual, image + _times(turn, self.direction), energy)

    def select(self, heads: Tensor) -> _Search:
        return _Search(self.residual[heads], self.direction[heads], self.energy[heads])


def line_search(
    objective: Objective, theta: Tensor, here: Point, step: Tensor, *, halvings: int = 30
) -> tuple[Tensor, Point, Tensor, Tensor]:
    """Halve each head's step until f falls as Armijo's rule asks.

    Returns theta, its Point, who moved (H,), and the tries (H,).

    A rise within the rounding of f counts as level. A head that no length helps stays where it was,
    and is said not to have moved.
    """
    slope = _dot(here.gradient, step)
    rounding = 4 * torch.finfo(theta.dtype).eps * here.value.abs()
    length = torch.ones_like(here.value)
    tries = torch.ones_like(length, dtype=torch.long)
    there = objective(theta + step)
    for _ in range(halvings):
        fine = there.value <= here.value + 1e-4 * length * slope + rounding
        if fine.all():
            break
        length = torch.where(fine, length, length / 2)
        tries += ~fine
        there = objective(theta + _times(length, step))
    moved = there.value <= here.value + rounding
    if not moved.all():
        length = torch.where(moved, length, 0)
        there = objective(theta + _times(length, step))
    return theta + _times(length, step), there, moved, tries


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("hkd,hkd->h", a.double(), b.double())


def _times(scalar: Tensor, tensor: Tensor) -> Tensor:
    return scalar.to(tensor.dtype)[:, None, None] * tensor
