"""Some images of a manifest: drawn by split and class, so that a part is a small copy of the whole.

The images stand in one order that a seed draws, and N of them are its first N: those of a smaller
draw are among those of a larger one. Each class of each split is there before any has two, and then
they come in turn as their shares ask (Adams's method of divisors: image j of m, from 0, at j / m).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.manifest import ABSENT, PRESENT, SPLITS, Manifest
from features.splits import luck_of

TURN = ("train", "test", "val")  # in which splits get their first image of a class


DRAWN = "drawn by split and class"  # in the note of a manifest that is some of another


def limited(manifest: Manifest, n: int, *, seed: int) -> Manifest:
    """Return n images of a manifest, in its order; all of them where it has no more.

    The note says so. Images without a label, or in no split, come after all others.
    """
    if n >= len(manifest):
        return manifest
    some = manifest.take(np.sort(drawn_order(manifest, seed=seed)[:n]))
    note = f"{n} of {len(manifest)} images, {DRAWN}, seed {seed}"
    return replace(some, note="; ".join(filter(None, [manifest.note, note])))


def drawn_order(manifest: Manifest, *, seed: int) -> NDArray[np.int64]:
    """Return the rows (N,) in the order in which a limit takes them, whatever order they are in."""
    luck = luck_of(seed, manifest.id)
    split = np.array([TURN.index(s) if s in SPLITS else len(TURN) for s in manifest.split.tolist()])
    early = np.full(len(manifest), len(manifest))
    if manifest.label.ndim == 1:
        stratum = manifest.label.astype(np.int64)
        usable = np.asarray(stratum >= 0)
    else:  # a finding that is there and one that is not are a class each
        states = np.concatenate([manifest.label == PRESENT, manifest.label == ABSENT], axis=1)
        common = states.sum(0)
        stratum = np.where(states, common, len(manifest) + 1).argmin(1)  # an image's rarest
        usable = np.asarray(states.any(1))
        first = _first_of_each(states, split, luck)
        early[first] = np.arange(len(first))
    usable &= split < len(TURN)
    rarity = np.bincount(np.where(usable, stratum, 0), usable)[np.where(usable, stratum, 0)]

    order = np.lexsort((luck, early, split, stratum, ~usable))
    edges = np.flatnonzero((np.diff(stratum[order]) != 0) | (np.diff(split[order]) != 0)) + 1
    sizes = np.diff([0, *edges, len(order)])
    rank = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    share = np.empty(len(order))
    share[order] = rank / np.repeat(sizes, sizes)
    return np.lexsort((luck, split, rarity, share, early, ~usable))


def _first_of_each(states: NDArray[np.bool_], split: NDArray[Any], luck: NDArray[Any]) -> list[int]:
    """Return rows that have every column (N, S) in every split, one for each not there yet."""
    chosen: list[int] = []
    states_seen = np.zeros((len(TURN), states.shape[1]), dtype=bool)
    for s in np.argsort(states.sum(0), kind="stable"):
        for k in range(len(TURN)):
            rows = np.flatnonzero(states[:, s] & (split == k))
            if len(rows) and not states_seen[k, s]:
                row = int(rows[luck[rows].argmin()])
                chosen.append(row)
                states_seen[k] |= states[row]
    return chosen
