"""Many models on many data sets: ranks, and tests that say whether they differ.

Demsar 2006, Statistical Comparisons of Classifiers over Multiple Data Sets. Shapes: n data sets, k
models; a table of scores is (n, k), more being better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import f, friedmanchisquare, rankdata, studentized_range, wilcoxon

ENOUGH_SETS, ENOUGH_MODELS = 5, 3  # for Friedman's test
ENOUGH_PAIRS = 6  # data sets with which Wilcoxon's two-sided p can be below .05 at all


@dataclass(frozen=True)
class Ranks:
    """Mean ranks (k,), 1 being best; p of Friedman's test in Iman and Davenport's form.

    Two models whose mean ranks differ by `critical` or more differ (Nemenyi, 5 %). p and critical
    are None where there are too few data sets or models to say.
    """

    mean: list[float]
    p: float | None
    critical: float | None
    why_not: str = ""


def ranks(table: NDArray[np.float64]) -> Ranks:
    """Return the mean ranks of k models over n data sets, table (n, k), and whether they differ.

    The critical difference is Nemenyi's, q sqrt(k (k + 1) / (6 n)) (Demsar 2006, section 3.2.2).
    """
    n, k = table.shape
    mean = rankdata(-table, axis=1).mean(0)
    if n < ENOUGH_SETS or k < ENOUGH_MODELS:
        why = f"{k} models on {n} data sets: want {ENOUGH_MODELS} on {ENOUGH_SETS} for a test"
        return Ranks(mean.tolist(), None, None, why)
    # Nemenyi's q is the studentised range of k normals over sqrt 2.
    q = studentized_range.ppf(0.95, k, np.inf) / np.sqrt(2)
    return Ranks(mean.tolist(), friedman(table), float(q * np.sqrt(k * (k + 1) / (6 * n))))


def friedman(table: NDArray[np.float64]) -> float:
    """Return p of Friedman's test in Iman and Davenport's form (1980); table (n, k).

    F = (n - 1) chi2 / (n (k - 1) - chi2), with k - 1 and (k - 1)(n - 1) degrees of freedom. It is 1
    where no model differs from another on any data set. Where all data sets rank alike F is
    infinite, and p is exact: one of (k! / ties!) ^ (n - 1) orders.
    """
    n, k = table.shape
    if (table == table[:, :1]).all():
        return 1.0
    chi2 = float(friedmanchisquare(*table.T).statistic)
    rest = n * (k - 1) - chi2  # 0 where all data sets rank alike: F divides by it
    if rest < 1e-9 * n * k:
        orders = factorial(k) // prod(factorial(c) for c in Counter(table[0].tolist()).values())
        return float(orders ** (1.0 - n))
    return float(f.sf((n - 1) * chi2 / rest, k - 1, (k - 1) * (n - 1)))


def wilcoxon_holm(table: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return Holm's adjusted p of Wilcoxon's signed-rank test of every pair, (k, k).

    None where there are too few data sets.
    """
    n, k = table.shape
    if n < ENOUGH_PAIRS:
        return None
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    raw = [
        1.0 if (table[:, i] == table[:, j]).all() else wilcoxon(table[:, i], table[:, j]).pvalue
        for i, j in pairs
    ]
    out = np.ones((k, k))
    for (i, j), p in zip(pairs, holm(raw), strict=True):
        out[i, j] = out[j, i] = p
    return out


def holm(p: Sequence[float] | NDArray[Any]) -> NDArray[np.float64]:
    """Return p values (m,) adjusted for how many there are (Holm 1979): (m,), in the same order."""
    raw = np.asarray(p, dtype=np.float64)
    # adjusted p_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)) of the ascending p_(1) ... p_(m).
    order = np.argsort(raw)
    steps = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    out = np.empty(len(raw))
    out[order] = np.minimum(steps, 1)
    return out
