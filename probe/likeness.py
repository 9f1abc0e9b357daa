"""How unlike an image is to those that a head was trained on, by the features that the head reads.

Shapes: N images, D features. The distance of x is sqrt(mean_j ((x_j - m_j) / s_j)^2), m and s the
mean and standard deviation of the training images; a feature that is the same in all of them is
left out. It is measured of training images as of new ones: in parts by subject, each from the mean
and deviation of the other parts. It tells another kind of image from those of training (a
photograph from a radiograph), and not which answers are wrong: images that are like those of
training may be answered wrongly, and a new scanner may not show. Of few training images it tells
little: on 40 CT slices, a photograph may be no farther off than they are from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PARTS = 5  # by subject
SHARE = 0.99  # of the training images are nearer than what is called unlike

Chunks = Callable[[], Iterator[Tensor]]  # rows (m, D), in the same order each time


@dataclass(frozen=True)
class Seen:
    """Mean and standard deviation (D,) of training images, and SHARE's quantile of distances."""

    mean: Tensor
    scale: Tensor
    usual: float
    images: int

    def beyond(self, X: Tensor) -> NDArray[np.float64]:
        """Return how many times as far as SHARE of the training images X (N, D) are off, (N,)."""
        far = distances(X, self.mean, self.scale).numpy()
        return np.asarray(far / self.usual if self.usual > 0 else np.where(far > 0, np.inf, 0))

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored beside a head's coefficients: mean and scale (D,), in float32."""
        return {"seen_mean": self.mean.float(), "seen_scale": self.scale.float()}

    def about(self) -> dict[str, Any]:
        """Return what is stored in a head's JSON."""
        return {"usual": self.usual, "images": self.images}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Seen | None:
        """Return what was stored with a head, (D,) tensors; None with those of earlier versions."""
        mean, scale = tensors.get("seen_mean"), tensors.get("seen_scale")
        if mean is None or scale is None or "seen" not in about:
            return None
        return cls(mean, scale, about["seen"]["usual"], about["seen"]["images"])


def distances(X: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the distance of X (N, D) from the mean, (N,) in float64."""
    kept = scale > 0
    z = (X.double() - mean)[:, kept] / scale[kept]
    return (z.square().sum(1) / max(int(kept.sum()), 1)).sqrt()


def measure(chunks: Chunks, subjects: NDArray[Any]) -> Seen | None:
    """Return what was seen in rows of these subjects (N,); None of fewer than two subjects."""
    names, member = np.unique(subjects, return_inverse=True)
    parts = min(PARTS, len(names))
    if parts < 2:
        return None
    part = torch.from_numpy(member % parts)
    counts = torch.bincount(part, minlength=parts).double()
    shift = next(chunks())[0].double()  # squares of what is far from zero would round
    sums, squares = torch.zeros(2, parts, len(shift), dtype=torch.float64)
    for rows, X in _with_places(chunks):
        moved = X.double() - shift
        sums.index_add_(0, part[rows], moved)
        squares.index_add_(0, part[rows], moved.square())

    def moments(kept: Tensor) -> tuple[Tensor, Tensor]:
        n = counts[kept].sum()
        mean = sums[kept].sum(0) / n
        variance = squares[kept].sum(0) / n - mean.square()
        return mean + shift, variance.clamp(min=0).sqrt()

    others = [moments(torch.arange(parts) != p) for p in range(parts)]
    far = torch.zeros(len(part), dtype=torch.float64)
    for rows, X in _with_places(chunks):
        for p, (mean, scale) in enumerate(others):
            of_part = part[rows] == p
            far[rows.start : rows.stop][of_part] = distances(X[of_part], mean, scale)
    mean, scale = moments(torch.ones(parts, dtype=torch.bool))
    return Seen(mean, scale, float(np.quantile(far.numpy(), SHARE)), len(part))


def _with_places(chunks: Chunks) -> Iterator[tuple[slice, Tensor]]:
    """Yield where the rows of a chunk stand among all, and the chunk (n, D)."""
    start = 0
    for X in chunks():
        yield slice(start, start + len(X)), X.cpu()
        start += len(X)
