"""What tells that a store's bytes are as they were written: CRC-32 (zlib) of all that counts.

    a row of a feature           checksums/features/..., checksums/views/...
    a row's source and reason    checksums/source
    a row's mark in /done        checksums/done: that of its one byte; 0 where none was written yet
    text and labels              the attribute `checksum` of /manifest
    all that is no dataset       checksums/structure: attributes, shapes, names, unused space

Stores of earlier versions have neither checksums/done nor checksums/structure. docs/format.md says
which bytes mean nothing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.columns import AT_ONCE, Column, Extent

PENDING, DONE, BAD = 0, 1, 2  # what a mark says
MARKS, STRUCTURE = "checksums/done", "checksums/structure"
OF_MARK = np.array([0, zlib.crc32(b"\1"), zlib.crc32(b"\2")], dtype="<u4")
SOURCE = {"hash": "S64", "size": "<i8", "mtime_ns": "<i8"}

Columns = Mapping[str, Column]


def of_rows(values: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC-32 (n,) of every row's bytes as they lie in the file (little-endian)."""
    if not len(values):
        return np.empty(0, dtype=np.uint32)
    rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    return np.fromiter((zlib.crc32(row.data) for row in rows), dtype=np.uint32, count=len(rows))


def of_sources(columns: Columns, rows: NDArray[np.integer]) -> NDArray[np.uint32]:
    """Return the CRC-32 of the hash, size, mtime and reason of each of rows (n,), (n,)."""
    names = (*(f"manifest/{name}" for name in SOURCE), "reason")
    parts = [columns[name].take(rows) for name in names]
    rest = (b"".join(part[i].tobytes() for part in parts) for i in range(len(rows)))
    return np.array([zlib.crc32(row) for row in rest], dtype=np.uint32)


def marks(columns: Columns) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the marks (N,), and which of them say something else than their checksums.

    A commit forces marks to disk before it writes their checksums, and `forget` does it the other
    way round. So a mark may be without a checksum, and a checksum never without its mark.
    """
    for _ in range(3):  # another process may be writing both
        sums = columns[MARKS].read() if MARKS in columns else None
        done = columns["done"].read()
        wrong = done > BAD
        if sums is not None:
            wrong |= (sums != 0) & (sums != OF_MARK[np.minimum(done, BAD)])
        if not wrong.any():
            break
    return done, wrong


def structure(descriptor: int, extents: Mapping[str, Extent]) -> int:
    """Return the CRC-32 of all bytes of a file that are in none of its datasets."""
    crc, at = 0, 0
    taken = [(offset, offset + size_of(shape, dtype)) for offset, shape, dtype in extents.values()]
    end = os.fstat(descriptor).st_size
    for start, stop in [*sorted(taken), (end, end)]:
        while at < start:
            data = os.pread(descriptor, min(start - at, AT_ONCE), at)
            if not data:
                break
            crc, at = zlib.crc32(data, crc), at + len(data)
        at = max(at, stop)
    return crc


def size_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the bytes of a dataset."""
    return int(np.prod([*shape, dtype.itemsize], dtype=object))


def wrong_marks(columns: Columns) -> NDArray[np.int64]:
    """Return rows (n,) whose mark is damaged: by its checksum, or bad ones without a reason."""
    done, wrong = marks(columns)
    for start, reasons in columns["reason"].blocks(1 << 24):
        block = done[start : start + len(reasons)]
        wrong[start : start + len(reasons)] |= (block == BAD) & (reasons == b"")
    return np.flatnonzero(wrong)


def wrong_rows(columns: Columns, name: str, block_bytes: int) -> Iterator[NDArray[np.int64]]:
    """Yield, block by block, the committed rows (n,) of a feature's dataset that are damaged."""
    done, sums = columns["done"].read(), columns[f"checksums/{name}"].read()
    for start, block in columns[name].blocks(block_bytes):
        inside = np.flatnonzero(done[start : start + len(block)] == DONE)
        yield start + inside[of_rows(block[inside]) != sums[start + inside]]


def wrong_sources(columns: Columns) -> NDArray[np.int64]:
    """Return the rows (n,), committed or bad, whose source or reason is damaged."""
    rows = np.flatnonzero(columns["done"].read() != PENDING)
    wrong = of_sources(columns, rows) != columns["checksums/source"].read()[rows]
    return np.asarray(rows[wrong])
