"""Calibration in the large: as many positive as the probabilities say, or how many more.

Of an output (a finding, a class against the rest) with labels y (N,) of 1, 0 and log-odds z (N,):

    O / E = sum y / sum expit(z)                  observed over expected
    a:      sum (y - expit(z + a)) = 0            the calibration intercept, the slope held at 1

(Van Calster et al. 2019, Calibration: the Achilles heel of predictive analytics; Debray et al. 2017
for the scale of O / E.) Intervals take subjects as independent: of log O / E, and of a, by the sums
of each subject's share (the sandwich of Liang & Zeger 1986), with Student's quantile.
Shapes: N images, S subjects, K classes, L findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit, log_expit, softmax
from scipy.stats import t

from probe.score import log_odds
from probe.score.metrics import one_vs_rest
from probe.score.resampling import LEVEL

Array = NDArray[np.float64]
FAR = 60.0  # log-odds: an intercept that is further off has no counterpart in probabilities
GRADIENT = 1e-9  # of shares, where classes' intercepts are found


def in_the_large(
    y: NDArray[Any], z: Array, subject: NDArray[Any], classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return per output images, observed, expected, and ratio and intercept with 95 % intervals.

    y (N,) or (N, L), z (N, K) or (N, L), subject (N,). Of two classes the second is the output.
    Values are None where all images, or none, are positive.
    """
    names = classes if y.ndim == 2 or len(classes) > 2 else classes[1:]
    found = {}
    for name, (truth, score) in zip(names, one_vs_rest(y, z), strict=True):
        known = ~np.isnan(truth)
        found[name] = _of_output(truth[known], score[known], subject[known])
    return found


def _of_output(y: Array, z: Array, subject: NDArray[Any]) -> dict[str, Any]:
    names, member = np.unique(subject, return_inverse=True)
    p = expit(z)
    observed, expected = float(y.sum()), float(p.sum())
    said = {"images": len(y), "observed": observed, "expected": expected}
    ratio: dict[str, float | None] = dict.fromkeys(("value", "ci_low", "ci_high"))
    shift = dict(ratio)
    if expected > 0:
        ratio["value"] = observed / expected
    if observed > 0 and expected > 0:
        moves: Any = np.bincount(member, y / observed - p / expected, len(names))
        half = _half(moves)
        ends = {"ci_low": np.exp(-half), "ci_high": np.exp(half)} if half is not None else {}
        ratio |= {end: float(observed / expected * times) for end, times in ends.items()}
    a = intercept(y, z)
    if a is not None:
        q = expit(z + a)
        moves = np.bincount(member, y - q, len(names)) / (q * (1 - q)).sum()
        half = _half(moves)
        shift["value"] = a
        shift |= {} if half is None else {"ci_low": a - half, "ci_high": a + half}
    return said | {"ratio": ratio, "intercept": shift}


def _half(moves: Array) -> float | None:
    """Return half the 95 % interval of a sum of subjects' moves (S,); None of one subject."""
    S = len(moves)
    if S < 2:
        return None
    variance = float(np.square(moves).sum()) * S / (S - 1)
    return float(t.ppf((1 + LEVEL) / 2, S - 1) * np.sqrt(variance))


def intercept(y: Array, z: Array) -> float | None:
    """Return the a of which sum expit(z + a) = sum y; None where y (N,) is of one side only."""
    observed = float(y.sum())
    finite = z[np.isfinite(z)]
    if not 0 < observed < len(y) or not len(finite):
        return None
    low, high = -FAR - float(finite.max()), FAR - float(finite.min())

    def missing(a: float) -> float:
        return float(expit(z + a).sum() - observed)

    if missing(low) >= 0 or missing(high) <= 0:  # infinite log-odds leave nothing to shift
        return None
    return float(brentq(missing, low, high, xtol=1e-12, rtol=1e-14))


def recalibrated(y: NDArray[Any], z: Array) -> Array:
    """Return z, (N, K) or (N, L), shifted so that every output's mean probability is its frequency.

    y (N,) or (N, L). A finding is shifted by its own intercept, and stays where it has none. Of
    classes, an intercept is added to each logit (log p); one that no image is of is ruled out.
    """
    if y.ndim == 2:
        shifts = [intercept(*one) for one in _known(y, z)]
        return np.asarray(z + np.array([0.0 if a is None else a for a in shifts]))
    if z.shape[1] == 2:
        a = intercept((y == 1).astype(float), z[:, 1]) or 0.0
        return np.stack([-(z[:, 1] + a), z[:, 1] + a], axis=1)
    return _of_classes(y, z)


def _known(y: NDArray[Any], z: Array) -> list[tuple[Array, Array]]:
    return [(y[~np.isnan(y[:, k]), k], z[~np.isnan(y[:, k]), k]) for k in range(y.shape[1])]


def _of_classes(y: NDArray[Any], z: Array) -> Array:
    """Return the log-odds of classes whose intercepts maximise the likelihood of y (N,)."""
    import torch

    there = np.unique(y)
    logs = np.maximum(log_expit(z[:, there]), np.log(np.finfo(float).tiny))  # log p
    share = (y[:, None] == there).mean(0)

    def loss(b: Array) -> tuple[float, Array]:
        moved = logs + np.r_[0.0, b]
        top = moved.max(1, keepdims=True)
        value = float((np.log(np.exp(moved - top).sum(1)) + top[:, 0]).mean() - share[1:] @ b)
        return value, (softmax(moved, axis=1).mean(0) - share)[1:]

    def curvature(b: Array) -> Array:
        p = softmax(logs + np.r_[0.0, b], axis=1)[:, 1:]
        return np.asarray(np.diag(p.mean(0)) - p.T @ p / len(p))

    b = np.zeros(len(there) - 1)
    if len(b):
        how = {"jac": True, "hess": curvature, "method": "trust-exact"}
        b = minimize(loss, b, options={"gtol": GRADIENT}, **how).x
    logits = np.full(z.shape, -np.inf)
    logits[:, there] = logs + np.r_[0.0, b]
    moved: Array = log_odds.of_logits(torch.from_numpy(logits), "softmax").numpy()
    return moved
