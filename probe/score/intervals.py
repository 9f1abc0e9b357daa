"""95 % intervals of scores by resampling subjects.

The default, "bayesian", is the Bayesian bootstrap by subject with anchors (resampling.py): no
resample loses a class, and answers without an error have a width. Its quantiles are taken on a
scale without bounds (logit, log) and stretched about the median for how few subjects decide. It was
chosen by simulation: benchmarks/bench_statistics.py has its coverage beside the others'.

"percentile" and "bca" are Efron's (Efron & Tibshirani 1993, sections 13.3 and 14.3). Of few
subjects or a rare class they are too short: the percentile interval of the AUROC of 10 subjects
covers 80 % instead of 95 %.
Shapes: N images, S subjects, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm, t

from probe.score.folded import Scores
from probe.score.metrics import Metric, evaluate, mean_score
from probe.score.resampling import (
    BLOCK,
    DECIDED,
    FLAWLESS,
    LEVEL,
    MANY,
    MAX_GROUPS,
    Anchored,
    Array,
    anchored,
    bayesian,
    bootstrap,
)

METHODS = ("bayesian", "percentile", "bca")
SAID = {
    "bayesian": "Bayesian bootstrap by {0}, corrected for few {0}s",
    "percentile": "percentile bootstrap by {}",
    "bca": "BCa bootstrap by {}",
}
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
NEAR = 1e-9  # of a bound, where draws that reach it are put
OF_FOLDS = 1.15  # of out-of-fold predictions, see intervals
MIN_DF = 3.0  # degrees of freedom; below, Student's quantile says nothing any more
# What a score can't be beyond; others are between 0 and 1.
BOUNDS = dict.fromkeys(("kappa", "quadratic_kappa", "mcc"), (-1.0, 1.0)) | {
    "log_loss": (0.0, np.inf),
    "brier": (0.0, 2.0),
    "calibration_slope": (-np.inf, np.inf),
    "calibration_intercept": (-np.inf, np.inf),
}


def length_factor(fold: NDArray[Any] | None) -> float:
    """Return by which intervals are lengthened, of predictions whose rows are of outer folds."""
    return 1.0 if fold is None else OF_FOLDS


def intervals(
    metrics: Sequence[Metric],
    y: NDArray[Any],
    p: Scores,
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
    method: str = METHODS[0],
    longer: float = 1.0,
) -> dict[str, dict[str, float | None]]:
    """Return {"value", "ci_low", "ci_high"} of every metric; None where it isn't defined.

    y (N,) or (N, L), p (N, K) or (N, L), subject (N,); n resamples. Of the percentile and BCa
    bootstraps, resamples in which a metric is not defined are left out.

    longer: by which the default interval is lengthened, OF_FOLDS for out-of-fold predictions. Each
    image is tested once and trains the other folds' heads, so that folds err together, and
    resampling alone makes intervals too short (Bates, Hastie & Tibshirani 2021): .92 instead of .95
    in benchmarks/bench_nested.py, by which the factor was chosen.
    """
    values = {metric.name: float(evaluate(metric, y, p)[0]) for metric in metrics}
    if method == "bayesian":
        ends = _bayesian(metrics, y, p, subject, values, n=n, rng=rng, longer=longer)
    else:
        ends = _efron(metrics, y, p, subject, values, n=n, rng=rng, bca=method == "bca")
    out = {}
    for name, value in values.items():
        low, high = ends[name] if np.isfinite(value) else (np.nan, np.nan)
        three = {"value": value, "ci_low": low, "ci_high": high}
        out[name] = {k: float(v) if np.isfinite(v) else None for k, v in three.items()}
    return out


def _bayesian(
    metrics: Sequence[Metric],
    y: NDArray[Any],
    p: Scores,
    subject: NDArray[Any],
    values: dict[str, float],
    *,
    n: int,
    rng: np.random.Generator,
    longer: float,
) -> dict[str, tuple[float, float]]:
    """Return the ends of each metric's default interval; arguments as of `intervals`."""
    weights = {name: FLAWLESS if value == 1 else DECIDED for name, value in values.items()}
    scorers = [anchored(m, y, p, subject, decided=weights[m.name]) for m in metrics]
    draws = bayesian(scorers, subject, n=n, rng=rng)
    out = {}
    for metric, one, scores in zip(metrics, scorers, draws.T, strict=True):
        value = values[metric.name]
        if not np.isfinite(value):
            continue
        factor = longer * stretch(influences(one, y, subject), y)
        out[metric.name] = _between(metric, value, scores, factor)
    return out


