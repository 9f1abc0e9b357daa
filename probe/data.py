"""What of a store is probed: its committed rows with a label, in memory or left in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import ABSENT, NO_LABEL, NOT_STATED, PRESENT, SPLITS, UNCERTAIN, Manifest
from features.memory import COPIES, available
from features.store import BAD, DONE, PENDING, FeatureStore
from probe.solve.sources import FromStore, InMemory, Source

UNCERTAIN_AS = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan}


@dataclass(frozen=True)
class Features:
    """Rows of a feature (n, D): X where they are in memory, else read from the store as needed."""

    store: FeatureStore
    feature: str
    rows: NDArray[np.int64]
    X: torch.Tensor | None
    free_bytes: int  # bytes of memory that were left at the start

    def __len__(self) -> int:
        """Return n."""
        return len(self.rows)

    @property
    def width(self) -> int:
        """Return D."""
        return self.store.features[self.feature][0]

    def take(self, index: NDArray[Any]) -> Features:
        """Keep the rows of an ascending index or a mask (n,)."""
        X = None if self.X is None else self.X[torch.from_numpy(index)]
        return Features(self.store, self.feature, self.rows[index], X, self.free_bytes)

    def source(self) -> Source:
        """Return the rows as the solver takes them."""
        if self.X is not None:
            return InMemory(self.X)
        return FromStore(
            partial(self.store.read, self.feature), self.rows, self.width, self.free_bytes
        )

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield rows (m, D), chunk by chunk."""
        return self.source().chunks()


@dataclass(frozen=True)
class Data:
    """Manifest rows (n,), their features, y (n,) or (n, L), and train (n,)."""

    rows: NDArray[np.int64]
    features: Features
    y: NDArray[Any]
    train: NDArray[np.bool_]  # train and val rows; all of them where folds test
    n_bad: int


def load(
    store: FeatureStore,
    manifest: Manifest,
    feature: str,
    uncertain: str,
    device: str = "cpu",
    *,
    outer: bool = False,
) -> Data:
    """Read what can be probed: committed rows with a label. ProbeError if a split is left empty.

    outer: whether folds of all rows test, whatever part of the split they are in. Features stay in
    the file where COPIES of them don't fit the memory that is left.
    """
    done = store.done
    if (done == PENDING).any():
        raise ProbeError(
            f"{store.path} is not complete: "
            f"{int((done == PENDING).sum())} of {len(done)} images are still to be done; "
            "run the same `medprobe extract` again"
        )
    if len(store.features.get(feature, (0,))) > 1:
        raise ProbeError(
            f"{feature} is a matrix per image: a linear head takes a vector, see --feature"
        )
    used = np.isin(manifest.split, SPLITS)
    rows = np.flatnonzero((done == DONE) & labelled(manifest.label) & used)
    y = targets(manifest.label[rows], uncertain)
    train = (manifest.split[rows] != "test") | outer
    if not train.any() or (train.all() and not outer):
        raise ProbeError(
            f"{store.path}: no usable image is left "
            f"in the {'test' if train.all() else 'train'} split"
        )
    size = 4 * len(rows) * store.features.get(feature, (0,))[0]
    free_bytes = available()
    fits = COPIES * size <= min(available(device), free_bytes)
    X = torch.from_numpy(store.read(feature, rows)) if fits else None
    return Data(
        rows, Features(store, feature, rows, X, free_bytes), y, train, int((done == BAD).sum())
    )


def labelled(label: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which images have a label, (N,), or a stated finding; label (N,) or (N, L)."""
    stated = label[:, None] != NO_LABEL if label.ndim == 1 else label != NOT_STATED
    return np.asarray(stated.any(1))


def targets(label: NDArray[np.int32], uncertain: str) -> NDArray[Any]:
    """Return class indices (N,) as they are; states of findings (N, L) as 1, 0 or NaN."""
    if label.ndim == 1:
        return label.astype(np.int64)
    y = np.full(label.shape, np.nan)
    y[label == PRESENT], y[label == ABSENT] = 1, 0
    y[label == UNCERTAIN] = UNCERTAIN_AS[uncertain]
    y[label == NOT_STATED] = np.nan if uncertain == "ignore" else 0
    return y
