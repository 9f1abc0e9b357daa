"""Two models on the same test images: how much better is one, and could that be chance.

Shapes: N images, S subjects, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from probe.score.delong import delong_difference
from probe.score.intervals import Scale, ends, mean_influences, stretch
from probe.score.metrics import Metric, mean_score
from probe.score.resampling import Array, anchored, bayesian, in_blocks, midranks

ALPHA = 0.05
SURE, SEEN = 100, 20  # exchanges at least as far apart after which no more are drawn: see _p
FINER = 100  # times as many exchanges as pairs: Holm's p of the smallest is then ALPHA / 5 or less
MANY = 1000  # subjects of whose exchanges the sum is as good as normal
TINY = 1e-12  # differences that rounding makes


@dataclass(frozen=True)
class Difference:
    """How much better (in the metric's own direction of numbers) model A is than B, and p.

    `resolution` is the smallest p that the test could have given; 0 where there is no such floor.
    """

    value: float
    ci_low: float
    ci_high: float
    p: float
    test: str
    resolution: float = 0.0


def compare(
    metric: Metric,
    y: NDArray[Any],
    a: NDArray[Any] | Sequence[NDArray[Any]],
    b: NDArray[Any] | Sequence[NDArray[Any]],
    subject: NDArray[Any],
    *,
    n: int,
    rng: np.random.Generator,
    pairs: int = 1,
) -> Difference:
    """Return score(a) - score(b) on the same test images.

    y (N,) or (N, L); a and b (N, K) or (N, L), what `metric` takes, or a sequence of these, one per
    seed: then scores are means over seeds, and all seeds of a subject are drawn, or exchanged,
    together. subject (N,). The interval is the paired Bayesian bootstrap's, by subject, with
    anchors that one model has right and the other wrong (as Agresti & Min 2005 add to the table of
    paired proportions). p is of a permutation test that exchanges the two models' answers subject
    by subject, two-sided. As many are drawn as it takes (see _p); `pairs` is for how many pairs p
    will be adjusted.

    What is exchanged must mean the same of both models:

    - a metric that ranks sees the order only, so each model's ranks among the images, class by
      class, are exchanged, as Bandos, Rockette & Gur 2005 do. Two models of different scale or
      calibration would otherwise be mixed into one bad ranking, and the test lose its power.
    - a metric of decisions (accuracy, kappa, F1) takes of each image a decision that its own scores
      make. Decisions go with their rows whatever the scale, so rows are exchanged as they are.
    - a metric of probabilities (log-loss, Brier, calibration error) is about the numbers
      themselves: a model of another calibration is a different model, and rows are exchanged.
    """
    ours, theirs = _seeds(a), _seeds(b)
    value = mean_score(metric, y, ours) - mean_score(metric, y, theirs)
    our_scores = [anchored(metric, y, p, subject) for p in ours]
    their_scores = [anchored(metric, y, p, subject, turned=True) for p in theirs]
    draws = bayesian([*our_scores, *their_scores], subject, n=n, rng=rng)
    apart = draws[:, : len(our_scores)].mean(1) - draws[:, len(our_scores) :].mean(1)
    moves = (mean_influences(side, y, subject) for side in (our_scores, their_scores))
    low, high = ends(apart, stretch(_less(*moves), y))
    reach = Scale.of(metric.name, draws.ravel()).width  # no two scores are further apart
    low, high = max(min(low, value), -reach), min(max(high, value), reach)
    most = max(n, FINER * pairs)
    p, test, floor = _p(_exchanged(metric, y, ours, theirs, subject), value, subject, n, most, rng)
    return Difference(value, low, high, p, test, floor)


def _seeds(p: NDArray[Any] | Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the predictions of each seed, (N, K) or (N, L), of one array or several."""
    return [p] if isinstance(p, np.ndarray) else list(p)


def _less(a: Array | None, b: Array | None) -> Array | None:
    return None if a is None or b is None else a - b


def _exchanged(
    metric: Metric,
    y: NDArray[Any],
    ours: Sequence[NDArray[Any]],
    theirs: Sequence[NDArray[Any]],
    subject: NDArray[Any],
) -> Callable[[int, np.random.Generator], Array]:
    """Return a function of B and rng: the difference after exchanging subjects at random, (B,).

    Where one model has more seeds than the other, the other's are taken several times, as many as
    make the two equal: every seed then counts alike in its model's mean.
    """
    twice = np.concatenate([y, y])
    count = math.lcm(len(ours), len(theirs))
    both = []
    for k in range(count):
        pair = ours[k % len(ours)], theirs[k % len(theirs)]
        pair = (midranks(pair[0]), midranks(pair[1])) if metric.ranking else pair
        both.append(metric.make(twice, np.concatenate(pair)))
    names, member = np.unique(subject, return_inverse=True)

    def differences(size: int, rng: np.random.Generator) -> Array:
        swap = rng.integers(0, 2, (len(names), size)).astype(float)[member]  # (N, B)
        first = np.concatenate([1 - swap, swap]).T
        return np.asarray(sum(one(first) - one(1 - first) for one in both) / count)

    return differences


def _p(
    differences: Callable[[int, np.random.Generator], Array],
    value: float,
    subject: NDArray[Any],
    n: int,
    most: int,
    rng: np.random.Generator,
) -> tuple[float, str, float]:
    """Return p of a difference, its test's name, and the smallest p there could be; subject (N,).

    Sequential Monte Carlo (Besag & Clifford 1991): exchanges are drawn until SURE of them are at
    least as far apart as the models are, or until n where SEEN are; where fewer are, p is small and
    decides, and drawing goes on until SEEN are or `most` are drawn. Stopped by its h-th such
    exchange at draw l, p is h / l; at the end (h + 1) / (l + 1) (Phipson & Smyth 2010). Under the
    null hypothesis P(p <= x) <= x whatever the rule makes of a case.

    Of MANY subjects the sum of exchanges is normal, and its tail is taken instead of going on.
    """
    S = len(np.unique(subject))
    name = f"permutation by {'image' if len(subject) == S else 'subject'}"
    floor = 1 / (most + 1)
    drawn, far, squares = 0, 0, 0.0
    for size in _sizes(n, most):
        made = in_blocks(lambda k, own: differences(k, own), 2 * len(subject), n=size, rng=rng)
        made = np.where(np.isfinite(made), made, 0.0)
        hits = np.flatnonzero(np.abs(made) >= abs(value) - TINY)
        wanted = SURE if drawn + size <= n else SEEN
        if far + len(hits) >= wanted:
            last = drawn + int(hits[wanted - far - 1]) + 1
            return wanted / last, name, floor
        far, drawn, squares = far + len(hits), drawn + size, squares + float(made @ made)
        if drawn == n and far >= SEEN:
            break
        if drawn == n and S >= MANY and squares > 0:
            tail = 2 * norm.sf(abs(value) / np.sqrt(squares / drawn))
            return float(min(tail, (far + 1) / (drawn + 1))), f"{name}, normal tail", 0.0
    return (far + 1) / (drawn + 1), name, floor


def _sizes(n: int, most: int) -> Iterator[int]:
    """Yield how many exchanges to draw next: n in a few steps, then twice as many as there are."""
    drawn = 0
    while drawn < most:
        size = min(max(100, drawn), (n if drawn < n else most) - drawn)
        drawn += size
        yield size


def delong_test(truth: NDArray[Any], a: NDArray[Any], b: NDArray[Any]) -> Difference | None:
    """Return AUROC(a) - AUROC(b) with DeLong's interval and two-sided p; truth, a, b (N,).

    None where no such test can be made: see delong_difference.
    """
    test = delong_difference(truth, a, b)
    return Difference(*test, "DeLong") if test else None
