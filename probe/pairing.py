"""Models on one test set, in pairs: which can be tested, their tests, and the best of them.

A model is its predictions, one Predictions per seed, each in the order of their ids (in_order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features.errors import ContradictedError
from probe.results import Predictions, Result, read_predictions
from probe.score import metrics
from probe.score.intervals import interval_of_mean, length_factor
from probe.score.paired import Difference, compare, delong_test
from probe.score.ranks import holm
from probe.score.winner import Winner, choose

AGREE = 1e-6  # the most that a score made again may differ from the one in its row


@dataclass(frozen=True)
class PairedTest:
    """The first of two models less the second, or why there is no test."""

    difference: Difference | None = None
    p_holm: float | None = None  # adjusted for all tests made together
    why_not: str = ""


def paired_tests(
    metric: metrics.Metric,
    pairs: Sequence[tuple[Sequence[Predictions], Sequence[Predictions]]],
    *,
    n: int,
    seed: int,
) -> list[PairedTest]:
    """Test each pair of models on n resamples, with Holm's adjustment for all of them.

    A model without predictions is an empty sequence, whose pairs have a reason and no test.
    """
    reasons = [unpaired(a[0], b[0]) if a and b else "no predictions" for a, b in pairs]
    count = sum(not why_not for why_not in reasons)
    differences = [
        None if why_not else paired_test(metric, a, b, n=n, seed=seed, pairs=count)
        for (a, b), why_not in zip(pairs, reasons, strict=True)
    ]
    adjusted = iter(holm([difference.p for difference in differences if difference]).tolist())
    return [
        PairedTest(difference, next(adjusted) if difference else None, why_not)
        for difference, why_not in zip(differences, reasons, strict=True)
    ]


def paired_test(
    metric: metrics.Metric,
    ours: Sequence[Predictions],
    theirs: Sequence[Predictions],
    *,
    n: int,
    seed: int,
    pairs: int = 1,
) -> Difference:
    """Return DeLong's test for the AUROC of two classes and independent images, else resampling.

    A model is the predictions of its seeds, and its score their mean; seeds with other test images
    than the first of `ours` are left out. DeLong's takes one seed of each, ENOUGH images of each
    class (delong.py), some variance and no outer folds. `pairs` is the number of pairs that p is
    adjusted for.
    """
    first = ours[0]
    a, b = ([p for p in side if not unpaired(first, p)] for side in (ours, theirs))
    y, subjects = np.asarray(first.labels), np.asarray(first.subjects)
    independent = len(set(first.subjects)) == len(subjects)
    binary = metric.name == "auroc" and y.ndim == 1 and len(first.classes) == 2
    if binary and independent and len(a) == len(b) == 1 and first.fold is None:
        test = delong_test(y == 1, a[0].log_odds[:, 1], b[0].log_odds[:, 1])
        if test:
            return test
    scores_a, scores_b = ([p.scores(metric) for p in side] for side in (a, b))
    rng = np.random.default_rng(seed)
    return compare(metric, y, scores_a, scores_b, subjects, n=n, rng=rng, pairs=pairs)


def chosen_among(
    metric: metrics.Metric, models: Sequence[Sequence[Predictions]], *, n: int, seed: int
) -> tuple[list[int], Winner | None]:
    """Hold the first of models, the best, against the others that have its test images.

    Return the indices of these and the Winner, None where there is no second model. A model is the
    predictions of its seeds; seeds with other images than the first one's are left out.
    """
    first = models[0][0]
    kept = [k for k, seeds in enumerate(models) if not unpaired(first, seeds[0])]
    if len(kept) < 2:
        return kept, None
    scores = [[s.scores(metric) for s in models[k] if not unpaired(first, s)] for k in kept]
    rng = np.random.default_rng(seed)
    y, subjects = np.asarray(first.labels), np.asarray(first.subjects)
    return kept, choose(metric, y, scores, subjects, n=n, rng=rng, best=0)


def unpaired(a: Predictions, b: Predictions) -> str:
    """Return why two predictions, in the order of their ids, can't be paired; "" if they can."""
    same = a.ids == b.ids and np.array_equal(a.labels, b.labels, equal_nan=True)
    return "" if same else "not the same test images and labels"


def in_order(predictions: Predictions) -> Predictions:
    """Return predictions in the order of their ids."""
    order: NDArray[np.int64] = np.argsort(np.asarray(predictions.ids))
    return predictions.take(order)


def read_checked_predictions(folder: Path, result: Result) -> Predictions:
    """Read a result's predictions and check them against its row in results.jsonl.

    They are scored again: the score and the number of images must be those of the row. Raises
    ContradictedError where they are not, ProbeError where there are no predictions.
    """
    path = folder / result.predictions
    predictions = read_predictions(path)
    metric = metrics.METRICS.get((result.task, result.metric))
    value = None
    if metric:
        scores = predictions.scores(metric)
        value = float(metrics.evaluate(metric, predictions.labels, scores)[0])
    differ = [
        f"{name} {again:.6g}, in the row {in_row:.6g}"
        for name, again, in_row, tolerance in (
            ("images", len(predictions.ids), result.n_test, 0),
            (result.metric, value, result.value, AGREE),
        )
        if again is not None and not abs(again - in_row) <= tolerance
    ]
    if differ:
        raise ContradictedError(
            f"{path} is not what its row in results.jsonl says ({'; '.join(differ)}): "
            f"run it again: {result.command}",
            "; ".join(differ),
        )
    return predictions


def interval_of_seeds(
    metric: metrics.Metric, seeds: Sequence[Predictions], *, n: int, seed: int
) -> tuple[float, float] | None:
    """Return the interval of the mean score of several seeds, or None.

    It is None where there is one seed, or where the seeds have other test images.
    """
    if len(seeds) < 2 or any(unpaired(seeds[0], other) for other in seeds):
        return None
    y, subjects = np.asarray(seeds[0].labels), np.asarray(seeds[0].subjects)
    scores, rng = [p.scores(metric) for p in seeds], np.random.default_rng(seed)
    longer = length_factor(seeds[0].fold)
    return interval_of_mean(metric, y, scores, subjects, n=n, rng=rng, longer=longer)
