"""Resample subjects, by weights: images of one patient are not independent.

A resample is a weight per image, that of its subject; nothing is copied, and every score is taken
on the same resamples. Shapes: N images, S subjects, B resamples, A anchors.

Anchors are made-up images of little weight, as many right as wrong ones: the prior of a Bayesian
bootstrap (Rubin 1981, The Bayesian bootstrap). Of a proportion they make about Jeffreys' interval
(Brown, Cai & DasGupta 2001), so that answers without an error have an interval with a width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from probe.score.metrics import Metric

LEVEL = 0.95
BLOCK = 1 << 20  # images x resamples that one thread scores at once: 8 MB, which a cache holds
MAX_GROUPS = 2000  # groups of subjects at most whose influence is measured one by one
# The anchors' weights together. Where decisions are scored, in subjects; where order is, in images,
# times the root of how many a subject has: an image ranked below all others is much further off
# than one that is called wrongly. Chosen by simulation (benchmarks/bench_statistics.py).
DECIDED, RANKED = 0.6, 0.15
FLAWLESS = 2.0  # where every decision is right: Clopper and Pearson's lower end, as Laplace's prior
HUGE = 1 << 27  # scores of a test set that is not copied for anchors, which hardly move so many
MANY = 200  # subjects of a class with which no correction for few is worth its time

Array: TypeAlias = NDArray[np.float64]
Scorer: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]
DrawWeights: TypeAlias = Callable[[NDArray[Any], int, np.random.Generator], Array]


def bootstrap_weights(subject: NDArray[Any], n: int, rng: np.random.Generator) -> Array:
    """Return how often each image is drawn in n bootstrap resamples of the subjects, (n, N).

    subject (N,) names the subject of each image.
    """
    names, member = np.unique(subject, return_inverse=True)
    S = len(names)
    counts = np.empty((n, S))
    for row in counts:
        row[:] = np.bincount(rng.integers(0, S, S), minlength=S)
    # In memory the resamples of an image lie side by side, as the metrics run through them.
    return np.ascontiguousarray(counts.T)[member].T


def bayesian_weights(subject: NDArray[Any], n: int, rng: np.random.Generator) -> Array:
    """Return weights of the Bayesian bootstrap of the subjects, exponential with mean 1, (n, N).

    No subject and so no class is ever lost.
    """
    names, member = np.unique(subject, return_inverse=True)
    return rng.standard_exponential((len(names), n))[member].T


def in_blocks(
    score: Callable[[int, np.random.Generator], Array],
    N: int,
    *,
    n: int,
    rng: np.random.Generator,
) -> Array:
    """Return score(size, rng) of n resamples in all, (n, ...), in blocks of few by all cores.

    N images: a block has BLOCK weights. Scores depend on rng only, not on the number of threads.
    """
    step = max(1, BLOCK // N)
    sizes = [min(step, n - start) for start in range(0, n, step)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return np.concatenate(list(pool.map(score, sizes, rng.spawn(len(sizes)))))


def bootstrap(
    metrics: Sequence[Metric],
    y: NDArray[Any],
    p: NDArray[Any],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
    draw: DrawWeights = bootstrap_weights,
) -> dict[str, Array]:
    """Return every metric's scores on the same n resamples of the subjects, name -> (n,).

    y (N,) or (N, L), p (N, K) or (N, L), subject (N,).
    """
    scorers = {metric.name: metric.make(y, p) for metric in metrics}

    def score(size: int, own: np.random.Generator) -> Array:
        weights = draw(subject, size, own)
        return np.stack([scorer(weights) for scorer in scorers.values()], axis=1)

    scores = in_blocks(score, len(y), n=n, rng=rng)
    return dict(zip(scorers, scores.T, strict=True))


# --- the Bayesian bootstrap with anchors ---------------------------------------------------------


@dataclass(frozen=True)
class Anchored:
    """A scorer over the N images and its A anchors, whose weights are `prior` (A,) on average."""

    scorer: Scorer  # weights (B, N + A) -> (B,)
    prior: Array

    def value(self, weights: NDArray[Any] | None = None, n: int = 0) -> Array:
        """Return the scores of weightings (B, N), or of n images alike; anchors at their mean."""
        weights = np.ones((1, n)) if weights is None else weights
        fixed = np.broadcast_to(self.prior, (len(weights), len(self.prior)))
        return self.scorer(np.concatenate([weights, fixed], axis=1))


def anchored(
    metric: Metric,
    y: NDArray[Any],
    p: NDArray[Any],
    subject: NDArray[Any],
    *,
    turned: bool = False,
    decided: float = DECIDED,
) -> Anchored:
    """Return a metric's scorer with anchors: for each class one image all right and one all wrong.

    y (N,) or (N, L), p (N, K) or (N, L), subject (N,). `turned` has them the other way round, for
    the second of two models whose difference is taken. A loss, which is about probabilities, has
    none: no image is as wrong as can be.
    """
    if not metric.higher or p.size > HUGE:
        return Anchored(metric.make(y, p), np.zeros(0))
    if metric.ranking:
        p = midranks(p)
    labels, right, wrong = _anchors(y, p, ranking=metric.ranking)
    if turned:
        right, wrong = wrong, right
    each = len(y) / len(np.unique(subject))
    share = RANKED * np.sqrt(each) if metric.ranking else decided * each
    # Each finding is ranked or decided by itself, and has anchors of its own; classes share them.
    A = 2 * len(labels) if y.ndim == 1 else 4
    scorer = metric.make(np.concatenate([y, labels, labels]), np.concatenate([p, right, wrong]))
    return Anchored(scorer, np.full(2 * len(labels), share / max(1, A)))


def _anchors(
    y: NDArray[Any], p: NDArray[Any], *, ranking: bool
) -> tuple[NDArray[Any], Array, Array]:
    """Return labels of anchors, and for each what is all right and what is all wrong to say.

    Of classes, one anchor for each that is there; of findings, one with and one without each that
    the test set has both of, not known of the others. Answers (N,) are right or wrong calls.
    """
    if y.ndim == 2:
        both = np.flatnonzero((y == 1).any(0) & (y == 0).any(0))
        labels = np.full((2 * len(both), y.shape[1]), np.nan)
        labels[np.arange(len(labels)), np.tile(both, 2)] = np.repeat([1.0, 0.0], len(both))
        is_right = labels == 1
    else:
        labels = np.unique(y)
        if p.ndim == 1:
            return labels, labels.astype(float), 1 - labels
        is_right = labels[:, None] == np.arange(p.shape[1])
    if ranking:
        high, low = len(p) + 1.0, 0.0
        return labels, np.where(is_right, high, low), np.where(is_right, low, high)
    if y.ndim == 2:
        return labels, is_right.astype(float), 1.0 - is_right
    K = p.shape[1]
    furthest = np.where(labels < K - 1 - labels, K - 1, 0)  # of ordered classes too
    return labels, is_right.astype(float), np.eye(K)[furthest]


def midranks(p: NDArray[Any]) -> Array:
    """Return the ranks of each column of p (N, K), 1 to N, ties in their middle."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(p, axis=0), dtype=np.float64)


def bayesian(
    scorers: Sequence[Anchored],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
) -> Array:
    """Return each scorer's scores in the same n draws of the Bayesian bootstrap, (n, scorers).

    subject (N,). Anchors' weights are gamma with their prior as shape; scorers with as many anchors
    share them.
    """

    def score(size: int, own: np.random.Generator) -> Array:
        weights = bayesian_weights(subject, size, own)
        given: dict[tuple[float, ...], Array] = {}
        out = []
        for one in scorers:
            key = tuple(one.prior.tolist())
            if key not in given:
                drawn = own.standard_gamma(one.prior[:, None], (len(one.prior), size))
                given[key] = np.concatenate([weights.T, drawn]).T
            out.append(one.scorer(given[key]))
        return np.stack(out, axis=1)

    return in_blocks(score, len(subject), n=n, rng=rng)
