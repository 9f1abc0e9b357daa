"""Minimise many convex objectives at once by Newton's method.

Each step is solved by conjugate gradients. The solver knows only an objective: something that gives
value, gradient and curvature at a point, Hessian products, a preconditioner, and a selection of its
heads. Heads share every matrix product; each has its own step length and its own stopping, and
leaves the batch when it is done.

Where it stops: half the Newton decrement, g' H^-1 g / 2, is to second order the gap f - min f.
Conjugate gradients give it as the decrease q of the quadratic model, and an estimate of what they
left of it. After a step the gap is what was left, times SAFETY, and what f fell otherwise than its
model, or g' P g / 2 with the preconditioner P and the new gradient if that is more: once the first
two were 1e-6 by chance and the gap was 2e-5. A head is done when it is at most
tol * max(f, 1e-3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.solve.objective import Objective, Point
from probe.solve.preconditioner import Own, Preconditioner

FLOOR = 1e-3  # a gap is measured against max(objective, FLOOR)
UNKNOWN = 10.0  # what bend is taken for before it was measured
BENDS = 0.1, 1e3  # the least and the most that bend is taken for
ETA = 0.4  # of the model's decrease that a Newton step may leave while far from the optimum
SAFETY = 4  # times what a step is estimated to leave is what its gap is said to be
LEAST = 5  # products that a hard head takes before it is called done
EASY = 8  # products in a step after which a head's own inverse is kept for the next
TRUST = 10  # times the estimate of a gap that its bound may be, where it is asked for
STRICTER = 1e-2  # what a step may leave, once the bound is found to be more
NOTHING = 1e-20  # a decrease that is below every tolerance
ROUNDED = 2.0**-9  # what rounding to bfloat16 changes in a number, at most
BLUR = 2.0**-11  # the root of what products at bfloat16 leave of a decrease, per product needed


@dataclass(frozen=True)
class Solution:
    """theta (H, K, D); per head value, gap (relative), converged, passes.

    effort (H,) is the number of products that the hardest Newton step needed: a better
    preconditioner is worth its price where it is large. bend (H,) is how far f leaves its quadratic
    model: for a model that falls by q, by bend * q^1.5, as for a self-concordant function.
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
    bounded: bool = False,
    max_newton: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Minimise every head from theta (H, K, D) on, where `here` is the objective if it is known.

    effort (H,) and bend (H,) are what a similar head had at its end. `bounded` asks also for a
    bound on the gap of TRUST times tol at most, which takes float64. progress(passes, heads left)
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
    foretold, strict = torch.zeros_like(here.value), torch.ones_like(here.value)
    for _ in range(max_newton):
        effort, bend = done.effort[active], done.bend[active]
        close = tol * here.value.clamp_min(FLOOR)
        precondition = objective.preconditioner(here, effort, own)
        if precondition.own:
            sound = decrement(objective, here, precondition) >= -NOTHING  # which NaN is not
            precondition = precondition.without(~sound)
        stiff = ROUNDED**2 * precondition.most > objective.l2
        goal = Goal(close * strict, bend, effort, stiff, foretold)
        found = newton_step(objective, here, precondition, goal)
        step, model, left = found.step, found.model, found.left
        # Where the model's own error is known to be small there is nothing to look at; a stiff
        # head's model may be wrong in float32 itself.
        off = 2 * bend * model**1.5
        sure = (model <= close) & (SAFETY * left + off <= close)
        looked = (stiff | ~sure | bounded).nonzero()[:, 0]
        part, old = objective.select(looked), here.select(looked)
        at, there, moved, tries = line_search(part, theta[looked], old, step[looked])
        theta, value = theta + step, here.value - model
        theta[looked], value[looked] = at, there.value
        seen = looked[model[looked] > close[looked]]
        off[seen] = (here.value - value - model)[seen].abs()
        bend[seen] = (off[seen] / model[seen] ** 1.5).clamp(*BENDS)
        gap = SAFETY * left + off
        gap[looked] = gap[looked].maximum(decrement(part, there, precondition.select(looked)))
        if bounded:
            strict = torch.where(gap <= close, strict * STRICTER, strict)
            gap = gap.maximum(bound(part, there) / TRUST)
        gap = gap.nan_to_num(torch.inf, torch.inf)
        go = ~(gap <= close)
        go[looked] &= moved
        done.theta[active], done.value[active], done.converged[active] = theta, value, gap <= close
        done.gap[active] = gap / here.value.clamp_min(FLOOR)
        done.passes[active] += found.used
        done.passes[active[looked]] += tries
        # The hardest step so far: a good preconditioner makes steps easy, and must stay.
        done.effort[active], done.bend[active] = torch.maximum(effort, found.effort), bend
        if progress:
            progress(int(done.passes.max()), int(go.sum()))
        if not go.any():
            break
        keep = go.nonzero()[:, 0]
        easy = found.effort[keep] <= EASY
        own = {h: one for h, one in precondition.select(keep).own.items() if easy[h]}
        foretold, strict = (bend * model)[keep].square(), strict[keep]
        active, theta, here = active[keep], theta[keep], there.select(go[looked].nonzero()[:, 0])
        objective = objective.select(keep)
    return done


