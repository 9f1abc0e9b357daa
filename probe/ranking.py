"""Scores of a ranking under many weightings at once: AUROC, average precision, sensitivity.

Shapes: N images, B weightings. truth is (N,) of 1, 0 and NaN (not scored), score (N,), weights
(B, N). Each function sorts once and returns a function of weights.

Images are gathered into steps of equal score, highest first. Steps of negatives only that follow
each other act as one, so a rare finding has few steps; adding up a step's weights is then one
sparse product for all weightings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from scipy.sparse import csr_matrix

Array: TypeAlias = Any
Scorer: TypeAlias = Callable[[Array], Array]


def auroc(truth: Array, score: Array) -> Scorer:
    """Area under the ROC curve; ties count half. NaN where one side has no weight."""
    steps = steps_of(truth, score, merge_positive=True)

    def scorer(weights: Array) -> Array:
        positive, negative = steps(weights)  # (T, B)
        above = positive.cumsum(0) - positive / 2
        with np.errstate(invalid="ignore"):
            area = np.einsum("tb,tb->b", above, negative)
            return area / (positive.sum(0) * negative.sum(0))

    return scorer


def average_precision(truth: Array, score: Array) -> Scorer:
    """Sum of precision times the step in recall. NaN where no positive has weight."""
    steps = steps_of(truth, score)

    def scorer(weights: Array) -> Array:
        positive, negative = steps(weights)
        hits, called = positive.cumsum(0), (positive + negative).cumsum(0)
        np.maximum(called, np.finfo(float).tiny, out=called)  # nothing called: no hit either
        with np.errstate(invalid="ignore"):
            return np.einsum("tb,tb,tb->b", hits, 1 / called, positive) / positive.sum(0)

    return scorer


def sensitivity_at(truth: Array, score: Array, *, specificity: float) -> Scorer:
    """Largest sensitivity of any threshold with at least this specificity.

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
        there = (positive.sum(0) > 0) & (negative.sum(0) > 0)
        return np.where(there, best, np.nan)

    return scorer


def totals(columns: Array) -> Scorer:
    """Return a function of weights (B, N): the weighted sums of columns (N, C), mostly 0, (B, C).

    A sparse product, not a matrix product: it runs in the caller's thread, and is as fast.
    """
    matrix = csr_matrix(np.atleast_2d(columns.T))
    return lambda weights: (matrix @ weights.T).T


def steps_of(
    truth: Array, score: Array, *, merge_positive: bool = False
) -> Callable[[Array], tuple[Array, Array]]:
    """Return a function of weights (B, N): positive and negative weight per step, two (T, B).

    `merge_positive` also joins steps of positives only, for what depends on them just by their sum.
    """
    rows = np.flatnonzero(~np.isnan(truth))
    rows = rows[np.argsort(-score[rows], kind="stable")]
    positive, ordered = truth[rows] == 1, score[rows]
    if not len(rows):
        empty = np.zeros((0, 1))
        return lambda weights: (empty.repeat(len(weights), 1), empty.repeat(len(weights), 1))
    tie = np.cumsum(np.r_[0, np.diff(ordered) != 0])
    share = np.bincount(tie, positive) / np.bincount(tie)  # of positives, per distinct score
    joins = (share[1:] == 0) & (share[:-1] == 0)
    if merge_positive:
        joins |= (share[1:] == 1) & (share[:-1] == 1)
    step = np.cumsum(np.r_[0, ~joins])[tie]
    shape = (int(step[-1]) + 1, len(truth))
    matrices = [
        csr_matrix((np.ones(part.sum()), (step[part], rows[part])), shape=shape)
        for part in (positive, ~positive)
    ]
    return lambda weights: (matrices[0] @ weights.T, matrices[1] @ weights.T)
