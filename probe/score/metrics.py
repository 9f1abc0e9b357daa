"""Arrays to floats: the scores of a head, each under many weightings of the images at once.

Shapes: N images, K classes, L findings, B weightings. y is (N,) class index or (N, L) of 1, 0 and
NaN (not scored); p is (N, K) or (N, L); weights (B, N). Every score is scikit-learn's with that
sample_weight. A class or finding that has no positive, or no negative, image can't be ranked: it is
left out of the mean, and the score is NaN where none is left. It is never scored 0.5.

p is probabilities; a metric whose `ranking` is true takes anything that grows with them, and best
log-odds (log_odds.py has the convention).

What doesn't depend on the weights (sorting, counting ties) is done once: a metric makes, from y and
p, a function of weights. Time and memory are linear in N and in K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from features.errors import ProbeError
from probe.score import agreement, log_odds, ranking
from probe.score.calibration import confidence_of, expected_error
from probe.score.folded import Folded, Scores, scorer_of
from probe.score.metric_names import list_from, resolve

Array: TypeAlias = Any  # numpy arrays; their dtypes vary with the task
Scorer: TypeAlias = Callable[[Array], Array]  # weights (B, N) -> scores (B,)
BLOCK = 1 << 22  # numbers of a block of weightings x images: 32 MB
KEPT = (
    1 << 25
)  # images x outputs whose order is kept between blocks: 128 MB; of more it is made again
COLUMNS = 16  # outputs whose scores are laid side by side at once
ROWS = 1 << 20  # numbers of a block of images x classes: 8 MB
SPECIFICITY = 0.9  # at which sensitivity is read off


@dataclass(frozen=True)
class Metric:
    """A score: `of` (y, p) -> scorer, whether more is better, and what it is called.

    ranking: only the order of each class's scores over the images counts, so that `of` takes
    whatever grows with p, ranks or log-odds.
    """

    name: str
    title: str
    of: Callable[[Array, Array], Scorer]
    task: str  # "multiclass", "multilabel"
    higher: bool = True  # False of a loss, which is about probabilities
    ranking: bool = False
    by_output: bool = False  # a mean over outputs, each of which takes its own folds

    def make(self, y: Array, p: Scores) -> Scorer:
        """Return a function of weights (B, N) of the images of y and p; of Folded p, by fold."""
        return self.of(y, p) if self.by_output else scorer_of(self.of, y, p)


def evaluate(metric: Metric, y: Array, p: Scores, weights: Array | None = None) -> Array:
    """Return the metric under each weighting, (B,); weights (B, N) default to one row of ones."""
    scorer = metric.make(y, p)
    if weights is None:
        return scorer(np.ones((1, len(y))))
    step = max(1, BLOCK // max(1, *p.shape))
    blocks = (weights[i : i + step] for i in range(0, len(weights), step))
    # The weights of an image lie side by side, as the scorers run through them.
    return np.concatenate([scorer(np.asfortranarray(block)) for block in blocks])


def mean_score(metric: Metric, y: Array, seeds: Sequence[Array]) -> float:
    """Return the mean of the metric over the answers of several seeds, p (N, K) or (N, L) each."""
    return float(np.mean([evaluate(metric, y, p)[0] for p in seeds]))


def evaluate_log_odds(metric: Metric, y: Array, z: Array, weights: Array | None = None) -> Array:
    """Return the metric of log-odds z (N, K) as `evaluate` does of probabilities."""
    return evaluate(metric, y, scores_for(metric, z), weights)


def scores_for(metric: Metric, z: Array, fold: Array | None = None) -> Scores:
    """Return what the metric takes of log-odds z (N, K): z where it ranks, else probabilities.

    fold (N,) says which of several heads gave each row: ranks are then taken within folds.
    """
    if not metric.ranking:
        return log_odds.probabilities(z)
    return z if fold is None else Folded(z, fold)


# --- one output at a time -----------------------------------------------------------------------


def one_vs_rest(y: Array, p: Array) -> Iterator[tuple[Array, Array]]:
    """Give truth (N,) of 1, 0, NaN and score (N,) of every output that is ranked, in turn.

    That is every finding, or every class against the rest; of two classes, the second.
    """
    which = range(1, 2) if y.ndim == 1 and p.shape[1] == 2 else range(p.shape[1])
    for some in (which[i : i + COLUMNS] for i in range(0, len(which), COLUMNS)):
        scores = np.ascontiguousarray(p[:, some.start : some.stop].T)
        for k, score in zip(some, scores, strict=True):
            yield (y[:, k] if y.ndim == 2 else (y == k).astype(float)), score


def _mean_of(make: Callable[[Array, Array], Scorer], y: Array, p: Scores) -> Scorer:
    """Return the mean of a score (truth, p) -> scorer over outputs; what has none is left out.

    Of Folded p, an output's score is its mean over folds: it counts as much as others, though some
    folds haven't got it.
    """
    if isinstance(p, Folded):
        return _mean(
            lambda: (
                scorer_of(make, truth, Folded(score, p.fold))
                for truth, score in one_vs_rest(y, p.p)
            ),
            p.p,
        )
    return _mean(lambda: (make(truth, score) for truth, score in one_vs_rest(y, p)), p)


def _mean(scorers: Callable[[], Iterator[Scorer]], p: Array) -> Scorer:
    """Return the mean of scores (B,) or (B, C) of every output, kept or made again by `scorers`."""
    kept = list(scorers()) if p.size <= KEPT else None

    def scorer(weights: Array) -> Array:
        total, defined = np.zeros(len(weights)), np.zeros(len(weights))
        for one in kept or scorers():
            values = one(weights).reshape(len(weights), -1)
            total += np.nansum(values, axis=1)
            defined += (~np.isnan(values)).sum(1)
        with np.errstate(invalid="ignore"):
            return total / defined

    return scorer


def _auroc_ovo(y: Array, p: Array) -> Scorer:
    """Hand & Till 2001: the mean over pairs of classes, each pair ranked both ways."""
    K = p.shape[1]
    sums = ranking.sums_by(y, K)

    def scorers() -> Iterator[Scorer]:
        for some in (range(i, min(i + COLUMNS, K)) for i in range(0, K, COLUMNS)):
            scores = np.ascontiguousarray(p[:, some.start : some.stop].T)
            for k, score in zip(some, scores, strict=True):
                yield ranking.auroc_against(y, k, score, sums)

    return _mean(scorers, p)


# --- means of a loss ----------------------------------------------------------------------------


def _mean_loss(loss: Array) -> Scorer:
    """Return the weighted mean of a loss (N,), of what is not NaN."""
    known = ~np.isnan(loss)
    filled = ranking.totals(np.where(known, loss, 0)[:, None])
    counted = ranking.totals(known.astype(float)[:, None])

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            return (filled(weights) / counted(weights))[:, 0]

    return scorer


def _log_loss(y: Array, p: Array) -> Scorer:
    tiny = np.finfo(p.dtype).eps  # as in scikit-learn's log_loss: no probability counts as 0
    return _mean_loss(-np.log(np.clip(p[np.arange(len(y)), y], tiny, None)))


def _log_loss_finding(truth: Array, p: Array) -> Scorer:
    tiny = np.finfo(p.dtype).eps
    q = np.clip(p, tiny, 1 - tiny)
    loss = -np.where(truth == 1, np.log(q), np.log1p(-q))
    return _mean_loss(np.where(np.isnan(truth), np.nan, loss))


def _brier(y: Array, p: Array) -> Scorer:
    """Brier 1950: of two classes (p - y)^2, of more the sum of that over classes."""
    if p.shape[1] == 2:
        return _mean_loss((p[:, 1] - y) ** 2)
    loss = np.empty(len(y))
    step = max(1, ROWS // p.shape[1])
    for rows in (slice(i, i + step) for i in range(0, len(y), step)):
        off = p[rows].astype(float)  # p - e_y, whose squared length is the loss
        off[np.arange(len(off)), y[rows]] -= 1
        loss[rows] = np.einsum("nk,nk->n", off, off)
    return _mean_loss(loss)


def _brier_finding(truth: Array, p: Array) -> Scorer:
    return _mean_loss((p - truth) ** 2)


def _f1_finding(truth: Array, p: Array) -> Scorer:
    """F1 of a finding at a probability of .5; NaN where it is never there."""
    actual, predicted = truth == 1, (p >= 0.5) & ~np.isnan(truth)
    sums = ranking.totals(np.stack([actual & predicted, actual, predicted], axis=1).astype(float))

    def scorer(weights: Array) -> Array:
        hits, positive, called = sums(weights).T
        with np.errstate(invalid="ignore"):
            return np.where(positive > 0, 2 * hits / (positive + called), np.nan)

    return scorer


def _calibration_error(y: Array, p: Array) -> Scorer:
    confidence, right = confidence_of(y, p)
    return expected_error(right, confidence)


# --- the table ----------------------------------------------------------------------------------


def _metrics() -> Iterator[Metric]:
    at = f"sensitivity at {SPECIFICITY:.0%} specificity"
    of_classes = partial(Metric, task="multiclass")
    yield of_classes("accuracy", "accuracy", agreement.accuracy)
    yield of_classes("balanced_accuracy", "balanced accuracy", agreement.balanced_accuracy)
    yield of_classes("kappa", "Cohen's kappa", agreement.kappa)
    yield of_classes("quadratic_kappa", "quadratic kappa", agreement.quadratic_kappa)
    yield of_classes("mcc", "Matthews correlation", agreement.matthews)
    yield of_classes("f1", "F1", agreement.f1)
    yield of_classes("f1_macro", "macro F1", agreement.f1_macro)
    yield of_classes("auroc_ovo", "one-vs-one AUROC", _auroc_ovo, ranking=True)
    yield of_classes("log_loss", "log-loss", _log_loss, higher=False)
    yield of_classes("brier", "Brier score", _brier, higher=False)
    yield of_classes("ece", "calibration error", _calibration_error, higher=False)
    ranked: dict[str, tuple[str, Callable[[Array, Array], Scorer]]] = {
        "auroc": ("AUROC", ranking.auroc),
        "average_precision": ("average precision", ranking.average_precision),
        "sensitivity_at_90": (at, partial(ranking.sensitivity_at, specificity=SPECIFICITY)),
    }
    for name, (title, make) in ranked.items():
        mean = partial(_mean_of, make)
        yield of_classes(name, title, mean, ranking=True, by_output=True)
        yield Metric(name, f"mean {title}", mean, "multilabel", ranking=True, by_output=True)
    of_findings = partial(Metric, task="multilabel")
    yield of_findings("f1", "mean F1", partial(_mean_of, _f1_finding))
    yield of_findings(
        "log_loss", "mean log-loss", partial(_mean_of, _log_loss_finding), higher=False
    )
    yield of_findings("brier", "mean Brier score", partial(_mean_of, _brier_finding), higher=False)
    error = partial(_mean_of, expected_error)
    yield of_findings("ece", "mean calibration error", error, higher=False)


METRICS = {(metric.task, metric.name): metric for metric in _metrics()}
DEFAULT = {"multiclass": "accuracy", "multilabel": "auroc"}


def of_task(task: str) -> list[Metric]:
    """Return the metrics of a task."""
    return [metric for (of, _), metric in METRICS.items() if of == task]


def find(name: str, task: str) -> Metric:
    """Return a metric by its name or an alias. Raises ProbeError where the task hasn't got it."""
    names = [metric.name for metric in of_task(task)]
    metric_name = resolve(name, names)
    if metric_name is None:
        raise ProbeError(f"no metric {name!r} for a {task} task: {list_from(name, names)}")
    return METRICS[task, metric_name]


