"""What two data sets share: subjects of one name, and files of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError, StoreError
from features.manifest import SPLITS, Manifest
from features.store import FeatureStore
from probe.exclusion import without
from probe.identity import made_by
from probe.results import Result

SHOWN = 20  # ids of shared images that a result keeps


@dataclass(frozen=True)
class Overlap:
    """Of the rows (n,) that are tested, which are those of the images that a head was trained on.

    subject, file (n,): whether its subject, by name, or its bytes are among them; the last two are
    of the images that it was tested on at home. None of them is known where `why_not` says so.
    """

    subject: NDArray[np.bool_]
    file: NDArray[np.bool_]
    tested_subject: NDArray[np.bool_]
    tested_file: NDArray[np.bool_]
    subjects_known: bool = True
    why_not: str = ""

    @property
    def trained(self) -> NDArray[np.bool_]:
        """Return which rows share a subject or a file with the training images, (n,)."""
        return self.subject | self.file

    def counts(self, ids: NDArray[Any], subjects: NDArray[Any]) -> dict[str, Any]:
        """Return what a result says of it, as of rows with ids and subjects (n,)."""
        if self.why_not:
            return {}

        def of(subject: NDArray[np.bool_], file: NDArray[np.bool_]) -> dict[str, int]:
            of_subjects = {
                "subjects": len(np.unique(subjects[subject])),
                "images_of_subjects": int(subject.sum()),
            }
            return (of_subjects if self.subjects_known else {}) | {"files": int(file.sum())}

        return {
            "trained_on": of(self.subject, self.file),
            "tested_on": of(self.tested_subject, self.tested_file),
            "ids": [str(name) for name in ids[self.trained][:SHOWN].tolist()],
        }


@dataclass(frozen=True)
class Keys:
    """Names of subjects and hashes of files of some images."""

    subjects: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, manifest: Manifest, hashes: Sequence[str], rows: NDArray[np.bool_]) -> Keys:
        """Return those of rows (N,)."""
        subjects = set(manifest.subject[rows].tolist()) if manifest.has_subjects else set()
        return cls(subjects, {hashes[i] for i in np.flatnonzero(rows).tolist()} - {""})


def overlap(
    manifest: Manifest, hashes: Sequence[str], home: Result | None, store: Path | None = None
) -> Overlap:
    """Hold rows (n,) of a manifest with their hashes against the images of a head's own result.

    store: where its store is, if it isn't where the result says.
    """
    if home is None:
        return _unknown(manifest, "the head lies in no folder of results, which would name it")
    path = store or Path(home.store)
    try:
        with FeatureStore.open(path) as opened:
            if not made_by(opened, home.identity):
                return _unknown(manifest, f"{path} is not what the head was trained on any more")
            own = without(opened.manifest(), home.settings.get("exclude", ()))
            own_hashes = opened.hashes()
    except ProbeError as error:
        return _unknown(manifest, str(error))
    except StoreError:
        return _unknown(manifest, f"its store is not at {path}; name it by --home")
    used = np.isin(own.split, SPLITS)
    test = used if home.outer else own.split == "test"
    trained = Keys.of(own, own_hashes, used if home.outer else used & ~test)
    tested = Keys.of(own, own_hashes, test)
    known = own.has_subjects and manifest.has_subjects
    file = np.asarray(hashes)
    return Overlap(
        _among(manifest.subject, trained.subjects) & known,
        _among(file, trained.files),
        _among(manifest.subject, tested.subjects) & known,
        _among(file, tested.files),
        subjects_known=known,
    )


def _among(values: NDArray[Any], keys: set[str]) -> NDArray[np.bool_]:
    return np.isin(values, sorted(keys)) if keys else np.zeros(len(values), dtype=bool)


def _unknown(manifest: Manifest, why_not: str) -> Overlap:
    nothing = np.zeros(len(manifest), dtype=bool)
    return Overlap(nothing, nothing, nothing, nothing, why_not=why_not)