@dataclass(frozen=True)
class Goal:
    """When a Newton step has gone far enough, (H,) each: see _search.

    stiff: rounding to bfloat16 adds more curvature than l2, in some direction. foretold: what the
    last step's bend lets the next one's decrease be, bend^2 q^2; 0 where there was none.
    """

    close: Tensor
    bend: Tensor
    effort: Tensor
    stiff: Tensor
    foretold: Tensor


@dataclass(frozen=True)
class Step:
    """Newton steps of H heads: step (H, K, D), and the decrease q of the quadratic model (H,).

    left (H,) is what an exact solution would still add to q; used (H,) counts products, effort (H,)
    those of the precision that took more of them.
    """

    step: Tensor
    model: Tensor
    left: Tensor
    used: Tensor
    effort: Tensor


def newton_step(
    objective: Objective, here: Point, precondition: Preconditioner, goal: Goal
) -> Step:
    """Solve H s = -g by preconditioned conjugate gradients.

    With rows at bfloat16 first by these, in the coordinates of their basis. They make products with
    a matrix H' a little other than H: rounding adds curvature, up to ROUNDED^2 of the largest that
    the mean has. Where that is below l2 it does no harm. Elsewhere, in stiff heads, H' hides
    directions in which H has hardly any curvature, and with them all that there is to gain: such a
    head is not done before it went on, from what it found, by exact products.
    """
    residual = -here.gradient
    found = Step(
        step=torch.zeros_like(residual),
        model=torch.zeros_like(here.value),
        left=torch.zeros_like(here.value),
        used=torch.zeros_like(goal.effort),
        effort=torch.zeros_like(goal.effort),
    )
    every = torch.arange(len(residual), device=residual.device)
    exact = _Equations(objective, here, precondition, coarse=False)
    if objective.half is None:
        _search(exact, residual, every, goal, found)
        return found
    _search(replace(exact, coarse=True), objective.turn(residual), every, goal, found)
    if residual.shape[1] > 1:  # rounding moved all classes together, and no step moves them back
        found.step.copy_(objective.centred(found.step))
    found = replace(found, step=objective.turn(found.step, back=True))
    last = 2 * goal.bend * found.model**1.5 <= goal.close  # unless f is found to bend more
    early = goal.stiff & ~last
    found.left[early] = found.left[early].maximum(goal.close[early])
    late = (goal.stiff & last).nonzero()[:, 0]
    if len(late):
        _refine(exact.select(late), residual[late], late, goal, found)
    return found


