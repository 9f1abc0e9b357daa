"""Predictions by the heads of several folds: what ranks compares them within a fold only.

Heads of different folds have scales of their own: a score of one fold above a score of another says
little. A metric of the order of images is therefore taken in each fold, and the mean over folds is
the score (Forman & Scholz 2010, Apples-to-apples in cross-validation studies; Airola et al. 2011,
who show that pooled AUROC is too low on average). A metric of decisions or probabilities needs no
order between images, and takes all folds' predictions together.

Shapes: N images, K classes, L findings, B weightings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # numpy arrays; their dtypes vary with the task
Scorer: TypeAlias = Callable[[Array], Array]  # weights (B, N) -> scores (B,)
EVERYWHERE = -1  # the fold of an image that counts in each fold, its weight shared among them


@dataclass(frozen=True)
class Folded:
    """Scores p (N, K) or (N, L), and the fold (N,) whose head gave each row, or EVERYWHERE."""

    p: Array
    fold: Array

    def __len__(self) -> int:
        """Return N."""
        return len(self.p)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of the scores."""
        return tuple(self.p.shape)

    @property
    def size(self) -> int:
        """Return how many scores there are."""
        return int(self.p.size)


Scores: TypeAlias = Any  # (N, K) or (N, L), or a Folded of that shape


def scorer_of(make: Callable[[Array, Array], Scorer], y: Array, p: Scores) -> Scorer:
    """Return make(y, p); of Folded scores, the mean over folds of make on each fold's rows.

    y (N,) or (N, L). A fold in which the score is not defined is left out of the mean.
    """
    if not isinstance(p, Folded):
        return make(y, p)
    folds = np.unique(p.fold[p.fold != EVERYWHERE])
    parts = []
    for f in folds:
        own, shared = np.flatnonzero(p.fold == f), np.flatnonzero(p.fold == EVERYWHERE)
        rows = np.concatenate([own, shared[_there(y[own], y[shared])]])
        share = np.where(p.fold[rows] == EVERYWHERE, 1 / len(folds), 1.0)
        parts.append((rows, share, make(y[rows], p.p[rows])))

    def scorer(weights: Array) -> Array:
        total, defined = np.zeros(len(weights)), np.zeros(len(weights))
        for rows, share, one in parts:
            values = one(np.asfortranarray(weights[:, rows] * share))
            total += np.nan_to_num(values)
            defined += ~np.isnan(values)
        with np.errstate(invalid="ignore"):
            return total / defined

    return scorer


def _there(own: Array, shared: Array) -> Array:
    """Say of labels (A,) or (A, L) which a fold, labelled (n,) or (n, L), has, both sides of each.

    A class that a fold hasn't got is not scored there, and no image that is shared may change that.
    """
    if own.ndim == 1:
        return np.isin(shared, own)
    both = (own == 1).any(0) & (own == 0).any(0)
    return ((~np.isnan(shared)) & both).any(1)


def with_scores(p: Scores, change: Callable[[Array], Array]) -> Scores:
    """Return scores changed by a function (N, K) -> (N, K) that keeps the order of each column."""
    return Folded(change(p.p), p.fold) if isinstance(p, Folded) else change(p)


def joined(parts: Sequence[Scores]) -> Scores:
    """Return scores (N_i, K) under each other; beside Folded ones, plain rows are EVERYWHERE."""
    if not any(isinstance(part, Folded) for part in parts):
        return np.concatenate(parts)
    arrays = [part.p if isinstance(part, Folded) else part for part in parts]
    folds = [
        part.fold if isinstance(part, Folded) else np.full(len(part), EVERYWHERE) for part in parts
    ]
    return Folded(np.concatenate(arrays), np.concatenate(folds))
