"""A head tested on other data than its own: frozen, with its C and its thresholds, on their labels.

The other data are a store of the same backbone, or images that are extracted as the head's were.
Classes are matched by name (matching.py). Home is the data set that the head was trained on, where
its result has the predictions that the drop is taken from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import NO_SPLIT, Manifest
from features.store import FeatureStore
from probe import saved
from probe.elsewhere import UNSAID, Elsewhere, ExternalOptions, applied
from probe.identity import Identity, data_of
from probe.results import Evaluation, Result, read_predictions, record, result_of
from probe.score import metrics
from probe.score.difference import METHOD, independent_difference
from probe.score.in_the_large import in_the_large, recalibrated
from probe.score.predictions import (
    LabelledPredictions,
)
from probe.score.thresholds import Frozen
from probe.tested import evaluate, scored, to_predictions


def test(
    head: Path,
    store_path: Path,
    *,
    out: Path,
    settings: ExternalOptions | None = None,
    labels: Manifest | None = None,
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> Result:
    """Score a saved head on the labels of a store; write predictions and a line of results.jsonl.

    labels: a manifest of the store's images, where labels are to be taken of it and not of the
    store. Raises ProbeError where the store doesn't suit the head, no class is common or no image
    is left, StoreError for a store that can't be read.
    """
    settings = settings or ExternalOptions()
    started = perf_counter()
    about = saved.read(head)
    with FeatureStore.open(store_path) as store:
        trial = applied(head, about, store, settings, labels)
        evaluation, drop = _scores(trial)
        result = result_of(
            _identity(trial, evaluation.metric),
            evaluation,
            C=about.get("C"),
            folds={},
            n_train=trial.row.n_train if trial.row else 0,
            n_bad=trial.n_bad,
            store=str(store.path),
            store_fingerprint=store.fingerprint_digest,
            predictions="",
            heads="",
            converged=trial.row.converged if trial.row else True,
            seconds=round(perf_counter() - started, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=trial.notes(evaluation),
            audit=trial.audit(),
            external=_said(trial) | drop,
            command=command,
            versions=dict(versions or {}),
        )
        said = to_predictions(trial.predictions, trial.matched.manifest.classes)
        return record(out, result, said)


test.__test__ = False  # type: ignore[attr-defined]  # no test of pytest's


def test_each(
    heads: Sequence[Result],
    out: Path,
    stores: Mapping[Path, ExternalOptions],
    **provenance: Any,
) -> list[Result]:
    """Test the heads of results in `out` on each of the stores that suit them; their own are not.

    Raises ProbeError where a result has no head, or no store suits it. provenance: as of `test`.
    """
    found = []
    for result in heads:
        if not result.heads:
            raise ProbeError(
                f"{result.backbone} on {result.dataset} has no saved head to test elsewhere: "
                "nearest neighbours have none; leave --test-on out, or take --head linear"
            )
        about = saved.read(out / result.heads)
        others = [path for path in stores if path.resolve() != Path(result.store).resolve()]
        suited = [path for path in others if _backbone(path) == about["backbone"]]
        if others and not suited:
            raise ProbeError(
                f"no store of --test-on is of {result.backbone} with the same weights, as the head "
                f"is: found {', '.join(map(str, others))}"
            )
        for path in suited:
            how: dict[str, Any] = {"out": out, "settings": stores[path], **provenance}
            found.append(test(out / result.heads, path, **how))
    return found


test_each.__test__ = False  # type: ignore[attr-defined]


def _backbone(path: Path) -> Any:
    with FeatureStore.open(path) as store:
        return store.fingerprint["backbone"]


def _identity(of: Elsewhere, metric: str) -> Identity:
    """Return what tells its result from others."""
    row, about, matched_ = of.row, of.about, of.matched
    whole = of.settings.part == "all"
    own = {
        "part": of.settings.part,
        "classes": dict(of.settings.names),
        "shared_left_out": of.settings.leave_shared_out,
    }
    if row:
        trained = {"trained_split": row.split_digest, "trained_labels": row.labels_digest}
        own = dict(row.settings) | trained | own
    else:
        own["head"] = _digest(of.head)
    kept = _without(matched_.manifest, of.left_out)
    data = data_of(of.store, kept, of.settings.uncertain or "", outer=whole)
    head = row.head if row else "linear" if about.get("C") is not None else "zero-shot"
    return Identity(
        **data,
        scenario=row.scenario if row else about.get("scenario") or f"frozen-{head}",
        head=head,
        feature=about["feature"],
        protocol=row.protocol if row else UNSAID,
        metric=metric,
        scored_by=of.settings.scored_by,
        shots=row.shots if row else None,
        seed=row.seed if row else of.settings.seed,
        settings=own,
        trained_on=of.trained_on,
    )


def _scores(of: Elsewhere) -> tuple[Evaluation, dict[str, Any]]:
    """Return the scores here, and the drop from home."""
    about, manifest = of.about, of.matched.manifest
    known = about.get("thresholds") or {}
    evaluation = evaluate(
        manifest,
        of.predictions,
        of.metric,
        held_out=Frozen(known.get("outputs") or {}),
        chosen_on=f"{known.get('chosen_on') or 'what was held out'}, of {of.trained_on}",
        settings=replace(of.settings, threshold=known.get("rule") or "youden"),
    )
    return evaluation, _drop(of, evaluation)


def _home(of: Elsewhere) -> LabelledPredictions | str:
    """Return the answers that the head's own result was scored on, or why there are none."""
    if not of.row or not of.folder:
        return "the head lies in no folder of results, so that its own score isn't known"
    if of.row.scored_by != of.settings.scored_by:
        return f"its own score is per {of.row.scored_by}"
    try:
        said = read_predictions(of.folder / of.row.predictions)
    except ProbeError:
        return "the predictions of its own result are gone"
    outputs = [said.classes.index(name) for name in of.matched.manifest.classes]
    labels = said.labels if said.labels.ndim == 1 else said.labels[:, outputs]
    fold, together = said.fold, False
    if of.row.outer and fold is None:  # ranked together, and no less tested in folds
        fold, together = np.zeros(len(labels), dtype=np.int64), True
    return LabelledPredictions(
        ids=np.asarray(said.ids),
        subjects=np.asarray(said.subjects),
        y=labels,
        z=said.log_odds[:, outputs],
        columns={},
        has_subjects=of.row.subjects_known,
        fold=fold,
        ranked_together=together,
    )


