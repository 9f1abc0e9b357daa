"""A head's answers on other data than its own, and what a reader of their score must know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import NO_LABEL, NO_SPLIT, NOT_STATED, SPLITS, Manifest
from features.store import DONE, PENDING, FeatureStore
from probe import saved
from probe.data import labelled, targets
from probe.likeness import SHARE
from probe.matching import Matched, matched
from probe.overlap import Overlap, overlap
from probe.results import Evaluation, Result
from probe.score.metrics import Metric
from probe.score.predictions import (
    LabelledPredictions,
    Scoring,
    check_scoring,
    labelled_predictions,
)
from probe.tested import metric_of, remarks

PARTS = ("all", "test")
UNCERTAIN_LABELS = "uncertain labels: "  # how a note of a result begins (tested.py)
UNSAID = "unknown"  # protocol and data set of a head whose result isn't there


@dataclass(frozen=True)
class ExternalOptions(Scoring):
    """How a head is tested on other data. None takes the head's own."""

    metric: str | None = None
    uncertain: str | None = None  # what -1 and an empty cell count as
    part: str = "all"  # all labelled images of the other data, or its "test" split
    names: Mapping[str, str] = field(default_factory=dict)  # class of the other data -> head's
    home: Path | None = None  # the store that the head was trained on, if it was moved
    leave_shared_out: bool = False  # images whose subject or bytes the head was trained on


@dataclass(frozen=True)
class Elsewhere:
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
            self.matched.manifest,
            self.predictions.y,
            self.predictions,
            evaluation,
            self.settings,
            self.settings.uncertain or "" if self.matched.manifest.task == "multilabel" else "",
        )
        said = ("split: ", "one side only in training")  # or not meant, as nothing was trained here
        return [*found, *(note for note in more if not note.startswith(said))]

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


def applied(
    head: Path,
    about: Mapping[str, Any],
    store: FeatureStore,
    settings: ExternalOptions,
    labels: Manifest | None,
) -> Elsewhere:
    """Apply a head to the rows of a store that are tested."""
    saved.check_suits(head, about, store)
    known = saved.row_of(head, settings.scored_by)
    folder, row = known or (None, None)
    settings = replace(settings, uncertain=settings.uncertain or _uncertain(row))
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
    y = targets(found.manifest.label[rows], settings.uncertain or "")
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
    return Elsewhere(
        *(head, about, folder, row, store, found, rows, predictions, shared, left_out),
        *(len(reader.unlike), n_bad, silent, settings, metric),
    )


def _uncertain(row: Result | None) -> str:
    """Return what an uncertain label counted as where the head was trained; zeros if not known."""
    said = [note for note in (row.notes if row else ()) if note.startswith(UNCERTAIN_LABELS)]
    return said[0].removeprefix(UNCERTAIN_LABELS) if said else "zeros"


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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
