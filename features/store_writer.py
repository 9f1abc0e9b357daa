"""Rows into an open store: a batch is committed in two steps, each forced to disk."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features import checksums
from features.checksums import BAD, DONE, MARKS, OF_MARK, PENDING, SOURCE
from features.errors import StoreError
from features.files import reason
from features.layout import BLOCK_BYTES, REASON_BYTES, column_of, decode, dtype_of, is_filled
from features.store_reader import StoreReader


class StoreWriter(StoreReader):
    """An open store, to be read, and filled where it is opened with `write`."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        super().__init__(path, write=write)
        if write:
            self._mend_marks()

    def commit(
        self,
        rows: NDArray[np.integer],
        features: Mapping[str, NDArray[np.floating[Any]]],
        source: Mapping[str, Sequence[Any]],
        bad: Mapping[int, str],
        remarks: Mapping[int, str] | None = None,
    ) -> None:
        """Write a batch: features (n, D) and sources of its rows, reasons of its bad ones, remarks.

        A source is an image's hash, size and mtime. Rows that `bad` names have a source, and
        features that are not looked at. When it returns, the batch survives a power cut. Raises
        StoreError for features that are not finite, and where the disk is full.
        """
        rows = np.asarray(rows, dtype=np.int64)
        good = np.array([int(i) not in bad for i in rows], dtype=bool)
        kept = {name: v[good].astype(dtype_of(name)) for name, v in features.items()}
        for name, values in kept.items():
            finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            if not finite.all():
                i = int(rows[good][np.flatnonzero(~finite)[0]])
                image = decode(self.columns["manifest/path"].take(np.array([i])))[0]
                raise StoreError(
                    f"{self.path}: feature {name} of row {i} ({image}) is not finite; "
                    "nothing of this batch was stored. "
                    "Try --precision float32, or look at the weights"
                )
        with self._committing(rows, np.where(good, DONE, BAD)):
            for name, values in kept.items():
                self.columns[column_of(name)].write(rows[good], values)
                self._write(f"checksums/{column_of(name)}", rows[good], checksums.of_rows(values))
            for name, dtype in SOURCE.items():
                self._write(f"manifest/{name}", rows, np.array(source[name], dtype=dtype))
            texts = {**(remarks or {}), **{row: why or "no reason" for row, why in bad.items()}}
            reasons = [_cut(texts.get(int(i), "")) for i in rows]
            self._write("reason", rows, np.array(reasons, dtype=f"S{REASON_BYTES}"))
            self._write("checksums/source", rows, checksums.of_sources(self.columns, rows))

    def gather(self, part: StoreReader, rows: NDArray[np.integer]) -> None:
        """Copy what a part has committed, with its checksums; row k of it is row rows[k] here (n,).

        A part is a store of some of the images with the same features. When it returns, the rows
        survive a power cut. Raises StoreError where the disk is full.
        """
        done = part.done
        filled_rows = np.flatnonzero(done != PENDING)
        filled = [n for n in self.columns if is_filled(n) and n not in ("done", MARKS)]
        with self._committing(rows[filled_rows], done[filled_rows]):
            for name in filled:
                step = max(1, BLOCK_BYTES // max(1, self.columns[name].row_bytes))
                for a in range(0, len(filled_rows), step):
                    some = filled_rows[a : a + step]
                    self.columns[name].write(rows[some], part.columns[name].take(some))

    @contextmanager
    def _committing(self, rows: NDArray[np.integer], marks: NDArray[np.integer]) -> Iterator[None]:
        """Force to disk what is written inside, then marks (n,) of rows (n,): a commit's two steps.

        The checksums of marks follow, for a mark means the same without.
        """
        done = self.columns["done"]
        try:
            if (done.take(rows) != PENDING).any():  # rows that are computed again
                self.forget(rows)
            yield
            os.fsync(self.descriptor)
            done.write(rows, marks)
            os.fsync(self.descriptor)
            self._write_marks_checksums(rows, marks)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(
                f"{self.path}: {'the disk is full' if full else reason(error)}. What is stored "
                "stays; make room and give the same command again: it goes on from here"
            ) from None

    def forget(self, rows: NDArray[np.integer]) -> None:
        """Mark rows (n,) as still to be done, and what is written of them as worth nothing."""
        for right in self._right.values():
            right[rows] = False
        nothing = np.full(len(rows), PENDING)
        for name in (MARKS, "done", "checksums/source"):
            if name in self.columns:
                self.columns[name].write(rows, nothing)
                os.fsync(self.descriptor)

    def _mend_marks(self) -> None:
        """Reset rows with damaged marks, to be computed again; give marks the checksums they lack.

        Those are lacking after a power cut, or in rows that an earlier version wrote.
        """
        marks, wrong = checksums.marks(self.columns)
        if wrong.any():
            warnings.warn(
                f"{self.path}: the marks of {int(wrong.sum())} images were damaged; these are "
                "computed anew",
                stacklevel=4,
            )
            self.forget(np.flatnonzero(wrong))
        elif MARKS in self.columns:
            bare = np.flatnonzero((marks != PENDING) & (self.columns[MARKS].read() == 0))
            self._write_marks_checksums(bare, marks[bare])

    def _write_marks_checksums(self, rows: NDArray[np.integer], marks: NDArray[np.integer]) -> None:
        """Write the checksums of marks (n,) of rows (n,), in a store that has them."""
        if MARKS in self.columns:
            self.columns[MARKS].write(rows, OF_MARK[marks])

    def _write(self, name: str, rows: NDArray[np.integer], values: Any) -> None:
        """Write values (n, ...) at rows (n,) of a column."""
        self.columns[name].write(rows, np.asarray(values))


def _cut(reason: str) -> bytes:
    """Return a reason short enough, without half a character at its end."""
    data = reason.encode(errors="replace")[:REASON_BYTES]
    return data.decode(errors="ignore").encode()
