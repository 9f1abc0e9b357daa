"""What every result on a store says, however its head was trained: audit, metric, test scores."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.audit import audit
from features.errors import ProbeError
from features.manifest import NUMBER, SPLITS, Manifest
from features.store import DONE, FeatureStore
from probe.results import Evaluation, Predictions
from probe.score import evaluation, metrics
from probe.score.caveats import caveat
from probe.score.intervals import intervals, length_factor
from probe.score.metrics import Metric
from probe.score.predictions import LabelledPredictions, Scoring
from probe.score.thresholds import Frozen, HeldOut

NO_FINDING = {
    "no finding",
    "no findings",
    "none",
    "normal",
    "healthy",
    "no abnormality",
}  # as findings
EACH_FOLD = "training and test of each outer fold"
ALONE = "test images have no {}: each is scored as one of its own"
ORDER = "quadratic_kappa takes the classes in this order: "

# Notes that a command prints with a result.
TOLD = re.compile(
    r"quadratic_kappa takes |k = [\d, ]+ left out|\d+ test images have no "
    r"|.* counts as a finding in the mean|.* can't be called right: |left out: \d+ "
    r"|\d+ \w+ lies? in several values"
)


def metric_of(manifest: Manifest, asked: str | None) -> Metric:
    """Return the metric asked for, the data set's own, or the task's. ProbeError for no such."""
    name = asked or manifest.metric or metrics.DEFAULT[manifest.task]
    return metrics.find(name, manifest.task)


def audit_splits(
    store: FeatureStore, manifest: Manifest, *, strict: bool, outer: bool = False
) -> dict[str, Any]:
    """Return what the audit of the splits found. Raises ProbeError for leaks where `strict`.

    outer: images are tested in outer folds, which keep subjects and identical files together, so
    that nothing leaks, whatever part of the split they are in.
    """
    if outer:
        split = np.where(np.isin(manifest.split, SPLITS), SPLITS[0], manifest.split)
        manifest = replace(manifest, split=split)
    found = audit(manifest, hashes=store.hashes(), usable=store.done == DONE)
    if strict and found.leaks:
        raise ProbeError(
            f"{store.path}: {found.line()}. See `medprobe audit {store.path}`, or --split drawn"
        )
    return {
        "line": found.line().replace("the splits", EACH_FOLD if outer else "the splits"),
        "leaks": len(found.leaks),
        "conflicts": len(found.conflicts),
    }


def evaluate(
    manifest: Manifest,
    predictions: LabelledPredictions,
    metric: Metric,
    *,
    held_out: HeldOut | Frozen,
    chosen_on: str,
    settings: Scoring,
) -> Evaluation:
    """Score test predictions in every way that a Result says.

    held_out: images that thresholds are chosen on; chosen_on: what these are. Raises ProbeError
    where the metric is not defined on the test split.
    """
    scores = scored(metrics.of_task(manifest.task), predictions, settings)
    value, low, high = (scores[metric.name][name] for name in ("value", "ci_low", "ci_high"))
    if value is None or low is None or high is None:
        raise ProbeError(
            f"{manifest.dataset}: {metric.name} is not defined on this test split "
            f"({one_sided_note(manifest, predictions.y)}); choose another --metric or another split"
        )
    return Evaluation(
        task=manifest.task,
        classes=list(manifest.classes),
        label_from=manifest.label_from,
        labelled_by=manifest.labelled_by,
        positive=positive_of(manifest),
        metric=metric.name,
        metrics=scores,
        value=value,
        ci_low=low,
        ci_high=high,
        n_test=len(predictions.y),
        n_subjects_test=len(np.unique(predictions.subjects)),
        **evaluation.extras(
            predictions,
            manifest.classes,
            metric,
            held_out=held_out,
            chosen_on=chosen_on,
            settings=settings,
        ),
    )


def positive_of(manifest: Manifest) -> str:
    """Return which of two classes counts as positive, the last; "" where there are more."""
    two = manifest.task == "multiclass" and len(manifest.classes) == 2
    return manifest.classes[1] if two else ""


def kappa_order_note(manifest: Manifest, metric: str) -> str:
    """Say in which order quadratic kappa takes classes whose names don't tell it; else nothing.

    Names tell it where they differ in a number only (2, Grade 2). With two classes the order
    doesn't matter. An order that was given, or is the data set's own, is said as it is.
    """
    classes = manifest.classes
    if metric != "quadratic_kappa" or len(classes) < 3 or _numbered(classes):
        return ""
    line = f"{ORDER}{' < '.join(classes)}"
    if manifest.order_from not in ("given", "source"):
        line += "; that is how their names are sorted: give the grades' order by --classes"
    return line


def _numbered(classes: Sequence[str]) -> bool:
    parts = [NUMBER.split(name) for name in classes]
    return all(len(p) == 3 for p in parts) and len({(p[0], p[2]) for p in parts}) == 1


def remarks(
    manifest: Manifest,
    y_train: NDArray[Any],
    predictions: LabelledPredictions,
    found: Evaluation,
    settings: Scoring,
    uncertain: str,
) -> list[str]:
    """Return what a reader of the number must know; `found` is what `evaluate` returned.

    y_train is (n,) or (n, L); uncertain is what -1 counted as, "" where there are no findings.
    """
    notes = [manifest.note] if manifest.note else []
    notes.append(f"split: {manifest.split_from}")
    if order := kappa_order_note(manifest, found.metric):
        notes.append(order)
    if settings.aggregate:
        notes.append(f"scored per {settings.unit}: the {settings.aggregate} of its images")
    if predictions.alone:
        notes.append(f"{predictions.alone} {ALONE.format(settings.unit)}")
    if one_sided := one_sided_note(manifest, predictions.y):
        notes.append(f"left out of AUROC and average precision, {one_sided}")
    if untaught := metrics.unranked(y_train, manifest.classes):
        not_scored = "" if y_train.ndim == 1 else ", so not scored"
        notes.append(f"one side only in training{not_scored}: {', '.join(untaught)}")
    notes += no_finding_note(manifest, found)
    if uncertain:
        notes.append(f"uncertain labels: {uncertain}")
    if predictions.ranked_together:
        notes.append(
            "AUROC and its like: images of all folds are ranked together, each by its own fold's "
            "head, as a fold is too small to be ranked; that is too low on average (Airola 2011)"
        )
    if not predictions.has_subjects:
        notes.append("no subjects are known: images are taken as independent")
    ends = found.ci_low, found.ci_high
    no_width = caveat(*ends, found.n_subjects_test, predictions.independent)
    return [*notes, *(note for note in (found.few, no_width) if note)]


def no_finding_note(manifest: Manifest, evaluation: Evaluation) -> list[str]:
    """Say that a finding which means none is averaged like the others, and the mean without it."""
    metric = evaluation.metric
    if manifest.task != "multilabel" or metric not in ("auroc", "average_precision"):
        return []
    values = {name: output[metric] for name, output in evaluation.outputs.items()}
    known = {name: value for name, value in values.items() if value is not None}
    none = [name for name in known if re.sub(r"[\W_]+", " ", name).strip().casefold() in NO_FINDING]
    rest = [value for name, value in known.items() if name not in none]
    if not none or not rest:
        return []
    return [
        f"{', '.join(none)} counts as a finding in the mean; without it {metric} is "
        f"{np.mean(rest):.3f}, the mean of {len(rest)}"
    ]


def scored(
    wanted: Sequence[Metric], predictions: LabelledPredictions, settings: Scoring
) -> dict[str, dict[str, float | None]]:
    """Return value and interval of every metric, on the same resamples whatever is asked."""
    found: dict[str, dict[str, float | None]] = {}
    for ranking in {metric.ranking for metric in wanted}:
        found |= intervals(
            [metric for metric in wanted if metric.ranking == ranking],
            predictions.y,
            predictions.scores(next(metric for metric in wanted if metric.ranking == ranking)),
            predictions.subjects,
            n=settings.bootstrap,
            rng=np.random.default_rng(settings.seed),
            method=settings.interval,
            longer=length_factor(predictions.fold),
        )
    return {metric.name: found[metric.name] for metric in wanted}


def to_predictions(predictions: LabelledPredictions, classes: Sequence[str]) -> Predictions:
    """Return test answers as predictions.csv holds them."""
    return Predictions(
        ids=predictions.ids.tolist(),
        subjects=predictions.subjects.tolist(),
        labels=predictions.y,
        probabilities=predictions.p,
        classes=classes,
        log_odds=predictions.z,
        fold=predictions.ranked_within,
    )


def one_sided_note(manifest: Manifest, y: NDArray[Any]) -> str:
    """Name the classes or findings that the test split, y (N,) or (N, L), has one side of only."""
    names = metrics.unranked(y, manifest.classes)
    return f"no positive or no negative test image: {', '.join(names)}" if names else ""
