"""Columns: rows of fixed size at a known place in a file, read and written by position.

The store's HDF5 datasets are contiguous, so their bytes can be reached without HDF5: as fast as the
disk or the page cache gives them, from several threads and forked processes at once (no position
is shared), and a write that fails says so (a full disk) before anything else happens.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError

AT_ONCE = 1 << 30  # bytes per call: the kernel takes no more than 2 GiB

Extent = tuple[int, tuple[int, ...], np.dtype[Any]]  # offset in the file, shape, type


@dataclass(frozen=True)
class Column:
    """shape[0] rows of one dtype at `offset` of an open file."""

    descriptor: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows start to stop, (stop - start, ...)."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        out = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        self._read_into(out, start)
        return out

    def take(self, rows: NDArray[np.integer]) -> NDArray[Any]:
        """Return rows (n,) in the given order, (n, ...); neighbours are read together."""
        rows = np.asarray(rows)
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for a, b in runs(rows):
            self._read_into(out[a:b], int(rows[a]))
        return out

    def write(self, rows: NDArray[np.integer], values: NDArray[Any]) -> None:
        """Write values (n, ...) at rows (n,). Raises OSError, as where the disk is full."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        for a, b in runs(np.asarray(rows)):
            data = values[a:b].reshape(-1).view(np.uint8).data
            position = self.offset + int(rows[a]) * self.row_bytes
            while len(data):
                written = os.pwrite(self.descriptor, data[:AT_ONCE], position)
                data, position = data[written:], position + written

    def blocks(self, limit: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield a block's first row and its rows (B, ...): at most `limit` bytes, or one row."""
        step = max(1, limit // max(self.row_bytes, 1))
        for start in range(0, self.shape[0], step):
            yield start, self.read(start, start + step)

    def _read_into(self, out: NDArray[Any], start: int) -> None:
        """Fill `out` (n, ...) with the rows from start on."""
        if not out.size:
            return
        if not 0 <= start <= self.shape[0] - len(out):
            raise IndexError(f"rows {start} to {start + len(out)} of {self.shape[0]}")
        data = out.reshape(-1).view(np.uint8).data
        position = self.offset + start * self.row_bytes
        while len(data):
            read = os.preadv(self.descriptor, [data[:AT_ONCE]], position)
            if not read:
                raise StoreError(
                    f"a store ends at byte {position}, before its rows do: copy it again"
                )
            data, position = data[read:], position + read


def runs(rows: NDArray[np.integer]) -> Iterator[tuple[int, int]]:
    """Yield (a, b) where rows[a:b] are consecutive numbers."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *ends.tolist(), len(rows)]
    return ((a, b) for a, b in itertools.pairwise(edges) if b > a)
