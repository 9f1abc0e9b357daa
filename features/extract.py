"""Manifest x backbones -> stores: one decode feeds every backbone.

Images are decoded in processes of their own (workers.py) a few batches ahead of the passes, and
batches are committed behind them (jobs.py), so that a run takes what the forward passes take. A
run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from features.backbones import Backbone
from features.errors import ImageError, StoreError
from features.images import NOT_FOUND
from features.jobs import Chunk, Commits, Job, chunk_size, taken_by_all
from features.lock import writing
from features.manifest import Manifest
from features.parts import recover
from features.plan import Plan, Settings, begin, plan, store_path
from features.presence import missing_line, need_some
from features.store import DONE, FeatureStore
from features.workers import Loaded, Recipe, Workers

AHEAD = 2  # chunks decoded ahead of the one that is computed
PATIENCE = 0.5  # seconds between looks at whether to stop, while an image is waited for


@dataclass(frozen=True)
class Report:
    """What became of one store's rows: computed now, there before, or bad (these are neither)."""

    store: Path
    backbone: str
    images: int
    computed: int
    reused: int
    bad: dict[str, str]  # path -> reason
    added: tuple[str, ...] = ()  # features that joined those there
    remarks: dict[str, int] = field(default_factory=dict)  # on good images, and on how many
    twin: Path | None = None  # the store of the same images that features were copied from


Progress = Callable[[int, int, int], None]  # images done, images in all, bad ones among them
Stop = Callable[[], bool]
Engine = Callable[[Manifest, list[Job], Settings, Progress | None, Stop], None]


def extract(
    manifest: Manifest,
    backbones: Sequence[Backbone],
    *,
    out: Path,
    settings: Settings | None = None,
    progress: Progress | None = None,
    stop: Stop = lambda: False,
    engine: Engine | None = None,
    relabel: bool = True,
) -> list[Report]:
    """Fill out/<dataset>/<backbone>.h5 for every backbone and return what was done.

    engine fills the stores: `fill` does it in this process, spread.py on other machines. stop is
    asked between batches; once it says so, what was computed is committed and KeyboardInterrupt
    raised. relabel: whether a store that is there gets the manifest's labels and splits. Raises
    MissingImagesError where a new store would have no image (which an engine, that may see other
    disks, isn't asked), StaleStoreError where a store was made from something else (nothing is
    changed), StoreLockedError where another process writes to one, StoreError where the disk is
    full, and with on_error="fail" ImageError at the first bad image.
    """
    settings = settings or Settings()
    with ExitStack() as stack:
        begun: list[tuple[Plan, list[Job]]] = []
        for backbone in backbones:
            path = store_path(out, manifest.dataset, backbone.spec.name)
            if engine is None and not path.is_file():
                need_some(manifest)
            stack.enter_context(writing(path))
            planned = plan(manifest, backbone, out, settings)  # nobody changes it from here on
            if engine is None and planned.new:
                need_some(manifest)  # before another store is replaced
            if planned.grows:  # what workers had in hand is of the store as it is now
                with FeatureStore.open(planned.path, write=True) as store:
                    recover(store, store.manifest(), settings)
            jobs = []
            for store in begin(planned, manifest, settings, relabel=relabel):
                stack.enter_context(store)
                recover(store, manifest, settings)
                jobs.append(Job(store, planned.backbone, settings.device))
            begun.append((planned, jobs))
        every = [job for _, jobs in begun for job in jobs]
        (engine or fill)(manifest, every, settings, progress, stop)
        reports = [_finish(manifest, planned, jobs) for planned, jobs in begun]
    _say_missing(manifest, reports)
    return reports


def _finish(manifest: Manifest, planned: Plan, jobs: Sequence[Job]) -> Report:
    """Bring added features home, and say what was done."""
    main, *added = jobs
    for job in added:
        main.store.absorb(job.store, planned.fingerprint)
        job.store.close()
        job.store.path.unlink()
    bad = {str(manifest.path[i]): reason for i, reason in main.store.bad().items()}
    good = len(manifest) - len(bad)
    computed = good - min(job.good for job in jobs)
    return Report(
        store=planned.path,
        backbone=planned.backbone.spec.name,
        images=len(manifest),
        computed=computed,
        reused=good - computed,
        bad=bad,
        added=tuple(sorted(planned.missing)) if added else (),
        remarks=dict(Counter(main.store.remarks().values())),
        twin=planned.twin,
    )


def _say_missing(manifest: Manifest, reports: Sequence[Report]) -> None:
    """Warn of files that are not there: how many, where they were looked for, and one of them."""
    found = reports[0].bad if reports else {}  # all stores have the same images
    gone = [path for path, reason in found.items() if reason == NOT_FOUND]
    if gone:
        first = manifest.file(manifest.path.tolist().index(gone[0]))
        line = missing_line(len(gone), len(manifest), str(manifest.root), str(first))
        warnings.warn(f"{manifest.dataset}: {line}; they are left out", stacklevel=3)


