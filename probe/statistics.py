"""Intervals and comparisons that resample subjects: images of one patient are not independent.

A resample is a weight per image, how often its subject was drawn; nothing is copied, and every
metric is scored on the same resamples. Shapes: N images, S subjects, B resamples, M models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from probe.metrics import Metric, evaluate

LEVEL = 0.95
METHODS = ("percentile", "bca")
BLOCK = 1 << 20  # images x resamples that one thread scores at once: 8 MB, which a cache holds
JACKKNIFE = 2000  # groups of subjects at most that BCa leaves out one at a time


def bootstrap_weights(
    subject: NDArray[Any], n: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return how often each image is drawn in n bootstrap resamples of the subjects, (n, N)."""
    names, member = np.unique(subject, return_inverse=True)
    S = len(names)
    counts = np.empty((n, S))
    for row in counts:
        row[:] = np.bincount(rng.integers(0, S, S), minlength=S)
    # In memory the resamples of an image lie side by side, as the metrics run through them.
    return np.ascontiguousarray(counts.T)[member].T


def bootstrap(
    metrics: Sequence[Metric],
    y: NDArray[Any],
    p: NDArray[Any],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
) -> dict[str, NDArray[np.float64]]:
    """Return every metric's scores on the same n resamples of the subjects, name -> (n,).

    They depend on rng only, not on the number of threads.
    """
    scorers = {metric.name: metric.make(y, p) for metric in metrics}
    step = max(1, BLOCK // len(y))
    sizes = [min(step, n - start) for start in range(0, n, step)]

    def score(size: int, own: np.random.Generator) -> list[NDArray[np.float64]]:
        weights = bootstrap_weights(subject, size, own)
        return [scorer(weights) for scorer in scorers.values()]

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        blocks = list(pool.map(score, sizes, rng.spawn(len(sizes))))
    return {name: np.concatenate([b[i] for b in blocks]) for i, name in enumerate(scorers)}


def intervals(
    metrics: Sequence[Metric],
    y: NDArray[Any],
    p: NDArray[Any],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
    method: str = "percentile",
) -> dict[str, dict[str, float | None]]:
    """Return {"value", "ci_low", "ci_high"} of every metric; None where it isn't defined.

    The 95 % interval is the percentile bootstrap's, or BCa's (Efron & Tibshirani 1993, sections
    13.3 and 14.3). Resamples in which a metric is not defined are left out.
    """
    resampled = bootstrap(metrics, y, p, subject, n=n, rng=rng)
    out = {}
    for metric in metrics:
        value = float(evaluate(metric, y, p)[0])
        scores = resampled[metric.name][np.isfinite(resampled[metric.name])]
        low, high = float("nan"), float("nan")
        if len(scores) and np.isfinite(value):
            ends = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            if method == "bca":
                ends = _bca(ends, scores, value, _jackknife(metric, y, p, subject))
            low, high = (float(v) for v in np.quantile(scores, ends))
        three = {"value": value, "ci_low": low, "ci_high": high}
        out[metric.name] = {k: v if np.isfinite(v) else None for k, v in three.items()}
    return out


def _jackknife(
    metric: Metric, y: NDArray[Any], p: NDArray[Any], subject: NDArray[Any]
) -> NDArray[np.float64]:
    """Return the metric without each subject (or each of JACKKNIFE groups of them) in turn."""
    names, member = np.unique(subject, return_inverse=True)
    group = (np.arange(len(names)) % JACKKNIFE)[member]
    groups = int(group.max()) + 1
    step = max(1, BLOCK // len(y))
    parts = []
    for start in range(0, groups, step):
        left_out = np.arange(start, min(start + step, groups))
        parts.append(evaluate(metric, y, p, (group != left_out[:, None]).astype(float)))
    scores = np.concatenate(parts)
    return np.asarray(scores[np.isfinite(scores)])


def _bca(
    ends: NDArray[np.float64],
    scores: NDArray[np.float64],
    value: float,
    without: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the quantiles that BCa takes for `ends`: corrected for bias and acceleration."""
    below = ((scores < value).mean() + (scores <= value).mean()) / 2
    spread = without.mean() - without
    scale = 6 * ((spread**2).sum()) ** 1.5
    if not 0 < below < 1 or scale == 0:
        return ends  # every resample on one side, or nothing varies: nothing to correct by
    bias, acceleration = norm.ppf(below), (spread**3).sum() / scale
    z = bias + norm.ppf(ends)
    return np.asarray(norm.cdf(bias + z / (1 - acceleration * z)))


@dataclass(frozen=True)
class Difference:
    """How much better (in the metric's own direction of numbers) model A is than B, and p."""

    value: float
    ci_low: float
    ci_high: float
    p: float
    test: str


def compare(
    metric: Metric,
    y: NDArray[Any],
    a: NDArray[Any],
    b: NDArray[Any],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
) -> Difference:
    """Return score(a) - score(b) on the same test images.

    The interval is the paired percentile bootstrap's, by subject. p is of a permutation test that
    exchanges the two models' predictions subject by subject (two-sided, Phipson & Smyth 2010).
    """
    value = float(evaluate(metric, y, a)[0] - evaluate(metric, y, b)[0])
    here, there = metric.make(y, a), metric.make(y, b)
    both = metric.make(np.concatenate([y, y]), np.concatenate([a, b]))
    names, member = np.unique(subject, return_inverse=True)
    step = max(1, BLOCK // len(y))
    resampled, permuted = [], []
    for start in range(0, n, step):
        size = min(step, n - start)
        weights = bootstrap_weights(subject, size, rng)
        resampled.append(here(weights) - there(weights))
        swap = rng.integers(0, 2, (size, len(names))).astype(float)[:, member]
        first = np.concatenate([1 - swap, swap], axis=1)
        permuted.append(both(first) - both(1 - first))
    scores = np.concatenate(resampled)
    low, high = np.quantile(scores[np.isfinite(scores)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    as_large = np.abs(np.concatenate(permuted)) >= abs(value) - 1e-12
    p = (int(as_large.sum()) + 1) / (n + 1)
    return Difference(value, float(low), float(high), p, "permutation by subject")


def delong(
    truth: NDArray[Any], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return AUROCs (M,) of M models and their covariance (M, M); scores (M, N), truth (N,) 1, 0.

    DeLong et al. 1988 by the ranks of Sun & Xu 2014. Images count as independent.
    """
    from scipy.stats import rankdata

    positive, negative = scores[:, truth == 1], scores[:, truth == 0]
    m, n = positive.shape[1], negative.shape[1]
    whole = rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    above = (whole[:, :m] - rankdata(positive, axis=1)) / n  # (M, m) negatives below, ties half
    below = 1 - (whole[:, m:] - rankdata(negative, axis=1)) / m
    covariance = np.atleast_2d(np.cov(above)) / m + np.atleast_2d(np.cov(below)) / n
    return above.mean(1), covariance


def delong_test(truth: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> Difference:
    """Return AUROC(a) - AUROC(b) with DeLong's interval and two-sided p."""
    areas, covariance = delong(truth, np.stack([a, b]))
    value = float(areas[0] - areas[1])
    error = float(np.sqrt(max(0.0, np.array([1, -1]) @ covariance @ np.array([1, -1]))))
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    p = float(2 * norm.sf(abs(value) / error)) if error else 1.0
    return Difference(value, value - reach, value + reach, p, "DeLong")
