"""Arrays to floats: the scores of a head, each under many weightings of the images at once.

Shapes: N images, K classes, L findings, B weightings. y is (N,) class index or (N, L) of 1, 0 and
NaN (not scored); p is (N, K) or (N, L); weights (B, N). Every score is scikit-learn's with that
sample_weight. A class or finding that has no positive, or no negative, image can't be ranked: it is
left out of the mean, and the score is NaN where none is left. It is never scored 0.5.

What doesn't depend on the weights (sorting, counting ties) is done once: a metric makes, from y and
p, a function of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from features.errors import ProbeError
from probe import ranking
from probe.calibration import expected_error

Array: TypeAlias = Any  # numpy arrays; their dtypes vary with the task
Scorer: TypeAlias = Callable[[Array], Array]  # weights (B, N) -> scores (B,)
BLOCK = 1 << 22  # numbers of a block of weightings x images: 32 MB
SPECIFICITY = 0.9  # at which sensitivity is read off


@dataclass(frozen=True)
class Metric:
    """A score: `make` (y, p) -> scorer, whether more is better, and what it is called."""

    name: str
    title: str
    make: Callable[[Array, Array], Scorer]
    task: str  # "multiclass", "multilabel"
    higher: bool = True  # False of a loss, which is about probabilities
    ranking: bool = False  # whether only the order of each class's scores counts


def evaluate(metric: Metric, y: Array, p: Array, weights: Array | None = None) -> Array:
    """Return the metric under each weighting, (B,); weights default to one row of ones."""
    scorer = metric.make(y, p)
    if weights is None:
        return scorer(np.ones((1, len(y))))
    step = max(1, BLOCK // max(1, len(y)))
    return np.concatenate([scorer(weights[i : i + step]) for i in range(0, len(weights), step)])


# --- from the confusion matrix ------------------------------------------------------------------


def _confusion(y: Array, p: Array) -> Scorer:
    """Return a function of weights: the weight of images of class i called j, (B, K, K)."""
    K = p.shape[1]
    cells, place = np.unique(y * K + p.argmax(1), return_inverse=True)
    used = ranking.totals(np.eye(len(cells))[place])

    def table(weights: Array) -> Array:
        out = np.zeros((len(weights), K * K))
        out[:, cells] = used(weights)
        return out.reshape(-1, K, K)

    return table


def _of_confusion(score: Callable[[Array], Array], y: Array, p: Array) -> Scorer:
    table = _confusion(y, p)

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return score(table(weights))

    return scorer


def _hits(table: Array) -> Array:
    return np.diagonal(table, axis1=1, axis2=2)


def _accuracy(table: Array) -> Array:
    return _hits(table).sum(1) / table.sum((1, 2))


def _balanced_accuracy(table: Array) -> Array:
    return mean_defined(_hits(table) / table.sum(2))


def _quadratic_kappa(table: Array) -> Array:
    K = table.shape[1]
    cost = np.subtract.outer(np.arange(K), np.arange(K)) ** 2
    by_chance = (
        np.einsum("bi,bj->bij", table.sum(2), table.sum(1)) / table.sum((1, 2))[:, None, None]
    )
    return 1 - (cost * table).sum((1, 2)) / (cost * by_chance).sum((1, 2))


def _f1(table: Array) -> Array:
    said = table.sum(1) + table.sum(2)
    return mean_defined(2 * _hits(table) / said)  # a class neither there nor called is left out


# --- means of a loss ----------------------------------------------------------------------------


def _mean_loss(loss: Array) -> Scorer:
    """Return the weighted mean of a loss (N,), or of (N, L) per finding, then over findings."""
    loss = loss[:, None] if loss.ndim == 1 else loss
    known = ~np.isnan(loss)
    filled, counted = ranking.totals(np.where(known, loss, 0)), ranking.totals(known.astype(float))

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return mean_defined(filled(weights) / counted(weights))

    return scorer


def _log_loss(y: Array, p: Array) -> Scorer:
    tiny = np.finfo(p.dtype).eps
    if y.ndim == 1:
        return _mean_loss(-np.log(np.clip(p[np.arange(len(y)), y], tiny, None)))
    q = np.clip(p, tiny, 1 - tiny)
    return _mean_loss(np.where(np.isnan(y), np.nan, -np.where(y == 1, np.log(q), np.log1p(-q))))


def _brier(y: Array, p: Array) -> Scorer:
    """Brier 1950: of two classes or a finding (p - y)^2, of more the sum of that over classes."""
    if y.ndim == 2:
        return _mean_loss((p - y) ** 2)
    if p.shape[1] == 2:
        return _mean_loss((p[:, 1] - y) ** 2)
    return _mean_loss(((p - np.eye(p.shape[1])[y]) ** 2).sum(1))


def _f1_findings(y: Array, p: Array) -> Scorer:
    """F1 of every finding at a probability of .5, then the mean; one never there is left out."""
    there, said = y == 1, (p >= 0.5) & ~np.isnan(y)
    hits, positives, called = (
        ranking.totals(part.astype(float)) for part in (there & said, there, said)
    )

    def scorer(weights: Array) -> Array:
        positive = positives(weights)
        with np.errstate(invalid="ignore"):
            f1 = 2 * hits(weights) / (positive + called(weights))
        return mean_defined(np.where(positive > 0, f1, np.nan))

    return scorer


# --- rankings -----------------------------------------------------------------------------------


def one_vs_rest(y: Array, p: Array) -> list[tuple[Array, Array]]:
    """Return truth (N,) of 1, 0, NaN and score (N,) of every output that is ranked.

    That is every finding, or every class against the rest; of two classes, the second.
    """
    if y.ndim == 2:
        return [(y[:, k], p[:, k]) for k in range(p.shape[1])]
    which = [1] if p.shape[1] == 2 else range(p.shape[1])
    return [((y == k).astype(float), p[:, k]) for k in which]


def _ranked(rank: Callable[[Array, Array], Scorer], y: Array, p: Array) -> Scorer:
    """Return the mean of a ranking score over outputs; what can't be ranked is left out."""
    scorers = [rank(truth, score) for truth, score in one_vs_rest(y, p)]
    return lambda weights: mean_defined(np.stack([scorer(weights) for scorer in scorers], axis=1))


