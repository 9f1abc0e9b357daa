"""The manifest: the ordered table of images with labels, subjects and splits.

Row i is image i of every store. Labels are numbers with names beside them. A multiclass label is a
class index, or NO_LABEL. A multilabel row has one number per finding: PRESENT, ABSENT, UNCERTAIN
(the -1 of CheXpert) or NOT_STATED (an empty cell).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.urls import Location, locate

SPLITS = ("train", "val", "test")
NO_SPLIT = "none"  # an image that is neither trained on nor tested
NO_LABEL = -1
NUMBER = re.compile(r"(\d+(?:\.\d+)?)", re.ASCII)
PRESENT, ABSENT, UNCERTAIN, NOT_STATED = 1, 0, -1, -2


@dataclass(frozen=True, repr=False)
class Manifest:
    """N images. `path` is relative to `root`, or a URL; images of a `subject` stay together."""

    dataset: str
    root: Location
    id: NDArray[Any]  # (N,) str, unique
    path: NDArray[Any]  # (N,) str
    subject: NDArray[Any]  # (N,) str
    split: NDArray[Any]  # (N,) one of SPLITS, or NO_SPLIT
    label: NDArray[np.int32]  # (N,) class index, or (N, L) states of findings
    classes: tuple[str, ...]
    split_from: str  # "given", or how it was drawn
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # published mean, std
    metric: str | None = None  # what the data set is usually scored by
    note: str = ""  # what a reader of its numbers must know
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # (N,) str: sex, view, ...
    label_from: str = ""  # the column of a table that labels are from; "" where there is no choice
    order_from: str = ""  # of the classes: "given" (--classes), "source" or "names" (sorted)
    labelled_by: str = ""  # the command that gave labels and splits; "" where none did

    @property
    def task(self) -> str:
        """Return "multiclass" (one class per image) or "multilabel" (any number of findings)."""
        return "multilabel" if self.label.ndim == 2 else "multiclass"

    @property
    def has_subjects(self) -> bool:
        """Say whether images are known to belong to subjects; else each is one of its own."""
        return not np.array_equal(self.subject, self.id)

    def __repr__(self) -> str:
        """Return the data set's name, and how many images each split and class has."""
        what = "findings" if self.task == "multilabel" else "classes"
        parts = [f"{int((self.split == s).sum())} {s}" for s in (*SPLITS, NO_SPLIT)]
        splits = ", ".join(part for part in parts if not part.startswith("0 "))
        return (
            f"Manifest({self.dataset!r}, {len(self)} images of {len(np.unique(self.subject))} "
            f"subjects, {len(self.classes)} {what}; {splits}; split {self.split_from})"
        )

    def __len__(self) -> int:
        """Return N."""
        return len(self.id)

    def head(self, n: int) -> Manifest:
        """Return the first n images."""
        return self.take(np.arange(min(n, len(self))))

    def take(self, rows: NDArray[np.integer]) -> Manifest:
        """Return the images of an index (n,)."""
        names = ("id", "path", "subject", "split", "label")
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, columns=columns, **{name: getattr(self, name)[rows] for name in names})

    def rows_of(self, some: Manifest) -> NDArray[np.int64]:
        """Return in which rows (n,) the images of another manifest are; all of them must be."""
        row_of = {name: row for row, name in enumerate(self.id.tolist())}
        return np.array([row_of[name] for name in some.id.tolist()], dtype=np.int64)

    def file(self, row: int) -> Location:
        """Return where an image lies."""
        path = str(self.path[row])
        return locate(path) if "://" in path else self.root / path

    def digest(self) -> str:
        """Return a hash of which image stands in which row, without labels, subjects and splits."""
        return digest(list(zip(self.id.tolist(), self.path.tolist(), strict=True)))

    def split_digest(self) -> str:
        """Return a hash of which image is in which split, whatever the order of the rows."""
        return digest(sorted(zip(self.id.tolist(), self.split.tolist(), strict=True)))

    def labels_digest(self) -> str:
        """Return a hash of what each image is labelled as, in words, whatever the order of rows."""
        if self.label.ndim == 1:
            names = [*self.classes, ""]  # NO_LABEL is the last one
            labels: list[Any] = [names[label] for label in self.label.tolist()]
        else:
            labels = self.label.tolist()
        return digest([list(self.classes), sorted(zip(self.id.tolist(), labels, strict=True))])


def digest(value: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def natural_order(names: Sequence[str]) -> list[str]:
    """Sort class names as text, but the numbers in them as numbers (10 and Grade 10 follow 9)."""
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        values = {}
    if values and all(map(math.isfinite, values.values())):
        return sorted(values, key=lambda name: (values[name], name))
    return sorted(set(names), key=_natural)


def _natural(name: str) -> tuple[list[str | float], str]:
    """Return text and numbers in turn: "Grade 10" is ["Grade ", 10.0, ""]."""
    parts = NUMBER.split(name)
    return [float(part) if k % 2 else part for k, part in enumerate(parts)], name
