"""Scores of the class that is called, the most probable one: accuracy, F1, kappas, Matthews.

Shapes: N images, K classes, B weightings. Each function takes y (N,), class indices, and p (N, K),
and returns a function of weights (B, N). No table of K x K is made: each score is made of what is
right, labelled and called per class, sums that are linear in N and K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from probe.score.ranking import sums_by, totals

Array: TypeAlias = Any
Scorer: TypeAlias = Callable[[Array], Array]


def accuracy(y: Array, p: Array) -> Scorer:
    """Share of images that is called right, of y (N,) and p (N, K): a Scorer (B, N) -> (B,)."""
    right = totals((p.argmax(1) == y).astype(float)[:, None])

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return right(weights)[:, 0] / weights.sum(1)

    return scorer


def balanced_accuracy(y: Array, p: Array) -> Scorer:
    """Mean over the classes that are there of the share called right (recall); y (N,), p (N, K)."""
    return _per_class(y, p, lambda right, there, called: mean_defined(right / there))


def f1_macro(y: Array, p: Array) -> Scorer:
    """Mean F1 over classes, of y (N,) and p (N, K); one neither there nor called is left out."""
    return _per_class(y, p, lambda right, there, called: mean_defined(_f1(right, there, called)))


def f1(y: Array, p: Array) -> Scorer:
    """F1 of two classes' second, of y (N,) and p (N, K); of more classes the mean."""
    if p.shape[1] > 2:
        return f1_macro(y, p)
    return _per_class(y, p, lambda right, there, called: _f1(right, there, called)[:, 1])


def kappa(y: Array, p: Array) -> Scorer:
    """Agreement beyond chance (Cohen 1960), of y (N,) and p (N, K).

    kappa = 1 - (share missed) / (share missed by chance, as labels and calls are distributed). NaN
    where one class only is there and called.
    """

    def score(right: Array, there: Array, called: Array) -> Array:
        n = there.sum(1)
        by_chance = np.einsum("bk,bk->b", there, called) / n
        found = 1 - (n - right.sum(1)) / (n - by_chance)
        return np.where(_alike(there, called), np.nan, found)

    return _per_class(y, p, score)


def matthews(y: Array, p: Array) -> Scorer:
    """Correlation of labels and calls (Gorodkin 2004, equation 8), of y (N,) and p (N, K).

    cov(label, call) / sqrt(cov(label, label) cov(call, call)), each summed over classes. 0 where
    either is all of one class.
    """

    def score(right: Array, there: Array, called: Array) -> Array:
        n = there.sum(1)
        both = n * right.sum(1) - np.einsum("bk,bk->b", there, called)
        spread = [n**2 - np.einsum("bk,bk->b", one, one) for one in (there, called)]
        constant = _alike(there, there) | _alike(called, called)
        return np.where(constant & (n > 0), 0, both / np.sqrt(spread[0] * spread[1]))

    return _per_class(y, p, score)


def quadratic_kappa(y: Array, p: Array) -> Scorer:
    """Weighted kappa (Cohen 1968) with squared distances of class indices; y (N,), p (N, K).

    1 - E[(label - call)^2] / E_chance[(label - call)^2]; by chance the two are independent, so that
    the denominator is var(label) + var(call) + (mean label - mean call)^2. NaN where kappa is.
    """
    called = p.argmax(1)
    missed = totals(((y - called).astype(float) ** 2)[:, None])
    sums = [sums_by(which, p.shape[1]) for which in (y, called)]

    def scorer(weights: Array) -> Array:
        there, said = (add(weights) for add in sums)
        with np.errstate(invalid="ignore", divide="ignore"):
            (mean, spread), (other, around) = _moments(there), _moments(said)
            by_chance = spread + around + (mean - other) ** 2
            found = 1 - missed(weights)[:, 0] / there.sum(1) / by_chance
        return np.where(_alike(there, said), np.nan, found)

    return scorer


def mean_defined(columns: Array) -> Array:
    """Return the mean over axis 1 of columns (B, K) but NaN, (B,); NaN where nothing is left."""
    there = ~np.isnan(columns)
    with np.errstate(invalid="ignore"):
        return np.where(there, columns, 0).sum(1) / there.sum(1)


def _per_class(y: Array, p: Array, score: Callable[[Array, Array, Array], Array]) -> Scorer:
    """Return the score of what is right, there and called per class, (B, K) each."""
    called, K = p.argmax(1), p.shape[1]
    right = sums_by(y, K, (called == y).astype(float))
    there, said = sums_by(y, K), sums_by(called, K)

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            return score(right(weights), there(weights), said(weights))

    return scorer


def _f1(right: Array, there: Array, called: Array) -> Array:
    return 2 * right / (there + called)


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
