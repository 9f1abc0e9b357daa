"""Which rows train and which are tested, for each result of a feature.

A trial is what one result is of. Its training sets are fitted together with those of all other
trials; each has folds of its own that choose C. Rows are numbered as in Data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import Manifest
from probe import splits
from probe.choose import TrainingSet
from probe.data import Data
from probe.probing import ProbeSettings
from probe.score import metrics
from probe.score.predictions import LabelledPredictions

UNTESTED = -1


@dataclass(frozen=True)
class Trial:
    """What one result is of: training sets, and whose head is tested on which of the N rows.

    The first training set's head is the one that is kept. tested_by (N,) is the number of a
    training set, or UNTESTED. Of outer folds, set 1 + f is without fold f, which its head is tested
    on, and the first set is all rows.
    """

    training_sets: tuple[TrainingSet, ...]
    tested_by: NDArray[np.int64]
    outer: str = ""  # what outer folds these are; "" where the first head is tested
    values: tuple[str, ...] = ()  # what each fold is called, of the values of a column
    note: str = ""

    @property
    def seed(self) -> int:
        """Return what drew it."""
        return self.training_sets[0].seed


def trials_of(
    manifest: Manifest,
    data: Data,
    settings: ProbeSettings,
    shots: int | None,
    hashes: Sequence[str] | None = None,
) -> list[Trial]:
    """Return the trials of a number of shots, one per seed: draws of shots, deals of outer folds.

    hashes (N,) of the bytes of the manifest's images: identical ones are in one outer fold.

    Raises ProbeError for more folds than subjects, and for shots of images with several labels.
    """
    seeds = range(settings.seed, settings.seed + settings.seeds)
    if settings.outer is not None:
        return [_nested(manifest, data, settings, seed, hashes) for seed in seeds]
    train, tested_by = np.flatnonzero(data.train), np.where(data.train, UNTESTED, 0)
    if shots is None:
        subjects = len(np.unique(manifest.subject[data.rows[train]]))
        k = _check_folds(settings.folds, subjects)
        folds = splits.folds(manifest, data.rows[train], k=k, seed=settings.seed)
        return [Trial((TrainingSet(np.arange(len(train)), folds, settings.seed),), tested_by)]
    if manifest.task != "multiclass":
        raise ProbeError(
            "--shots counts images per class, and images of this data set have several "
            "findings: leave --shots out, or extract one finding as a class of its own "
            "(--label-col, --name)"
        )
    trials = []
    for seed in seeds:
        rows = splits.few(data.y[train], manifest.subject[data.rows[train]], shots, seed=seed)
        folds = splits.within(manifest, data.rows[train[rows]], k=settings.folds, seed=seed)
        trials.append(Trial((TrainingSet(rows, folds, seed, shots),), tested_by))
    return trials


def _nested(
    manifest: Manifest,
    data: Data,
    settings: ProbeSettings,
    seed: int,
    hashes: Sequence[str] | None,
) -> Trial:
    """Return the trial of one deal of outer folds, each training set with inner folds."""
    assert settings.outer is not None
    outer = splits.outer(manifest, data.rows, k=settings.outer, seed=seed, hashes=hashes)
    sets = []
    for without in (UNTESTED, *range(int(outer.part.max()) + 1)):
        kept = np.flatnonzero(outer.trains(without))
        if not len(kept):
            raise ProbeError(
                f"{manifest.dataset}: without {outer.values[without]} and its subjects' other "
                f"images nothing is left to train on"
            )
        k = _check_folds(settings.folds, len(np.unique(outer.group[kept])))
        label = manifest.label[data.rows[kept]]
        inner = splits.dealt(outer.group[kept], label, k=k, seed=seed, by=outer.by)
        sets.append(TrainingSet(kept, inner, seed))
    note = _unseen(manifest, data, sets, outer.part)
    if outer.torn:
        lie = "s lie" if outer.torn != 1 else " lies"
        note += "; " * bool(note) + (
            f"{outer.torn} {outer.by}{lie} in several values of "
            f"{settings.outer}: where one value is tested, no image of theirs trains"
        )
    return Trial(tuple(sets), 1 + outer.part, outer.kind, outer.values, note)


def _unseen(
    manifest: Manifest, data: Data, sets: Sequence[TrainingSet], part: NDArray[np.int64]
) -> str:
    """Name the classes with images that no head which is tested on them was shown; "" for none."""
    if manifest.task != "multiclass":
        return ""
    names: dict[str, int] = {}
    for f, subset in enumerate(sets[1:]):
        y = data.y[part == f]
        for k in np.setdiff1d(y, data.y[subset.rows]).tolist():
            names[manifest.classes[k]] = names.get(manifest.classes[k], 0) + int((y == k).sum())
    said = [f"{n} images of {name}" for name, n in names.items()]
    if not said:
        return ""
    return f"{', '.join(said)} can't be called right: all are in one outer fold, no head saw others"


def _check_folds(k: int, subjects: int) -> int:
    if not 2 <= k <= subjects:
        raise ProbeError(
            f"{k} folds of {subjects} training subjects: want 2 to {subjects}, see --folds"
        )
    return k


def of_outer_folds(
    kind: str, predictions: LabelledPredictions, metric: metrics.Metric, **chosen: list[Any]
) -> dict[str, Any]:
    """Return what a result says of its outer folds: what they are, and of each size and score.

    chosen: what was chosen in each, such as C. There are no scores where all are ranked together.
    """
    assert predictions.fold is not None
    folds = [np.flatnonzero(predictions.fold == f) for f in range(int(predictions.fold.max()) + 1)]
    said: dict[str, Any] = {"kind": kind, "n": [len(rows) for rows in folds]}
    if not predictions.ranked_together:
        each = [
            metrics.evaluate_log_odds(metric, predictions.y[rows], predictions.z[rows])[0]
            for rows in folds
        ]
        said["scores"] = [float(v) if np.isfinite(v) else None for v in each]
    return said | {name: values for name, values in chosen.items() if None not in values}