def _between(metric: Metric, value: float, draws: Array, factor: float) -> tuple[float, float]:
    """Return the ends of draws (B,), stretched on the metric's scale by a factor, about a value."""
    scale = Scale.of(metric.name, draws)
    low, high = ends(scale.onto(draws), factor)
    return min(scale.back(low), value), max(scale.back(high), value)


@dataclass(frozen=True)
class Scale:
    """Maps scores between two bounds onto all numbers, and back."""

    low: float
    high: float

    @classmethod
    def of(cls, name: str, scores: Array) -> Scale:
        """Return a metric's scale; one without bounds where scores (B,) are beyond the metric's."""
        low, high = BOUNDS.get(name, (0.0, 1.0))
        if len(scores) and not (low - NEAR <= scores.min() and scores.max() <= high + NEAR):
            return cls(-np.inf, np.inf)
        return cls(low, high)

    @property
    def width(self) -> float:
        """Return how far two scores can be apart, which may be infinite."""
        return self.high - self.low

    def onto(self, scores: Array) -> Array:
        """Return the logit of scores (B,) between the bounds, or the log above the lower one."""
        if self.low == -np.inf:
            return scores
        above = np.log(np.maximum(scores - self.low, NEAR))
        if self.high == np.inf:
            return above
        return above - np.log(np.maximum(self.high - scores, NEAR))

    def back(self, value: float) -> float:
        """Return the score at a value of the scale."""
        if self.low == -np.inf:
            return value
        if self.high == np.inf:
            return float(self.low + np.exp(value))
        return float(self.low + (self.high - self.low) * expit(value))


def ends(scores: Array, factor: float) -> tuple[float, float]:
    """Return the 95 % quantiles of draws (B,), their distances to the median times a factor.

    NaN where no draw is defined.
    """
    defined = scores[np.isfinite(scores)]
    if not len(defined):
        return np.nan, np.nan
    low, middle, high = np.quantile(defined, [ENDS[0], 0.5, ENDS[1]])
    return float(middle + factor * (low - middle)), float(middle + factor * (high - middle))


