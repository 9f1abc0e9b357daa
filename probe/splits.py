"""Which rows train, choose and test: folds from a store's manifest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
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


def few(y: NDArray[np.integer], shots: int, *, seed: int) -> NDArray[np.int64]:
    """Return an ascending index of `shots` rows of every class of y (n,), drawn by a seed.

    Raises ProbeError for a class that has fewer rows.
    """
    counts = np.bincount(y)
    present = np.flatnonzero(counts)
    if counts[present].min() < shots:
        least = int(present[counts[present].argmin()])
        raise ProbeError(
            f"{shots} shots of class number {least}, which has {counts[least]} training images: "
            "want --shots of at most that many"
        )
    rng = np.random.default_rng([seed, shots])
    rows = [rng.choice(np.flatnonzero(y == k), shots, replace=False) for k in present]
    return np.sort(np.concatenate(rows))


def within(manifest: Manifest, rows: NDArray[np.integer], *, k: int, seed: int) -> Folds:
    """Return folds over a few rows, at most k; none where a class has a single row."""
    label = manifest.label[rows]
    k = min(k, int(np.bincount(label)[np.unique(label)].min()), len(set(manifest.subject[rows])))
    if k < 2:
        return Folds("nothing: one image per class", np.zeros((0, len(rows)), dtype=bool))
    part = deal(manifest.subject[rows], label, [1 / k] * k, seed=seed)
    return Folds(f"{k} stratified folds of the few, seed {seed}", part == np.arange(k)[:, None])
