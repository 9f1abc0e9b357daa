"""Scores of the predicted class, the most probable one: accuracy, F1, kappas, Matthews.

Shapes: N images, K classes, B weightings. Each function takes y (N,), class indices, and p (N, K),
and returns a function of weights (B, N). No table of K x K is made: each score is made of what is
correct, actual and predicted per class, sums that are linear in N and K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from probe.score.ranking import sums_by, totals

Array: TypeAlias = Any
Scorer: TypeAlias = Callable[[Array], Array]


def accuracy(y: Array, p: Array) -> Scorer:
    """Share of correct predictions, of y (N,) and p (N, K): a Scorer (B, N) -> (B,)."""
    right = totals((p.argmax(1) == y).astype(float)[:, None])

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return right(weights)[:, 0] / weights.sum(1)

    return scorer


def balanced_accuracy(y: Array, p: Array) -> Scorer:
    """Mean recall over the classes that occur, of y (N,) and p (N, K)."""
    return _per_class(y, p, lambda correct, actual, predicted: mean_defined(correct / actual))


def f1_macro(y: Array, p: Array) -> Scorer:
    """Mean F1 over the classes that are actual or predicted, of y (N,) and p (N, K)."""
    return _per_class(y, p, lambda *sums: mean_defined(_f1(*sums)))


def f1(y: Array, p: Array) -> Scorer:
    """F1 of two classes' second, of y (N,) and p (N, K); of more classes the mean."""
    if p.shape[1] > 2:
        return f1_macro(y, p)
    return _per_class(y, p, lambda *sums: _f1(*sums)[:, 1])


def kappa(y: Array, p: Array) -> Scorer:
    """Agreement beyond chance (Cohen 1960), of y (N,) and p (N, K).

    kappa = 1 - (share missed) / (share missed by chance, as labels and predictions are
    distributed). NaN where a single class is actual and predicted.
    """

    def score(correct: Array, actual: Array, predicted: Array) -> Array:
        # p_o = sum_k correct_k / n, p_e = sum_k actual_k predicted_k / n^2,
        # kappa = (p_o - p_e) / (1 - p_e) = 1 - (n - n p_o) / (n - n p_e).
        n = actual.sum(1)
        by_chance = np.einsum("bk,bk->b", actual, predicted) / n
        value = 1 - (n - correct.sum(1)) / (n - by_chance)
        return np.where(_alike(actual, predicted), np.nan, value)

    return _per_class(y, p, score)


def matthews(y: Array, p: Array) -> Scorer:
    """Correlation of labels and predictions (Gorodkin 2004, equation 8), of y (N,) and p (N, K).

    cov(y, p) / sqrt(cov(y, y) cov(p, p)) of label y and prediction p, each summed over classes. 0
    where either is all of one class.
    """

    def score(correct: Array, actual: Array, predicted: Array) -> Array:
        n = actual.sum(1)
        # n^2 cov(label, prediction), from one-hot labels and predictions summed over classes.
        both = n * correct.sum(1) - np.einsum("bk,bk->b", actual, predicted)
        spread = [n**2 - np.einsum("bk,bk->b", one, one) for one in (actual, predicted)]
        constant = _alike(actual, actual) | _alike(predicted, predicted)
        return np.where(constant & (n > 0), 0, both / np.sqrt(spread[0] * spread[1]))

    return _per_class(y, p, score)


def quadratic_kappa(y: Array, p: Array) -> Scorer:
    """Weighted kappa (Cohen 1968) with squared distances of class indices; y (N,), p (N, K).

    1 - E[(y - p)^2] / E_chance[(y - p)^2] of label y and prediction p; by chance the two are
    independent: the denominator is var(y) + var(p) + (mean y - mean p)^2. NaN where kappa is.
    """
    predicted = p.argmax(1)
    missed = totals(((y - predicted).astype(float) ** 2)[:, None])
    sums = [sums_by(which, p.shape[1]) for which in (y, predicted)]

    def scorer(weights: Array) -> Array:
        actual, predicted = (add(weights) for add in sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            (mean, spread), (other, around) = _moments(actual), _moments(predicted)
            # E (y - p)^2 of independent y and p = var y + var p + (mean y - mean p)^2
            by_chance = spread + around + (mean - other) ** 2
            value = 1 - missed(weights)[:, 0] / actual.sum(1) / by_chance
        return np.where(_alike(actual, predicted), np.nan, value)

    return scorer


def mean_defined(columns: Array) -> Array:
    """Return the mean over axis 1 of columns (B, K) but NaN, (B,); NaN where nothing is left."""
    defined = ~np.isnan(columns)
    with np.errstate(invalid="ignore"):
        return np.where(defined, columns, 0).sum(1) / defined.sum(1)


def _per_class(y: Array, p: Array, score: Callable[[Array, Array, Array], Array]) -> Scorer:
    """Return the score of what is correct, actual and predicted per class, (B, K) each."""
    predicted, K = p.argmax(1), p.shape[1]
    correct_sums = sums_by(y, K, (predicted == y).astype(float))
    actual_sums, predicted_sums = sums_by(y, K), sums_by(predicted, K)

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return score(correct_sums(weights), actual_sums(weights), predicted_sums(weights))

    return scorer


def _f1(correct: Array, actual: Array, predicted: Array) -> Array:
    return 2 * correct / (actual + predicted)


def _moments(sums: Array) -> tuple[Array, Array]:
    """Return mean and variance of the class index, (B,) each, of weights per class (B, K)."""
    index, n = np.arange(sums.shape[1]), sums.sum(1)
    mean = sums @ index / n
    return mean, np.einsum("bk,bk->b", sums, (index - mean[:, None]) ** 2) / n


def _alike(a: Array, b: Array) -> Array:
    """Say where all weight of a and of b (B, K) is on one class, the same: exact, not rounded."""
    one = a.argmax(1)
    rows = np.arange(len(a))
    return (
        ((a != 0).sum(1) <= 1) & ((b != 0).sum(1) <= 1) & (b.argmax(1) == one) & (a[rows, one] > 0)
    )
