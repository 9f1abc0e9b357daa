"""AUROCs of independent images and their covariance, without resampling (DeLong et al. 1988).

Shapes: N images, m positive and n negative, M models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from probe.score.resampling import LEVEL

ENOUGH = 10  # images of each class, from which the test keeps its size (bench_statistics.py)


def delong(
    truth: NDArray[Any], scores: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return AUROCs (M,) of M models and their covariance (M, M); scores (M, N), truth (N,) 1, 0.

    By the ranks of Sun & Xu 2014. Images count as independent. The covariance is NaN where a class
    has one image only.
    """
    from scipy.stats import rankdata

    positive, negative = scores[:, truth == 1], scores[:, truth == 0]
    m, n = positive.shape[1], negative.shape[1]
    # Rank in all less rank in one's own class counts the other class's scores below, ties by half.
    whole = rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    above = (whole[:, :m] - rankdata(positive, axis=1)) / n  # V10 (M, m), whose mean is the AUROC
    below = 1 - (whole[:, m:] - rankdata(negative, axis=1)) / m
    if min(m, n) < 2:
        return above.mean(1), np.full((len(scores), len(scores)), np.nan)
    # S = S10 / m + S01 / n, the covariances of V10 over positives and V01 over negatives.
    covariance = np.atleast_2d(np.cov(above)) / m + np.atleast_2d(np.cov(below)) / n
    return above.mean(1), covariance


def delong_difference(
    truth: NDArray[Any], a: NDArray[Any], b: NDArray[Any]
) -> tuple[float, float, float, float] | None:
    """Return AUROC(a) - AUROC(b), the ends of its interval, and its two-sided p; truth, a, b (N,).

    None where that can't be told: fewer than ENOUGH images of a class, or a variance of zero.
    """
    if min((truth == 1).sum(), (truth == 0).sum()) < ENOUGH:
        return None
    # L = (1, -1): var(A - B) = L S L', and (A - B) / sd is about normal.
    areas, covariance = delong(truth, np.stack([a, b]))
    value = float(areas[0] - areas[1])
    variance = float(np.array([1, -1]) @ covariance @ np.array([1, -1]))
    if not variance > 1e-15:  # what rounding leaves of none
        return None
    error = float(np.sqrt(variance))
    reach = float(norm.ppf((1 + LEVEL) / 2)) * error
    return value, value - reach, value + reach, float(2 * norm.sf(abs(value) / error))
