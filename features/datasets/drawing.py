"""From a list of images with labels to a Manifest.

Checks, class order, and a split where none is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features.datasets.options import Options
from features.dicom import patient_id
from features.errors import DatasetError, ImageError
from features.manifest import NO_LABEL, PRESENT, SPLITS, Manifest, natural_order
from features.splits import deal

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def index_classes(labels: Sequence[str]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return class indices (N,) and the classes in natural order; an empty label is NO_LABEL."""
    classes = natural_order([name for name in labels if name])
    place = {name: k for k, name in enumerate(classes)}
    return np.array([place.get(name, NO_LABEL) for name in labels], dtype=np.int32), tuple(classes)


def build(
    *,
    dataset: str,
    root: Path,
    paths: Sequence[str],
    label: NDArray[np.int32],
    classes: tuple[str, ...],
    subjects: Sequence[str] | None,
    splits: Sequence[str] | None,
    options: Options,
    where: str,
    metric: str | None = None,
    note: str = "",
) -> Manifest:
    """Check the table and return the Manifest. `where` names the source in errors.

    Without splits a test part of `options.test_share` is dealt by subject, stratified, from
    `options.seed`. Raises DatasetError for no images, an image listed twice, a label that can't
    be split, or no test split.
    """
    if not len(paths):
        raise DatasetError(f"{where} holds no images")
    twice = [path for path, n in Counter(paths).items() if n > 1]
    if twice:
        raise DatasetError(
            f"{where} lists {len(twice)} images more than once, the first is {twice[0]}: "
            "want one row per image (several labels of one image go into one cell, see --label-sep)"
        )
    if label.ndim == 1 and len(classes) < 2:
        raise DatasetError(
            f"{where} has {len(classes)} class ({', '.join(classes)}): want at least 2"
        )
    path = np.array(paths, dtype=np.str_)
    if options.subject_from_dicom:
        subjects = _patient_ids(root, paths, where)
    subject = path if subjects is None else np.array(subjects, dtype=np.str_)
    if splits is not None:
        split, split_from = _given_split(splits, path, where), "given"
    else:
        split = _drawn_split(subject, label, classes, path, options, where)
        split_from = (
            f"drawn by {'image' if subjects is None else 'subject'}, stratified, "
            f"{options.test_share:.0%} test, seed {options.seed}"
        )
    for name in ("train", "test"):
        if name not in split:
            found = ", ".join(f"{s} ({int((split == s).sum())})" for s in SPLITS if s in split)
            raise DatasetError(
                f"{where} has no {name} split: found {found}; "
                "name the split column with --split-col, or leave splits out and one is drawn"
            )
    return Manifest(
        dataset=dataset,
        root=root,
        id=path,
        path=path,
        subject=subject,
        split=split,
        label=label,
        classes=classes,
        split_from=split_from,
        metric=metric,
        note=note,
    )


def _patient_ids(root: Path, paths: Sequence[str], where: str) -> list[str]:
    found = []
    for path in paths:
        try:
            name = patient_id(root / path)
        except ImageError as error:
            raise DatasetError(f"{where}: {path}: no patient id: {error}") from None
        if not name:
            raise DatasetError(f"{where}: {path} has no patient id: leave --subject-from-dicom out")
        found.append(name)
    return found


def _given_split(splits: Sequence[str], path: NDArray[np.str_], where: str) -> NDArray[np.str_]:
    names = [SPLIT_NAMES.get(s.strip().lower()) for s in splits]
    if None in names:
        i = names.index(None)
        raise DatasetError(
            f"{where}: {path[i]} has split {splits[i]!r}: "
            "want train, val or test in every row, or in none"
        )
    return np.array(names, dtype=np.str_)


def _drawn_split(
    subject: NDArray[np.str_],
    label: NDArray[np.int32],
    classes: tuple[str, ...],
    path: NDArray[np.str_],
    options: Options,
    where: str,
) -> NDArray[np.str_]:
    if label.ndim == 1:
        for k, name in enumerate(classes):
            rows = np.flatnonzero(label == k)
            if len(rows) == 1:
                raise DatasetError(
                    f"{where}: class {name!r} has one image ({path[rows[0]]}), "
                    "which can't be in train and test: "
                    "drop it, merge it with another class, or give a split"
                )
    elif not (label == PRESENT).any():
        raise DatasetError(f"{where}: no image has any of {', '.join(classes)}")
    shares = (1 - options.test_share, options.test_share)
    part = deal(subject, label, shares, seed=options.seed)
    return np.array(["train", "test"], dtype=np.str_)[part]
