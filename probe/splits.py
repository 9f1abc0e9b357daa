"""Which rows train, choose and test: folds from a store's manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from features.errors import ProbeError
from features.manifest import Manifest
from features.splits import deal
from probe.exclusion import column_of


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
    by = "subject" if manifest.has_subjects else "image"
    return dealt(manifest.subject[rows], manifest.label[rows], k=k, seed=seed, by=by)


def dealt(
    group: NDArray[np.str_], label: NDArray[np.integer], *, k: int, seed: int, by: str
) -> Folds:
    """Return k stratified folds of rows, by their groups (n,) and labels, (n,) or (n, L)."""
    part = deal(group, label, [1 / k] * k, seed=seed)
    return Folds(f"{k} stratified folds by {by}, seed {seed}", part == np.arange(k)[:, None])


@dataclass(frozen=True)
class Outer:
    """Outer folds of n rows: part (n,) is the fold that tests each, by a head of the other folds.

    group (n,) names what must stay together, in inner folds too. values: what each fold is called
    where they are the values of a column; `torn`, how many groups lie in several of these.
    """

    kind: str
    part: NDArray[np.int64]
    group: NDArray[np.str_]
    by: str
    values: tuple[str, ...] = ()
    torn: int = 0

    def trains(self, fold: int) -> NDArray[np.bool_]:
        """Return which rows (n,) train the head that tests a fold: none of its groups' rows."""
        if not self.torn:
            return np.asarray(self.part != fold)
        return ~np.isin(self.group, self.group[self.part == fold])


def outer(
    manifest: Manifest,
    rows: NDArray[np.integer],
    *,
    k: int | str,
    seed: int,
    hashes: Sequence[str] | None = None,
) -> Outer:
    """Return outer folds over rows (n,): k stratified ones by subject, or "subject", one for each.

    Of another column, k, each value is a fold; a subject may lie in several. hashes (N,), of each
    image's bytes: subjects that share a file are dealt as one. Raises ProbeError for more folds
    than subjects, for a column of one value, and where no subjects are known to leave out.
    """
    group = _together(manifest.subject[rows], [hashes[i] for i in rows] if hashes else None)
    names, member = np.unique(group, return_inverse=True)
    by = "subject" if manifest.has_subjects else "image"
    if k == "subject":
        if not manifest.has_subjects:
            raise ProbeError(
                f"{manifest.dataset} has no subjects to leave out one by one: extract again with "
                "--subject-col, or take a number of --outer folds"
            )
        return Outer(f"each of {len(names)} subjects left out in turn", member, group, by)
    if isinstance(k, str):
        values, part = np.unique(column_of(manifest, k)[rows], return_inverse=True)
        if len(values) < 2:
            raise ProbeError(
                f"{manifest.dataset}: {k} has one value among the images, "
                f"{values[0] if len(values) else 'none'}: leaving it out leaves nothing to train on"
            )
        torn = int((_parts_of(member, part) > 1).sum())
        kind = f"each of {len(values)} values of {k} left out in turn"
        return Outer(kind, part, group, by, tuple(values.tolist()), torn)
    if not 2 <= k <= len(names):
        raise ProbeError(
            f"{k} outer folds of {len(names)} {by}s: want 2 to {len(names)}, see --outer"
        )
    part = deal(group, manifest.label[rows], [1 / k] * k, seed=seed)
    return Outer(f"{k} stratified outer folds by {by}, seed {seed}", part, group, by)


def _parts_of(member: NDArray[np.integer], part: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return in how many parts each group lies, (G,); member and part (n,) of each row."""
    pairs = np.unique(np.stack([member, part]), axis=1)
    return np.bincount(pairs[0])


def _together(subject: NDArray[np.str_], hashes: Sequence[str] | None) -> NDArray[np.str_]:
    """Return a group for each row (n,): its subject, or the first of those that share files."""
    if hashes is None:
        return subject
    names, member = np.unique(subject, return_inverse=True)
    known = [i for i, one in enumerate(hashes) if one]
    _, file = np.unique([hashes[i] for i in known], return_inverse=True)
    # A graph of subjects and files, an edge for each image: what is connected stays together.
    size = len(names) + len(known)
    edges = csr_matrix(
        (np.ones(len(known)), (member[known], len(names) + file)), shape=(size, size)
    )
    component = connected_components(edges, directed=False)[1][: len(names)]
    _, first, place = np.unique(component, return_index=True, return_inverse=True)
    return np.asarray(names[first[place]][member])


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
