"""The best of several models on one test set: is it better than others, and how good is it.

The best was found on the same images that it is judged by, so both answers must allow for the
search. Within each resample the best of that resample is compared with all others: a difference
counts as found where it is larger than what the search alone gives in all but 5 % of resamples
(max-type resampling with step-down, Romano & Wolf 2005; with equal models it is Tukey's range,
which Hsu's comparisons with the best 1984 rest on). The score of the best is corrected by how
much the maximum of resamples is too high (Tibshirani & Tibshirani 2009); its interval is the hybrid
one of Andrews, Kitagawa & McCloskey 2024 (Inference on Winners): given that it won, and by how
much, its score is a truncated normal one.

Shapes: N images, S subjects, B resamples, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

from probe.score.intervals import Scale, influences, stretch
from probe.score.metrics import Metric, evaluate
from probe.score.resampling import LEVEL, Array, anchored, bayesian

BETA = (1 - LEVEL) / 10  # of 5 %, what is spent on the bound that keeps the interval finite


@dataclass(frozen=True)
class Winner:
    """The best of M models.

    index: which it is. p: for each model, of the best being better than it, adjusted for the search
    (1 for itself). estimate, ci_low, ci_high: its score, corrected for having been chosen.
    """

    index: int
    value: float
    estimate: float
    ci_low: float
    ci_high: float
    p: list[float]
    resolution: float  # the smallest p that n resamples can give

    def no_surer_than(self, own: Sequence[float | None]) -> Winner:
        """Return it with no p below that of each pair's own test, which knows no search."""
        p = [p if q is None else max(p, q) for p, q in zip(self.p, own, strict=True)]
        return replace(self, p=p)


def choose(
    metric: Metric,
    y: NDArray[Any],
    models: Sequence[Sequence[NDArray[Any]]],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
    best: int | None = None,
) -> Winner:
    """Return the best of models; each has predictions of some seeds, scored by their mean.

    y (N,) or (N, L); predictions (N, K) or (N, L), what `metric` takes; subject (N,). `best` is its
    index where that is known already: of equal scores it may be any.
    """
    sign = 1.0 if metric.higher else -1.0
    owner = np.repeat(np.arange(len(models)), [len(seeds) for seeds in models])
    flat = [p for seeds in models for p in seeds]
    values = sign * _means(np.array([evaluate(metric, y, p) for p in flat]), owner)[:, 0]
    best = int(np.argmax(values)) if best is None else best
    scorers = [anchored(metric, y, p, subject) for p in flat]
    draws = sign * _means(bayesian(scorers, subject, n=n, rng=rng).T, owner).T  # (B, M)
    anchor = sign * _means(np.array([one.value(n=len(y)) for one in scorers]), owner)[:, 0]
    moves = [influences(one, y, subject) for one in scorers]
    known = [m for m in moves if m is not None]
    moved = _means(np.array(known), owner) if known else None  # (M, S)

    p = _better(y, values, draws, best, moved)
    anchor = _untied(anchor, values, best, moved, 1 / len(np.unique(subject)))
    scale = Scale.of(metric.name, sign * draws)
    on_scale = sign * scale.onto(sign * draws)
    centre = sign * scale.onto(sign * anchor)
    spread = (on_scale - on_scale.mean(0)) * stretch(None if moved is None else moved[best], y)
    least, most = winners_interval(centre, spread, best)
    middle = min(max(float(centre[best]) - winners_bias(centre, spread), least), most)
    low, estimate, high = sorted(scale.back(sign * value) for value in (least, middle, most))
    return Winner(best, sign * float(values[best]), estimate, low, high, p.tolist(), 1 / (n + 1))


def _means(rows: Array, owner: NDArray[Any]) -> Array:
    """Return the mean over the seeds of each model, (M, ...).

    rows (R, ...) of the R seeds of all models; owner (R,) is the model of each, 0 to M - 1.
    """
    return np.stack([rows[owner == k].mean(0) for k in range(int(owner.max()) + 1)])


def _untied(anchor: Array, values: Array, best: int, moved: Array | None, least: float) -> Array:
    """Return scores anchor (M,) in which those equal to the best are a little below it.

    Which of several equal counts is called the best is chance. On a scale without steps the best
    would be a quarter of a step above each other on average. The step is the most that a subject
    moves the two apart, by moved (M, S).
    """
    out = anchor.copy()
    for j in np.flatnonzero(np.abs(values - values[best]) < 1e-12):
        step = least if moved is None else np.abs(moved[best] - moved[j]).max()
        if j != best:
            out[j] = anchor[best] - step / 4
    return out


