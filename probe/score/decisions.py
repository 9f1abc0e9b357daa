"""Is acting on the model worth it? Net benefit at every threshold of probability: decision curves.

Who acts where p >= t holds a missed positive for (1 - t) / t times as bad as a needless action. In
those terms the model's net benefit is TP / N - FP / N * t / (1 - t); that of acting on everybody
has all images called, and that of acting on nobody is 0 (Vickers & Elkin 2006, Decision Curve
Analysis). It is about probabilities, so it punishes bad calibration.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.01, 0.99, 99)


def net_benefit(
    truth: NDArray[Any], p: NDArray[Any], thresholds: NDArray[np.float64] = THRESHOLDS
) -> NDArray[np.float64]:
    """Return the net benefit at each threshold (T,), of p (N,) and truth (N,) of 1, 0 or NaN."""
    known = ~np.isnan(truth)
    t, p = truth[known] == 1, p[known]
    called = p[:, None] >= thresholds  # (N, T)
    hits, false = called[t].sum(0), called[~t].sum(0)
    return np.asarray((hits - false * thresholds / (1 - thresholds)) / len(t))
