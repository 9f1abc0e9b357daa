"""Features as they are given, in memory or left in a file, and what is measured of them.

Shapes: N rows, D features. A source hands its rows out in chunks, which may be read again for every
pass over them. All sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.errors import ProbeError

CHUNK_BYTES = 32 << 20  # of rows that are read at once
MIN_CHUNK_ROWS = 256  # however little memory is left
# A chunk may take this part of the memory that is left: about five copies of it are alive. With a
# thirty-second it took as long, and a quarter of the store was not always enough memory.
MEMORY_SHARES = 48
SIZES = 1e-60, 1e60  # of features: float64 holds their squares, and a penalty divided by these


class Source(Protocol):
    """Raw features (N, D), handed out as chunks of at most `chunk_rows` rows in a fixed order."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, D)."""
        ...

    @property
    def chunk_rows(self) -> int:
        """Return the rows of a chunk; the last may have fewer."""
        ...

    def chunks(self) -> Iterator[Tensor]:
        """Yield (n, D) float32 from the first row on."""
        ...

    def part(self, start: int, stop: int) -> Source:
        """Return the rows from start to before stop, for another process."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Features X (N, D) that are in memory."""

    X: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, D)."""
        return self.X.shape[0], self.X.shape[1]

    @property
    def chunk_rows(self) -> int:
        """Return N: one chunk holds all."""
        return len(self.X)

    def chunks(self) -> Iterator[Tensor]:
        """Yield all rows (N, D) at once."""
        yield self.X

    def part(self, start: int, stop: int) -> InMemory:
        """Return the rows from start to before stop, in memory of their own."""
        return InMemory(self.X[start:stop].clone())


@dataclass(frozen=True)
class FromStore:
    """Features that stay in a file, read chunk by chunk.

    read(slice) returns rows of the file, (n, D); rows (N,) are those wanted, ascending.
    """

    read: Callable[[slice], NDArray[np.floating]]
    rows: NDArray[np.integer]
    width: int  # D
    free_bytes: int  # of memory

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, D)."""
        return len(self.rows), self.width

    @property
    def chunk_rows(self) -> int:
        """Return how many rows keep a chunk within CHUNK_BYTES and its share of the memory."""
        nbytes = min(CHUNK_BYTES, self.free_bytes // MEMORY_SHARES)
        return max(MIN_CHUNK_ROWS, nbytes // (4 * self.width))

    def chunks(self) -> Iterator[Tensor]:
        """Yield the wanted rows (n, D), in the order of the file."""
        for i in range(0, len(self.rows), self.chunk_rows):
            yield self._chunk(self.rows[i : i + self.chunk_rows])

    def part(self, start: int, stop: int) -> FromStore:
        """Return the rows from start to before stop, in the same file."""
        return replace(self, rows=self.rows[start:stop])

    def _chunk(self, part: NDArray[np.integer]) -> Tensor:
        """Read wanted rows `part` (n,), ascending: (n, D), in one slice if all of it is wanted."""
        if part[-1] - part[0] + 1 == len(part):
            whole = self.read(slice(int(part[0]), int(part[-1]) + 1))
            return torch.from_numpy(np.require(whole, np.float32, ["C", "W"]))
        out = np.empty((len(part), self.width), dtype=np.float32)
        start = 0
        while start < len(part):
            # What lies within a chunk's worth of the file is read as one slice, the rest left out.
            near = int(np.searchsorted(part, part[start] + self.chunk_rows))
            first, last = int(part[start]), int(part[near - 1])
            out[start:near] = self.read(slice(first, last + 1))[part[start:near] - first]
            start = near
        return torch.from_numpy(out)


def column_sums(source: Source, device: torch.device) -> Tensor:
    """Return the sum of the rows, (D,) float64. Raises ProbeError for one that is not finite."""
    out = torch.zeros(source.shape[1], dtype=torch.float64, device=device)
    for X in source.chunks():
        # One pass finds the mean and what is not finite: NaN and infinity survive a sum.
        part = X.to(device).sum(0, dtype=torch.float64)
        if not part.isfinite().all():
            raise ProbeError(
                "the features hold NaN or infinity; run `medprobe verify` on the store"
            )
        out += part
    return out


def representable(shift: Tensor, source: Source) -> Tensor:
    """Return a shift (D,) rounded to the source's type, in float64.

    Subtracting it in that type and adding it back in float64 is then the same.
    """
    dtype = source.X.dtype if isinstance(source, InMemory) else torch.float32
    return shift.to(dtype).double()


def root_sum_squares(source: Source, shift: Tensor) -> float:
    """Return the root of the sum of squares of all numbers less their column's shift (D,)."""
    norm = 0.0
    for X in source.chunks():
        X = X.to(shift.device)
        X = X - shift.to(X.dtype)
        top = float(X.abs().amax()) if X.numel() else 0.0
        if top > 0:  # squared as shares of the largest, which neither overflow nor vanish
            share = float((X / top).square().sum(dtype=torch.float64))
            norm = math.hypot(norm, top * math.sqrt(share))
    return norm


def power_of_two_scale(root: float, count: int) -> float:
    """Return the root mean square of so many numbers, from the root of their sum of squares.

    It is rounded to a power of two: dividing by it rounds nothing. Raises ProbeError for features
    that float64 can't penalise.
    """
    size = root / math.sqrt(max(count, 1))
    if size == 0:
        return 1.0
    if not SIZES[0] < size < SIZES[1]:
        raise ProbeError(
            f"the features are {size:.0e} in size about their mean (root mean square), where "
            f"{SIZES[0]:g} to {SIZES[1]:g} can be fitted: scale them"
        )
    return 2.0 ** round(math.log2(size))
