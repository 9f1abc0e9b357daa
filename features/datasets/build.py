"""From a list of images with labels to a Manifest.

Checks, class order, and a split where none is given.
"""

from __future__ import annotations

import posixpath
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features.datasets.bounds import texts
from features.datasets.cells import apart
from features.datasets.merging import merge_classes, ordered
from features.datasets.options import Options
from features.datasets.splitting import Labelled, check_parts, split_of
from features.dicom import patient_id
from features.errors import DatasetError, ImageError
from features.manifest import NO_LABEL, Manifest, natural_order
from features.urls import Location, locate


@dataclass(frozen=True)
class Listing:
    """Images as a source lists them: texts are N long, label (N,) class index or (N, L) states.

    where names the source in errors. subjects: None where each image is one of its own. splits:
    None where none are given; split_from says by whom. unused (N,): images that are in no part.
    metric, note, normalize, label_from and order_from are as in Manifest.
    """

    dataset: str
    where: str
    root: Location
    paths: Sequence[str]
    label: NDArray[np.int32]
    classes: tuple[str, ...]
    subjects: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    split_from: str = "given"
    unused: NDArray[np.bool_] | None = None
    metric: str | None = None
    note: str = ""
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    columns: Mapping[str, Sequence[str]] | None = None
    label_from: str = ""
    order_from: str = "source"


def index_classes(labels: Sequence[str]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return class indices (N,) and the classes in natural order; an empty label is NO_LABEL."""
    classes = natural_order([name for name in labels if name])
    index_of = {name: k for k, name in enumerate(classes)}
    return np.array([index_of.get(name, NO_LABEL) for name in labels], dtype=np.int32), tuple(
        classes
    )


def build(listing: Listing, options: Options) -> Manifest:
    """Check a listing and return the Manifest.

    Without splits, parts of `options.test_share` and `options.val_share`, or one fold, are dealt
    by subject, stratified, from `options.seed`. Raises DatasetError for no images, an image listed
    twice, a label that can't be split, or no test split.
    """
    where, order_from = listing.where, listing.order_from
    _check_paths(listing)
    label, classes = _classes(listing, options)
    path = texts(listing.paths, where, "path")
    subjects = _patient_ids(listing) if options.subject_from_dicom else listing.subjects
    subject = path if subjects is None else texts(subjects, where, "subject")
    images = Labelled(where, path, subject, label, classes)
    split, split_from = split_of(images, listing.splits, listing.unused, options)
    split_from = split_from or listing.split_from
    if options.classes and options.labelled:
        # after the split was drawn, which is so the same in any order
        label, classes = ordered(label, classes, options.classes, where)
        order_from = "given"
    if options.labelled and not options.whole:
        check_parts(images, split, split_from)
    columns = (listing.columns or {}).items()
    return Manifest(
        dataset=listing.dataset,
        root=listing.root,
        id=path,
        path=path,
        subject=subject,
        split=split,
        label=label,
        classes=classes,
        split_from=split_from,
        normalize=listing.normalize,
        metric=listing.metric,
        note=listing.note,
        columns={name: texts(v, where, f"cell of {name}") for name, v in columns},
        label_from=listing.label_from,
        order_from=order_from,
    )


def _classes(listing: Listing, options: Options) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return labels (N,) or (N, L) and classes, some joined as asked. DatasetError for too few."""
    label, classes, where = listing.label, listing.classes, listing.where
    if options.merge:
        label, classes = merge_classes(label, classes, options.merge, where)
    for alike in apart(classes):
        warnings.warn(
            f"{where}: the classes {' and '.join(alike)} differ only in how they are written, and "
            f'are kept apart; --merge "{alike[0]}={"+".join(alike)}" makes them one',
            stacklevel=4,
        )
    if label.ndim == 1 and len(classes) < 2 and options.labelled and not options.whole:
        raise DatasetError(
            f"{where} has {len(classes)} class ({', '.join(classes)}): want at least 2"
        )
    return label, classes


def _check_paths(listing: Listing) -> None:
    """Raise DatasetError for no image, or one that is listed twice.

    a.png and ./a.png are the same. Links are not followed, and URLs are taken as they are.
    """
    where, root = listing.where, listing.root
    if not len(listing.paths):
        raise DatasetError(f"{where} holds no images")
    base = str(root) if isinstance(root, Path) else ""
    spelled = defaultdict(list)
    for path in listing.paths:
        whole = path if "://" in path else posixpath.normpath(posixpath.join(base, path))
        spelled[whole].append(path)
    twice = [same for same in spelled.values() if len(same) > 1]
    if twice:
        first, *others = dict.fromkeys(twice[0])
        also = f", again as {others[0]}" if others else ""
        raise DatasetError(
            f"{where} lists {len(twice)} images more than once, the first is {first}{also}: "
            "want one row per image (several labels of one image go into one cell, see --label-sep)"
        )


def _patient_ids(listing: Listing) -> list[str]:
    ids, where = [], listing.where
    for path in listing.paths:
        try:
            name = patient_id(locate(path) if "://" in path else listing.root / path)
        except ImageError as error:
            raise DatasetError(f"{where}: {path}: no patient id: {error}") from None
        if not name:
            raise DatasetError(f"{where}: {path} has no patient id: leave --subject-from-dicom out")
        ids.append(name)
    return ids
