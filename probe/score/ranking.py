"""Scores of a ranking under many weightings at once: AUROC, average precision, sensitivity.

Shapes: N images, B weightings. truth is (N,) of 1, 0 and NaN (not scored), score (N,) of anything
that grows with the probability, infinities too; weights (B, N). Each function looks once at the
scores and returns a function of weights.

Images are gathered into steps, highest score first: a step is all images of one score that a
positive has, or all negatives between two of these. So a rare finding has few steps, negatives need
no sorting among themselves, and adding up a step's weights is one sparse product for all
weightings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from scipy.sparse import csc_matrix, csr_matrix

Array: TypeAlias = Any
Scorer: TypeAlias = Callable[[Array], Array]


def auroc(truth: Array, score: Array) -> Scorer:
    """Area under the ROC curve of truth (N,), score (N,); ties count half.

    It is the share of pairs (positive, negative) in which the positive has the higher score (Hanley
    & McNeil 1982): per step, positives above it times its negatives. NaN where one side has no
    weight.
    """
    steps = steps_of(truth, score, merge_positive=True)

    def scorer(weights: Array) -> Array:
        positive, negative = steps(weights)  # (T, B)
        above = positive.cumsum(0) - positive / 2
        with np.errstate(invalid="ignore"):
            area = np.einsum("tb,tb->b", above, negative)
            return area / (positive.sum(0) * negative.sum(0))

    return scorer


def auroc_against(y: Array, k: int, score: Array, sums: Scorer) -> Scorer:
    """AUROC of class k against every class alone, (B, K), by the scores (N,) of class k.

    y is (N,) class index, sums the function of weights that adds them up by class, (B, K). NaN
    against a class without weight, or itself.
    """
    steps = steps_of((y == k).astype(float), score, merge_positive=True)

    def scorer(weights: Array) -> Array:
        positive, _ = steps(weights)
        above = positive.cumsum(0) - positive / 2  # (T, B) positives over each step
        area = sums(above[steps.step].T * weights)  # per class, its images' share of pairs
        total = sums(weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            area /= total[:, k, None] * total
        area[:, k] = np.nan
        area[total[:, k] == 0] = np.nan
        return area

    return scorer


def average_precision(truth: Array, score: Array) -> Scorer:
    """Sum over steps of precision times the rise in recall, of truth (N,) and score (N,).

    scikit-learn's average_precision_score, without interpolation. NaN where no positive has weight.
    """
    steps = steps_of(truth, score)

    def scorer(weights: Array) -> Array:
        positive, negative = steps(weights)
        hits, called = positive.cumsum(0), (positive + negative).cumsum(0)
        np.maximum(called, np.finfo(float).tiny, out=called)  # nothing called: no hit either
        with np.errstate(invalid="ignore"):
            return np.einsum("tb,tb,tb->b", hits, 1 / called, positive) / positive.sum(0)

    return scorer


def sensitivity_at(truth: Array, score: Array, *, specificity: float) -> Scorer:
    """Largest sensitivity of any threshold with at least this specificity; truth, score (N,).

    NaN where one side has no weight.
    """
    steps = steps_of(truth, score, merge_positive=True)

    def scorer(weights: Array) -> Array:
        positive, negative = steps(weights)
        with np.errstate(invalid="ignore"):
            sensitivity = positive.cumsum(0) / positive.sum(0)
            false = negative.cumsum(0) / negative.sum(0)
        allowed = false <= 1 - specificity + 1e-12  # 0.1 is more than 1 - 0.9 in floating point
        best = np.where(allowed, sensitivity, 0).max(0, initial=0)
        defined = (positive.sum(0) > 0) & (negative.sum(0) > 0)
        return np.where(defined, best, np.nan)

    return scorer


def totals(columns: Array) -> Scorer:
    """Return a function of weights (B, N): the weighted sums of columns (N, C), mostly 0, (B, C).

    A sparse product, not a matrix product: it runs in the caller's thread, and is as fast.
    """
    matrix = csr_matrix(np.atleast_2d(columns.T))
    return lambda weights: (matrix @ weights.T).T


def sums_by(group: Array, groups: int, values: Array | None = None) -> Scorer:
    """Return a function of weights (B, N): the sums of weights (times values) by group, (B, C).

    group (N,) is 0 to groups - 1 = C - 1.
    """
    matrix = _dealt(group, groups, len(group), None, values)
    return lambda weights: (matrix @ weights.T).T


@dataclass(frozen=True)
class Steps:
    """A function of weights (B, N): positive and negative weight per step, two (T, B).

    Rows 0 to T - 1 of the matrix are positives by step, T to 2 T - 1 negatives.
    """

    matrix: csc_matrix
    count: int

    def __call__(self, weights: Array) -> tuple[Array, Array]:
        """Return positive and negative weight per step."""
        sums = self.matrix @ weights.T
        return sums[: self.count], sums[self.count :]

    @property
    def step(self) -> Array:
        """Return the step of every image that has a truth, (n,)."""
        row = self.matrix.indices
        return np.where(row < self.count, row, row - self.count)


def steps_of(truth: Array, score: Array, *, merge_positive: bool = False) -> Steps:
    """Return the steps of a ranking, highest score first; truth (N,) of 1, 0, NaN, score (N,).

    `merge_positive` joins steps of positives only, for what depends on them just by their sum.
    """
    known = ~np.isnan(truth)
    whole = bool(known.all())
    positive, score = (truth == 1, score) if whole else (truth[known] == 1, score[known])
    at: Array = np.unique(score[positive])  # ascending, (P,)
    # Of 2 P + 1 steps 2 j + 1 is at score j, 2 j between it and the one before.
    step: Array = np.searchsorted(at, score)
    tied = np.append(at, np.nan)[step] == score
    step = 2 * step + tied
    hits = np.bincount(step[positive], minlength=2 * len(at) + 1)
    others = np.bincount(step, minlength=len(hits)) - hits
    used = np.flatnonzero(hits + others)
    alone = others[used] == 0
    new = ~(alone[1:] & alone[:-1]) if merge_positive else np.ones(max(0, len(used) - 1), bool)
    order = np.zeros(len(hits), dtype=np.int32)
    order[used[1:]] = np.cumsum(new)
    count = int(order.max()) + 1 if len(used) else 0
    row = (count - 1 - order)[step] + count * ~positive
    return Steps(_dealt(row, 2 * count, len(truth), None if whole else known), count)


def _dealt(
    row: Array, rows: int, n: int, known: Array | None, values: Array | None = None
) -> csc_matrix:
    """Return a matrix (rows, n) with one entry in every known column, 1 or a value, at its row."""
    pointer = _counted(n) if known is None else np.append(0, np.cumsum(known)).astype(np.int32)
    data = _ones(n)[: len(row)] if values is None else values
    return csc_matrix((data, row.astype(np.int32), pointer), shape=(rows, n))


@lru_cache(maxsize=2)  # all outputs of a task have the same
def _ones(n: int) -> Array:
    return np.ones(n)


@lru_cache(maxsize=2)
def _counted(n: int) -> Array:
    return np.arange(n + 1, dtype=np.int32)
