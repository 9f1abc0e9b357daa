"""From checked inputs to solved heads: prepare, solve, unpack.

Shapes: N images, D features, J strengths C, G row weightings, L label columns (1 of softmax), K
outputs of a head (1 of sigmoid). Head (j, b), b = g L + l, has strength j, weighting g and label l:
theta is (J, G L, K, width).

scikit-learn's objective is C sum_i w_i loss_i + |W|^2 / 2. Divided by C n, with n the sum of the
weights, it is the mean loss + l2 / 2 |W|^2, l2 = 1 / (C n). For rows z = (x - shift) / scale the
coefficients are scale times as large, and l2 is divided by scale^2 (coordinates.py).

float32 does the work, float64 what float32 can't: docs/solver.md, "Two precisions".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from features.errors import ProbeError
from probe.solve.certificate import certify
from probe.solve.coordinates import Basis
from probe.solve.gap import FLOOR
from probe.solve.head_set import ABSENT_INTERCEPT, HeadSet
from probe.solve.inputs import Given
from probe.solve.losses import Loss, Sigmoid, Softmax
from probe.solve.objective import HeadObjective, LocalObjective
from probe.solve.path import HeadProgress, RegularizationPath, batch_size
from probe.solve.rows import LocalRows, Rows, bases_of
from probe.solve.solver import SolverSettings
from probe.solve.sources import Source

SURE_LOGIT = 40.0  # whose loss, 4e-18, counts as none
FLOAT32_TOL = 1e-7  # the smallest relative gap that float32 is asked for
FLOAT32_STALLED = 3  # steps that float32 can't tell from rounding: float64 goes on from there
FLOAT32_HOPELESS = 0.5  # of a strength's heads given up: larger strengths are not tried either
FLOAT32_PENALTIES = 1e-25, 1e25  # that it is given: their products with weights are numbers
FLOAT32_ROUNDING = 2.0**-24  # what rounding to float32 changes in a number, at most
ROUNDING_SHARE = 0.1  # of the tolerance that rounding heads to float32 may take
BOUND_PRODUCTS = 1 << 19  # in a head's logits, up to which a bound in float64 costs little
BF16_MIN_NUMBERS = 1 << 20  # in the rows, from which products at bfloat16 are faster
BF16_MIN_PRODUCTS = 16  # that a head takes: turning the rows costs as much as one of D outputs


@dataclass(frozen=True)
class FitSettings:
    """How to fit.

    tol: the gap, relative to max(objective, FLOOR). certified: bound each head's gap, too.
    fast_bf16: the device multiplies bfloat16 faster than float32.
    """

    tol: float
    certified: bool
    device: torch.device
    fast_bf16: bool


class RowsElsewhere(Rows, Protocol):
    """Rows that other processes hold."""

    def objective(self, heads: HeadSet) -> HeadObjective:
        """Return the objective of heads over these rows."""
        ...


class Engine(Protocol):
    """Where rows lie and sums over them are made."""

    def rows(
        self, source: Source, row_class: Tensor | None, device: torch.device
    ) -> LocalRows | RowsElsewhere:
        """Return the rows of a source (N, D), as LocalRows.from_source does."""
        ...


@dataclass(frozen=True)
class Problem:
    """Heads to be fitted, in the order of the rows.

    labels (L, N) or None of softmax. weights (G L, N) float64, each row summing to 1, and `group`
    (J G L,) which of them each head has; l2 (J G L,), column (J G L,) of the labels; log_c (J,),
    ascending, and `back` (J',), which of these each of the caller's strengths is. intercepts
    (G L, K) are where heads start. present (G, K): the classes that have weight.
    """

    rows: LocalRows | RowsElsewhere
    labels: Tensor | None
    weights: Tensor
    l2: Tensor
    group: Tensor
    column: Tensor
    log_c: Sequence[float]
    back: Tensor
    intercepts: Tensor
    present: Tensor
    bases: list[Basis]
    basis: Tensor
    bf16_rows: LocalRows | None = None

    def objective(self, dtype: torch.dtype) -> HeadObjective:
        """Return the objective of all heads in a type."""
        loss: Loss = Softmax()
        present = None if bool(self.present.all()) else self.present
        if self.labels is not None:
            loss = Sigmoid(self.labels.nan_to_num(0).to(dtype), self.column)
            present = None
        heads = HeadSet(
            loss=loss,
            weights=self.weights.to(dtype),
            l2=self.l2.to(dtype),
            group=self.group,
            bases=[one.to(dtype) for one in self.bases],
            basis=self.basis,
            present=present,
        )
        if isinstance(self.rows, LocalRows):
            return LocalObjective(heads, self.rows.to(dtype), self.bf16_rows)
        return self.rows.to(dtype).objective(heads)

    @property
    def bound_is_cheap(self) -> bool:
        """Say whether a bound in float64 costs little beside the fit."""
        K = self.intercepts.shape[1]
        return self.rows.in_memory and len(self.rows) * self.rows.width * K <= BOUND_PRODUCTS


def prepare(given: Given, settings: FitSettings, engine: Engine | None) -> Problem:
    """Put rows, labels and weights in the solver's order and units.

    Raises ProbeError for rows that are not finite and for a weighting that leaves none.
    """
    device, softmax = settings.device, given.kind == "softmax"
    y = given.labels.to(device) if given.n_classes is None else given.labels.to(device, torch.int64)
    rows_of = engine.rows if engine else LocalRows.from_source
    rows = rows_of(given.features, y if softmax else None, device)
    # Labels and weights follow the rows, which are sorted by class within a chunk.
    y, w = y[rows.order], given.weights[:, rows.order]
    labels = None if softmax else y.reshape(len(y), -1).T.double()  # (L, N)
    strengths, back = torch.unique(given.C, return_inverse=True)  # ascending

    # One row of weights per weighting, or per weighting and label where labels are missing.
    J, G, L = len(strengths), len(w), 1 if labels is None else len(labels)
    j, g, column = (
        t.flatten().to(device)
        for t in torch.meshgrid(torch.arange(J), torch.arange(G), torch.arange(L), indexing="ij")
    )
    # A missing label is a weight of zero: it leaves the row out of that label's loss alone.
    known = w.double()[:, None]
    if labels is not None:
        known = known * ~labels.isnan()  # (G, L, N)
    total = known.sum(2)  # (G, L)
    if not (total > 0).all():
        raise ProbeError(
            "a fold or a label has no training row left: use fewer folds, or drop the label"
        )
    if labels is None:
        intercepts, present = _class_intercepts(y, w, total, given.n_classes or 0)
    else:
        intercepts = _label_intercepts(labels, known, total)
        present = torch.ones(G, 1, dtype=torch.bool, device=device)
    bases, basis = bases_of(rows, w)
    problem = Problem(
        rows=rows,
        labels=labels,
        weights=(known / total[..., None]).flatten(0, 1),
        # l2 = 1 / (C n), times scale^-2 because coefficients of rows are scale times as large.
        l2=1 / (strengths[j] * total[g, column] * rows.units.scale**2),
        group=g * L + column,
        column=column,
        log_c=strengths.log10().tolist(),
        back=back,
        intercepts=intercepts,
        present=present,
        bases=bases,
        basis=basis[g],
    )
    return _with_bf16_rows(problem) if settings.fast_bf16 else problem


def _class_intercepts(y: Tensor, w: Tensor, total: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return the best intercepts without features, log p_k (G, K), and which classes have weight.

    y (N,) classes, w (G, N) weights, total (G, 1) their sums.
    """
    counts = torch.zeros(len(w), K, dtype=torch.float64, device=w.device)
    counts.index_add_(1, y, w.double())
    present = counts > 0
    return torch.where(present, (counts / total).log(), ABSENT_INTERCEPT), present


def _label_intercepts(labels: Tensor, known: Tensor, total: Tensor) -> Tensor:
    """Return the best intercepts without features, log p / (1 - p), (G L, 1).

    labels (L, N), known (G, L, N) weights, total (G, L) their sums.
    """
    share = (known * labels.nan_to_num(0)).sum(2) / total
    return share.logit().clamp(-SURE_LOGIT, SURE_LOGIT).view(-1, 1)


def _with_bf16_rows(problem: Problem) -> Problem:
    """Add the rows at bfloat16 where turning them pays: there is one basis, and much to do."""
    rows, heads = problem.rows, len(problem.l2)
    outputs = heads * problem.intercepts.shape[1]
    if (
        isinstance(rows, LocalRows)
        and rows.in_memory
        and len(problem.bases) == 1
        and min(len(rows), BF16_MIN_PRODUCTS * outputs) >= rows.width
        and len(rows) * rows.width >= BF16_MIN_NUMBERS
    ):
        return replace(problem, bf16_rows=rows.in_bf16(problem.bases[0].B))
    return problem


def solve(problem: Problem, tol: float, progress: HeadProgress | None) -> RegularizationPath:
    """Solve all heads: in float32 as far as that can tell, and in float64 what that leaves.

    Those are heads that it left unconverged, or whose gap it can't bound where rows are few, or all
    of them when tol < FLOAT32_TOL.
    """
    (B, K), J = problem.intercepts.shape, len(problem.log_c)
    # At C -> 0 the optimum is W = 0 and the intercepts of the classes' shares: the start.
    theta = torch.zeros(J, B, K, problem.rows.width, device=problem.l2.device)
    theta[..., -1] = problem.intercepts
    path = RegularizationPath(problem.log_c, theta)
    least, most = FLOAT32_PENALTIES
    float32 = bool(((problem.l2 > least) & (problem.l2 < most)).all())
    bounded = problem.bound_is_cheap
    if float32:
        first = SolverSettings(
            tol=max(tol, FLOAT32_TOL), max_stalled=FLOAT32_STALLED, hopeless=FLOAT32_HOPELESS
        )
        path.solve(problem.objective(torch.float32), first, progress)
        if bounded and tol >= FLOAT32_TOL:
            path.check(problem.objective(torch.float64), tol=tol)
    if not float32 or tol < FLOAT32_TOL or not path.converged.all():
        path.theta, exact = path.theta.double(), problem.objective(torch.float64)
        if K > 1:  # what rounding moved all classes by: no step of the solver goes there
            path.theta = exact.centred(path.theta.flatten(0, 1)).view_as(path.theta)
        if tol < FLOAT32_TOL:  # float32 can't tell how near it came
            path.gap[:] = torch.inf
        path.solve(exact, SolverSettings(tol=tol, bounded=bounded), progress)
    return path


@dataclass(frozen=True)
class Fitted:
    """Heads in the order of the caller's strengths and in the units of the features.

    coef (J, G, L, K, D), intercept (J, G, L, K); converged, gap, value, passes and bound, where it
    was asked for, (J, G, L).
    """

    coef: Tensor
    intercept: Tensor
    converged: Tensor
    gap: Tensor
    value: Tensor
    passes: Tensor
    bound: Tensor | None


def unpack(problem: Problem, path: RegularizationPath, settings: FitSettings) -> Fitted:
    """Return the solved heads for features.

    A class without a row in a group gets no coefficients and an intercept of -SURE_LOGIT, before
    all are centred, which is where the penalty has them.
    """
    L = 1 if problem.labels is None else len(problem.labels)
    shape, back = (len(problem.present), L), problem.back
    bound = None
    if settings.certified:
        bound = torch.unflatten(_certificates(problem, path.theta), 1, shape)[back]
    theta = path.theta.double()
    if problem.labels is None:
        theta[..., -1] = torch.where(problem.present, theta[..., -1], -SURE_LOGIT)
        # sum_k W_k = 0 is the least |W|^2 among all that give the same softmax.
        theta = theta - theta.mean(2, keepdim=True)
        theta[..., :-1] *= problem.present[..., None]
    # theta is in the order of ascending C; `back` repeats and reorders it as the caller's C are.
    coef, intercept = problem.rows.units.to_features(torch.unflatten(theta, 1, shape)[back])
    converged, gap, value, passes = (
        torch.unflatten(one, 1, shape)[back]
        for one in (path.converged, path.gap, path.value, path.passes)
    )
    rounding = _rounding_gap(problem, coef, intercept)
    allowed = ROUNDING_SHARE * settings.tol * value.clamp_min(FLOOR)
    exact = settings.tol < FLOAT32_TOL or bool((rounding > allowed).any())
    dtype = torch.float64 if exact else torch.float32
    return Fitted(coef.to(dtype), intercept.to(dtype), converged, gap, value, passes, bound)


def _rounding_gap(problem: Problem, coef: Tensor, intercept: Tensor) -> Tensor:
    """Return what rounding heads to float32 adds to their objective, about, (J, G, L).

    A logit is a sum of terms of this mean square, sum_d coef_d^2 E x_d^2 + intercept^2. Each is
    rounded, by FLOAT32_ROUNDING of itself at most, and the objective gains half of
    p (1 - p) <= 1 / 4 times the square of what that makes of the logit.
    """
    # (sum_d e_d)^2 of independent roundings is sum_d e_d^2 on average.
    squares = problem.rows.units.mean_squares(problem.bases[0].gram)
    size = (coef.square() @ squares + intercept.square()).sum(3)
    return FLOAT32_ROUNDING**2 / 8 * size


def _certificates(problem: Problem, theta: Tensor) -> Tensor:
    """Return the certificate of every head, (J, B), of theta (J, B, K, width)."""
    objective = problem.objective(torch.float64)
    if not isinstance(objective, LocalObjective):
        raise ProbeError("a certified gap is computed in one process: leave the engine out")
    theta = theta.double()
    flat, step = theta.flatten(0, 1), batch_size(objective, theta)
    parts = torch.split(torch.arange(len(flat), device=theta.device), step)
    bounds = [certify(objective.select(part), flat[part]) for part in parts]
    return torch.cat(bounds).view(theta.shape[:2])
