"""Extraction spread over workers: what each of them does, and what the driver does with them.

The driver holds the stores, and is the only one that writes to them. It deals rows into parts
(parts.py), a worker fills a part, and the driver gathers it while the workers go on. Workers come
from a pool (cluster.py) that deals again what a lost one had in hand; nothing here knows of Ray.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from features.backbones import Backbone
from features.duplicates import Files, fill_copies, hashes, measure
from features.errors import ClusterError, MedprobeError, StoreError
from features.extract import ImageProgress, Stop, fill
from features.jobs import Job, taken_by_all
from features.manifest import Manifest
from features.parts import Part, clear, deal, gather
from features.plan import ExtractionSettings
from features.workers import ImageRecipe, Workers

ROUNDS = 3  # a second one only where images change while they are read
MEASURED, HASHED = 4096, 256  # files in one call


class Pool(Protocol):
    """Workers, each a `Worker` in a process of its own."""

    def room(self) -> int:
        """Return how many workers there may be."""
        ...

    def run(
        self,
        method: str,
        items: Sequence[Any],
        *,
        stop: Stop,
        tick: Callable[[], None],
        in_hand: Callable[[Any], tuple[Any, str]],
    ) -> Any:
        """Yield (item, what a worker's method returned for it) as they come in."""
        ...

    def asked(self, method: str) -> list[Any]:
        """Return what the busy workers last answered to a method, without waiting for them."""
        ...


@dataclass(frozen=True)
class RowRange:
    """Some rows (n,) of a data set, to be looked at only."""

    rows: NDArray[np.int64]
    images: Manifest

    def in_hand(self) -> tuple[int, str]:
        """Return the first row, and all in words."""
        row = int(self.rows[0])
        return row, f"rows {row} to {self.rows[-1]}, from {self.images.file(0)} on"


class Worker:
    """Fills parts, one after the other; it can be asked how far it is meanwhile."""

    def __init__(self, backbones: Sequence[Backbone], settings: ExtractionSettings) -> None:
        self._backbones, self._settings = backbones, settings
        self._decoders: Workers | None = None
        self._stopped = False
        self._now = (-1, 0, 0)  # first row of the part in hand, images done of it, bad ones

    def measure(self, rows: RowRange) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return size and mtime_ns of n files, (n,) each."""
        return measure(rows.images)

    def hashes(self, rows: RowRange) -> NDArray[np.bytes_]:
        """Return the hashes of n files, (n,)."""
        return hashes(rows.images)

    def progress(self) -> tuple[int, int, int]:
        """Return the first row of the part in hand, how many images are done, how many are bad."""
        return self._now

    def stop(self) -> None:
        """Stop after the batch in hand, and fill nothing more."""
        self._stopped = True

    def fill(self, part: Part) -> tuple[int, int]:
        """Fill a part's stores, from where they are; return images done and bad ones.

        Raises what extract.extract raises, and ClusterError, which says where it was, for any other
        error.
        """
        first = int(part.rows[0])

        def progress(done: int, _: int, bad: int) -> None:
            self._now = (first, done, bad)

        progress(0, 0, 0)
        try:
            self._fill(part, progress)
        except KeyboardInterrupt:
            self._close()
        except MedprobeError:
            self._close()
            raise
        except Exception as error:
            self._close()
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ClusterError(
                f"{what}. It happened at {part.in_hand()[1]}, on {socket.gethostname()}; "
                "what is stored stays"
            ) from error
        return self._now[1:]

    def _fill(self, part: Part, progress: ImageProgress) -> None:
        with ExitStack() as stack:
            jobs = []
            for shard in part.shards:
                store = stack.enter_context(shard.opened(part.images))
                backbone = self._backbones[shard.job]
                jobs.append(Job(store, backbone, self._settings.device, shard.wanted))
            fill(
                part.images,
                jobs,
                self._settings,
                progress,
                lambda: self._stopped,
                skipped=part.skipped,
                workers_of=self._decoders_of,
            )

    def _decoders_of(self, recipe: ImageRecipe, count: int) -> AbstractContextManager[Workers]:
        """Return processes that decode, kept from part to part."""
        if self._decoders and self._decoders.recipe != recipe:
            self._close()
        self._decoders = self._decoders or Workers(recipe, count)
        return nullcontext(self._decoders)

    def _close(self) -> None:
        """End the processes that decode, and what was asked of them."""
        if self._decoders:
            self._decoders.__exit__()
            self._decoders = None


def fill_by(
    pool_of: Callable[..., AbstractContextManager[Pool]],
    manifest: Manifest,
    jobs: Sequence[Job],
    settings: ExtractionSettings,
    progress: ImageProgress | None,
    stop: Stop,
) -> None:
    """Fill the jobs' stores by workers: an engine of extract.extract.

    pool_of(Worker, *its arguments) gives the workers. Raises what extract.extract raises, and
    ClusterError where workers are lost again and again at one row.
    """
    jobs = [job for job in jobs if job.computed]
    if not jobs:
        return
    with pool_of(Worker, [job.backbone for job in jobs], settings) as pool:
        for _ in range(ROUNDS):
            files = _files(pool, manifest, jobs, stop)
            taken = taken_by_all(jobs)
            first = files.first(taken)
            skipped = taken | (first != np.arange(len(first)))
            parts = deal(manifest, jobs, skipped, pool.room())
            _fill(pool, parts, len(manifest), jobs, progress, stop)
            if stop():
                raise KeyboardInterrupt
            for job in jobs:
                fill_copies(job, files, first)
                clear(job.store)
                job.look()
            if not any(job.todo.any() for job in jobs):
                break
        else:
            more = max(int(job.todo.sum()) for job in jobs)
            raise StoreError(
                f"{more} images kept changing while they were read: "
                "give the same command again when they no longer do"
            )
    if progress:
        bad = max(len(job.store.bad()) for job in jobs)
        progress(len(manifest), len(manifest), bad)


def _files(pool: Pool, manifest: Manifest, jobs: Sequence[Job], stop: Stop) -> Files:
    """Return what tells which images are copies: of those still to be done, and of the others."""

    def ask(method: str, wanted: NDArray[np.bool_], step: int) -> Any:
        rows = np.flatnonzero(wanted)
        some = [rows[a : a + step] for a in range(0, len(rows), step)]
        calls = [RowRange(part, manifest.take(part)) for part in some]
        return pool.run(method, calls, stop=stop, tick=lambda: None, in_hand=RowRange.in_hand)

    files = Files.known(jobs)
    todo = np.any([job.todo for job in jobs], axis=0)
    for some, (size, mtime_ns) in ask("measure", todo & (files.size < 0), MEASURED):
        files.size[some.rows], files.mtime_ns[some.rows] = size, mtime_ns
    for some, answer in ask("hashes", files.alike(), HASHED):
        files.hash[some.rows] = answer
    return files


def _fill(
    pool: Pool,
    parts: Sequence[Part],
    total: int,
    jobs: Sequence[Job],
    progress: ImageProgress | None,
    stop: Stop,
) -> None:
    """Have the parts filled, and gather each while others are filled."""
    done, bad = total - sum(len(part.rows) for part in parts), 0
    gathering: deque[Future[None]] = deque()

    def tick() -> None:
        now = [answer for answer in pool.asked("progress") if answer[0] not in gathered]
        if progress:
            progress(done + sum(n for _, n, _ in now), total, bad + sum(n for _, _, n in now))

    gathered: set[int] = set()
    with ThreadPoolExecutor(1, "gather") as thread:
        run = pool.run("fill", parts, stop=stop, tick=tick, in_hand=Part.in_hand)
        for part, (_, wrong) in run:
            gathered.add(int(part.rows[0]))
            done, bad = done + len(part.rows), bad + wrong
            gathering.append(thread.submit(gather, part, jobs))
            while gathering and gathering[0].done():
                gathering.popleft().result()
    for one in gathering:
        one.result()
