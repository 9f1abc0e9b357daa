"""Minimise many convex objectives at once by Newton's method.

Each step is solved by conjugate gradients. The solver knows only an objective: something that gives
value, gradient and curvature at a point, Hessian products, a preconditioner, and a selection of its
heads. Heads share every matrix product; each has its own step length and its own stopping, and
leaves the batch when it is done.

Where it stops: half the Newton decrement, g' H^-1 g / 2, is to second order the gap f - min f.
Conjugate gradients give it as the decrease q of the quadratic model, and an estimate of what they
left of it. After a step the gap is what was left, times SAFETY, and what f fell otherwise than its
model; a head is done when that is at most tol * max(f, 1e-3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.objective import Objective, Point
from probe.preconditioner import Own, Preconditioner

FLOOR = 1e-3  # a gap is measured against max(objective, FLOOR)
UNKNOWN = 10.0  # what bend is taken for before it was measured
BENDS = 0.1, 1e3  # the least and the most that bend is taken for
ETA = 0.4  # of the model's decrease that a Newton step may leave while far from the optimum
SAFETY = 4  # times what a step is estimated to leave is what its gap is said to be
LEAST = 5  # products that a hard head takes before it is called done
EASY = 8  # products in a step after which a head's own inverse is kept for the next


@dataclass(frozen=True)
class Solution:
    """theta (H, K, D); per head value, gap (relative), converged, passes.

    effort (H,) is the number of products of the hardest Newton step: a better preconditioner is
    worth its price where it is large. bend (H,) is how far f leaves its quadratic model: for a
    model that falls by q, by bend * q^1.5, as for a self-concordant function.
    """

    theta: Tensor
    value: Tensor
    gap: Tensor
    converged: Tensor
    passes: Tensor
    effort: Tensor
    bend: Tensor


@torch.no_grad()
def minimise(
    objective: Objective,
    theta: Tensor,
    *,
    here: Point | None = None,
    effort: Tensor | None = None,
    bend: Tensor | None = None,
    tol: float = 1e-6,
    max_newton: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Minimise every head from theta (H, K, D) on, where `here` is the objective if it is known.

    effort (H,) and bend (H,) are what a similar head had at its end. progress(passes, heads left)
    is called once per Newton step; a pass is one product with the rows and one back.
    """
    H = len(theta)
    passes = torch.full((H,), int(here is None), device=theta.device)
    here = here or objective(theta)
    done = Solution(
        theta=theta.clone(),
        value=here.value.clone(),
        gap=torch.full_like(here.value, torch.inf),
        converged=torch.zeros(H, dtype=torch.bool, device=theta.device),
        passes=passes,
        effort=torch.zeros_like(passes) if effort is None else effort.clone(),
        bend=torch.full_like(here.value, UNKNOWN) if bend is None else bend.clone(),
    )
    active = torch.arange(H, device=theta.device)
    own: Mapping[int, Own] = {}
    for _ in range(max_newton):
        effort, bend = done.effort[active], done.bend[active]
        close = tol * here.value.clamp_min(FLOOR)
        precondition = objective.preconditioner(here, effort, own)
        step, model, left, used = newton_step(
            objective, here, precondition, effort=effort, bend=bend, close=close
        )
        # Where the model's own error is known to be small there is nothing to look at.
        off = 2 * bend * model**1.5
        looked = ((model > close) | (SAFETY * left + off > close)).nonzero()[:, 0]
        part, old = objective.select(looked), here.select(looked)
        at, there, moved, tries = line_search(part, theta[looked], old, step[looked])
        theta, value = theta + step, here.value - model
        theta[looked], value[looked] = at, there.value
        seen = looked[model[looked] > close[looked]]
        off[seen] = (here.value - value - model)[seen].abs()
        bend[seen] = (off[seen] / model[seen] ** 1.5).clamp(*BENDS)
        gap = SAFETY * left + off
        go = gap > close
        go[looked] &= moved
        done.theta[active], done.value[active], done.converged[active] = theta, value, gap <= close
        done.gap[active] = gap / here.value.clamp_min(FLOOR)
        done.passes[active] += used
        done.passes[active[looked]] += tries
        # The hardest step so far: a good preconditioner makes steps easy, and must stay.
        done.effort[active], done.bend[active] = torch.maximum(effort, used), bend
        if progress:
            progress(int(done.passes.max()), int(go.sum()))
        if not go.any():
            break
        keep = go.nonzero()[:, 0]
        easy = used[keep] <= EASY
        own = {h: one for h, one in precondition.select(keep).own.items() if easy[h]}
        active, theta, here = active[keep], theta[keep], there.select(go[looked].nonzero()[:, 0])
        objective = objective.select(keep)
    return done


