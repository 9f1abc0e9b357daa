"""From a list of images with labels to a Manifest.

Checks, class order, and a split where none is given.
"""

from __future__ import annotations

import posixpath
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features.datasets.bounds import texts
from features.datasets.cells import apart, likely_separator
from features.datasets.merging import merge_classes, ordered
from features.datasets.options import Options
from features.dicom import patient_id
from features.errors import DatasetError, ImageError
from features.manifest import (
    NO_LABEL,
    NO_SPLIT,
    PRESENT,
    SPLITS,
    Manifest,
    natural_order,
)
from features.splits import deal
from features.urls import Location, locate

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    NO_SPLIT: NO_SPLIT,
}


def index_classes(labels: Sequence[str]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return class indices (N,) and the classes in natural order; an empty label is NO_LABEL."""
    classes = natural_order([name for name in labels if name])
    place = {name: k for k, name in enumerate(classes)}
    return np.array([place.get(name, NO_LABEL) for name in labels], dtype=np.int32), tuple(classes)


def build(
    *,
    dataset: str,
    root: Location,
    paths: Sequence[str],
    label: NDArray[np.int32],
    classes: tuple[str, ...],
    subjects: Sequence[str] | None,
    splits: Sequence[str] | None,
    options: Options,
    where: str,
    metric: str | None = None,
    note: str = "",
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    split_from: str = "given",
    unused: NDArray[np.bool_] | None = None,
    label_from: str = "",
    order_from: str = "source",
) -> Manifest:
    """Check the table and return the Manifest. `where` names the source in errors.

    label is (N,) class index or (N, L) states of findings, unused (N,); texts are N long.

    Without splits, parts of `options.test_share` and `options.val_share`, or one fold, are dealt
    by subject, stratified, from `options.seed`. Raises DatasetError for no images, an image listed
    twice, a label that can't be split, or no test split. Images that are `unused` are in no part.
    label_from and order_from are as in Manifest.
    """
    if not len(paths):
        raise DatasetError(f"{where} holds no images")
    _refuse_twice(root, paths, where)
    if options.merge:
        label, classes = merge_classes(label, classes, options.merge, where)
    for alike in apart(classes):
        warnings.warn(
            f"{where}: the classes {' and '.join(alike)} differ only in how they are written, and "
            f'are kept apart; --merge "{alike[0]}={"+".join(alike)}" makes them one',
            stacklevel=3,
        )
    if label.ndim == 1 and len(classes) < 2 and options.labelled:
        raise DatasetError(
            f"{where} has {len(classes)} class ({', '.join(classes)}): want at least 2"
        )
    path = texts(paths, where, "path")
    if options.subject_from_dicom:
        subjects = _patient_ids(root, paths, where)
    subject = path if subjects is None else texts(subjects, where, "subject")
    if options.split in ("study", "official") and splits is None:
        raise DatasetError(f"{where} has no {options.split} split: leave --split out")
    if not options.labelled:  # to be predicted: no part is trained on
        split, split_from = np.full(len(path), NO_SPLIT, dtype="<U5"), "none: not trained on"
    elif splits is not None and options.split != "drawn":
        split = _given_split(splits, path, where)
    else:
        used = np.ones(len(path), dtype=bool) if unused is None else ~unused
        split = np.full(len(path), NO_SPLIT, dtype="<U5")
        split[used] = _drawn_split(subject[used], label[used], classes, path[used], options, where)
        by = "image" if subjects is None else "subject"
        split_from = f"drawn by {by}, stratified, {_parts(options)}, seed {options.seed}"
    if options.classes and options.labelled:
        # after the split was drawn, which is so the same in any order
        label, classes = ordered(label, classes, options.classes, where)
        order_from = "given"
    if options.labelled:
        _need_parts(split, subject, where, by=split_from)
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
        normalize=normalize,
        metric=metric,
        note=note,
        columns={k: texts(v, where, f"cell of {k}") for k, v in (columns or {}).items()},
        label_from=label_from,
        order_from=order_from,
    )


def _refuse_twice(root: Location, paths: Sequence[str], where: str) -> None:
    """Raise DatasetError for an image listed twice, however its path is spelled (a.png, ./a.png).

    Links are not followed, and URLs are taken as they are.
    """
    base = str(root) if isinstance(root, Path) else ""
    spelled = defaultdict(list)
    for path in paths:
        whole = path if "://" in path else posixpath.normpath(posixpath.join(base, path))
        spelled[whole].append(path)
    twice = [found for found in spelled.values() if len(found) > 1]
    if twice:
        first, *others = dict.fromkeys(twice[0])
        also = f", again as {others[0]}" if others else ""
        raise DatasetError(
            f"{where} lists {len(twice)} images more than once, the first is {first}{also}: "
            "want one row per image (several labels of one image go into one cell, see --label-sep)"
        )


def _need_parts(split: NDArray[np.str_], subject: NDArray[np.str_], where: str, *, by: str) -> None:
    """Raise DatasetError where nothing is trained on, or nothing tested. `by`: split_from."""
    for name in ("train", "test"):
        if name in split:
            continue
        found = ", ".join(f"{s} ({int((split == s).sum())})" for s in SPLITS if s in split)
        if by.startswith("drawn"):
            n = len(np.unique(subject[split != NO_SPLIT]))
            raise DatasetError(
                f"{where}: {n} subject{'s are' if n != 1 else ' is'} too few for a {name} part "
                f"({by}): found {found or 'none'}; a label is tested if two subjects have it. Give "
                "more subjects, or a column of splits"
            )
        raise DatasetError(
            f"{where} has no {name} split: found {found}; "
            "name the split column with --split-col, or draw one with --split drawn"
        )


def _patient_ids(root: Location, paths: Sequence[str], where: str) -> list[str]:
    found = []
    for path in paths:
        try:
            name = patient_id(locate(path) if "://" in path else root / path)
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
            if len(rows) == 1 and (sep := likely_separator(classes)) and sep in name:
                raise DatasetError(
                    f"{where}: {name!r} is the label of one image ({path[rows[0]]}): if it is "
                    f'several findings, give --label-sep "{sep}"; a class needs two images or more'
                )
            if len(rows) == 1:
                raise DatasetError(
                    f"{where}: class {name!r} has one image ({path[rows[0]]}), "
                    "which can't be in train and test: "
                    "drop it, merge it with another class, or give a split"
                )
    elif not (label == PRESENT).any():
        raise DatasetError(f"{where}: no image has any of {', '.join(classes)}")
    if options.test_share + options.val_share >= 1:
        raise DatasetError(f"{where}: test and val shares leave nothing to train on")
    names = np.array(["train", "test", "val"], dtype=np.str_)
    if options.test_fold is not None:
        i, k = options.test_fold
        part = (deal(subject, label, [1 / k] * k, seed=options.seed) == i - 1).astype(np.int64)
        part[_sole(subject, label)] = 0
    else:
        test, val = options.test_share, options.val_share
        shares = (1 - test - val, test, val) if val else (1 - test, test)
        part = deal(subject, label, shares, seed=options.seed, ranked=True)
    return np.asarray(names[part])


def _sole(subject: NDArray[np.str_], label: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which images are of the only subject with some label, (N,)."""
    columns = (
        [label == k for k in np.unique(label[label >= 0])] if label.ndim == 1 else label.T == 1
    )
    sole = [np.unique(subject[has]) for has in columns]
    return np.isin(subject, [names[0] for names in sole if len(names) == 1])


def _parts(options: Options) -> str:
    if options.test_fold is not None:
        return "test is fold {} of {}".format(*options.test_fold)
    val = f", {options.val_share:.0%} val" if options.val_share else ""
    return f"{options.test_share:.0%} test{val}"
