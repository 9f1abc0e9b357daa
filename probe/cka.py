"""Linear CKA: how alike two sets of features of the same images are, whatever their axes.

The minibatch estimate of Nguyen, Raghu and Kornblith 2021 (arXiv:2010.15327): unbiased HSIC (Song
et al. 2012, JMLR 13, equation 4) of each batch, averaged over batches, then normalised. Its
expectation does not depend on the size of the batches; with one batch of all images it is the
full-matrix value.

Shapes: n images of a batch, S sets of features, one kernel matrix (n, n) each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.errors import ProbeError
from features.store import DONE, FeatureStore

MIN_IMAGES = 4  # images that unbiased HSIC is defined for


def hsic(batch: Sequence[Tensor]) -> Tensor:
    """Return the unbiased HSIC of every two sets of features, (S, S), of one batch.

    A set is (n, D) of any width D; the kernel is linear. Raises ProbeError below MIN_IMAGES images.
    """
    n = len(batch[0])
    if n < MIN_IMAGES:
        raise ProbeError(f"CKA needs {MIN_IMAGES} images in a batch: found {n}")
    kernels = torch.stack([_kernel(X.double()) for X in batch])  # (S, n, n)
    flat, rows = kernels.flatten(1), kernels.sum(2)  # (S, n n), (S, n)
    total = rows.sum(1)  # (S,)
    trace = flat @ flat.T  # tr(K L), both being symmetric
    outer = total[:, None] * total / ((n - 1) * (n - 2))
    return (trace + outer - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def _kernel(X: Tensor) -> Tensor:
    """Return X X' (n, n) of X (n, D) less its mean, without the diagonal.

    HSIC doesn't depend on the mean; subtracting it saves digits.
    """
    X = X - X.mean(0)
    return (X @ X.T).fill_diagonal_(0)


def cka(batches: Iterable[Sequence[Tensor]]) -> NDArray[np.float64]:
    """Return linear CKA of every two sets of features, (S, S), over batches of the same images.

    A value can leave [0, 1] by chance, being unbiased before it is normalised; it is NaN for a set
    that is the same for all images.
    """
    mean = torch.stack([hsic(batch) for batch in batches]).mean(0)
    own = mean.diagonal()
    size = own.clamp(min=0).sqrt()
    likeness: NDArray[np.float64] = (mean / (size[:, None] * size)).numpy()
    likeness[~np.isfinite(likeness)] = np.nan
    return likeness


def of_stores(
    wanted: Sequence[tuple[FeatureStore, str]], *, batch_size: int = 256, seed: int = 0
) -> NDArray[np.float64]:
    """Return linear CKA of features of stores, (S, S), on the images that all of them have.

    Raises ProbeError where there are fewer than MIN_IMAGES such images.
    """
    stores = {id(store): store for store, _ in wanted}
    rows = dict(zip(stores, _shared(list(stores.values())), strict=True))
    return cka(_batches(wanted, rows, batch_size, seed))


def _shared(stores: Sequence[FeatureStore]) -> list[NDArray[np.int64]]:
    """Return per store the rows (n,) of images that are done in every store, in one order."""
    done = [np.flatnonzero(store.done == DONE) for store in stores]
    ids = [store.manifest().id[rows] for store, rows in zip(stores, done, strict=True)]
    common = ids[0]
    for other in ids[1:]:
        common = np.intersect1d(common, other)
    if len(common) < MIN_IMAGES:
        names = " and ".join(str(store.path) for store in stores[:2])
        raise ProbeError(
            f"{names} have {len(common)} images in common: want {MIN_IMAGES}, of the same data set"
        )
    shared = []
    for own, rows in zip(ids, done, strict=True):
        order = np.argsort(own)
        shared.append(rows[order][np.searchsorted(own[order], np.sort(common))])
    return shared


def _batches(
    wanted: Sequence[tuple[FeatureStore, str]],
    rows: dict[int, NDArray[np.int64]],
    batch_size: int,
    seed: int,
) -> Iterator[list[Tensor]]:
    """Yield random batches of about one size, (n, D) of each set, no image twice."""
    N = len(next(iter(rows.values())))
    order = np.random.default_rng(seed).permutation(N)
    for part in np.array_split(order, max(1, round(N / max(MIN_IMAGES, batch_size)))):
        yield [_read(store, feature, rows[id(store)][part]) for store, feature in wanted]


def _read(store: FeatureStore, feature: str, rows: NDArray[np.int64]) -> Tensor:
    """Return the features of rows in any order, (n, D); a matrix per image is laid out flat."""
    order = np.argsort(rows)
    ascending = store.read(feature, rows[order]).reshape(len(rows), -1)
    return torch.from_numpy(ascending[np.argsort(order)])
