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
from scipy.special import expit

from probe.score.ranking import sums_by, totals

Array: TypeAlias = Any
BINS = 15
STEPS, NEAR = 60, 1e-6  # Newton steps; the last one of a line that is found


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


def slope_of(truth: Array, z: Array) -> Callable[[Array], Array]:
    """Return a function of weights (B, N): the calibration slope of log-odds z (N,), (B,).

    It is a of the logistic regression P(truth = 1) = expit(a z + b) (Cox 1958): 1 is calibrated,
    below 1 the probabilities are too extreme. truth (N,) is 1, 0 or NaN. NaN where z separates the
    two sides, so that no slope is steep enough.
    """
    return lambda weights: _line(truth, z, weights, slope=True)[0]


def intercept_of(truth: Array, z: Array) -> Callable[[Array], Array]:
    """Return a function of weights (B, N): calibration in the large of log-odds z (N,), (B,).

    It is b of P(truth = 1) = expit(z + b) (Van Calster et al. 2019): 0 is calibrated, below 0 the
    probabilities are too high on average. truth (N,) is 1, 0 or NaN.
    """
    return lambda weights: _line(truth, z, weights, slope=False)[1]


def _line(truth: Array, z: Array, weights: Array, *, slope: bool) -> tuple[Array, Array]:
    """Return a and b (B,) of each weighting (B, N) by Newton's method; a is 1 without `slope`.

    With it z is standardised for the steps, whose length is bounded, and they begin at 0: a slope
    of .01 or of 1000 is found like one of 1.
    """
    known = ~np.isnan(truth)
    t, x, w = truth[known], np.clip(z[known], -35, 35), weights[:, known]
    centre, spread = 0.0, 1.0
    if slope and len(x):
        centre, spread = x.mean(), x.std() or 1.0
    x = (x - centre) / spread
    a, b = np.full(len(w), 0.0 if slope else 1.0), np.zeros(len(w))
    for _ in range(STEPS):
        p = expit(a[:, None] * x + b[:, None])
        off, curved = w * (t - p), w * p * (1 - p)
        # Newton's equations of the log-likelihood: H (da, db) = gradient.
        ga, gb = off @ x, off.sum(1)
        aa, ab, bb = curved @ (x * x), curved @ x, curved.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if slope:
                scale = aa * bb - ab * ab
                da, db = (bb * ga - ab * gb) / scale, (aa * gb - ab * ga) / scale
            else:
                da, db = np.zeros_like(ga), gb / bb
        a, b = a + np.clip(da, -1, 1), b + np.clip(db, -3, 3)
        if not np.nanmax(np.abs([da, db]), initial=0) > 1e-10:
            break
    with np.errstate(invalid="ignore"):
        lost = ~((np.abs(da) < NEAR) & (np.abs(db) < NEAR))
    a[lost], b[lost] = np.nan, np.nan
    return a / spread, b - a * (centre / spread)


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
