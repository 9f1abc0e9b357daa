"""Do probabilities mean what they say? Reliability bins and the expected calibration error.

Shapes: N images, K classes, L findings, B weightings. Of classes, the confidence is the largest
probability, and it is right where that class is the label (Guo et al. 2017, On Calibration of
Modern Neural Networks). Of a finding, it is the finding's probability. Bins are of equal width; a
value on an edge is in the lower bin, as in scikit-learn's calibration_curve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from probe.score.ranking import sums_by, totals

Array: TypeAlias = Any
BINS = 15


def confidence_of(y: Array, p: Array) -> tuple[Array, Array]:
    """Return of classes how sure (N,), and whether it was right (N,), 1 or 0."""
    predicted = p.argmax(1)
    return p[np.arange(len(y)), predicted], (predicted == y).astype(float)


def _bin(confidence: Array) -> Array:
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)


def expected_error(right: Array, confidence: Array) -> Callable[[Array], Array]:
    """Return a function of weights (B, N): the mean over bins of |confidence - frequency|, (B,).

    right (N,) is 1, 0, or NaN for not known; NaN where nothing is known.
    """
    known = ~np.isnan(right)
    # ECE = sum_b |B_b| / n |acc(B_b) - conf(B_b)| = sum_b |sum_{i in b} (conf_i - right_i)| / n
    # (Guo et al. 2017): one sum per bin, linear in the weights.
    off = np.where(known, confidence - right, 0)
    gap, counted = sums_by(_bin(confidence), BINS, off), totals(known.astype(float)[:, None])

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return abs(gap(weights)).sum(1) / counted(weights)[:, 0]

    return scorer


def reliability(y: Array, p: Array) -> list[dict[str, float]]:
    """Return per bin that holds any: low, high, images, mean confidence and frequency of right.

    y (N,) class index and p (N, K); or (N, L) of 1, 0 and NaN each, all findings together.
    """
    confidence, right = (p.ravel(), y.ravel()) if y.ndim == 2 else confidence_of(y, p)
    confidence, right = confidence[~np.isnan(right)], right[~np.isnan(right)]
    bin_of = _bin(confidence)
    images, sure, hits = (
        np.bincount(bin_of, weights, BINS) for weights in (None, confidence, right)
    )
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "images": int(images[k]),
            "confidence": float(sure[k] / images[k]),
            "frequency": float(hits[k] / images[k]),
        }
        for k in np.flatnonzero(images).tolist()
    ]