def _drop(of: Elsewhere, evaluation: Evaluation) -> dict[str, Any]:
    """Return, by every metric, the score at home less the score here, with an interval.

    Of findings, both are means over those that are ranked on both sides.
    """
    home = _home(of)
    if isinstance(home, str):
        return {"drop_method": f"none: {home}"}
    here, scores = of.predictions, evaluation.metrics
    of_task = metrics.of_task(evaluation.task)
    if here.y.ndim == 2:
        both = [(one.y == 1).any(0) & (one.y == 0).any(0) for one in (home, here)]
        common = both[0] & both[1]
        if not common.any():
            return {"drop_method": "none: no finding is there and not there on both sides"}
        home = replace(home, y=np.where(common, home.y, np.nan))
        if not common[both[1]].all():
            here = replace(here, y=np.where(common, here.y, np.nan))
            scores = scored(of_task, here, of.settings)
    before = scored(of_task, home, of.settings)
    drop = {
        name: {"home": before[name]["value"], "here": scores[name]["value"]}
        | independent_difference(before[name], scores[name])
        for name in scores
    }
    return {"drop": drop, "drop_method": METHOD}


def _said(of: Elsewhere) -> dict[str, Any]:
    """Return what a result says of the test beside its scores, see schema.External."""
    predictions, manifest = of.predictions, of.matched.manifest
    moved = recalibrated(predictions.y, predictions.z)
    after = {}
    for metric in metrics.of_task(manifest.task):
        value = metrics.evaluate_log_odds(metric, predictions.y, moved)
        after[metric.name] = float(value[0]) if np.isfinite(value[0]) else None
    return {
        "head": str(of.head),
        "part": of.settings.part,
        "absent": list(of.matched.absent),
        "unknown": dict(of.matched.unknown),
        "calibration": in_the_large(
            predictions.y, predictions.z, predictions.subjects, manifest.classes
        ),
        "recalibrated": after,
        "shared": of.overlap.counts(manifest.id[of.rows], manifest.subject[of.rows]),
    }


def _without(manifest: Manifest, rows: NDArray[np.int64]) -> Manifest:
    """Return a manifest of which some rows (n,) are in no split."""
    split = manifest.split.copy()
    split[rows] = NO_SPLIT
    return replace(manifest, split=split)


def _digest(head: Path) -> str:
    """Return the first 16 hex digits of a head's file."""
    return hashlib.sha256(head.with_suffix(".json").read_bytes()).hexdigest()[:16]
