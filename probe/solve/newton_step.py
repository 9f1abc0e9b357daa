"""One Newton step of many heads: H s = -g by preconditioned conjugate gradients.

Shapes: H heads, K outputs, D columns. Heads share every product with the rows; each has its own
tolerance and leaves when it is met. docs/solver.md, "A Newton step" and "What bfloat16 may do".

The quadratic model of the objective falls by q = -g's - s'Hs/2. Conjugate gradients add
a_k r_k'd_k / 2 to q in iteration k, where a_k is the length along direction d_k and r_k the
residual: q rises to g'H^-1 g / 2, half the squared Newton decrement, and what it still lacks is
half the squared H-norm of the error of s (Hestenes & Stiefel 1952, theorem 6:1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.solve.gap import dot, times
from probe.solve.objective import Objective, Point
from probe.solve.preconditioner import Preconditioner

FORCING = 0.4  # of q that a step may leave far from the optimum: a forcing term (Dembo et al. 1982)
SAFETY = 4  # times the estimate of what a step leaves is reported as its gap
MIN_OWN_ITERATIONS = 5  # of a hard head, at most, with its own inverse before it is called done
EASY_STEP = 8  # a step of at most so many iterations keeps its head's own inverse for the next
MAX_ITERATIONS = 250  # of one step
TINY_DECREASE = 1e-20  # a decrease below every tolerance
BF16_ROUNDING = 2.0**-9  # of a number, what rounding to bfloat16 changes (rms); 2^-8 at most
BF16_CG_ERROR = 2.0**-11  # the root of what bfloat16 leaves of a decrease, per iteration needed


@dataclass(frozen=True)
class StepTolerance:
    """When a Newton step has gone far enough, (H,) each.

    gap: what it may leave of f. cubic_coefficient: f leaves a model that falls by q by this times
    q^1.5. cg_iterations: of the hardest step so far. bf16_unsafe: rounding to bfloat16 adds more
    curvature than l2 in some direction. expected: what the last step's cubic coefficient c lets
    this one's decrease be, c^2 q^2; 0 where there was none.
    """

    gap: Tensor
    cubic_coefficient: Tensor
    cg_iterations: Tensor
    bf16_unsafe: Tensor
    expected: Tensor


@dataclass(frozen=True)
class Step:
    """Newton steps of H heads, written to as conjugate gradients go on.

    step (H, K, D). decrease q (H,) of the quadratic model. cg_error (H,): what an exact solution
    would still add to q. products (H,) with the Hessian; cg_iterations (H,) of the longer of the
    two runs, at bfloat16 and exact.
    """

    step: Tensor
    decrease: Tensor
    cg_error: Tensor
    products: Tensor
    cg_iterations: Tensor


@dataclass(frozen=True)
class NewtonSystem:
    """H s = -g of some heads; at bfloat16 nearly that, in the coordinates of the basis.

    heads (H',) says which of the step's heads they are. At bfloat16 the objective is that over the
    rows at bfloat16.
    """

    objective: Objective
    point: Point
    inverse: Preconditioner
    heads: Tensor
    bf16: bool

    def product(self, V: Tensor) -> Tensor:
        """Return H V, (H', K, D)."""
        return self.objective.hessian_product(self.point, V)

    def precondition(self, R: Tensor) -> Tensor:
        """Return about H^-1 R, (H', K, D)."""
        if self.bf16:
            return self.inverse(R)
        objective = self.objective
        return objective.from_basis(self.inverse(objective.to_basis(R)))

    def representable(self, V: Tensor) -> Tensor:
        """Return V (H', K, D) with no more digits than products take: see Objective."""
        return V.to(torch.bfloat16).to(V.dtype) if self.bf16 else V

    def select(self, heads: Tensor) -> NewtonSystem:
        """Keep the heads of an index (H'',)."""
        return NewtonSystem(
            self.objective.select(heads),
            self.point.select(heads),
            self.inverse.select(heads),
            self.heads[heads],
            self.bf16,
        )


def newton_step(
    objective: Objective, point: Point, inverse: Preconditioner, tolerance: StepTolerance
) -> Step:
    """Return steps s with H s = -g, nearly: at bfloat16 first where the rows are there so.

    Products at bfloat16 are with a matrix H' a little other than H: rounding adds curvature, up to
    BF16_ROUNDING^2 of the largest that the mean has. Where that is below l2 it does no harm. Where
    not, H' hides directions in which H has hardly any curvature, and with them all that there is to
    gain (heads at C = 1e5 reported a gap of 1e-7 and had 4e-4): such a head is not done before it
    went on, from what it found, by exact products.
    """
    residual = -point.gradient
    result = Step(
        step=torch.zeros_like(residual),
        decrease=torch.zeros_like(point.value),
        cg_error=torch.zeros_like(point.value),
        products=torch.zeros_like(tolerance.cg_iterations),
        cg_iterations=torch.zeros_like(tolerance.cg_iterations),
    )
    every = torch.arange(len(residual), device=residual.device)
    exact = NewtonSystem(objective, point, inverse, every, bf16=False)
    if (rounded := objective.bf16) is None:
        conjugate_gradients(exact, residual, tolerance, result)
        return result
    system = replace(exact, objective=rounded, bf16=True)
    conjugate_gradients(system, objective.to_basis(residual), tolerance, result)
    if residual.shape[1] > 1:  # rounding moved all classes together, and no step moves them back
        result.step.copy_(objective.centred(result.step))
    result = replace(result, step=objective.from_basis(result.step))
    # The last step, unless f is found to leave its model by more.
    last = 2 * tolerance.cubic_coefficient * result.decrease**1.5 <= tolerance.gap
    early = tolerance.bf16_unsafe & ~last
    result.cg_error[early] = result.cg_error[early].maximum(tolerance.gap[early])
    late = (tolerance.bf16_unsafe & last).nonzero()[:, 0]
    if len(late):
        _refine(exact.select(late), residual[late], tolerance, result)
    return result


def _refine(system: NewtonSystem, residual: Tensor, tolerance: StepTolerance, result: Step) -> None:
    """Go on from result.step by exact products, first to the best length along it.

    residual (H', K, D) of the system's heads at a step of zero. The model is lowest at s'r / s'Hs
    along s. With an inverse P of the head's own r'P r / 2 is what is left of q, and may be little
    enough.
    """
    heads = system.heads
    # The step found at bfloat16, scaled: s <- (s'r / s'H s) s, one exact product.
    step = result.step[heads]
    product = system.product(step)
    down, curvature = dot(step, residual), dot(step, product)
    length = torch.where((down > 0) & (curvature > 0), down / curvature, 0)
    result.step[heads] = times(length, step)
    result.decrease[heads] = 0.5 * length * down
    result.products[heads] += 1
    residual = residual - times(length, product)
    # q* - q = r'H^-1 r / 2 exactly, and about r'P r / 2 where P is this head's own inverse.
    cg_error = 0.5 * dot(residual, system.precondition(residual))
    result.cg_error[heads] = cg_error
    far = ~((cg_error >= 0) & (cg_error <= tolerance.gap[heads] / (2 * SAFETY)))
    own = system.inverse.head_inverses
    far |= torch.tensor([h not in own for h in range(len(heads))]).to(far.device)
    if far.any():
        keep = far.nonzero()[:, 0]
        conjugate_gradients(system.select(keep), residual[keep], tolerance, result)


@dataclass(frozen=True)
class StoppingRule:
    """When conjugate gradients have done enough for a head. docs/solver.md, "When a step is done".

    past: q (H,) of the step's heads after 0, 1, ... iterations. least (H,): iterations before a
    head is called done by its estimate; least_beyond (H,): the same while q <
    StepTolerance.expected.
    """

    tolerance: StepTolerance
    result: Step
    past: list[Tensor]
    least: Tensor
    least_beyond: Tensor

    @classmethod
    def of_step(cls, system: NewtonSystem, tolerance: StepTolerance, result: Step) -> StoppingRule:
        """Return the rule for a system's heads.

        Slow directions show late, so a head isn't done before a quarter of the iterations of its
        hardest step, with an inverse of its own MIN_OWN_ITERATIONS at most. Without it the estimate
        of separable heads at C = 1e5 fell to 5e-5 in one step and was 3e-3 in the next.
        """
        least = tolerance.cg_iterations // 4
        own = system.heads[[*system.inverse.head_inverses]]
        least[own] = least[own].clamp_max(MIN_OWN_ITERATIONS)
        if system.bf16:
            least[tolerance.bf16_unsafe] = 0
        beyond = least.maximum(tolerance.cg_iterations.clamp_max(EASY_STEP))
        return cls(tolerance, result, [result.decrease.clone()], least, beyond)

    def goes_on(self, system: NewtonSystem, broken: Tensor) -> Tensor:
        """Return which of the system's heads (H',) need another iteration; write their cg_error.

        What is left after k - d iterations is at least what the last d added to q, and little more
        where they add less and less (Strakos & Tichy 2002, On error estimation in the conjugate
        gradient method); d is a third of k and two more. What rounding products to
        bfloat16 leaves of q was 1e-6 of it where 10 to 30 products do, 1e-3 for 170 and 2e-2 for
        400: about (BF16_CG_ERROR k)^2.

        A head stops when that is below half of what the model itself is wrong by, c q^1.5, and at
        most FORCING q, or below its share of the tolerance, gap / (2 SAFETY).
        """
        result, tolerance, heads = self.result, self.tolerance, system.heads
        self.past.append(result.decrease.clone())
        # k iterations done; q_k; the gap that this step may leave.
        k, q, gap = len(self.past) - 1, result.decrease[heads], tolerance.gap[heads]
        hardest = tolerance.cg_iterations[heads].clamp_min(k)
        rounding = (BF16_CG_ERROR * hardest).square() * q * system.bf16
        # q_k - q_(k-d), d = k // 3 + 2: a lower bound of q* - q_k d iterations ago.
        cg_error = (result.decrease - self.past[max(0, k - 2 - k // 3)])[heads] + rounding
        result.cg_error[heads] = torch.where(broken, torch.inf, cg_error)
        # More accuracy than the model itself has gains nothing; FORCING q while far away, where the
        # cubic term says more than q.
        model_error = 0.5 * tolerance.cubic_coefficient[heads] * q**1.5
        enough = torch.maximum(gap / (2 * SAFETY), model_error.clamp_max(FORCING * q))
        enough = enough.maximum(2 * rounding)
        # q below what the last step let it be: the step is near its end, or a slow direction hasn't
        # shown yet. So it takes at least as many iterations as an easy step.
        below_expected = q < tolerance.expected[heads]
        least = torch.where(below_expected, self.least_beyond[heads], self.least[heads])
        # The minimum is for heads that would be called done by their estimate, and for no others.
        return (cg_error > enough) | ((k < least) & (cg_error <= gap))


def conjugate_gradients(
    system: NewtonSystem, residual: Tensor, tolerance: StepTolerance, result: Step
) -> None:
    """Let the system's heads go on from result.step, with residuals (H', K, D); write to result.

    Algorithm 5.3 of Nocedal & Wright 2006, all heads at once; StoppingRule says when one stops.
    Directions at bfloat16 are rounded before they are used, so that all products are with one
    matrix: only then are directions conjugate.
    """
    rule = StoppingRule.of_step(system, tolerance, result)
    # r = -g - H s, image P r, direction d; energy r'P r is the residual's squared P-norm.
    image = system.precondition(residual)
    direction, energy = system.representable(image), dot(residual, image)
    broken = ~(energy >= -TINY_DECREASE)  # r'P r < 0: an inverse that rounding has broken
    for k in range(1, MAX_ITERATIONS + 1):
        heads, product = system.heads, system.product(direction)
        # a = r'd / d'H d, where the model is lowest along d; it falls by a r'd / 2. In exact
        # arithmetic r'd = r'P r; with rounded directions r'd is the one that holds.
        curvature, down = dot(direction, product), dot(direction, residual)
        descends = (curvature > 0) & (down > 0) & (energy > 0)  # else: converged to rounding
        length = torch.where(descends, down / curvature, 0)
        result.step[heads] += times(length, direction)
        result.decrease[heads] += 0.5 * length * down
        result.products[heads] += 1
        result.cg_iterations[heads] = result.cg_iterations[heads].clamp_min(k)
        go = descends & rule.goes_on(system, broken)
        if not go.any():
            break
        residual = residual - times(length, product)  # r <- r - a H d
        image = system.precondition(residual)
        before, energy = energy, dot(residual, image)
        beta = torch.where(before > 0, energy / before, 0)  # Fletcher & Reeves
        direction = system.representable(image + times(beta, direction))
        # Copying the curvature costs about one pass: worth it once a quarter of the batch is done.
        if go.sum() <= 0.75 * len(go):
            keep = go.nonzero()[:, 0]
            system, broken = system.select(keep), broken[keep]
            residual, direction, energy = residual[keep], direction[keep], energy[keep]