def _auroc_ovo(y: Array, p: Array) -> Scorer:
    """Hand & Till 2001: the mean over pairs of classes, each pair ranked both ways."""
    K = p.shape[1]
    pairs = []
    for a in range(K):
        for b in range(a + 1, K):
            in_pair = (y == a) | (y == b)
            for k in (a, b):
                pairs.append(ranking.auroc(np.where(in_pair, y == k, np.nan), p[:, k]))
    return lambda weights: mean_defined(np.stack([scorer(weights) for scorer in pairs], axis=1))


def mean_defined(columns: Array) -> Array:
    """Return the mean over axis 1 of what is not NaN; NaN where nothing is left."""
    there = ~np.isnan(columns)
    with np.errstate(invalid="ignore"):
        return np.where(there, columns, 0).sum(1) / there.sum(1)


_sensitivity = partial(ranking.sensitivity_at, specificity=SPECIFICITY)
_at = f"sensitivity at {SPECIFICITY:.0%} specificity"

METRICS = {
    (metric.task, metric.name): metric
    for metric in (
        Metric("accuracy", "accuracy", partial(_of_confusion, _accuracy), "multiclass"),
        Metric(
            "balanced_accuracy",
            "balanced accuracy",
            partial(_of_confusion, _balanced_accuracy),
            "multiclass",
        ),
        Metric(
            "quadratic_kappa",
            "quadratic kappa",
            partial(_of_confusion, _quadratic_kappa),
            "multiclass",
        ),
        Metric("f1", "macro F1", partial(_of_confusion, _f1), "multiclass"),
        Metric("auroc", "AUROC", partial(_ranked, ranking.auroc), "multiclass", ranking=True),
        Metric("auroc_ovo", "one-vs-one AUROC", _auroc_ovo, "multiclass", ranking=True),
        Metric(
            "average_precision",
            "average precision",
            partial(_ranked, ranking.average_precision),
            "multiclass",
            ranking=True,
        ),
        Metric(
            "sensitivity_at_90", _at, partial(_ranked, _sensitivity), "multiclass", ranking=True
        ),
        Metric("log_loss", "log-loss", _log_loss, "multiclass", higher=False),
        Metric("brier", "Brier score", _brier, "multiclass", higher=False),
        Metric("ece", "calibration error", expected_error, "multiclass", higher=False),
        Metric("auroc", "mean AUROC", partial(_ranked, ranking.auroc), "multilabel", ranking=True),
        Metric(
            "average_precision",
            "mean average precision",
            partial(_ranked, ranking.average_precision),
            "multilabel",
            ranking=True,
        ),
        Metric(
            "sensitivity_at_90",
            f"mean {_at}",
            partial(_ranked, _sensitivity),
            "multilabel",
            ranking=True,
        ),
        Metric("f1", "mean F1", _f1_findings, "multilabel"),
        Metric("log_loss", "mean log-loss", _log_loss, "multilabel", higher=False),
        Metric("brier", "mean Brier score", _brier, "multilabel", higher=False),
        Metric("ece", "mean calibration error", expected_error, "multilabel", higher=False),
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


def best_of(metric: Metric, scores: Array) -> int:
    """Return the place of the best score (J,), of equals the first; undefined is worst."""
    better = scores if metric.higher else -scores
    return int(np.argmax(np.where(np.isnan(scores), -np.inf, better)))


def unranked(y: Array, classes: Sequence[str]) -> list[str]:
    """Name the classes or findings that have no positive, or no negative, image."""
    columns = y.T if y.ndim == 2 else [(y == k).astype(float) for k in range(len(classes))]
    return [
        name
        for name, c in zip(classes, columns, strict=True)
        if not ((c == 1).any() and (c == 0).any())
    ]


def per_output(y: Array, p: Array, classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Return AUROC, average precision and the number of positives of every class or finding."""
    names = classes if y.ndim == 2 or len(classes) > 2 else classes[1:]
    ones = np.ones((1, len(y)))
    out = {}
    for name, (truth, score) in zip(names, one_vs_rest(y, p), strict=True):
        area = float(ranking.auroc(truth, score)(ones)[0])
        ap = float(ranking.average_precision(truth, score)(ones)[0])
        defined = np.isfinite(area)
        out[name] = {
            "auroc": area if defined else None,
            "average_precision": ap if defined else None,
            "positives": float((truth == 1).sum()),
            "negatives": float((truth == 0).sum()),
        }
    return out