@dataclass(frozen=True)
class _Equations:
    """H s = -g of some heads, or nearly: coarse, in the coordinates of the basis."""

    objective: Objective
    point: Point
    inverse: Preconditioner
    coarse: bool

    def product(self, V: Tensor) -> Tensor:
        """Return H V."""
        if self.coarse:
            return self.objective.coarse_product(self.point, V)
        return self.objective.hessian_product(self.point, V)

    def precondition(self, R: Tensor) -> Tensor:
        """Return about H^-1 R."""
        if self.coarse:
            return self.inverse(R)
        turn = self.objective.turn
        return turn(self.inverse(turn(R)), back=True)

    def usable(self, V: Tensor) -> Tensor:
        """Return V with no more digits than products take."""
        return V.to(torch.bfloat16).to(V.dtype) if self.coarse else V

    def select(self, heads: Tensor) -> _Equations:
        return _Equations(
            self.objective.select(heads),
            self.point.select(heads),
            self.inverse.select(heads),
            self.coarse,
        )


def _refine(equations: _Equations, residual: Tensor, live: Tensor, goal: Goal, found: Step) -> None:
    """Go on from found.step by exact products: first as far along it as is best.

    With an inverse P of the head's own r' P r / 2 is what is left, and may be little enough.
    """
    step = found.step[live]
    product = equations.product(step)
    down, curvature = _dot(step, residual), _dot(step, product)
    length = torch.where((down > 0) & (curvature > 0), down / curvature, 0)
    found.step[live] = _times(length, step)
    found.model[live] = 0.5 * length * down
    found.used[live] += 1
    residual = residual - _times(length, product)
    left = 0.5 * _dot(residual, equations.precondition(residual))
    found.left[live] = left
    far = ~((left >= 0) & (left <= goal.close[live] / (2 * SAFETY)))
    far |= torch.tensor([h not in equations.inverse.own for h in range(len(live))]).to(far.device)
    if far.any():
        keep = far.nonzero()[:, 0]
        _search(equations.select(keep), residual[keep], live[keep], goal, found)


