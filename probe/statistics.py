"""Intervals that resample subjects, not images: images of one patient are not independent."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.metrics import Metric, evaluate

LEVEL = 0.95


def bootstrap_weights(
    subject: NDArray[Any], n: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return how often each image is drawn in n bootstrap resamples of the subjects, (n, N)."""
    _, member = np.unique(subject, return_inverse=True)
    subjects = int(member.max()) + 1
    counts = rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=n)  # (n, S)
    return counts[:, member].astype(np.float64)


def interval(
    metric: Metric, y: NDArray[Any], p: NDArray[Any], weights: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the percentile bootstrap's 95 % interval of a metric.

    Efron & Tibshirani 1993, section 13.3. Resamples in which the metric is not defined (no
    positive image drawn) are left out.
    """
    scores = evaluate(metric, y, p, weights)
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return float("nan"), float("nan")
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
