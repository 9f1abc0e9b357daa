"""Deal subjects into parts so that every part gets its share of every label.

The parts are train/test splits and folds. The deal depends on the seed, the subjects' names and
their labels, and not on the order of the rows. It is the greedy rule of scikit-learn's
StratifiedGroupKFold (largest subjects first, each to the part that needs its labels most), for any
number of labels per image (Sechidis et al. 2011, On the stratification of multi-label data). The
last subjects with a label go to parts that haven't got it yet: none is without it by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def deal(
    subject: NDArray[np.str_],
    label: NDArray[np.integer],
    shares: Sequence[float],
    *,
    seed: int,
    ranked: bool = False,
) -> NDArray[np.int64]:
    """Return each image's part, (N,): each part its share of every label, no subject in two.

    Parameters
    ----------
    subject : (N,) names.
    label : (N,) class index, or (N, L) states of findings, of which only positive ones count.
    shares : the parts' shares, summing to 1; part k of the answer is number k.
    ranked : whether parts go by importance: of a label with fewer subjects than there are parts
        the first parts get one each. So every label is in part 0. If not, chance says which do.
    """
    names, member = np.unique(subject, return_inverse=True)
    images = np.bincount(member)
    counts = _label_counts(label, member, len(names))
    counts = np.concatenate([counts, images[:, None]], axis=1)  # (S, labels + 1)
    total = np.maximum(counts.sum(0), 1)
    share = np.asarray(shares, dtype=np.float64)[:, None] / np.sum(shares)
    need = np.repeat(
        total[None], len(share), axis=0
    )  # what a part still lacks, as if it were to get all

    # Rare labels weigh more: a label's weight is the inverse of how often it occurs.
    weight = 1 / total
    size = (counts * weight).sum(1)
    luck = luck_of(seed, names)
    part = np.empty(len(names), dtype=np.int64)
    has = counts[:, :-1] > 0  # (S, labels)
    left = has.sum(0)
    lacking = np.ones((len(share), has.shape[1]), dtype=bool)
    for s in np.lexsort((luck, -size)):
        want = need @ (counts[s] * weight * weight)
        # Labels with as many subjects left as parts without them can't wait any longer.
        due = lacking[:, has[s] & (left <= lacking.sum(0))].sum(1)
        if due.any():
            most = due > 0 if ranked else due == due.max()
            want = np.where(most, -np.arange(len(due)) if ranked else want, -np.inf)
        best = np.flatnonzero(want >= want.max() - 1e-12)
        part[s] = best[luck[s] % len(best)]
        need[part[s]] -= counts[s] / share[part[s]]
        left -= has[s]
        lacking[part[s], has[s]] = False
    return part[member]


def _label_counts(
    label: NDArray[np.integer], member: NDArray[np.integer], subjects: int
) -> NDArray[np.float64]:
    """Return how many images with each label each subject has, (S, labels)."""
    if label.ndim == 1:
        known = label >= 0
        counts = np.zeros((subjects, int(label.max(initial=0)) + 1))
        np.add.at(counts, (member[known], label[known]), 1)
        return counts
    counts = np.zeros((subjects, label.shape[1]))
    np.add.at(counts, member, label == 1)
    return counts


def luck_of(seed: int, names: NDArray[np.str_]) -> NDArray[np.int64]:
    """Return a number for each name (n,), drawn by the seed, that depends on nothing else."""
    data = (f"{seed}\0{name}".encode("utf-8", "surrogateescape") for name in names.tolist())
    numbers = [int.from_bytes(hashlib.sha256(one).digest()[:7], "big") for one in data]
    return np.array(numbers, dtype=np.int64)