def _search(
    equations: _Equations,
    residual: Tensor,
    live: Tensor,
    goal: Goal,
    found: Step,
    max_iterations: int = 250,
) -> None:
    """Let the heads `live` go on from found.step, whose residuals are given, and write to found.

    What is left after k - d iterations is at least what the last d added, and little more where
    they add less and less (Strakos & Tichy 2002, On error estimation in the conjugate gradient
    method); d is a third of k and two more. A head stops when that is below half of what the model
    itself is wrong by, bend * q^1.5, or below a share of the tolerance that SAFETY leaves room for.
    One whose steps have been hard goes on for a quarter of its hardest step, or LEAST products with
    an inverse of its own, because slow directions show late: without it the estimate of separable
    heads at C = 1e5 fell to 5e-5 in one step and was 3e-3 in the next.

    Directions at bfloat16 are rounded before they are used, so that all products are with one
    matrix. What rounding the products leaves of the decrease was 1e-6 of it where 10 to 30 products
    do, 1e-3 for 170 and 2e-2 for 400.
    """
    coarse = equations.coarse
    least = goal.effort // 4
    own = live[[*equations.inverse.own]]
    least[own] = least[own].clamp_max(LEAST)
    if coarse:
        least[goal.stiff] = 0
    few = least.maximum(goal.effort.clamp_max(EASY))
    past = [found.model.clone()]
    image = equations.precondition(residual)
    direction, energy = equations.usable(image), _dot(residual, image)
    stuck = ~(energy >= -NOTHING)  # an inverse that rounding has broken
    for k in range(1, max_iterations + 1):
        product = equations.product(direction)
        curvature, down = _dot(direction, product), _dot(direction, residual)
        ahead = (curvature > 0) & (down > 0) & (energy > 0)  # else: converged to rounding
        length = torch.where(ahead, down / curvature, 0)
        found.step[live] += _times(length, direction)
        found.model[live] += 0.5 * length * down
        found.used[live] += 1
        found.effort[live] = found.effort[live].clamp_min(k)
        past.append(found.model.clone())
        q, close = found.model[live], goal.close[live]
        unseen = (BLUR * goal.effort[live].clamp_min(k)).square() * q * coarse
        left = (found.model - past[max(0, k - 2 - k // 3)])[live] + unseen
        found.left[live] = torch.where(stuck, torch.inf, left)
        enough = torch.maximum(
            close / (2 * SAFETY), (0.5 * goal.bend[live] * q**1.5).clamp_max(ETA * q)
        ).maximum(2 * unseen)
        enough_by_now = torch.where(q < goal.foretold[live], few[live], least[live])
        doubt = (k < enough_by_now) & (left <= close)
        go = ahead & ((left > enough) | doubt)
        if not go.any():
            break
        residual = residual - _times(length, product)
        image = equations.precondition(residual)
        before, energy = energy, _dot(residual, image)
        turn = torch.where(before > 0, energy / before, 0)
        direction = equations.usable(image + _times(turn, direction))
        # Copying the curvature costs about one pass: worth it once a quarter of the batch is done.
        if go.sum() <= 0.75 * len(go):
            keep = go.nonzero()[:, 0]
            live, stuck, equations = live[keep], stuck[keep], equations.select(keep)
            residual, direction, energy = residual[keep], direction[keep], energy[keep]


def decrement(objective: Objective, here: Point, precondition: Preconditioner) -> Tensor:
    """Return g' P g / 2, about the gap where P is about the inverse Hessian, (H,)."""
    g = objective.turn(here.gradient)
    return 0.5 * _dot(g, precondition(g))


def bound(objective: Objective, here: Point) -> Tensor:
    """Return nearly the certificate's bound on the gap (certificate.py), at no cost, (H,).

    The intercept's gradient is nearly zero here, and counts as a row's size times as much.
    """
    g = here.gradient.double().square()
    whole = g[..., :-1].sum((1, 2)) + g.shape[2] * g[..., -1].sum(1)
    return whole / (2 * objective.l2.double())


def line_search(
    objective: Objective, theta: Tensor, here: Point, step: Tensor, *, trials: int = 30
) -> tuple[Tensor, Point, Tensor, Tensor]:
    """Shorten each head's step until f falls as Armijo's rule asks, and not past its lowest point.

    Returns theta, its Point, who moved (H,), and the tries (H,).

    A rise within the rounding of f counts as level. A head that no length helps, or whose step is
    not finite or does not lead down, stays where it was, and is said not to have moved.
    """
    step = torch.where(step.isfinite().all(2).all(1)[:, None, None], step, 0)
    slope = _dot(here.gradient, step)
    rounding = 4 * torch.finfo(theta.dtype).eps * here.value.abs()
    length = torch.where(slope < 0, torch.ones_like(here.value), 0)
    tries = torch.ones_like(length, dtype=torch.long)
    there = objective(theta + _times(length, step)) if len(theta) else here
    for _ in range(trials):
        fine = there.value <= here.value + 1e-4 * length * slope + rounding
        ahead = _dot(there.gradient, step)  # the slope at the new point
        past = (ahead > -0.5 * slope) & (-slope > rounding)  # its lowest point, if that can be told
        again = ((~fine | past) & (slope < 0)).nonzero()[:, 0]
        if not len(again):
            break
        # Where the two slopes' line crosses zero: what a parabola would have for its lowest point.
        shorter = (slope / (slope - ahead)).clamp(0.1, 0.7)
        length[again] *= shorter[again]
        tries[again] += 1
        there.put(again, objective.select(again)(theta[again] + _times(length[again], step[again])))
    worse = (~(there.value <= here.value + rounding)).nonzero()[:, 0]
    if len(worse):
        length[worse] = 0
        there.put(worse, objective.select(worse)(theta[worse]))
    return theta + _times(length, step), there, length > 0, tries


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("hkd,hkd->h", a.double(), b.double())


def _times(scalar: Tensor, tensor: Tensor) -> Tensor:
    return scalar.to(tensor.dtype)[:, None, None] * tensor
