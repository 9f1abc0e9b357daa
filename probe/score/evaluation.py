"""All that a Result says of its test predictions beside its scores: groups, thresholds, caveats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probe.score.calibration import reliability
from probe.score.caveats import few
from probe.score.groups import subgroups
from probe.score.intervals import OF_FOLDS, SAID, intervals, length_factor
from probe.score.metrics import METRICS, Metric, per_output, scores_for
from probe.score.predictions import LabelledPredictions, Scoring
from probe.score.thresholds import Frozen, HeldOut, at_thresholds


def extras(
    predictions: LabelledPredictions,
    classes: Sequence[str],
    metric: Metric,
    *,
    held_out: HeldOut | Frozen,
    chosen_on: str,
    settings: Scoring,
) -> dict[str, Any]:
    """Return what a Result says beside its scores, by the names of its fields.

    held_out: what thresholds are chosen on, see thresholds.py.
    """
    again: dict[str, Any] = {
        "n": settings.bootstrap,
        "seed": settings.seed,
        "method": settings.interval,
        "longer": length_factor(predictions.fold),
    }
    rule = settings.threshold
    return {
        "interval": f"{SAID[settings.interval].format(predictions.independent)}, "
        f"{settings.bootstrap} resamples, 95 %"
        + (f", {OF_FOLDS:g} times as long, of outer folds" if predictions.fold is not None else ""),
        "subjects_known": predictions.has_subjects,
        "few": few(predictions.y, predictions.subjects, classes, predictions.independent),
        "outputs": _outputs(predictions, classes, **again),
        "reliability": reliability(predictions.y, predictions.p),
        "subgroups": subgroups(
            predictions.y,
            predictions.z,
            predictions.subjects,
            {name: predictions.columns[name] for name in settings.by},
            metric,
            classes,
            fold=predictions.ranked_within,
            **again,
        ),
        "thresholds": {
            "rule": rule,
            "chosen_on": chosen_on,
            "outputs": at_thresholds(held_out, predictions, classes, rule=rule, **again),
        },
    }


def _outputs(
    predictions: LabelledPredictions,
    classes: Sequence[str],
    *,
    n: int,
    seed: int,
    method: str,
    longer: float,
) -> dict[str, dict[str, float | None]]:
    """Return what per_output says, of findings with the interval of their AUROC."""
    outputs = per_output(predictions.y, predictions.z, classes, predictions.ranked_within)
    if predictions.y.ndim == 1:
        return outputs
    metric = METRICS["multilabel", "auroc"]
    for k, output in enumerate(outputs.values()):
        if output["auroc"] is None:
            continue
        known = ~np.isnan(predictions.y[:, k])
        y, z = (values[known, k : k + 1] for values in (predictions.y, predictions.z))
        fold = predictions.ranked_within
        fold = None if fold is None else fold[known]
        p = scores_for(metric, z, fold)
        rng, subjects = np.random.default_rng(seed), predictions.subjects[known]
        how: dict[str, Any] = {"n": n, "rng": rng, "method": method, "longer": longer}
        score = intervals([metric], y, p, subjects, **how)[metric.name]
        output |= {end: score[end] for end in ("ci_low", "ci_high")}
    return outputs
