"""Arrays to floats: the scores of a head, each under many weightings of the images at once.

Shapes: N images, K classes, L findings, B weightings. y is (N,) class index or (N, L) of 1, 0 and
NaN (not scored); p is (N, K) or (N, L); weights (B, N). Every score is scikit-learn's with that
sample_weight. A class or finding that has no positive, or no negative, image can't be ranked: it is
left out of the mean, and the score is NaN where none is left. It is never scored 0.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from features.errors import ProbeError

Array: TypeAlias = Any  # numpy arrays; their dtypes vary with the task
BLOCK = 1 << 24  # numbers of a block of weightings x images: 128 MB


@dataclass(frozen=True)
class Metric:
    """A score: function (y, p, weights) -> (B,), whether more is better, and what it is called."""

    name: str
    title: str
    score: Callable[[Array, Array, Array], Array]
    task: str  # "multiclass", "multilabel"
    higher: bool = True


def evaluate(metric: Metric, y: Array, p: Array, weights: Array | None = None) -> Array:
    """Return the metric under each weighting, (B,); weights default to one row of ones."""
    if weights is None:
        weights = np.ones((1, len(y)))
    step = max(1, BLOCK // max(1, len(y)))
    parts = [metric.score(y, p, weights[i : i + step]) for i in range(0, len(weights), step)]
    return np.concatenate(parts)


def confusion(y: Array, p: Array, weights: Array) -> Array:
    """Return the weight of images of class i that are called j, (B, K, K)."""
    K = p.shape[1]
    cell = y * K + p.argmax(1)
    out = np.zeros((K * K, len(weights)))
    for c in np.unique(cell):
        out[c] = weights[:, cell == c].sum(1)
    return out.T.reshape(-1, K, K)


def _accuracy(y: Array, p: Array, weights: Array) -> Array:
    return weights @ (p.argmax(1) == y) / weights.sum(1)


def _balanced_accuracy(y: Array, p: Array, weights: Array) -> Array:
    table = confusion(y, p, weights)
    there = table.sum(2)
    with np.errstate(invalid="ignore"):
        recall = np.diagonal(table, axis1=1, axis2=2) / there
    return _mean_defined(recall)


def _quadratic_kappa(y: Array, p: Array, weights: Array) -> Array:
    table = confusion(y, p, weights)
    K = table.shape[1]
    cost = np.subtract.outer(np.arange(K), np.arange(K)) ** 2
    by_chance = (
        np.einsum("bi,bj->bij", table.sum(2), table.sum(1)) / table.sum((1, 2))[:, None, None]
    )
    with np.errstate(invalid="ignore"):
        return 1 - (cost * table).sum((1, 2)) / (cost * by_chance).sum((1, 2))


def _f1(y: Array, p: Array, weights: Array) -> Array:
    table = confusion(y, p, weights)
    hits = np.diagonal(table, axis1=1, axis2=2)
    said = table.sum(1) + table.sum(2)
    with np.errstate(invalid="ignore"):
        return _mean_defined(2 * hits / said)  # a class neither there nor called is left out


def _log_loss(y: Array, p: Array, weights: Array) -> Array:
    tiny = np.finfo(p.dtype).eps
    if y.ndim == 1:
        loss = -np.log(np.clip(p[np.arange(len(y)), y], tiny, None))
        return weights @ loss / weights.sum(1)
    q = np.clip(p, tiny, 1 - tiny)
    loss = -np.where(y == 1, np.log(q), np.log1p(-q))
    known = ~np.isnan(y)
    with np.errstate(invalid="ignore"):
        return _mean_defined(weights @ np.where(known, loss, 0) / (weights @ known))


def _auroc(y: Array, p: Array, weights: Array) -> Array:
    """One-vs-rest, the mean over classes; with two classes, of the second."""
    return _per_output(y, p, weights, _rank_auc)


def _average_precision(y: Array, p: Array, weights: Array) -> Array:
    return _per_output(y, p, weights, _rank_ap)


def _per_output(
    y: Array, p: Array, weights: Array, rank: Callable[[Array, Array, Array], Array]
) -> Array:
    if y.ndim == 2:
        truths = [(y[:, k], p[:, k]) for k in range(p.shape[1])]
    elif p.shape[1] == 2:
        truths = [((y == 1).astype(float), p[:, 1])]
    else:
        truths = [((y == k).astype(float), p[:, k]) for k in range(p.shape[1])]
    columns = []
    for truth, score in truths:
        known = ~np.isnan(truth)
        columns.append(rank(truth[known], score[known], weights[:, known]))
    return _mean_defined(np.stack(columns, axis=1))


def _tied(truth: Array, score: Array, weights: Array) -> tuple[Array, Array]:
    """Return the positive and negative weight at each distinct score, highest first: two (B, T)."""
    order = np.argsort(-score, kind="stable")
    start = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    w = weights[:, order]
    positive = np.add.reduceat(w * truth[order], start, axis=1)
    return positive, np.add.reduceat(w, start, axis=1) - positive


def _rank_auc(truth: Array, score: Array, weights: Array) -> Array:
    if not len(truth):
        return np.full(len(weights), np.nan)
    positive, negative = _tied(truth, score, weights)
    above = positive.cumsum(1) - positive / 2  # ties count half
    with np.errstate(invalid="ignore"):
        return (above * negative).sum(1) / (positive.sum(1) * negative.sum(1))


def _rank_ap(truth: Array, score: Array, weights: Array) -> Array:
    if not len(truth):
        return np.full(len(weights), np.nan)
    positive, negative = _tied(truth, score, weights)
    hits, called = positive.cumsum(1), (positive + negative).cumsum(1)
    with np.errstate(invalid="ignore"):
        precision = np.where(called > 0, hits / called, 0)
        return (precision * positive).sum(1) / positive.sum(1)


def _mean_defined(columns: Array) -> Array:
    """Return the mean over axis 1 of what is not NaN; NaN where nothing is left."""
    there = ~np.isnan(columns)
    with np.errstate(invalid="ignore"):
        return np.where(there, columns, 0).sum(1) / there.sum(1)


METRICS = {
    (metric.task, metric.name): metric
    for metric in (
        Metric("accuracy", "accuracy", _accuracy, "multiclass"),
        Metric("balanced_accuracy", "balanced accuracy", _balanced_accuracy, "multiclass"),
        Metric("quadratic_kappa", "quadratic kappa", _quadratic_kappa, "multiclass"),
        Metric("f1", "macro F1", _f1, "multiclass"),
        Metric("auroc", "AUROC", _auroc, "multiclass"),
        Metric("average_precision", "average precision", _average_precision, "multiclass"),
        Metric("log_loss", "log-loss", _log_loss, "multiclass", higher=False),
        Metric("auroc", "mean AUROC", _auroc, "multilabel"),
        Metric("average_precision", "mean average precision", _average_precision, "multilabel"),
        Metric("log_loss", "mean log-loss", _log_loss, "multilabel", higher=False),
    )
}
DEFAULT = {"multiclass": "accuracy", "multilabel": "auroc"}


def of_task(task: str) -> list[Metric]:
    """Return the metrics of a task."""
    return [metric for (of, _), metric in METRICS.items() if of == task]


def find(name: str, task: str) -> Metric:
    """Return a metric by name. Raises ProbeError where the task hasn't got it."""
    if (task, name) not in METRICS:
        names = ", ".join(metric.name for metric in of_task(task))
        raise ProbeError(f"no metric {name!r} for a {task} task: want one of {names}")
    return METRICS[task, name]