def newton_step(
    objective: Objective,
    here: Point,
    precondition: Preconditioner,
    *,
    effort: Tensor,
    bend: Tensor,
    close: Tensor,
    max_iterations: int = 250,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve H s = -g by preconditioned conjugate gradients.

    Returns s (H, K, D), the decrease q of the quadratic model (H,), what an exact solution would
    still add to it (H,), and the products used (H,).

    What is left after k - d iterations is at least what the last d added, and little more where
    they add less and less (Strakos & Tichy 2002, On error estimation in the conjugate gradient
    method); d is a third of k and two more. A head stops when that is below half of what the model
    itself is wrong by, bend * q^1.5, or below a share of the tolerance that SAFETY leaves room for.
    One whose steps have been hard goes on for a quarter of its hardest step, or LEAST products with
    an inverse of its own, because slow directions show late: without it the estimate of separable
    heads at C = 1e5 fell to 5e-5 in one step and was 3e-3 in the next.
    """
    step = torch.zeros_like(here.gradient)
    model = torch.zeros_like(here.value)
    left = torch.zeros_like(here.value)
    used = torch.zeros_like(here.value, dtype=torch.long)
    least = effort // 4
    least[[*precondition.own]] = least[[*precondition.own]].clamp_max(LEAST)
    past = [model.clone()]
    live = torch.arange(len(step), device=step.device)
    state = _Search.start(-here.gradient, precondition)
    for k in range(1, max_iterations + 1):
        product = objective.hessian_product(here, state.direction)
        curvature = _dot(state.direction, product)
        ahead = (curvature > 0) & (state.energy > 0)  # else: converged to rounding
        length = torch.where(ahead, state.energy / curvature, 0)
        step[live] += _times(length, state.direction)
        model[live] += 0.5 * length * state.energy
        used[live] += 1
        past.append(model.clone())
        left[live] = (model - past[max(0, k - 2 - k // 3)])[live]
        q = model[live]
        enough = torch.maximum(
            close[live] / (2 * SAFETY), (0.5 * bend[live] * q**1.5).clamp_max(ETA * q)
        )
        doubt = (k < least[live]) & (left[live] <= close[live])
        go = ahead & ((left[live] > enough) | doubt)
        if not go.any():
            break
        state = state.next(length, product, precondition)
        # Copying the curvature costs about one pass: worth it once a quarter of the batch is done.
        if go.sum() <= 0.75 * len(go):
            keep = go.nonzero()[:, 0]
            live, state = live[keep], state.select(keep)
            objective, here = objective.select(keep), here.select(keep)
            precondition = precondition.select(keep)
    return step, model, left, used


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
    objective: Objective, theta: Tensor, here: Point, step: Tensor, *, trials: int = 30
) -> tuple[Tensor, Point, Tensor, Tensor]:
    """Shorten each head's step until f falls as Armijo's rule asks, and not past its lowest point.

    Returns theta, its Point, who moved (H,), and the tries (H,).

    A rise within the rounding of f counts as level. A head that no length helps stays where it was,
    and is said not to have moved.
    """
    slope = _dot(here.gradient, step)
    rounding = 4 * torch.finfo(theta.dtype).eps * here.value.abs()
    length = torch.ones_like(here.value)
    tries = torch.ones_like(length, dtype=torch.long)
    there = objective(theta + step) if len(theta) else here
    for _ in range(trials):
        fine = there.value <= here.value + 1e-4 * length * slope + rounding
        ahead = _dot(there.gradient, step)  # the slope at the new point
        past = (ahead > -0.5 * slope) & (-slope > rounding)  # its lowest point, if that can be told
        again = (~fine | past).nonzero()[:, 0]
        if not len(again):
            break
        # Where the two slopes' line crosses zero: what a parabola would have for its lowest point.
        shorter = (slope / (slope - ahead)).clamp(0.1, 0.7)
        length[again] *= shorter[again]
        tries[again] += 1
        there.put(again, objective.select(again)(theta[again] + _times(length[again], step[again])))
    worse = (there.value > here.value + rounding).nonzero()[:, 0]
    if len(worse):
        length[worse] = 0
        there.put(worse, objective.select(worse)(theta[worse]))
    return theta + _times(length, step), there, length > 0, tries


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("hkd,hkd->h", a.double(), b.double())


def _times(scalar: Tensor, tensor: Tensor) -> Tensor:
    return scalar.to(tensor.dtype)[:, None, None] * tensor
