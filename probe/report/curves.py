"""ROC and precision-recall curves with bands that resample subjects.

Shapes: N images, K outputs (classes or findings), B resamples, G places of the grid. The band is
pointwise, 95 %, over the grid's false positive rates (ROC) or recalls (precision-recall); nothing
is interpolated between thresholds but the ROC's straight lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.results import Predictions
from probe.score import ranking
from probe.score.metrics import one_vs_rest
from probe.score.resampling import LEVEL, bootstrap_weights

GRID = np.linspace(0, 1, 51)
RESAMPLES = 200
MEAN = "mean of all"

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Band:
    """A curve of one output on GRID, (G,) each; `area` is that under it.

    Where there is no band, low and high are empty, and `why_not` says why, with {} for the unit.
    """

    name: str
    middle: Array
    low: Array
    high: Array
    area: float
    why_not: str = ""


def bands(predictions: Predictions, *, seed: int = 0) -> tuple[list[Band], list[Band]]:
    """Return ROC and precision-recall bands of every output with both sides, their mean first.

    Of two classes there is the second only, and no mean.
    """
    names = list(predictions.classes)
    if predictions.labels.ndim == 1 and len(names) == 2:
        names = names[1:]
    pairs = list(zip(names, one_vs_rest(predictions.labels, predictions.log_odds), strict=True))
    both = [(n, t, s) for n, (t, s) in pairs if (t == 1).any() and (t == 0).any()]
    if not both:
        return [], []
    rng = np.random.default_rng(seed)
    weights = bootstrap_weights(np.asarray(predictions.subjects), RESAMPLES, rng)
    weights = np.concatenate([np.ones((1, weights.shape[1])), weights])  # the first is the curve
    curves = [_curves(truth, score, weights) for _, truth, score in both]
    alone = [_alone(truth, np.asarray(predictions.subjects)) for _, truth, _ in both]
    both_kinds = []
    for place, area in enumerate((ranking.auroc, ranking.average_precision)):
        each = [
            (name, curve[place], float(area(truth, score)(weights[:1])[0]), why)
            for (name, truth, score), curve, why in zip(both, curves, alone, strict=True)
        ]
        if len(each) > 1:
            mean = np.mean([curve for _, curve, _, _ in each], axis=0)
            why = "it is of curves without one" if any(alone) else ""
            each.insert(0, (MEAN, mean, float(np.mean([area for _, _, area, _ in each])), why))
        both_kinds.append([_band(*one) for one in each])
    return both_kinds[0], both_kinds[1]


def _curves(truth: NDArray[Any], score: NDArray[Any], weights: Array) -> tuple[Array, Array]:
    """Return true positive rates and precisions on GRID under each weighting, (B, G) each."""
    hits, others = (part.cumsum(0).T for part in ranking.steps_of(truth, score)(weights))  # (B, T)
    tpr, ppv = np.full((2, len(weights), len(GRID)), np.nan)
    for b, (h, m) in enumerate(zip(hits, others, strict=True)):
        P, N = h[-1], m[-1]
        if not P or not N:
            continue
        tpr[b] = np.interp(GRID, np.r_[0, m / N], np.r_[0, h / P])
        reached = np.searchsorted(h, GRID * P - 1e-4).clip(max=len(h) - 1)
        first = np.flatnonzero(h + m)[0]  # a threshold that nothing drawn reaches
        reached = np.maximum(reached, first)
        ppv[b] = h[reached] / (h[reached] + m[reached])
    return tpr, ppv


def _alone(truth: NDArray[Any], subjects: NDArray[Any]) -> str:
    """Return on which side of truth (N,) there is one subject (N,) only; "" where on neither."""
    for value, word in ((1, "with"), (0, "without")):
        if len(np.unique(subjects[truth == value])) < 2:
            return f"one test {{}} {word} it"
    return ""


def _band(name: str, curve: Array, area: float, why_not: str) -> Band:
    """Return the first of (B, G) curves, with quantiles of the others that are defined.

    No band is a width that is not known: with one subject of a side there is none, nor where all
    resamples that are defined give one curve.
    """
    defined = curve[1:][np.isfinite(curve[1:]).all(1)]
    if not why_not and (len(defined) < 2 or np.ptp(defined, axis=0).max() == 0):
        why_not = "all resamples give the same curve"
    if why_not:
        return Band(name, curve[0], np.zeros(0), np.zeros(0), area, why_not)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Band(name, curve[0], low, high, area)
