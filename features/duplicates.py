"""Images with the same bytes, found before rows are dealt to several workers.

In a store, images with the same bytes are computed once, at the first of their rows, and are left
out of their batches elsewhere. A worker that has some of the rows can't know of the others. So
files are hashed first (only those whose size another file has too), copies are left out of all
parts, and are filled in at the end from the row that was computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import ImageError
from features.images import read_bytes
from features.jobs import Job
from features.manifest import Manifest
from features.store import DONE, PENDING

AT_ONCE = 4096  # rows that are copied in one commit


@dataclass(frozen=True)
class Files:
    """size (bytes), mtime_ns, hash (hex) of images' files, each (N,); -1 and b"" for unknown."""

    size: NDArray[np.int64]
    mtime_ns: NDArray[np.int64]
    hash: NDArray[np.bytes_]

    @classmethod
    def known(cls, jobs: Sequence[Job]) -> Files:
        """Return what the stores know from the images that they have."""
        n = len(jobs[0].todo)
        files = cls(np.full(n, -1), np.full(n, -1), np.zeros(n, dtype="S64"))
        for job in jobs:
            done = job.store.done == DONE
            for name, mine in vars(files).items():
                mine[done] = job.store.columns[f"manifest/{name}"].read()[done]
        return files

    def alike(self) -> NDArray[np.bool_]:
        """Return which files have a size that another has too, and no hash yet, (N,)."""
        _, which, counts = np.unique(self.size, return_inverse=True, return_counts=True)
        alike: NDArray[np.bool_] = (counts[which] > 1) & (self.size >= 0) & (self.hash == b"")
        return alike

    def first(self, taken: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return for every row the first whose file has the same bytes, of `taken` if any, (N,)."""
        first = np.arange(len(self.hash))
        rows = np.flatnonzero(self.hash != b"")
        rows = rows[np.argsort(~taken[rows], kind="stable")]
        short = self.hash[rows].astype("S32")  # 16 bytes of the hash
        _, where, which = np.unique(short, return_index=True, return_inverse=True)
        first[rows] = rows[where][which]
        return first


def measure(images: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return size and mtime_ns of images' files, each (n,); -1 for one that can't be read."""
    measured = np.full((2, len(images)), -1, dtype=np.int64)
    for i in range(len(images)):
        with suppress(OSError):
            stat = images.file(i).stat()
            measured[:, i] = stat.st_size, stat.st_mtime_ns
    return measured[0], measured[1]


def hashes(images: Manifest) -> NDArray[np.bytes_]:
    """Return the SHA-256 of images' files in hex, (n,); b"" for one that can't be read."""
    digests = np.zeros(len(images), dtype="S64")
    for i in range(len(images)):
        with suppress(ImageError):
            digests[i] = hashlib.sha256(read_bytes(images.file(i))).hexdigest().encode()
    return digests


def fill_copies(job: Job, files: Files, first: NDArray[np.int64]) -> None:
    """Fill the pending rows whose bytes an earlier row has, `first` (N,), from that one.

    Where that row's file has changed since it was hashed, they stay pending.
    """
    store = job.store
    copies = np.flatnonzero((store.done == PENDING) & (first != np.arange(len(first))))
    marks, read = store.done[first[copies]], store.columns["manifest/hash"].take(first[copies])
    copies = copies[(marks != PENDING) & (read == files.hash[copies])]
    reasons, remarks = store.bad(), store.remarks()
    for a in range(0, len(copies), AT_ONCE):
        rows = copies[a : a + AT_ONCE]
        store.commit(
            rows,
            {name: store.read(name, first[rows]) for name in store.features},
            {name: values[rows].tolist() for name, values in vars(files).items()},
            {int(i): reasons[int(first[i])] for i in rows if int(first[i]) in reasons},
            {int(i): remarks[int(first[i])] for i in rows if int(first[i]) in remarks},
        )
