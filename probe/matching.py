"""Classes of one data set by the names of another's: which are common, and which images remain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import NO_LABEL, PRESENT, Manifest


@dataclass(frozen=True)
class Matched:
    """A manifest whose labels are a head's classes; which of these it keeps, and what isn't common.

    Of a class per image all K of the head's stay, as it divides probability among them; of
    findings, which it says one by one, those that are common: `outputs` are their places.
    """

    manifest: Manifest
    outputs: NDArray[np.int64]
    absent: tuple[str, ...]  # of the head's classes, those that the data set hasn't got
    unknown: Mapping[str, int]  # of the data set's, those the head hasn't got: images that have it

    @property
    def left_out(self) -> int:
        """Return how many images are of no class that the head knows."""
        return sum(self.unknown.values()) if self.manifest.task == "multiclass" else 0


def matched(
    manifest: Manifest, classes: Sequence[str], task: str, names: Mapping[str, str] | None = None
) -> Matched:
    """Return a manifest by the names of a head's classes; names: class of the data set -> head's.

    Raises ProbeError for another task, for names that neither side has, and where no class is
    common.
    """
    theirs = _renamed(manifest, classes, names or {})
    if manifest.task != task:
        kinds = {"multiclass": "one class per image", "multilabel": "several findings per image"}
        raise ProbeError(
            f"{manifest.dataset} has {kinds[manifest.task]}, and the head says {kinds[task]}: give "
            "the data set labels of the head's kind (--label-col, --label-sep)"
        )
    common = [name for name in classes if name in theirs]
    if not common:
        raise ProbeError(
            f"{manifest.dataset} has the classes {', '.join(manifest.classes)}, and the head "
            f"{', '.join(classes)}: none is common. Say which are the same by --class THEIRS=HEAD'S"
        )
    absent = tuple(name for name in classes if name not in theirs)
    place = {name: k for k, name in enumerate(classes)}
    if task == "multilabel":
        column = {name: k for k, name in enumerate(theirs)}
        label = manifest.label[:, [column[name] for name in common]]
        unknown = {
            name: int((manifest.label[:, k] == PRESENT).sum())
            for name, k in column.items()
            if name not in place
        }
        own = replace(manifest, label=label, classes=tuple(common))
        return Matched(own, np.array([place[name] for name in common]), absent, unknown)
    to = np.array([*(place.get(name, NO_LABEL) for name in theirs), NO_LABEL], dtype=np.int32)
    counts = np.bincount(manifest.label[manifest.label >= 0], minlength=len(theirs))
    unknown = {}
    for name, count in zip(theirs, counts.tolist(), strict=True):
        if name not in place:
            unknown[name] = count
    own = replace(manifest, label=to[manifest.label], classes=tuple(classes))
    return Matched(own, np.arange(len(classes)), absent, unknown)


def _renamed(manifest: Manifest, classes: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Return the data set's classes by the head's names."""
    for theirs, ours in names.items():
        for name, known, whose in (
            (theirs, manifest.classes, manifest.dataset),
            (ours, classes, "the head"),
        ):
            if name not in known:
                raise ProbeError(
                    f"--class {theirs}={ours}: {whose} has no class {name!r}, found "
                    f"{', '.join(known)}"
                )
    theirs_by_ours = [names.get(name, name) for name in manifest.classes]
    if manifest.task == "multilabel" and len(set(theirs_by_ours)) < len(theirs_by_ours):
        raise ProbeError(
            f"--class would make one finding of several of {manifest.dataset}: take --merge where "
            "the data set is read"
        )
    return theirs_by_ours
