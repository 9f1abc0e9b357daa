"""Recalibrated probabilities and prediction sets of the sweep's heads, and how good they are.

Both are fitted to what folds held out, each image scored by a head that was fitted without it, and
measured on the tested images. With outer folds each fold has a map, and a threshold, of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import Manifest
from probe.choose import Selection
from probe.score import conformal, metrics
from probe.score.calibration import intercept_of, slope_of
from probe.score.intervals import intervals, length_factor
from probe.score.metrics import METRICS, Metric
from probe.score.predictions import LabelledPredictions, Scoring, labelled_predictions
from probe.score.ranking import totals
from probe.score.recalibration import Recalibration, fit
from probe.trials import Trial

MOST = 1e6  # of a slope or an intercept that is said
SHARE = Metric("coverage", "coverage", lambda y, p: _share(y, p), "sets")


@dataclass(frozen=True)
class Held:
    """What a training set's folds held out: labels (n,), log-odds (n, K), and which rows (n,)."""

    y: NDArray[Any]
    z: NDArray[np.float64]
    rows: NDArray[np.int64]

    def by(self, recalibrate: Recalibration | None) -> Held:
        """Return it with recalibrated log-odds."""
        if recalibrate is None:
            return self
        return replace(self, z=recalibrate(self.z, classes=self.y.ndim == 1))


def held_by(trial: Trial, selections: Sequence[Selection], rows: NDArray[np.int64]) -> list[Held]:
    """Return what each training set held out; rows (n,) are those of the training images."""
    held = []
    for subset, selection in zip(trial.training_sets, selections, strict=True):
        y, z = selection.held_out()
        parts = [subset.rows[mask] for mask in subset.folds.held_out]
        held.append(Held(y, z, rows[np.concatenate(parts)] if parts else rows[: len(y)]))
    return held


def recalibrations(method: str | None, held: Sequence[Held]) -> list[Recalibration | None]:
    """Return each training set's map, fitted to what it held out; None without a method."""
    return [None if method is None else fit(method, one.y, one.z) for one in held]


def calibration_of(
    before: LabelledPredictions,
    after: LabelledPredictions,
    kept: Recalibration | None,
    settings: Scoring,
) -> dict[str, Any]:
    """Return what a result says of its calibration: slope and intercept, before and after a map.

    kept: the map of the head that is kept. Slope and intercept are of two classes, or of all
    findings together; log-loss and calibration error are among the metrics too.
    """
    said: dict[str, Any] = {"after": _scores(after, settings)}
    if kept is None:
        return {"scores": said["after"]} if said["after"] else {}
    return kept.to_json() | {"before": _scores(before, settings)} | said


def _scores(predictions: LabelledPredictions, settings: Scoring) -> dict[str, dict[str, Any]]:
    task = "multilabel" if predictions.y.ndim == 2 else "multiclass"
    chosen = [METRICS[task, name] for name in ("log_loss", "ece")]
    chosen += [
        Metric(f"calibration_{name}", f"calibration {name}", _of_outputs(make), task, higher=False)
        for name, make in (("slope", slope_of), ("intercept", intercept_of))
        if task == "multilabel" or predictions.z.shape[1] == 2
    ]
    found: dict[str, dict[str, Any]] = {}
    for metric in chosen:
        p = predictions.z if metric.name.startswith("calibration") else predictions.p
        found |= _interval(metric, predictions.y, p, predictions, settings)
    return {name: _said(score) for name, score in found.items()}


def _said(score: dict[str, Any]) -> dict[str, Any]:
    """Return a score without ends beyond MOST, and without all where its value is.

    Log-odds that hardly differ, of a head that is penalised much, have a slope of millions.
    """
    kept = {k: v if v is not None and abs(v) <= MOST else None for k, v in score.items()}
    return kept if kept["value"] is not None else dict.fromkeys(kept)


def _of_outputs(
    make: Callable[[Any, Any], metrics.Scorer],
) -> Callable[[Any, Any], metrics.Scorer]:
    """Return a scorer of y (N,) or (N, L) and z (N, 2) or (N, L), of all findings as one."""

    def of(y: Any, z: Any) -> metrics.Scorer:
        if y.ndim == 1:
            return make(y.astype(float), z[:, 1])
        one = make(y.ravel(), z.ravel())
        return lambda weights: one(np.repeat(weights, y.shape[1], axis=1))

    return of


def _interval(
    metric: Metric,
    y: NDArray[Any],
    p: NDArray[Any],
    predictions: LabelledPredictions,
    settings: Scoring,
) -> dict[str, dict[str, Any]]:
    return intervals(
        [metric],
        y,
        p,
        predictions.subjects,
        n=settings.bootstrap,
        rng=np.random.default_rng(settings.seed),
        method=settings.interval,
        longer=length_factor(predictions.fold),
    )


def sets_of(
    level: float,
    held: Sequence[Held],
    manifest: Manifest,
    predictions: LabelledPredictions,
    settings: Scoring,
) -> dict[str, Any]:
    """Return what a result says of its prediction sets: coverage, size, and by class.

    held: of the kept head, then of each outer fold; limits are chosen on units where units are what
    is tested. Raises ProbeError for several findings per image, for units of several classes, and
    where nothing was held out.
    """
    y, p = predictions.y, predictions.p
    if y.ndim == 2:
        raise ProbeError(
            "--conformal makes sets of the classes that an image may have, not of findings"
        )
    if not len(held[0].y):
        raise ProbeError("nothing was held out that --conformal could be fitted to: give --folds")
    alike = replace(settings, by=())
    scored = [labelled_predictions(manifest, one.rows, one.y, one.z, alike) for one in held]
    limits = [conformal.threshold(one.p, one.y, one.subjects, level=level) for one in scored]
    limit = np.array(limits[1:])[predictions.fold] if predictions.fold is not None else limits[0]
    found = conformal.sets(p, limit)
    right, ones = found[np.arange(len(y)), y].astype(float), np.ones(len(y))
    by_class = {}
    for k in np.unique(y):
        mine = y == k
        by_class[int(k)] = float(right[mine].mean())
    return {
        "level": level,
        "threshold": limits[0],
        "coverage": _interval(SHARE, ones, right, predictions, settings)["coverage"],
        "size": float(found.sum(1).mean()),
        "empty": float((found.sum(1) == 0).mean()),
        "by_class": [by_class.get(k) for k in range(p.shape[1])],
    }


def _share(y: NDArray[Any], right: NDArray[Any]) -> metrics.Scorer:
    """Return a function of weights (B, N): the weighted share of images that are right (N,)."""
    sums = totals(np.stack([right * y, y], axis=1))

    def scorer(weights: Any) -> Any:
        hits, of = sums(weights).T
        return hits / of

    return scorer
