"""How much a table may hold, so that a small file can't take the machine's memory.

Compressed tables are inflated step by step and counted as they go, whatever they say of their
size. Of Excel and Parquet what they declare is counted before it is read, then what is found.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import DatasetError

TEXT = 1_000_000_000  # bytes of a file, and of its text once it is unpacked
LINE = 1 << 24  # characters
COLUMNS = 16_384  # as in Excel
CELLS = 50_000_000
ARRAY = 4_000_000_000  # bytes of the paths, subjects or groups of all images
HINT = "split the table, or keep the columns that are needed"


def check_text(size: int, where: str, what: str = " of text") -> None:
    """Raise DatasetError for more bytes than a table may have."""
    if size > TEXT:
        raise DatasetError(f"{where} holds more than {TEXT / 1e6:,.0f} MB{what}: {HINT}")


def check_cells(rows: int, columns: int, where: str) -> None:
    """Raise DatasetError for more cells, or more columns, than a table may have."""
    if columns > COLUMNS:
        raise DatasetError(f"{where} has {columns:,} columns: want {COLUMNS:,} at most")
    if rows * max(columns, 1) > CELLS:
        raise DatasetError(
            f"{where} has more than {CELLS:,} cells ({rows:,} rows or more of {columns:,} columns):"
            f" {HINT}"
        )


def lines(stream: io.TextIOBase, where: str) -> Iterator[str]:
    """Yield the lines of a text. Raises DatasetError for one that never seems to end."""
    while line := stream.readline(LINE + 1):
        if len(line) > LINE:
            raise DatasetError(f"{where} has a line of more than {LINE:,} characters: no table")
        yield line


def texts(values: Sequence[str], where: str, what: str) -> NDArray[np.str_]:
    """Return texts (N,) as an array, in which each takes as much as the longest.

    Raises DatasetError where that is more than ARRAY.
    """
    longest = max(map(len, values), default=0)
    if (taken := 4 * longest * len(values)) > ARRAY:
        raise DatasetError(
            f"{where}: the longest {what} has {longest:,} characters, and {len(values):,} of that "
            f"length take {taken / 1e6:,.0f} MB: want {ARRAY / 1e6:,.0f} at most; shorten it"
        )
    return np.array(values, dtype=np.str_)


class Counted(io.RawIOBase):
    """A stream of bytes, of which no more are read than a table may have.

    start: its first bytes, which were read already.
    """

    def __init__(self, start: bytes, read: Callable[[int], bytes], where: str) -> None:
        self._start, self._read, self._where = start, read, where
        self._found = 0

    def readable(self) -> bool:
        """Return True, as io asks of a stream that can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what comes next."""
        data = self._start or self._read(len(buffer))
        taken, self._start = data[: len(buffer)], data[len(buffer) :] if self._start else b""
        buffer[: len(taken)] = taken
        self._found += len(taken)
        check_text(self._found, self._where)
        return len(taken)
