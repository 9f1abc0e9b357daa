"""What is scored: predictions and labels of the test images, one of each per image or per unit.

Shapes: N images (or units: subjects, studies), K classes, L findings. y is (N,) class index or (N,
L) of 1, 0, NaN; z (N, K) or (N, L) log-odds (log_odds.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import Manifest
from probe.score import log_odds
from probe.score.intervals import METHODS


@dataclass(frozen=True)
class Scoring:
    """How test predictions are scored."""

    seed: int = 0  # of folds and of the bootstrap
    bootstrap: int = 1000  # resamples of the subjects
    interval: str = METHODS[0]
    aggregate: str | None = None  # "mean" or "max" of the images of a unit
    unit: str = "subject"  # or a column of the manifest
    by: tuple[str, ...] = ()  # columns whose groups are scored apart
    threshold: str = "youden"  # or "f1": the rule, applied to what was held out

    @property
    def scored_by(self) -> str:
        """Return what one prediction stands for: "image", or "subject (mean)"."""
        return f"{self.unit} ({self.aggregate})" if self.aggregate else "image"


@dataclass(frozen=True)
class LabelledPredictions:
    """Predictions and labels to score: ids, subjects and columns (N,), y, log-odds z."""

    ids: NDArray[Any]
    subjects: NDArray[Any]
    y: NDArray[Any]
    z: NDArray[np.float64]
    columns: Mapping[str, NDArray[Any]]
    has_subjects: bool = True  # else images are taken as independent
    alone: int = 0  # images without a unit, each of which is one of its own

    @property
    def independent(self) -> str:
        """Return what is taken as independent: "subject", or "image" where none are known."""
        return "subject" if self.has_subjects else "image"

    @cached_property
    def p(self) -> NDArray[np.float64]:
        """Return the probabilities, of z's shape (N, K) or (N, L)."""
        return log_odds.probabilities(self.z)


def labelled_predictions(
    manifest: Manifest,
    rows: NDArray[np.integer],
    y: NDArray[Any],
    z: NDArray[np.float64],
    y_train: NDArray[Any],
    settings: Scoring,
) -> LabelledPredictions:
    """Return what is scored: one prediction per image, or per unit.

    rows (N,) of the manifest; y (N,) or (N, L), z (N, K) or (N, L) of these. A finding that
    training showed one side of only has no label here: a head can't rank it, and scored it would be
    .5.
    """
    if y.ndim == 2:
        both = (y_train == 1).any(0) & (y_train == 0).any(0)
        y = np.where(both, y, np.nan)
    columns = {name: column(manifest, name, rows) for name in settings.by}
    ids, subjects = manifest.id[rows], manifest.subject[rows]
    per_image = LabelledPredictions(ids, subjects, y, z, columns, manifest.has_subjects)
    if settings.aggregate is None:
        return per_image
    return aggregate(per_image, column(manifest, settings.unit, rows), settings.aggregate)


def check_scoring(
    manifest: Manifest, rows: NDArray[np.integer], y: NDArray[Any], settings: Scoring
) -> None:
    """Raise ProbeError where columns or units can't be scored, before a fit; rows (N,)."""
    labelled_predictions(manifest, rows, y, np.zeros((len(y), len(manifest.classes))), y, settings)


def column(manifest: Manifest, name: str, rows: NDArray[np.integer]) -> NDArray[Any]:
    """Return a column of the manifest at rows (N,). Raises ProbeError where it has none."""
    if name in ("subject", "path", "id"):
        return np.asarray(getattr(manifest, name)[rows])
    if name not in manifest.columns:
        known = ", ".join(manifest.columns) or "none"
        raise ProbeError(
            f"{manifest.dataset} has no column {name!r}: found {known}; "
            "columns come with the data set, see docs/datasets.md"
        )
    return np.asarray(manifest.columns[name][rows])


def aggregate(images: LabelledPredictions, units: NDArray[Any], how: str) -> LabelledPredictions:
    """Return one prediction per unit: the mean, or the largest, of its images' probabilities.

    units (N,) names the unit of each image. A finding is there where any image has it. An image
    without a unit ("") is one of its own, under its id. Raises ProbeError for images of one unit
    with different classes, or of different subjects.
    """
    alone = units == ""
    names = np.where(alone, images.ids.astype(np.str_), units)
    if both := set(names[alone].tolist()) & set(names[~alone].tolist()):
        raise ProbeError(
            f"{min(both)} is the id of an image without a unit, and the name of a unit: "
            "give the image a unit, or take another column by --unit"
        )
    names, first, member = np.unique(names, return_index=True, return_inverse=True)
    mixed_subjects = np.flatnonzero(images.subjects != images.subjects[first][member])
    if len(mixed_subjects):
        raise ProbeError(
            f"images of {names[member[mixed_subjects[0]]]} are of several subjects: "
            "take a --unit whose images are of one subject each"
        )
    y = images.y[first]
    if how == "max":
        z = log_odds.largest(images.z, member, len(names), classes=y.ndim == 1)
    else:
        z = log_odds.mean(images.z, member, len(names))
    if y.ndim == 1:
        differ = np.flatnonzero(images.y != y[member])
        if len(differ):
            raise ProbeError(
                f"images of {names[member[differ[0]]]} have different classes: "
                "leave --aggregate out, or name a --unit of one class each"
            )
    else:
        y = np.full((len(names), images.y.shape[1]), -1.0)
        np.maximum.at(y, member, np.where(np.isnan(images.y), -1, images.y))
        y[y < 0] = np.nan
    mixed = {
        name: np.array(
            [
                v[member == k][0] if len(set(v[member == k])) == 1 else "several"
                for k in range(len(names))
            ]
        )
        for name, v in images.columns.items()
    }
    subjects, known = images.subjects[first], images.has_subjects
    return LabelledPredictions(names, subjects, y, z, mixed, known, int(alone.sum()))
