"""What training is fed with: images decoded as it goes, or features that a store holds.

A feed turns lists of rows into batches on the CPU, the next one being made while one is used. With
an epoch a row comes as its view of that epoch (augment.py), which depends on the seed, the image's
bytes and the epoch only; without, as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from features.augment import augment, generator
from features.errors import ImageError, ProbeError
from features.fingerprint import decoding
from features.images import Transform, read_bytes
from features.layout import VIEWS
from features.manifest import Manifest
from features.memory import available
from features.store import FeatureStore
from features.workers import ImageRecipe, crops

AHEAD = 2  # batches that are being made while one is used

RowIndex = NDArray[np.int64]
T = TypeVar("T")


class Feed(Protocol):
    """Batches of a model's input."""

    def batches(self, parts: Sequence[RowIndex], epoch: int | None) -> Iterator[Tensor]:
        """Yield the input of each part's rows (B,): pixels (B, S, S, 3) or features (B, ...)."""
        ...


def _ahead(parts: Sequence[RowIndex], start: Callable[[RowIndex], T]) -> Iterator[T]:
    """Yield what `start` makes of each part, having started those of the next AHEAD parts."""
    waiting: deque[T] = deque()
    for part in parts:
        waiting.append(start(part))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True)
class Images:
    """Pixels uint8 (B, size, size, 3), decoded by threads: Pillow works without Python's lock.

    Views are made of the crop, so an image is decoded once: crops stay in memory as far as half of
    what was left of it at the start goes.
    """

    manifest: Manifest
    recipe: ImageRecipe  # with one transform
    seed: int
    room: int = field(default_factory=lambda: available() // 2)  # bytes for crops
    _kept: dict[int, tuple[Image.Image, str]] = field(default_factory=dict, repr=False)

    def batches(self, parts: Sequence[RowIndex], epoch: int | None) -> Iterator[Tensor]:
        """Yield (B, size, size, 3). ProbeError for an image that can't be decoded any more."""
        with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decode") as pool:
            for images in _ahead(
                parts, lambda part: [pool.submit(self._one, row, epoch) for row in part.tolist()]
            ):
                yield torch.from_numpy(np.stack([image.result() for image in images]))

    def _one(self, row: int, epoch: int | None) -> NDArray[np.uint8]:
        """Return an image's crop (side, side, 3), augmented as an epoch has it."""
        crop, content = self._kept.get(row) or self._read(row)
        if epoch is not None:
            crop = augment(crop, generator(self.seed, content, epoch))
        return np.array(crop)

    def _read(self, row: int) -> tuple[Image.Image, str]:
        """Return an image's crop and the hash of its bytes."""
        path = self.manifest.file(row)
        try:
            data = read_bytes(path)
            [crop] = crops(data, self.recipe)
        except ImageError as error:
            raise ProbeError(
                f"{path} was readable when features were extracted and is not now: {error}; "
                "repair it, or run `medprobe extract` again"
            ) from None
        image = crop, hashlib.sha256(data).hexdigest()
        if (len(self._kept) + 1) * 3 * crop.width * crop.height <= self.room:
            self._kept[row] = image
        return image


def recipe_of(store: FeatureStore, transform: Transform) -> ImageRecipe:
    """Return how a store's images were decoded, with another transform after it."""
    return ImageRecipe((transform,), **decoding(store.fingerprint))


@dataclass(frozen=True)
class StoredFeatures:
    """A feature of a store as float32 (B, ...); each epoch one of its views, if it has any."""

    store: FeatureStore
    feature: str
    seed: int

    def batches(self, parts: Sequence[RowIndex], epoch: int | None) -> Iterator[Tensor]:
        """Yield vectors (B, D) or tokens (B, T, C)."""
        with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
            for batch in _ahead(parts, lambda part: pool.submit(self._read, part, epoch)):
                yield batch.result()

    def _read(self, rows: RowIndex, epoch: int | None) -> Tensor:
        """Return the features of rows (B,), of a view drawn for each in an epoch: (B, ...)."""
        order = np.argsort(rows)
        x = self.store.read(self.feature, rows[order])
        views = self.feature + VIEWS
        if epoch is not None and views in self.store.features:
            changed = self.store.read(views, rows[order])  # (B, V, ...)
            rng = np.random.default_rng([self.seed, epoch, int(rows[order][0])])
            which = rng.integers(0, changed.shape[1] + 1, len(rows))
            seen = which > 0
            x[seen] = changed[seen, which[seen] - 1]
        out = np.empty(x.shape, dtype=np.float32)
        out[order] = x
        return torch.from_numpy(out)
