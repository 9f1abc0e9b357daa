"""Which rows train, choose and test: folds from a store's manifest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.manifest import Manifest
from features.splits import deal


@dataclass(frozen=True)
class Folds:
    """What C is chosen by. held_out (F, n): which of the n training rows each fold is scored on."""

    kind: str
    held_out: NDArray[np.bool_]


def folds(manifest: Manifest, rows: NDArray[np.integer], *, k: int, seed: int) -> Folds:
    """Return folds over some rows: the given val split if any, else k, stratified, by subject."""
    val = manifest.split[rows] == "val"
    if val.any():
        return Folds("the val split", val[None])
    part = deal(manifest.subject[rows], manifest.label[rows], [1 / k] * k, seed=seed)
    by = "image" if np.array_equal(manifest.subject, manifest.id) else "subject"
    return Folds(f"{k} stratified folds by {by}, seed {seed}", part == np.arange(k)[:, None])
