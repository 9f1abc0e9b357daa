"""Prediction sets that hold the label with a wanted frequency: split conformal prediction.

A set holds the classes whose probability is at least a threshold. The threshold is such that sets
of images that were held out hold their label as often as is wanted (Vovk et al. 2005), and the sets
are the smallest ones on average (Sadinle, Lei & Wasserman 2019, Least Ambiguous Set-Valued
Classifiers). Held out is what folds left out, each scored by a head without it, as in
cross-conformal prediction (Vovk 2015).

Images of a subject are not exchangeable with others', subjects are: each subject counts once, its
images sharing its weight (Dunn, Wasserman & Ramdas 2022). Shapes: N images, K classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def threshold(
    p: NDArray[np.float64], y: NDArray[Any], subject: NDArray[Any], *, level: float
) -> float:
    """Return the probability from which a class is in a set; 0 where too few are held out.

    p (N, K), y (N,) and subject (N,) of held-out images; level is the wanted frequency. With S
    subjects it is the floor((S + 1)(1 - level)) / S quantile of the label's probability.
    """
    names, member, count = np.unique(subject, return_inverse=True, return_counts=True)
    S = len(names)
    own = p[np.arange(len(y)), y]
    order = np.argsort(own, kind="stable")
    # How many subjects are below each score, an image being a share of its subject.
    below = np.cumsum((1 / count[member])[order])
    allowed = np.floor((S + 1) * (1 - level) + 1e-9)  # subjects that may be missed
    if allowed < 1:
        return 0.0
    return float(own[order][np.searchsorted(below, allowed - 1e-9)])


def sets(p: NDArray[np.float64], threshold: float | NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which classes are in each image's set, (N, K); threshold is one, or (N,)."""
    return np.asarray(p >= np.reshape(threshold, (-1, 1)))
