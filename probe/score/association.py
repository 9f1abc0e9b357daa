"""How far two columns of groups go together: Cramer's V, and a test that keeps subjects whole.

Shapes: N images, S subjects, R and K groups of the two columns, B permutations. A column is (N,)
whole numbers from 0 on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 22  # numbers of a block of permutations x images
AS_FAR = 20  # permutations at least as far as what is observed, after which no more are drawn


def cramers_v(a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    """Return Cramer's V of two columns (N,), corrected for bias, 0 to 1; NaN where one is constant.

    Bergsma 2013, A bias-correction for Cramer's V and Tschuprow's T: with phi2 = chi2 / N,
    V^2 = max(0, phi2 - (R - 1)(K - 1) / (N - 1)) / (min(R', K') - 1), R' = R - (R - 1)^2 / (N - 1)
    and K' alike. Independent columns have 0 on average, where the plain V grows with R and K.
    """
    table = _table(a, b)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    (R, K), N = table.shape, len(a)
    if min(R, K) < 2:
        return float("nan")
    off = (R - 1) * (K - 1) / (N - 1)
    fewer = min(R - (R - 1) ** 2 / (N - 1), K - (K - 1) ** 2 / (N - 1)) - 1
    if fewer <= 0:
        return float("nan")
    return float(min(1.0, np.sqrt(max(0.0, chi_square(table[None])[0] / N - off) / fewer)))


def permutation_p(
    a: NDArray[np.integer],
    b: NDArray[np.integer],
    subject: NDArray[np.str_],
    *,
    n: int,
    rng: np.random.Generator,
) -> float:
    """Return p of the hypothesis that two columns (N,) are independent, by n permutations at most.

    The images of a subject (N,) are not independent of each other, so that subjects are exchanged
    whole: the values of `a` of one subject take the place of another's that has as many images
    (whole-block exchange, Winkler et al. 2015), in random order within it. Where each image is a
    subject of its own that is the usual permutation test of chi-square. What the number of a
    subject's images alone tells of its values is not counted. Drawing stops where AS_FAR of them
    are at least as far from independence, the last at draw l: p is AS_FAR / l (Besag & Clifford
    1991); else it is (hits + 1) / (n + 1) (Phipson & Smyth 2010).
    """
    _, member, many = np.unique(subject, return_inverse=True, return_counts=True)
    order = np.argsort(member, kind="stable")
    rows = [order[many[member[order]] == size] for size in np.unique(many)]
    blocks = [part.reshape(-1, size) for part, size in zip(rows, np.unique(many), strict=True)]
    observed = chi_square(_table(a, b)[None])[0]
    R, K, N = int(a.max()) + 1, int(b.max()) + 1, len(a)
    hits, drawn, most = 0, 0, max(1, BLOCK // N)
    while drawn < n:
        size = min(most, max(100, drawn), n - drawn)
        moved = np.empty((size, N), dtype=np.int64)
        for places in blocks:  # (subjects, images of each)
            values = np.broadcast_to(a[places], (size, *places.shape))
            values = rng.permuted(values, axis=2) if places.shape[1] > 1 else values
            turn = rng.random((size, len(places))).argsort(1)
            taken = np.take_along_axis(values, turn[:, :, None], axis=1)
            moved[:, places.ravel()] = taken.reshape(size, -1)
        cell = np.arange(size)[:, None] * (R * K) + moved * K + b
        tables = np.bincount(cell.ravel(), minlength=size * R * K).reshape(size, R, K)
        far = np.flatnonzero(chi_square(tables) >= observed * (1 - 1e-12))
        if hits + len(far) >= AS_FAR:
            return AS_FAR / (drawn + int(far[AS_FAR - hits - 1]) + 1)
        hits, drawn = hits + len(far), drawn + size
    return (hits + 1) / (n + 1)


def chi_square(tables: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return Pearson's chi-square of tables of counts (B, R, K): (B,)."""
    rows, columns = tables.sum(2, keepdims=True), tables.sum(1, keepdims=True)
    wanted = rows * columns / np.maximum(tables.sum((1, 2), keepdims=True), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        off = np.where(wanted > 0, (tables - wanted) ** 2 / wanted, 0.0)
    total: NDArray[np.float64] = off.sum((1, 2))
    return total


def balancing(label: NDArray[np.integer], group: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return weights (N,) under which label and group, (N,) each, are independent.

    w = P(label) P(group) / P(label, group) (Kamiran & Calders 2012, "reweighing"): what each has in
    all stays as it is, and the weights sum to N where every pair occurs. A pair that does not occur
    has no image to be weighted: see `empty_pair`.
    """
    table = _table(label, group)
    wanted = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / len(label)
    weights: NDArray[np.float64] = (wanted / np.maximum(table, 1))[label, group]
    return weights


def empty_pair(label: NDArray[np.integer], group: NDArray[np.integer]) -> tuple[int, int] | None:
    """Return a label and a group that both occur in (N,), but on no image together; else None."""
    table = _table(label, group)
    there = (table.sum(1, keepdims=True) > 0) & (table.sum(0, keepdims=True) > 0)
    missing = np.argwhere(there & (table == 0))
    return (int(missing[0, 0]), int(missing[0, 1])) if len(missing) else None


def _table(a: NDArray[np.integer], b: NDArray[np.integer]) -> NDArray[np.int64]:
    R, K = int(a.max()) + 1, int(b.max()) + 1
    return np.bincount(a.astype(np.int64) * K + b, minlength=R * K).reshape(R, K)