def fill(
    manifest: Manifest,
    jobs: Sequence[Job],
    settings: Settings,
    progress: Progress | None,
    stop: Stop,
    *,
    left: NDArray[np.bool_] | None = None,
    workers_of: Callable[[Recipe, int], AbstractContextManager[Workers]] = Workers,
) -> None:
    """Fill the jobs' stores: chunk by chunk, for every job batch by batch.

    Rows that are `left` (N,), and those that all stores had before they grew, are not read, and are
    in no batch. workers_of(recipe, count) gives the processes that decode.
    """
    jobs = [job for job in jobs if job.computed]
    todo = np.any([job.todo for job in jobs], axis=0) if jobs else np.zeros(len(manifest), bool)
    finished, bad = int((~todo).sum()), 0
    if progress:
        progress(finished, len(manifest), bad)
    if not jobs:
        return
    taken = taken_by_all(jobs)
    left = taken if left is None else left | taken
    for job in jobs:
        job.backbone.place(job.device, job.dtype)
    transforms = list(dict.fromkeys(job.backbone.transform for job in jobs))
    recipe = Recipe(
        transforms=tuple(transforms),
        exact=settings.exact,
        views=max(job.n_views for job in jobs),
        seed=_view_seed(jobs),
        window=settings.window,
        frame=settings.frame,
    )
    cores = os.cpu_count() or 1
    count, most = settings.workers or min(2, cores), settings.workers or cores
    with workers_of(recipe, count) as workers, Commits() as commits:
        for chunk in _chunks(manifest, jobs, workers, settings, most, left, stop):
            asked = todo[chunk.rows]
            wrong = [k for k, image in enumerate(chunk.images) if image.reason and asked[k]]
            if wrong and settings.on_error == "fail":
                k = wrong[0]
                raise ImageError(
                    f"{manifest.file(chunk.rows[k])}: {chunk.images[k].reason}. "
                    "Repair or remove it, or take --on-error skip"
                )
            for job in jobs:
                place = transforms.index(job.backbone.transform)
                for a in range(0, len(chunk.rows), job.store.batch_size):
                    if stop():
                        break
                    job.fill(chunk, place, a, commits)
            if stop():
                break
            finished += int(asked.sum())
            bad += len(wrong)
            if progress:
                progress(finished, len(manifest), bad)
    if stop():
        raise KeyboardInterrupt


def _chunks(
    manifest: Manifest,
    jobs: Sequence[Job],
    workers: Workers,
    settings: Settings,
    most: int,
    left: NDArray[np.bool_],
    stop: Stop,
) -> Iterator[Chunk]:
    """Yield what has to be computed, in order, decoded ahead; no more once `stop` says so.

    While the passes have to wait for pixels, there are more workers each time, up to `most`.
    """
    step, needed = chunk_size(jobs), np.any([job.needs() for job in jobs], axis=0)
    starts = [s for s in range(0, len(manifest), step) if needed[s : s + step].any()]
    known = _Known(manifest, jobs, left)
    elsewhere: Future[Loaded] = Future()
    elsewhere.set_result(Loaded(reason="its bytes are in another row"))
    waiting: deque[tuple[NDArray[np.int64], list[torch.Tensor], list[Future[Loaded]]]] = deque()
    upcoming = iter(starts)

    def submit() -> None:
        start = next(upcoming, None)
        if start is None:
            return
        rows = np.arange(start, min(start + step, len(manifest)))
        pixels = [
            torch.empty(
                (len(rows), 1 + workers.recipe.views, t.size, t.size, 3),
                dtype=torch.uint8,
                pin_memory=settings.device.startswith("cuda"),
            )
            for t in workers.recipe.transforms
        ]
        blocks = [p.numpy() for p in pixels]
        loading = [
            elsewhere
            if left[i]
            else workers.load(manifest.file(int(i)), [memoryview(b[k]).cast("B") for b in blocks])
            for k, i in enumerate(rows)
        ]
        waiting.append((rows, pixels, loading))

    for _ in range(1 + AHEAD):
        submit()
    before = time.perf_counter()
    while waiting:
        rows, pixels, loading = waiting.popleft()
        asked = time.perf_counter()
        for future in loading:
            while not future.done():  # it may never be; a wish to stop is still heard
                if stop():
                    return
                wait([future], timeout=PATIENCE)
        images = [future.result() for future in loading]
        now = time.perf_counter()
        if now - asked > 0.1 * (now - before):
            workers.grow(min(2 * len(workers.threads), most))
        before = now
        yield Chunk(rows, images, pixels, known.copies(rows, images))
        submit()


def _view_seed(jobs: Sequence[Job]) -> int:
    seeds = {job.store.fingerprint["views"]["seed"] for job in jobs if job.views}
    if len(seeds) > 1:
        raise StoreError(
            f"the stores have views of different seeds ({', '.join(map(str, sorted(seeds)))}): "
            "finish them one by one, each with its own -m"
        )
    return seeds.pop() if seeds else 0


class _Known:
    """Which bytes were seen in which row: 16 bytes of the hash each.

    From the first row on, but for rows that are left and done: what has their bytes is their copy.
    """

    def __init__(self, manifest: Manifest, jobs: Sequence[Job], left: NDArray[np.bool_]) -> None:
        self._first: dict[bytes, int] = {}
        self._next = 0
        done = np.any([job.store.done == DONE for job in jobs], axis=0)
        self._stored = np.full(len(manifest), b"", dtype="S64") if done.any() else None
        if self._stored is not None:
            for job in jobs:
                rows = job.store.done == DONE
                self._stored[rows] = job.store.columns["manifest/hash"].read()[rows]
            for i in np.flatnonzero(left & (self._stored != b"")).tolist():
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
