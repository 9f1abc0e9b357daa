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
    """Return folds over rows (n,): the given val split if any, else k, stratified, by subject."""
    val = manifest.split[rows] == "val"
    if val.any():
        return Folds("the val split", val[None])
    part = deal(manifest.subject[rows], manifest.label[rows], [1 / k] * k, seed=seed)
    by = "subject" if manifest.has_subjects else "image"
    return Folds(f"{k} stratified folds by {by}, seed {seed}", part == np.arange(k)[:, None])


def few(
    y: NDArray[np.integer], subject: NDArray[np.str_], shots: int, *, seed: int
) -> NDArray[np.int64]:
    """Return an ascending index of `shots` rows of every class of y (n,), drawn by a seed.

    Each class's subjects (n,) stand in an order drawn by the seed, and give one image each, in
    turns: a second image of one is taken only when all have given one. The draw of fewer shots by
    the same seed is within the draw of more. Raises ProbeError for a class that has fewer rows.
    """
    counts = np.bincount(y)
    present = np.flatnonzero(counts)
    if counts[present].min() < shots:
        least = int(present[counts[present].argmin()])
        raise ProbeError(
            f"{shots} shots of class number {least}, which has {counts[least]} training images: "
            "want --shots of at most that many"
        )
    rng = np.random.default_rng([seed])
    names, member = np.unique(subject, return_inverse=True)
    place, luck = rng.permutation(len(names))[member], rng.permutation(len(y))
    drawn = []
    for k in present:
        rows = np.flatnonzero(y == k)
        rows = rows[np.lexsort((luck[rows], place[rows]))]  # subject by subject
        _, first, many = np.unique(place[rows], return_index=True, return_counts=True)
        turn = np.arange(len(rows)) - np.repeat(first, many)
        drawn.append(rows[np.argsort(turn, kind="stable")[:shots]])
    return np.sort(np.concatenate(drawn))


def within(manifest: Manifest, rows: NDArray[np.integer], *, k: int, seed: int) -> Folds:
    """Return folds over a few rows (n,), at most k; none holds out a class's only subjects.

    There are none at all where a class has a single subject.
    """
    label, subject = manifest.label[rows], manifest.subject[rows]
    k = min(k, *(len(np.unique(subject[label == c])) for c in np.unique(label)))
    part = deal(subject, label, [1 / k] * k, seed=seed)
    held_out = part == np.arange(k)[:, None]
    trained = np.array([np.isin(label, label[~held]).all() for held in held_out])
    held_out = held_out[trained]
    if not len(held_out):
        return Folds("nothing: a class has one subject", held_out)
    return Folds(f"{len(held_out)} stratified folds of the few, seed {seed}", held_out)
