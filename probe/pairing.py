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
from probe.score.paired import Difference, compare, delong_test
from probe.score.ranks import holm
from probe.score.winner import Winner, choose

AGREE = 1e-6  # predictions whose score differs more from their row's are another result's


@dataclass(frozen=True)
class PairedTest:
    """Of two models: the difference of the first and the second, or why there is no test."""

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

    A model without predictions is empty; what is said of it is the caller's.
    """
    reasons = [unpaired(a[0], b[0]) if a and b else "no predictions" for a, b in pairs]
    count = sum(not why_not for why_not in reasons)
    differences = [
        None if why_not else paired_test(metric, a, b, n=n, seed=seed, pairs=count)
        for (a, b), why_not in zip(pairs, reasons, strict=True)
    ]
    adjusted = iter(holm([found.p for found in differences if found]).tolist())
    return [
        PairedTest(found, next(adjusted) if found else None, why_not)
        for found, why_not in zip(differences, reasons, strict=True)
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
    than the first of `ours` are left out. DeLong's is for one seed each, and not for few images of
    a class or no variance. `pairs` is for how many p will be adjusted.
    """
    first = ours[0]
    a, b = ([p for p in side if not unpaired(first, p)] for side in (ours, theirs))
    y, subjects = np.asarray(first.labels), np.asarray(first.subjects)
    independent = len(set(first.subjects)) == len(subjects)
    binary = metric.name == "auroc" and y.ndim == 1 and len(first.classes) == 2
    if binary and independent and len(a) == len(b) == 1:
        found = delong_test(y == 1, a[0].log_odds[:, 1], b[0].log_odds[:, 1])
        if found:
            return found
    scores_a, scores_b = ([p.scores(metric) for p in side] for side in (a, b))
    rng = np.random.default_rng(seed)
    return compare(metric, y, scores_a, scores_b, subjects, n=n, rng=rng, pairs=pairs)


def chosen_among(
    metric: metrics.Metric, answers: Sequence[Sequence[Predictions]], *, n: int, seed: int
) -> tuple[list[int], Winner | None]:
    """Return which models have the test images of the first, the best, and how it compares.

    A model is the predictions of its seeds; where seeds differ in their images, of the first of
    them. Winner is None where there is no second model.
    """
    first = answers[0][0]
    kept = [k for k, seeds in enumerate(answers) if not unpaired(first, seeds[0])]
    if len(kept) < 2:
        return kept, None
    models = [[s.scores(metric) for s in answers[k] if not unpaired(first, s)] for k in kept]
    rng = np.random.default_rng(seed)
    y, subjects = np.asarray(first.labels), np.asarray(first.subjects)
    return kept, choose(metric, y, models, subjects, n=n, rng=rng, best=0)


def unpaired(a: Predictions, b: Predictions) -> str:
    """Say why predictions, each in the order of their ids, make no pairs; "" where they do."""
    same = a.ids == b.ids and np.array_equal(a.labels, b.labels, equal_nan=True)
    return "" if same else "not the same test images and labels"


def in_order(predictions: Predictions) -> Predictions:
    """Return predictions in the order of their ids."""
    order: NDArray[np.int64] = np.argsort(np.asarray(predictions.ids))
    return Predictions(
        ids=[predictions.ids[i] for i in order],
        subjects=[predictions.subjects[i] for i in order],
        labels=predictions.labels[order],
        probabilities=predictions.probabilities[order],
        classes=predictions.classes,
        log_odds=predictions.log_odds[order],
    )


def read_checked_predictions(folder: Path, result: Result) -> Predictions:
    """Read a result's predictions. ProbeError where they are not there.

    They are scored again: the score and the number of images must be those of the row. Raises
    ContradictedError where they are not.
    """
    path = folder / result.predictions
    said = read_predictions(path)
    metric = metrics.METRICS.get((result.task, result.metric))
    value = float(metrics.evaluate(metric, said.labels, said.scores(metric))[0]) if metric else None
    differ = [
        f"{name} {found:.6g}, in the row {wanted:.6g}"
        for name, found, wanted, close in (
            ("images", len(said.ids), result.n_test, 0),
            (result.metric, value, result.value, AGREE),
        )
        if found is not None and not abs(found - wanted) <= close
    ]
    if differ:
        raise ContradictedError(
            f"{path} is not what its row in results.jsonl says ({'; '.join(differ)}): "
            f"run it again: {result.command}",
            "; ".join(differ),
        )
    return said
