"""The split of a data set: as it is given, dealt by subject, or none where nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.datasets.cells import likely_separator
from features.datasets.options import Options
from features.errors import DatasetError
from features.manifest import NO_SPLIT, PRESENT, SPLITS
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
    NO_SPLIT: NO_SPLIT,
}


@dataclass(frozen=True)
class Labelled:
    """Images to be split: path and subject (N,), label (N,) or (N, L). where: named in errors."""

    where: str
    path: NDArray[np.str_]
    subject: NDArray[np.str_]  # the paths where no subjects are known
    label: NDArray[np.int32]
    classes: tuple[str, ...]

    def take(self, rows: NDArray[np.bool_]) -> Labelled:
        """Return some of the images, rows (N,)."""
        return replace(
            self, path=self.path[rows], subject=self.subject[rows], label=self.label[rows]
        )


def split_of(
    images: Labelled,
    splits: Sequence[str] | None,
    unused: NDArray[np.bool_] | None,
    options: Options,
) -> tuple[NDArray[np.str_], str]:
    """Return the part of every image (N,), and where it comes from: "" where `splits` say it.

    Images that are `unused` (N,) are in no part of a split that is drawn. Raises DatasetError for
    a split that isn't there, that names other parts, or that can't be drawn.
    """
    n = len(images.path)
    if options.split in ("study", "official") and splits is None:
        raise DatasetError(f"{images.where} has no {options.split} split: leave --split out")
    if not options.labelled:  # to be predicted: no part is trained on
        return np.full(n, NO_SPLIT, dtype="<U5"), "none: not trained on"
    if splits is not None and options.split != "drawn":
        return _given_split(images, splits), ""
    used = np.ones(n, dtype=bool) if unused is None else ~unused
    split = np.full(n, NO_SPLIT, dtype="<U5")
    if options.whole:
        split[used] = "test"
        return split, "all images are tested"
    split[used] = _drawn_split(images.take(used), options)
    by = "image" if images.subject is images.path else "subject"
    return split, f"drawn by {by}, stratified, {_parts(options)}, seed {options.seed}"


def check_parts(images: Labelled, split: NDArray[np.str_], split_from: str) -> None:
    """Raise DatasetError where no image is trained on, or none tested; split (N,)."""
    for name in ("train", "test"):
        if name in split:
            continue
        counts = ", ".join(f"{s} ({int((split == s).sum())})" for s in SPLITS if s in split)
        if split_from.startswith("drawn"):
            n = len(np.unique(images.subject[split != NO_SPLIT]))
            raise DatasetError(
                f"{images.where}: {n} subject{'s are' if n != 1 else ' is'} too few for a {name} "
                f"part ({split_from}): found {counts or 'none'}; a label is tested if two subjects "
                "have it. Give more subjects, or a column of splits"
            )
        raise DatasetError(
            f"{images.where} has no {name} split: found {counts}; "
            "name the split column with --split-col, or draw one with --split drawn"
        )


def _given_split(images: Labelled, splits: Sequence[str]) -> NDArray[np.str_]:
    """Return splits as a table has them under our names, (N,). DatasetError for other words."""
    names = [SPLIT_NAMES.get(s.strip().lower()) for s in splits]
    if None in names:
        i = names.index(None)
        raise DatasetError(
            f"{images.where}: {images.path[i]} has split {splits[i]!r}: "
            "want train, val or test in every row, or in none"
        )
    return np.array(names, dtype=np.str_)


def _drawn_split(images: Labelled, options: Options) -> NDArray[np.str_]:
    """Draw a split by subject, (N,). DatasetError where a class can't be in train and test."""
    label, subject, where = images.label, images.subject, images.where
    if label.ndim == 1:
        for k, name in enumerate(images.classes):
            rows = np.flatnonzero(label == k)
            if len(rows) == 1 and (sep := likely_separator(images.classes)) and sep in name:
                raise DatasetError(
                    f"{where}: {name!r} is the label of one image ({images.path[rows[0]]}): if it "
                    f'is several findings, give --label-sep "{sep}"; a class needs two images or '
                    "more"
                )
            if len(rows) == 1:
                raise DatasetError(
                    f"{where}: class {name!r} has one image ({images.path[rows[0]]}), "
                    "which can't be in train and test: "
                    "drop it, merge it with another class, or give a split"
                )
    elif not (label == PRESENT).any():
        raise DatasetError(f"{where}: no image has any of {', '.join(images.classes)}")
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
