"""A head tested on other data than its own: frozen, with its C and its thresholds, on their labels.

The other data are a store of the same backbone, or images that are extracted as the head's were.
Classes are matched by name (matching.py). Home is the data set that the head was trained on, where
its result has the predictions that the drop is taken from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import NO_LABEL, NO_SPLIT, NOT_STATED, SPLITS, Manifest
from features.store import DONE, PENDING, FeatureStore
from probe import saved
from probe.data import labelled, targets
from probe.identity import Identity, data_of
from probe.likeness import SHARE
from probe.matching import Matched, matched
from probe.overlap import Overlap, overlap
from probe.results import Evaluation, Result, read_predictions, record, result_of
from probe.score import metrics
from probe.score.difference import METHOD, independent_difference
from probe.score.in_the_large import in_the_large, recalibrated
from probe.score.metrics import Metric
from probe.score.predictions import (
    LabelledPredictions,
    Scoring,
    check_scoring,
    labelled_predictions,
)
from probe.score.thresholds import Frozen
from probe.tested import evaluate, metric_of, remarks, scored, to_predictions

PARTS = ("all", "test")
UNSAID = "unknown"  # protocol and data set of a head whose result isn't there


@dataclass(frozen=True)
class ExternalOptions(Scoring):
    """How a head is tested on other data. None takes the head's own."""

    metric: str | None = None
    uncertain: str = "zeros"  # what -1 and an empty cell count as
    part: str = "all"  # all labelled images of the other data, or its "test" split
    names: Mapping[str, str] = field(default_factory=dict)  # class of the other data -> head's
    home: Path | None = None  # the store that the head was trained on, if it was moved
    leave_shared_out: bool = False  # images whose subject or bytes the head was trained on


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
        trial = _trial(head, about, store, settings, labels)
        evaluation, drop = trial.scores()
        result = result_of(
            trial.identity(evaluation.metric),
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
            external=trial.said() | drop,
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


@dataclass(frozen=True)
class _Trial:
    """A head's answers on other data, and all that is said of them. rows (n,) are the store's."""

    head: Path
    about: Mapping[str, Any]
    folder: Path | None  # of the head's result
    row: Result | None
    store: FeatureStore
    matched: Matched
    rows: NDArray[np.int64]
    predictions: LabelledPredictions  # per image, or per unit
    overlap: Overlap
    left_out: NDArray[np.int64]  # rows that share subjects or files with those of training
    unlike: int
    n_bad: int
    silent: list[str]  # findings of which the head says the same, whatever the image
    settings: ExternalOptions
    metric: Metric

    @property
    def trained_on(self) -> str:
        """Return the name of the data set that the head was trained on."""
        return self.row.dataset if self.row else str(self.about.get("dataset") or UNSAID)

    def identity(self, metric: str) -> Identity:
        """Return what tells its result from others."""
        row, about, matched_ = self.row, self.about, self.matched
        whole = self.settings.part == "all"
        own = {
            "part": self.settings.part,
            "classes": dict(self.settings.names),
            "shared_left_out": self.settings.leave_shared_out,
        }
        if row:
            trained = {"trained_split": row.split_digest, "trained_labels": row.labels_digest}
            own = dict(row.settings) | trained | own
        else:
            own["head"] = _digest(self.head)
        kept = _without(matched_.manifest, self.left_out)
        data = data_of(self.store, kept, self.settings.uncertain, outer=whole)
        head = row.head if row else "linear" if about.get("C") is not None else "zero-shot"
        return Identity(
            **data,
            scenario=row.scenario if row else about.get("scenario") or f"frozen-{head}",
            head=head,
            feature=about["feature"],
            protocol=row.protocol if row else UNSAID,
            metric=metric,
            scored_by=self.settings.scored_by,
            shots=row.shots if row else None,
            seed=row.seed if row else self.settings.seed,
            settings=own,
            trained_on=self.trained_on,
        )

    def scores(self) -> tuple[Evaluation, dict[str, Any]]:
        """Return the scores here, and the drop from home."""
        about, manifest = self.about, self.matched.manifest
        known = about.get("thresholds") or {}
        evaluation = evaluate(
            manifest,
            self.predictions,
            self.metric,
            held_out=Frozen(known.get("outputs") or {}),
            chosen_on=f"{known.get('chosen_on') or 'what was held out'}, of {self.trained_on}",
            settings=replace(self.settings, threshold=known.get("rule") or "youden"),
        )
        return evaluation, self._drop(evaluation)

    def _home(self) -> LabelledPredictions | str:
        """Return the answers that the head's own result was scored on, or why there are none."""
        if not self.row or not self.folder:
            return "the head lies in no folder of results, so that its own score isn't known"
        if self.row.scored_by != self.settings.scored_by:
            return f"its own score is per {self.row.scored_by}"
        try:
            said = read_predictions(self.folder / self.row.predictions)
        except ProbeError:
            return "the predictions of its own result are gone"
        outputs = [said.classes.index(name) for name in self.matched.manifest.classes]
        labels = said.labels if said.labels.ndim == 1 else said.labels[:, outputs]
        return LabelledPredictions(
            ids=np.asarray(said.ids),
            subjects=np.asarray(said.subjects),
            y=labels,
            z=said.log_odds[:, outputs],
            columns={},
            has_subjects=self.row.subjects_known,
            fold=said.fold,
        )

    def _drop(self, evaluation: Evaluation) -> dict[str, Any]:
        """Return, by every metric, the score at home less the score here, with an interval.

        Of findings, both are means over those that are ranked on both sides.
        """
        home = self._home()
        if isinstance(home, str):
            return {"drop_method": f"none: {home}"}
        here, scores = self.predictions, evaluation.metrics
        of_task = metrics.of_task(evaluation.task)
        if here.y.ndim == 2:
            both = [(one.y == 1).any(0) & (one.y == 0).any(0) for one in (home, here)]
            common = both[0] & both[1]
            if not common.any():
                return {"drop_method": "none: no finding is there and not there on both sides"}
            home = replace(home, y=np.where(common, home.y, np.nan))
            if not common[both[1]].all():
                here = replace(here, y=np.where(common, here.y, np.nan))
                scores = scored(of_task, here, self.settings)
        before = scored(of_task, home, self.settings)
        drop = {
            name: {"home": before[name]["value"], "here": scores[name]["value"]}
            | independent_difference(before[name], scores[name])
            for name in scores
        }
        return {"drop": drop, "drop_method": METHOD}

    def said(self) -> dict[str, Any]:
        """Return what a result says of the test beside its scores, see schema.External."""
        predictions, manifest = self.predictions, self.matched.manifest
        moved = recalibrated(predictions.y, predictions.z)
        after = {}
        for metric in metrics.of_task(manifest.task):
            value = metrics.evaluate_log_odds(metric, predictions.y, moved)
            after[metric.name] = float(value[0]) if np.isfinite(value[0]) else None
        return {
            "head": str(self.head),
            "part": self.settings.part,
            "absent": list(self.matched.absent),
            "unknown": dict(self.matched.unknown),
            "calibration": in_the_large(
                predictions.y, predictions.z, predictions.subjects, manifest.classes
            ),
            "recalibrated": after,
            "shared": self.overlap.counts(manifest.id[self.rows], manifest.subject[self.rows]),
        }

    def notes(self, evaluation: Evaluation) -> list[str]:
        """Return what a reader of the number must know."""
        dataset, found = self.matched.manifest.dataset, []
        which = (
            "all labelled images, whatever part of a split they are in"
            if self.settings.part == "all"
            else f"the {self.settings.part} split"
        )
        found.append(f"tested on {dataset}: {which}; the head was trained on {self.trained_on}")
        if self.matched.absent:
            found.append(f"{dataset} has no {', '.join(self.matched.absent)}, which the head knows")
        if self.matched.unknown:
            named = ", ".join(f"{name} ({n})" for name, n in self.matched.unknown.items())
            what = "are left out" if self.matched.manifest.task == "multiclass" else "not scored"
            found.append(f"the head doesn't know {named}: images of these {what}")
        if self.silent:
            found.append(f"the head says the same of every image, not scored: {_some(self.silent)}")
        if self.overlap.why_not:
            found.append(f"overlap with the training images isn't checked: {self.overlap.why_not}")
        if len(self.left_out):
            found.append(
                f"{len(self.left_out)} images are left out that share a subject or their bytes "
                "with the training images"
            )
        if self.unlike > (1 - SHARE) * len(self.rows):
            found.append(
                f"{self.unlike} of {len(self.rows)} images are unlike the head's training images "
                f"(by their features, farther off than {SHARE:.0%} of these)"
            )
        more = remarks(
            replace(self.matched.manifest, split_from=which),
            self.predictions.y,
            self.predictions,
            evaluation,
            self.settings,
            self.settings.uncertain if self.matched.manifest.task == "multilabel" else "",
        )
        return [*found, *(note for note in more if not note.startswith("one side only in train"))]

    def audit(self) -> dict[str, Any]:
        """Return what it shares with the images that the head was trained on, as of an audit."""
        if self.overlap.why_not:
            return {}
        shared = self.overlap.counts(
            self.matched.manifest.id[self.rows], self.matched.manifest.subject[self.rows]
        )["trained_on"]
        n, files = shared.get("subjects", 0), shared["files"]
        unknown = "" if self.overlap.subjects_known else "; subjects are not known on both sides"
        if not n and not files:
            what = "no subject and no identical file" if not unknown else "no identical file"
            return {
                "line": f"it shares {what} with the training images{unknown}",
                "leaks": 0,
                "conflicts": 0,
            }
        parts = [
            f"{n} subject{'s' * (n != 1)} ({shared.get('images_of_subjects')} images)" if n else "",
            f"{files} identical file{'s' * (files != 1)}" if files else "",
        ]
        return {
            "line": f"the training images leak into it: {' and '.join(filter(None, parts))} "
            f"are of those that the head was trained on{unknown}",
            "leaks": n + files,
            "conflicts": 0,
        }


def _trial(
    head: Path,
    about: Mapping[str, Any],
    store: FeatureStore,
    settings: ExternalOptions,
    labels: Manifest | None,
) -> _Trial:
    """Apply a head to the rows of a store that are tested."""
    saved.check_suits(head, about, store)
    known = saved.row_of(head, settings.scored_by)
    folder, row = known or (None, None)
    manifest, done = _labels(store, labels)
    found = matched(manifest, about["classes"], about["task"], settings.names)
    rows = _rows(store, found, done, settings)
    hashes = store.hashes()
    shared = overlap(found.manifest.take(rows), [hashes[i] for i in rows], row, settings.home)
    left_out = rows[:0]
    if settings.leave_shared_out:
        if shared.why_not:
            raise ProbeError(f"what is shared with training isn't known: {shared.why_not}")
        rows, left_out = rows[~shared.trained], rows[shared.trained]
        if not len(rows):
            raise ProbeError(f"{store.path}: every image shares a subject or file with training")
        shared = overlap(found.manifest.take(rows), [hashes[i] for i in rows], row, settings.home)
    y = targets(found.manifest.label[rows], settings.uncertain)
    metric = metric_of(found.manifest, settings.metric or (row.metric if row else None))
    check_scoring(found.manifest, rows, y, settings)
    reader = saved.Reader(store, about["feature"], rows)
    z = saved.apply(head, about, reader)[:, found.outputs]
    if reader.damaged:
        raise ProbeError(
            f"{store.path}: {about['feature']} of {len(reader.damaged)} images is damaged; "
            "`medprobe verify` names them"
        )
    silent: list[str] = []
    if y.ndim == 2 and len(z) > 1:
        same = (z == z[0]).all(0)
        y = np.where(same, np.nan, y)
        silent = [name for name, one in zip(found.manifest.classes, same, strict=True) if one]
    predictions = labelled_predictions(found.manifest, rows, y, z, settings)
    n_bad = len(store.bad())
    return _Trial(
        *(head, about, folder, row, store, found, rows, predictions, shared, left_out),
        *(len(reader.unlike), n_bad, silent, settings, metric),
    )


def _labels(store: FeatureStore, labels: Manifest | None) -> tuple[Manifest, NDArray[np.uint8]]:
    """Return the manifest whose labels count, in the store's rows, and which rows are done (N,).

    Images of the store that `labels` hasn't got are in no split.
    """
    manifest, done = store.manifest(), store.done
    if (done == PENDING).any() and labels is None:
        raise ProbeError(
            f"{store.path} is not complete: {int((done == PENDING).sum())} of {len(done)} images "
            "are still to be done; run the same `medprobe extract` again"
        )
    if labels is None:
        return manifest, done
    rows = manifest.rows_of(labels)
    placed = np.full(len(manifest), -1, dtype=np.int64)
    placed[rows] = np.arange(len(rows))
    there = placed >= 0
    whole = labels.take(np.where(there, placed, 0))
    none = NO_LABEL if whole.label.ndim == 1 else NOT_STATED
    known = there if whole.label.ndim == 1 else there[:, None]
    return replace(
        whole,
        id=manifest.id,
        path=manifest.path,
        subject=np.where(there, whole.subject, manifest.id),
        split=np.where(there, whole.split, NO_SPLIT),
        label=np.where(known, whole.label, none),
    ), done


def _rows(
    store: FeatureStore, found: Matched, done: NDArray[np.uint8], settings: ExternalOptions
) -> NDArray[np.int64]:
    """Return the rows (n,) that are tested: labelled, whole, in the part that is asked for."""
    manifest = found.manifest
    part = np.isin(manifest.split, SPLITS if settings.part == "all" else (settings.part,))
    rows = np.flatnonzero(part & labelled(manifest.label) & (done == DONE))
    if not len(rows):
        where = "" if settings.part == "all" else f" in its {settings.part} split"
        raise ProbeError(
            f"{store.path}: no image with a label that the head knows is left{where} "
            f"({found.left_out} are of classes that it doesn't know)"
        )
    return rows


def _without(manifest: Manifest, rows: NDArray[np.int64]) -> Manifest:
    """Return a manifest of which some rows (n,) are in no split."""
    split = manifest.split.copy()
    split[rows] = NO_SPLIT
    return replace(manifest, split=split)


def _digest(head: Path) -> str:
    """Return the first 16 hex digits of a head's file."""
    return hashlib.sha256(head.with_suffix(".json").read_bytes()).hexdigest()[:16]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
