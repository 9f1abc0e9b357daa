"""Chunks: neighbouring rows of a data set, decoded ahead of the one whose features are computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from features.jobs import Chunk, Job, chunk_size
from features.manifest import Manifest
from features.store import DONE
from features.workers import Loaded, Workers

AHEAD = 2  # chunks decoded ahead of the one that is computed
STOP_SECONDS = 0.5  # between looks at whether to stop, while an image is waited for


@dataclass(frozen=True)
class _Decoding:
    """A chunk in the making: rows (n,), their pixels as in Chunk, and when each image is loaded."""

    rows: NDArray[np.int64]
    pixels: list[torch.Tensor]
    loading: list[Future[Loaded]]

    def finished(self, stop: Callable[[], bool]) -> bool:
        """Wait for all images; return False where `stop` says so meanwhile."""
        for future in self.loading:
            while not future.done():  # it may never be; a wish to stop is still heard
                if stop():
                    return False
                wait([future], timeout=STOP_SECONDS)
        return True


def chunks(
    manifest: Manifest,
    jobs: Sequence[Job],
    workers: Workers,
    skipped: NDArray[np.bool_],
    *,
    most: int,
    stop: Callable[[], bool],
) -> Iterator[Chunk]:
    """Yield what has to be computed, in order, decoded ahead; no more once `stop` says so.

    Rows that are `skipped` (N,) are not read. Where passes wait for pixels a tenth of the time or
    more, the number of workers is doubled, up to `most`.
    """
    step, needed = chunk_size(jobs), np.any([job.needs() for job in jobs], axis=0)
    starts = [s for s in range(0, len(manifest), step) if needed[s : s + step].any()]
    seen = _SeenBytes(manifest, jobs, skipped)
    pinned = any(job.device.startswith("cuda") for job in jobs)
    begun = (
        _begin(manifest, np.arange(s, min(s + step, len(manifest))), workers, skipped, pinned)
        for s in starts
    )
    waiting = deque(islice(begun, 1 + AHEAD))
    last_yield = time.perf_counter()
    while waiting:
        decoding = waiting.popleft()
        wait_began = time.perf_counter()
        if not decoding.finished(stop):
            return
        images = [future.result() for future in decoding.loading]
        now = time.perf_counter()
        if now - wait_began > 0.1 * (now - last_yield):  # a tenth of the time went into waiting
            workers.grow(min(2 * len(workers.threads), most))
        last_yield = now
        yield Chunk(decoding.rows, images, decoding.pixels, seen.copies(decoding.rows, images))
        waiting.extend(islice(begun, 1))


def _begin(
    manifest: Manifest,
    rows: NDArray[np.int64],
    workers: Workers,
    skipped: NDArray[np.bool_],
    pinned: bool,
) -> _Decoding:
    """Have workers decode rows (n,) into memory, which is pinned where a GPU reads it."""
    pixels = [
        torch.empty(
            (len(rows), 1 + workers.recipe.views, t.size, t.size, 3),
            dtype=torch.uint8,
            pin_memory=pinned,
        )
        for t in workers.recipe.transforms
    ]
    blocks = [p.numpy() for p in pixels]
    not_read: Future[Loaded] = Future()
    not_read.set_result(Loaded(reason="its bytes are in another row"))
    loading = [
        not_read
        if skipped[i]
        else workers.load(manifest.file(int(i)), [memoryview(b[k]).cast("B") for b in blocks])
        for k, i in enumerate(rows)
    ]
    return _Decoding(rows, pixels, loading)


class _SeenBytes:
    """Which image files were seen in which row, by the first 16 bytes of their hash.

    A row is a copy of the first row with the same bytes, or of a skipped row that is done.
    """

    def __init__(self, manifest: Manifest, jobs: Sequence[Job], skipped: NDArray[np.bool_]) -> None:
        """Take in the skipped rows (N,) that a store has done."""
        self._first: dict[bytes, int] = {}
        self._next = 0
        done = np.any([job.store.done == DONE for job in jobs], axis=0)
        self._stored = np.full(len(manifest), b"", dtype="S64") if done.any() else None
        if self._stored is not None:
            for job in jobs:
                rows = job.store.done == DONE
                self._stored[rows] = job.store.columns["manifest/hash"].read()[rows]
            for i in np.flatnonzero(skipped & (self._stored != b"")).tolist():
                self._first.setdefault(bytes.fromhex(self._stored[i].decode())[:16], i)

    def copies(self, rows: NDArray[np.int64], images: Sequence[Loaded]) -> dict[int, int]:
        """Take in the next rows (B,) read; return those whose bytes an earlier row has."""
        if self._stored is not None:
            for i in range(self._next, int(rows[0])):  # what was passed over: done before
                if self._stored[i]:
                    self._first.setdefault(bytes.fromhex(self._stored[i].decode())[:16], i)
        self._next = int(rows[-1]) + 1
        copies = {}
        for i, image in zip(rows.tolist(), images, strict=True):
            if not image.reason:
                first = self._first.setdefault(bytes.fromhex(image.hash)[:16], i)
                if first != i:
                    copies[i] = first
        return copies
