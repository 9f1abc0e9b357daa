"""A store that is filled in parts: rows are dealt out, filled as stores of their own, and gathered.

A part is whole batches of the store, so that every row comes out as if one process had filled it.
It lies beside the store in <store>.parts/, has all the promises of a store while it is filled, and
is copied into the store and removed when it is done. A part that was begun and not gathered is
taken in by the next run, of whatever kind.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from features.jobs import Job, chunk_size
from features.lock import writing
from features.manifest import Manifest
from features.plan import ExtractionSettings, check_sources, parts_folder
from features.store import PENDING, FeatureStore

MIN_IMAGES, MAX_IMAGES = 128, 4096  # of a part: fewer cost more to begin, more lose more at the end
PARTS = 64  # that a data set is dealt into, within these
PATIENCE = 150.0  # seconds until a lost worker's lock must be free: network disks take up to 90


@dataclass(frozen=True)
class ShardStore:
    """One store's share of a part: what the part's own store is made of, but for the images."""

    path: Path
    job: int  # which of the run's jobs
    features: Mapping[str, tuple[int, ...]]
    fingerprint: Mapping[str, Any]
    default_feature: str
    batch_size: int
    wanted: NDArray[np.bool_]  # (n,) which of the part's rows the store hasn't got

    @contextmanager
    def opened(self, images: Manifest) -> Iterator[FeatureStore]:
        """Open the part's store for writing; make it where there is none.

        Raises StoreError where its folder is not there.
        """
        if not self.path.parent.is_dir():
            raise StoreError(
                f"{self.path.parent} is not there on this machine: "
                "want a folder that all machines of the cluster share, see -o"
            )
        with writing(self.path, patience=PATIENCE):
            if not self.path.is_file():
                FeatureStore.create(
                    self.path,
                    images,
                    self.features,
                    fingerprint=self.fingerprint,
                    default_feature=self.default_feature,
                    batch_size=self.batch_size,
                )
            with FeatureStore.open(self.path, write=True) as store:
                yield store


@dataclass(frozen=True)
class Part:
    """Rows (n,) of a data set, ascending: whole batches. Those `skipped` (n,) are in no batch."""

    rows: NDArray[np.int64]
    images: Manifest
    skipped: NDArray[np.bool_]
    shards: tuple[ShardStore, ...]

    def in_hand(self) -> tuple[int, str]:
        """Return the first row that is still to be done, and the batch around it in words."""
        for shard in self.shards:
            wanted = shard.wanted.copy()
            with suppress(StoreError), FeatureStore.open(shard.path) as store:
                wanted &= store.done == PENDING
            if wanted.any():
                k = int(np.flatnonzero(wanted)[0])
                last = min(k - k % shard.batch_size + shard.batch_size, len(self.rows)) - 1
                row = int(self.rows[k])
                return row, f"rows {row} to {self.rows[last]}, from {self.images.file(k)} on"
        return int(self.rows[0]), f"rows {self.rows[0]} to {self.rows[-1]}"


def deal(
    manifest: Manifest, jobs: Sequence[Job], skipped: NDArray[np.bool_], workers: int
) -> list[Part]:
    """Return what is still to be done as parts, a few for each worker; skipped (N,) is left out."""
    todo = [job.todo & ~skipped for job in jobs]
    anywhere, step = np.any(todo, axis=0), chunk_size(jobs)
    chunks = [s for s in range(0, len(manifest), step) if anywhere[s : s + step].any()]
    share = len(chunks) * step // max(PARTS, 4 * workers)
    each = max(1, min(MAX_IMAGES, max(MIN_IMAGES, share)) // step)  # chunks
    parts = []
    for k in range(0, len(chunks), each):
        rows = np.concatenate(
            [np.arange(s, min(s + step, len(manifest))) for s in chunks[k : k + each]]
        )
        shards = tuple(
            ShardStore(
                path=parts_folder(job.store.path) / f"{rows[0]:012d}.h5",
                job=number,
                features=job.store.features,
                fingerprint=job.store.fingerprint,
                default_feature=job.store.default_feature,
                batch_size=job.store.batch_size,
                wanted=wanted[rows],
            )
            for number, (job, wanted) in enumerate(zip(jobs, todo, strict=True))
            if wanted[rows].any()
        )
        parts.append(Part(rows, manifest.take(rows), skipped[rows], shards))
    for job in jobs:
        parts_folder(job.store.path).mkdir(exist_ok=True)
    return parts


def gather(part: Part, jobs: Sequence[Job]) -> None:
    """Copy what is done of a part into the jobs' stores, and remove it."""
    for shard in part.shards:
        if shard.path.is_file():  # it isn't where the run was stopped before the first batch
            with FeatureStore.open(shard.path) as filled:
                jobs[shard.job].store.gather(filled, part.rows)
        _remove(shard.path)


def recover(store: FeatureStore, manifest: Manifest, settings: ExtractionSettings) -> None:
    """Take in the parts that an earlier run left behind, as far as they were filled.

    One that can't be opened, or was made from something else, is removed. Raises StaleStoreError
    for images that have changed since, as for those of a store.
    """
    folder = parts_folder(store.path)
    paths = sorted(folder.glob("*.h5"))
    row_of = {name: row for row, name in enumerate(manifest.id.tolist())} if paths else {}
    for path in paths:
        with writing(path, patience=PATIENCE), ExitStack() as stack:
            try:
                part = stack.enter_context(FeatureStore.open(path, write=True))
            except StoreError:
                part = None
            if part and _made_from(part) == _made_from(store):
                rows = np.array([row_of[name] for name in part.manifest().id.tolist()])
                check_sources(part, manifest.take(rows), settings)
                store.gather(part, rows)
        _remove(path)
    clear(store)


def clear(store: FeatureStore) -> None:
    """Remove the folder of a store's parts, all of which were gathered."""
    shutil.rmtree(parts_folder(store.path), ignore_errors=True)


def _made_from(store: FeatureStore) -> tuple[Any, ...]:
    return store.fingerprint, store.features, store.batch_size


def _remove(path: Path) -> None:
    for file in (path, path.with_suffix(".lock"), path.with_suffix(".holder")):
        file.unlink(missing_ok=True)