def best_of(metric: Metric, scores: Array) -> int:
    """Return the index of the best score (J,), the first of several; undefined is worst."""
    better = scores if metric.higher else -scores
    return int(np.argmax(np.where(np.isnan(scores), -np.inf, better)))


def unranked(y: Array, classes: Sequence[str]) -> list[str]:
    """Name the classes or findings of y, (N,) or (N, L), without a positive or a negative image."""
    if y.ndim == 2:
        positive, negative = (y == 1).sum(0), (y == 0).sum(0)
    else:
        positive = np.bincount(y, minlength=len(classes))
        negative = len(y) - positive
    both = (positive > 0) & (negative > 0)
    return [name for name, both_sides in zip(classes, both, strict=True) if not both_sides]


def per_output(
    y: Array, p: Array, classes: Sequence[str], fold: Array | None = None
) -> dict[str, dict[str, float | None]]:
    """Return AUROC, average precision and the number of positives of every class or finding.

    y (N,) or (N, L); p (N, K) or (N, L): log-odds, or what else grows with probabilities. fold
    (N,): of which fold each row is, where several heads gave them.
    """
    names = classes if y.ndim == 2 or len(classes) > 2 else classes[1:]
    ones = np.ones((1, len(y)))
    out = {}
    for name, (truth, score) in zip(names, one_vs_rest(y, p), strict=True):
        scores = score if fold is None else Folded(score, fold)
        area = float(scorer_of(ranking.auroc, truth, scores)(ones)[0])
        ap = float(scorer_of(ranking.average_precision, truth, scores)(ones)[0])
        defined = np.isfinite(area)
        out[name] = {
            "auroc": area if defined else None,
            "average_precision": ap if defined else None,
            "positives": float((truth == 1).sum()),
            "negatives": float((truth == 0).sum()),
        }
    return out