def influences(one: Anchored, y: NDArray[Any], subject: NDArray[Any]) -> Array | None:
    """Return what each subject (or group of MAX_GROUPS) moves the score by, were it there twice.

    (S,), the empirical influence values of Efron & Tibshirani 1993, section 21.3, by differences; y
    (N,) or (N, L), subject (N,). None where every class has MANY subjects: no correction for few is
    worth its time.
    """
    if fewest(y, subject) >= MANY:
        return None
    names, member = np.unique(subject, return_inverse=True)
    size = -(-len(names) // MAX_GROUPS)  # subjects of a group
    group = (np.arange(len(names)) // size)[member]
    centre = one.value(n=len(y))
    step = max(1, BLOCK // len(y))
    parts = []
    for start in range(0, int(group.max()) + 1, step):
        twice = np.arange(start, min(start + step, int(group.max()) + 1))
        weights = 1 + (group == twice[:, None]) / size
        parts.append(size * (one.value(np.asfortranarray(weights)) - centre))
    return np.concatenate(parts)


def mean_influences(
    seeds: Sequence[Anchored], y: NDArray[Any], subject: NDArray[Any]
) -> Array | None:
    """Return the influences (S,) on the mean score of several seeds; None where `influences` is."""
    moves = [influence for one in seeds if (influence := influences(one, y, subject)) is not None]
    return np.mean(moves, axis=0) if moves else None


def interval_of_mean(
    metric: Metric,
    y: NDArray[Any],
    seeds: Sequence[Scores],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
    longer: float = 1.0,
) -> tuple[float, float]:
    """Return the default interval of the mean score of several seeds on the same test images.

    seeds are (N, K) or (N, L) each, y (N,) or (N, L), subject (N,). It is about the test images;
    how much the training sets of the seeds vary is said by the standard deviation beside it.
    """
    scorers = [anchored(metric, y, p, subject) for p in seeds]
    draws = bayesian(scorers, subject, n=n, rng=rng).mean(1)
    factor = longer * stretch(mean_influences(scorers, y, subject), y)
    return _between(metric, mean_score(metric, y, seeds), draws, factor)


def stretch(moves: Array | None, y: NDArray[Any]) -> float:
    """Return by how much an interval of few subjects is to be longer, from their influences (S,).

    That is Student's quantile by the normal one. Where few subjects (those of a rare class) make
    most of the variance V, its degrees of freedom are few: 2 V^2 / Var(V), by how the squares of
    influences spread (Satterthwaite 1946). They are S - 2 at most with two classes, and with more
    as many as two of their mean size have.
    """
    if moves is None:
        return 1.0
    # Of a variance V = sum_s u_s^2 of influences u: df = 2 V^2 / Var(V), Var(V) by the u_s^2.
    S, squares = len(moves), np.square(moves)
    V = squares.sum()
    spread = np.square(squares).sum() - V * V / S
    freedom = 2 * V * V / spread if spread > 0 else np.inf
    classes = max(2, len(np.unique(y))) if y.ndim == 1 else 2
    freedom = max(min(freedom, 2.0 * S / classes - 2), MIN_DF)
    return float(t.ppf(ENDS[1], freedom) / norm.ppf(ENDS[1]))


def fewest(y: NDArray[Any], subject: NDArray[Any]) -> int:
    """Return how many subjects the rarest class of y (N,) has, or side of a finding of y (N, L)."""
    return min((count for _, _, count in sides_of(y, subject)), default=0)


def sides_of(y: NDArray[Any], subject: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Return (class, 1, its number of subjects) of each class that y (N,) has; subject (N,).

    Of findings, y (N, L), that have both: (finding, 1 or 0, number of subjects with or without it).
    """
    if y.ndim == 1:
        sides = [(int(k), 1, y == k) for k in np.unique(y)]
    else:
        both = np.flatnonzero((y == 1).any(0) & (y == 0).any(0)).tolist()
        sides = [(k, side, y[:, k] == side) for k in both for side in (1, 0)]
    return [(k, side, len(np.unique(subject[rows]))) for k, side, rows in sides]


# --- Efron's bootstrap ---------------------------------------------------------------------------


def _efron(
    metrics: Sequence[Metric],
    y: NDArray[Any],
    p: Scores,
    subject: NDArray[Any],
    values: dict[str, float],
    *,
    n: int,
    rng: np.random.Generator,
    bca: bool,
) -> dict[str, tuple[float, float]]:
    """Return the ends of each metric's percentile or BCa interval; arguments as of `intervals`."""
    resampled = bootstrap(metrics, y, p, subject, n=n, rng=rng)
    out = {}
    for metric in metrics:
        value = values[metric.name]
        scores = resampled[metric.name][np.isfinite(resampled[metric.name])]
        levels = np.array(ENDS)
        if bca and len(scores) and np.isfinite(value):
            levels = _bca(levels, scores, value, _jackknife(metric, y, p, subject))
        low, high = np.quantile(scores, levels) if len(scores) else (np.nan, np.nan)
        out[metric.name] = (float(low), float(high))
    return out


def _jackknife(
    metric: Metric, y: NDArray[Any], p: Scores, subject: NDArray[Any]
) -> NDArray[np.float64]:
    """Return the metric without each subject (or each of MAX_GROUPS groups of them), (S,).

    y (N,) or (N, L), p (N, K) or (N, L), subject (N,). Where it is not defined it is left out.
    """
    names, member = np.unique(subject, return_inverse=True)
    group = (np.arange(len(names)) % MAX_GROUPS)[member]
    groups = int(group.max()) + 1
    step = max(1, BLOCK // len(y))
    parts = []
    for start in range(0, groups, step):
        left_out = np.arange(start, min(start + step, groups))
        parts.append(evaluate(metric, y, p, (group != left_out[:, None]).astype(float)))
    scores = np.concatenate(parts)
    return np.asarray(scores[np.isfinite(scores)])


def _bca(
    levels: NDArray[np.float64],
    scores: NDArray[np.float64],
    value: float,
    without: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the quantiles that BCa takes for levels (2,): corrected for bias and acceleration.

    scores (B,) are the resamples', value the score itself, without (S,) the jackknife's.
    """
    # z0 = Phi^-1(share of resamples below, ties by half).
    below = ((scores < value).mean() + (scores <= value).mean()) / 2
    spread = without.mean() - without
    # a = sum_s d_s^3 / (6 (sum_s d_s^2)^1.5), d_s = the jackknife's mean less the score without s.
    scale = 6 * ((spread**2).sum()) ** 1.5
    if not 0 < below < 1 or scale == 0:
        return levels  # every resample on one side, or nothing varies: nothing to correct by
    bias, acceleration = norm.ppf(below), (spread**3).sum() / scale
    # Phi(z0 + (z0 + z) / (1 - a (z0 + z))) in the place of Phi(z).
    z = bias + norm.ppf(levels)
    return np.asarray(norm.cdf(bias + z / (1 - acceleration * z)))
