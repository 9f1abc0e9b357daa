"""Manifest x backbones -> stores: one decode feeds every backbone.

Images are decoded in processes of their own (workers.py) ahead of the passes (chunks.py), and
batches are committed behind them (jobs.py), so that a run takes what the forward passes take. A
run that was stopped goes on where it was.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from features.backbones import Backbone
from features.chunks import chunks
from features.errors import ImageError, StoreError
from features.images import NOT_FOUND
from features.jobs import Chunk, Commits, Job, taken_by_all
from features.lock import writing
from features.manifest import Manifest
from features.parts import recover
from features.plan import Ask, ExtractionSettings, Plan, begin, plan, run_locally, store_path
from features.presence import missing_line, need_some
from features.store import FeatureStore
from features.workers import ImageRecipe, Workers


@dataclass(frozen=True)
class ExtractionReport:
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


ImageProgress = Callable[[int, int, int], None]  # images done, images in all, bad ones among them
Stop = Callable[[], bool]
ExtractionEngine = Callable[
    [Manifest, list[Job], ExtractionSettings, ImageProgress | None, Stop], None
]


def extract(
    manifest: Manifest,
    backbones: Sequence[Backbone],
    *,
    out: Path,
    settings: ExtractionSettings | None = None,
    progress: ImageProgress | None = None,
    stop: Stop = lambda: False,
    engine: ExtractionEngine | None = None,
    ask: Ask = run_locally,
    relabel: bool = True,
) -> list[ExtractionReport]:
    """Fill out/<dataset>/<backbone>.h5 for every backbone and return what was done.

    engine fills the stores: `fill` does it in this process, distributed.py on other machines; ask
    puts a question about the device to a machine that has it. stop is asked between batches; once
    it says so, what was computed is committed and KeyboardInterrupt raised. relabel: whether a
    store that is there gets the manifest's labels and splits.

    Raises MissingImagesError where a new store would have no image (which an engine, that may see
    other disks, isn't asked), StaleStoreError where a store was made from something else (nothing
    is changed), StoreLockedError where another process writes to one, StoreError where the disk is
    full, and with on_error="fail" ImageError at the first bad image.
    """
    settings = settings or ExtractionSettings()
    with ExitStack() as stack:
        begun: list[tuple[Plan, list[Job]]] = []
        for backbone in backbones:
            path = store_path(out, manifest.dataset, backbone.spec.name)
            if engine is None and not path.is_file():
                need_some(manifest)
            stack.enter_context(writing(path))
            planned = plan(manifest, backbone, out, settings, ask)  # nobody changes it from here on
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


def _finish(manifest: Manifest, planned: Plan, jobs: Sequence[Job]) -> ExtractionReport:
    """Bring added features home, and say what was done."""
    main, *added = jobs
    for job in added:
        main.store.absorb(job.store, planned.fingerprint)
        job.store.close()
        job.store.path.unlink()
    bad = {str(manifest.path[i]): reason for i, reason in main.store.bad().items()}
    good = len(manifest) - len(bad)
    computed = good - min(job.good for job in jobs)
    return ExtractionReport(
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


def _say_missing(manifest: Manifest, reports: Sequence[ExtractionReport]) -> None:
    """Warn of files that are not there: how many, where they were looked for, and one of them."""
    bad = reports[0].bad if reports else {}  # all stores have the same images
    gone = [path for path, reason in bad.items() if reason == NOT_FOUND]
    if gone:
        first = manifest.file(manifest.path.tolist().index(gone[0]))
        line = missing_line(len(gone), len(manifest), str(manifest.root), str(first))
        warnings.warn(f"{manifest.dataset}: {line}; they are left out", stacklevel=3)


def fill(
    manifest: Manifest,
    jobs: Sequence[Job],
    settings: ExtractionSettings,
    progress: ImageProgress | None,
    stop: Stop,
    *,
    skipped: NDArray[np.bool_] | None = None,
    workers_of: Callable[[ImageRecipe, int], AbstractContextManager[Workers]] = Workers,
) -> None:
    """Fill the jobs' stores: chunk by chunk, for every job batch by batch.

    Rows that are `skipped` (N,), and those that all stores had before they grew, are not read, and
    are in no batch. workers_of(recipe, count) gives the processes that decode.
    """
    jobs = [job for job in jobs if job.computed]
    todo = np.any([job.todo for job in jobs], axis=0) if jobs else np.zeros(len(manifest), bool)
    finished, bad = int((~todo).sum()), 0
    if progress:
        progress(finished, len(manifest), bad)
    if not jobs:
        return
    taken = taken_by_all(jobs)
    skipped = taken if skipped is None else skipped | taken
    for job in jobs:
        job.backbone.to(job.device, job.dtype)
    recipe = _recipe(jobs, settings)
    cores = os.cpu_count() or 1
    count, most = settings.workers or min(2, cores), settings.workers or cores
    with workers_of(recipe, count) as workers, Commits() as commits:
        for chunk in chunks(manifest, jobs, workers, skipped, most=most, stop=stop):
            asked = todo[chunk.rows]
            wrong = [k for k, image in enumerate(chunk.images) if image.reason and asked[k]]
            if wrong and settings.on_error == "fail":
                raise _bad_image(manifest, chunk, wrong[0])
            _fill_chunk(jobs, chunk, recipe, commits, stop)
            if stop():
                break
            finished += int(asked.sum())
            bad += len(wrong)
            if progress:
                progress(finished, len(manifest), bad)
    if stop():
        raise KeyboardInterrupt


def _recipe(jobs: Sequence[Job], settings: ExtractionSettings) -> ImageRecipe:
    """Return how images are decoded, once for all jobs."""
    return ImageRecipe(
        transforms=tuple(dict.fromkeys(job.backbone.transform for job in jobs)),
        exact=settings.exact,
        views=max(job.n_views for job in jobs),
        seed=_view_seed(jobs),
        window=settings.window,
        frame=settings.frame,
    )


def _fill_chunk(
    jobs: Sequence[Job], chunk: Chunk, recipe: ImageRecipe, commits: Commits, stop: Stop
) -> None:
    """Compute a chunk's batches for every job and have them committed; none once `stop` says so."""
    for job in jobs:
        transform = recipe.transforms.index(job.backbone.transform)
        for start in range(0, len(chunk.rows), job.store.batch_size):
            if stop():
                return
            job.fill(chunk, transform, start, commits)


def _bad_image(manifest: Manifest, chunk: Chunk, k: int) -> ImageError:
    return ImageError(
        f"{manifest.file(chunk.rows[k])}: {chunk.images[k].reason}. "
        "Repair or remove it, or take --on-error skip"
    )


def _view_seed(jobs: Sequence[Job]) -> int:
    seeds = {job.store.fingerprint["views"]["seed"] for job in jobs if job.views}
    if len(seeds) > 1:
        raise StoreError(
            f"the stores have views of different seeds ({', '.join(map(str, sorted(seeds)))}): "
            "finish them one by one, each with its own -m"
        )
    return seeds.pop() if seeds else 0
