"""Which classes there are, and in which order: those that become one, and an order that was given.

The order counts: of two classes the last is the positive one, and quadratic kappa takes them as
grades from low to high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from features.datasets.cells import clean
from features.errors import DatasetError
from features.manifest import ABSENT, NO_LABEL, NOT_STATED, PRESENT, UNCERTAIN


def ordered(
    label: NDArray[np.int32], classes: tuple[str, ...], wanted: Sequence[str], where: str
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Return labels and classes in the order wanted. Labels are (N,), or (N, L) of findings.

    Raises DatasetError where other classes are named than there are.
    """
    names = [clean(name) for name in wanted]
    strange = [name for name in names if name not in classes]
    missing = [name for name in classes if name not in names]
    if strange or missing or len(names) != len(classes):
        wrong = [f"{', '.join(strange)}: no such class"] if strange else []
        wrong += [f"{', '.join(missing)} left out"] if missing else []
        wrong = wrong or ["a class is named twice"]
        raise DatasetError(
            f"{where}: --classes {','.join(names)}: {'; '.join(wrong)}. Want each of "
            f"{', '.join(classes)} once, in their order, with commas between them"
        )
    if label.ndim == 2:
        return label[:, [classes.index(name) for name in names]], tuple(names)
    new_index = np.full(len(classes) + 1, NO_LABEL, dtype=np.int32)  # the last is NO_LABEL's
    new_index[:-1] = [names.index(name) for name in classes]
    return new_index[label], tuple(names)


def merge_classes(
    label: NDArray[np.int32], classes: tuple[str, ...], merges: Sequence[str], where: str
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Join classes, or findings, as "new=old+old" says; the new one stands where its first stood.

    Labels are (N,), or (N, L) of findings. A merged finding is present where any of its parts is,
    else uncertain where any is, else absent where any is stated. Raises DatasetError for a name
    that is no class, or is another's already.
    """
    names = list(classes)
    gone: dict[str, str] = {}  # classes that were joined, and into what
    for merge in merges:
        new, parts = _merge(merge, names, gone, where)
        old = [names.index(name) for name in parts]
        if label.ndim == 1:
            joined = np.where(np.isin(label, old), min(old), label)
        else:
            order = {PRESENT: 3, UNCERTAIN: 2, ABSENT: 1, NOT_STATED: 0}
            states = np.array([NOT_STATED, ABSENT, UNCERTAIN, PRESENT], dtype=np.int32)
            height = np.vectorize(order.__getitem__)(label[:, old]).max(1)
            joined = label.copy()
            joined[:, min(old)] = states[height]
        names[min(old)] = new
        gone |= {name: new for name in parts}
        kept = [k for k in range(len(names)) if k not in old or k == min(old)]
        if label.ndim == 1:
            new_index = np.full(len(names) + 1, NO_LABEL, dtype=np.int32)  # the last is NO_LABEL's
            new_index[kept] = np.arange(len(kept))
            label = new_index[joined]
        else:
            label = joined[:, kept]
        names = [names[k] for k in kept]
    return label, tuple(names)


def _merge(
    merge: str, names: Sequence[str], gone: Mapping[str, str], where: str
) -> tuple[str, list[str]]:
    """Return the new name and the old ones of "new=old+old"."""
    new, _, rest = merge.partition("=")
    new, parts = new.strip(), [name.strip() for name in rest.split("+")]
    wrong = [name for name in parts if name not in names]
    if wrong and wrong[0] in gone:
        raise DatasetError(
            f"{where}: --merge {merge!r}: {wrong[0]} went into {gone[wrong[0]]} already; "
            "name each class in one --merge"
        )
    if not new or wrong:
        raise DatasetError(
            f"{where}: --merge {merge!r} names no class of {', '.join(names)}: want NEW=OLD+OLD"
        )
    if new in names and new not in parts:
        raise DatasetError(
            f"{where}: --merge {merge!r}: {new} is already a class: "
            f"write {new}={'+'.join([new, *parts])}, or take another name"
        )
    return new, parts