def _better(y: NDArray[Any], values: Array, draws: Array, best: int, moved: Array | None) -> Array:
    """Return p of the best being better than each model, adjusted for the search, (M,).

    From the model that is furthest below upwards: p is the share of resamples in which some two of
    the models that are left are further apart, in standard errors, than the best and this one.
    """
    noise = draws - draws.mean(0)
    M = len(values)
    drawn = np.full((M, M), np.inf)  # the spread of differences in resamples, inf where none
    for i, j in combinations(range(M), 2):
        spread = (noise[:, i] - noise[:, j]).std()
        drawn[i, j] = drawn[j, i] = spread if spread > 1e-12 else np.inf
    error = [_error(y, drawn[best, j], moved, best, j) for j in range(M)]
    apart = (values[best] - values) / error
    left, p, above = list(range(M)), np.ones(M), 0.0
    for j in sorted(set(range(M)) - {best}, key=lambda j: -apart[j]):
        widest = np.zeros(len(draws))
        for i in left:
            # The studentised range of what is left (Tukey): its largest distance in each resample.
            pairs = (noise[:, [i]] - noise[:, left]) / drawn[i, left]
            np.maximum(widest, pairs.max(1), out=widest)
        # Step-down: p never falls (Romano & Wolf 2005). (h + 1) / (B + 1): Phipson & Smyth 2010.
        p[j] = above = max(above, (int((widest >= apart[j] - 1e-12).sum()) + 1) / (len(draws) + 1))
        left.remove(j)
    return p


def _error(y: NDArray[Any], drawn: float, moved: Array | None, best: int, j: int) -> float:
    """Return the standard error of best less j, whose resamples have the spread `drawn`.

    moved (M, S) are the influences of subjects on each model's score. For few subjects it is longer
    by Student's quantile, and as if one more subject set the two apart (Agresti & Min 2005): where
    few do, the spread is too small just where they differ much.
    """
    if moved is None or not np.isfinite(drawn):
        return drawn
    between = moved[best] - moved[j]
    return float(stretch(between, y) * np.hypot(drawn, np.abs(between).max()))


def winners_bias(centre: Array, noise: Array) -> float:
    """Return by how much the best of the scores is too high on average; centre (M,), noise (B, M).

    In each resample the best is found again, and what it has of noise is what the search gives. Of
    models that are alike the scores already differ by noise, so they are drawn together first by
    as much as noise alone would spread them (Efron & Morris 1973).
    """
    middle = centre.mean()
    by_noise = np.square(noise - noise.mean(1, keepdims=True)).sum(1).mean()
    # The shrinkage factor 1 - E|noise|^2 / |scores|^2, each about its mean, at least 0.
    observed = np.square(centre - middle).sum()
    kept = max(0.0, 1 - by_noise / observed) if observed > 0 else 0.0
    again = (middle + kept * (centre - middle) + noise).argmax(1)
    return float(noise[np.arange(len(noise)), again].mean())


def winners_interval(centre: Array, noise: Array, best: int) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the winner's score.

    centre (M,) are the scores and noise (B, M) their resamples less their mean, on a scale where
    they are about normal. Andrews, Kitagawa & McCloskey 2024, equations 10 to 14: X_best given all
    that does not vary with it is normal, truncated to where it wins; within the 99.5 % bound of the
    largest deviation of any model, the mean is sought for which X_best is at a quantile.
    """
    covariance = np.atleast_2d(np.cov(noise, rowvar=False))
    variance = float(covariance[best, best])
    if not variance > 0:
        return float(centre[best]), float(centre[best])
    error, y = np.sqrt(variance), float(centre[best])
    # X_j = share_j X_best + Z_j with Z_j independent of X_best. It wins, X_best >= X_j, where
    # X_best (1 - share_j) >= Z_j: a floor where share_j < 1, a roof where it is above.
    share = covariance[best] / variance
    others = np.arange(len(centre)) != best
    others &= np.abs(1 - share) > 1e-9  # one that varies with the best by the same amounts
    bound = (centre[others] - share[others] * y) / (1 - share[others])
    floor = min(max(bound[share[others] < 1], default=-np.inf), y)
    roof = max(min(bound[share[others] > 1], default=np.inf), y)
    deviations = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    reach = float(np.quantile(np.abs(noise / deviations).max(1), 1 - BETA)) * error

    def below(mean: float) -> float:
        """Return P(X <= y) where the winner's score is `mean`."""
        low, high = max(floor, mean - reach), min(roof, mean + reach)
        start, end = norm.cdf([(low - mean) / error, (high - mean) / error])
        at_value = norm.cdf((y - mean) / error)
        return float((at_value - start) / (end - start)) if end > start else 0.5

    # BETA of the 5 % is spent on the bound, and the rest within it: together 5 %.
    alpha = ((1 - LEVEL) - BETA) / (1 - BETA)
    least, most = y - reach * (1 - 1e-9), y + reach * (1 - 1e-9)

    def mean_at(quantile: float) -> float:
        if below(least) <= quantile:
            return float(least)
        if below(most) >= quantile:
            return float(most)
        return float(brentq(lambda mean: below(mean) - quantile, least, most, xtol=1e-6 * error))

    return mean_at(1 - alpha / 2), mean_at(alpha / 2)
