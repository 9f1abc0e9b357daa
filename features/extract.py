"""Manifest x backbones -> stores: one decode feeds every backbone.

A run that was stopped goes on where it was. Rows go in fixed batches (row i is in batch
i // batch_size), each committed whole. A resumed run computes the same batches as an undisturbed
one, so the features are the same to the bit.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from features import dicom
from features.backbones import Backbone
from features.errors import ImageError, StaleStoreError, StoreError
from features.fingerprint import differences, fingerprint
from features.images import Transform, decode, read_bytes
from features.manifest import Manifest
from features.store import BAD, DONE, PENDING, FeatureStore, writing

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHOWN = 5  # how many of a list an error names


@dataclass(frozen=True)
class Settings:
    """How to extract. Batch size in images, workers in threads; None chooses by the machine."""

    layers: str = "last"  # or "all", or a list: "3,7,final"
    pools: tuple[str, ...] = ()  # none is each backbone's default
    tokens: bool = False
    precision: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    device: str = "cpu"
    on_error: str = "skip"  # or "fail"
    overwrite: str = "never"  # or "stale", "always"
    window: dicom.Window | None = None  # for DICOM, as frame
    frame: int | None = None


@dataclass(frozen=True)
class Report:
    """What became of one store: how many rows were computed now, were there before, are bad."""

    store: Path
    backbone: str
    images: int
    computed: int
    reused: int
    bad: dict[str, str]  # path -> reason


Progress = Callable[[int, int, int], None]  # images done, images in all, bad ones among them


def extract(
    manifest: Manifest,
    backbones: Sequence[Backbone],
    *,
    out: Path,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """Fill out/<dataset>/<backbone>.h5 for every backbone and return what was done.

    Raises StaleStoreError where a store was made from something else (nothing is changed),
    StoreLockedError where another process writes to one, and with on_error="fail"
    ImageError at the first bad image.
    """
    settings = settings or Settings()
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode has a limit
        jobs = []
        for backbone in backbones:
            path = store_path(out, manifest.dataset, backbone.spec.name)
            stack.enter_context(writing(path))
            store = stack.enter_context(_prepare(path, manifest, backbone, settings))
            jobs.append(_Job(store, backbone, settings))
        _run(manifest, jobs, settings, progress)
        return [job.report(manifest) for job in jobs]


def store_path(out: Path, dataset: str, backbone: str) -> Path:
    """Return where a store lies; characters that a file name can't have become dashes."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in backbone)
    return out / dataset / f"{name}.h5"


def resolve_precision(precision: str, device: str, *, bfloat16: bool = True) -> str:
    """Return what "auto" means here: bfloat16 where the hardware multiplies it natively.

    That is a GPU with bfloat16, or a processor with AMX; the bfloat16 of AVX-512 alone is left to
    be asked for. A backbone that bfloat16 harms gets float16 on a GPU. Else float32.
    """
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bfloat16" if bfloat16 and torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if bfloat16 and torch.cpu._is_amx_tile_supported() else "float32"


def resolve_device(device: str) -> str:
    """Return what "auto" means here."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _prepare(
    path: Path, manifest: Manifest, backbone: Backbone, settings: Settings
) -> FeatureStore:
    """Return the store open for writing: a new one, or the old one if it was made from the same."""
    wanted = backbone.select(settings.layers, settings.pools, settings.tokens)
    precision = resolve_precision(
        settings.precision, settings.device, bfloat16=backbone.spec.bfloat16
    )
    shown = dicom.applied(manifest.path.tolist(), settings.window, settings.frame)
    asked = fingerprint(manifest, backbone, wanted, precision, dicom=shown)
    if path.is_file() and settings.overwrite != "always":
        store = FeatureStore.open(path, write=True)
        if set(wanted) <= store.features.keys():
            asked["features"] = sorted(store.features)  # what is there beside them does no harm
        differ = differences(store.fingerprint, asked)
        if not differ:
            _check_sources(store, manifest, settings)
            _update_labels(store, manifest)
            return store
        store.file.close()
        if settings.overwrite == "never":
            raise StaleStoreError(
                f"{path} was made from something else: {'; '.join(differ)}. "
                "Take --overwrite stale to make it anew, or -o for another place"
            )
    FeatureStore.create(
        path,
        manifest,
        {name: backbone.network.features[name] for name in wanted},
        fingerprint=asked,
        default_feature=default
        if (default := backbone.spec.default_feature) in wanted
        else wanted[0],
        batch_size=settings.batch_size or (256 if settings.device.startswith("cuda") else 16),
    )
    return FeatureStore.open(path, write=True)


def _check_sources(store: FeatureStore, manifest: Manifest, settings: Settings) -> None:
    """See that no image has changed since it was read.

    It is compared by size and time, and where those differ by its bytes. Bad images are tried
    again. A changed one is an error, or with overwrite="stale" computed anew.
    """
    done, source = store.done, store.source()
    changed = []
    for i in np.flatnonzero(done == DONE):
        path = manifest.root / manifest.path[i]
        try:
            stat = path.stat()
        except OSError:
            continue  # its features are as good as they were
        if (stat.st_size, stat.st_mtime_ns) == (source["size"][i], source["mtime_ns"][i]):
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != source["hash"][i]:
            changed.append(int(i))
    if changed and settings.overwrite == "never":
        names = ", ".join(manifest.path[changed[:SHOWN]])
        raise StaleStoreError(
            f"{store.path}: {len(changed)} images have changed "
            f"since their features were computed ({names}). "
            "Take --overwrite stale to compute those anew"
        )
    again = np.concatenate([np.array(changed, dtype=np.int64), np.flatnonzero(done == BAD)])
    if len(again):
        store.forget(np.sort(again))


def _update_labels(store: FeatureStore, manifest: Manifest) -> None:
    """Bring labels, subjects, splits and other columns up to date; the features stay."""
    old = store.manifest()
    names = ("label", "subject", "split")
    same = all(np.array_equal(getattr(old, name), getattr(manifest, name)) for name in names)
    same &= old.columns.keys() == manifest.columns.keys() and all(
        np.array_equal(old.columns[name], values) for name, values in manifest.columns.items()
    )
    same &= all(
        getattr(old, name) == getattr(manifest, name)
        for name in ("classes", "root", "split_from", "metric", "note")
    )
    if not same:
        store.relabel(manifest)


class _Job:
    """One backbone and the store it fills."""

    def __init__(self, store: FeatureStore, backbone: Backbone, settings: Settings) -> None:
        self.store, self.backbone = store, backbone
        self.device = settings.device
        self.dtype = PRECISIONS[store.fingerprint["precision"]]
        self.wanted = list(store.features)
        self.todo = store.done == PENDING
        self.reused = int((~self.todo).sum())
        if self.todo.any():
            # Channels last: EfficientNet-Lite0 at float32 runs 2 to 3 times faster so, on 2 cores.
            backbone.module.to(self.device, self.dtype)
            backbone.module.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def compute(self, pixels: Tensor) -> dict[str, NDArray[np.floating[Any]]]:
        """Return the wanted features of pixels (B, 3, H, W) uint8."""
        pixels = pixels.to(self.device, non_blocking=True)
        images = self.backbone.transform.normalise(pixels, self.dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        found = self.backbone.network(images, self.wanted)
        return {
            name: (value.float() if value.ndim == 2 else value.half()).cpu().numpy()
            for name, value in found.items()
        }

    def report(self, manifest: Manifest) -> Report:
        """Say what was done."""
        bad = {str(manifest.path[i]): reason for i, reason in self.store.bad().items()}
        computed = int(self.todo.sum())
        return Report(
            self.store.path, self.backbone.spec.name, len(manifest), computed, self.reused, bad
        )


@dataclass(frozen=True)
class _Loaded:
    """One image as read: its pixels per transform, or why it is bad."""

    row: int
    pixels: tuple[Tensor, ...] = ()
    hash: str = ""
    size: int = 0
    mtime_ns: int = 0
    reason: str = ""


def _load(row: int, path: Path, transforms: Sequence[Transform], settings: Settings) -> _Loaded:
    try:
        data = read_bytes(path)
        image = decode(data, window=settings.window, frame=settings.frame)
    except ImageError as error:
        return _Loaded(row, reason=str(error))
    pixels = tuple(t.prepare(image) for t in transforms)
    return _Loaded(
        row, pixels, hashlib.sha256(data).hexdigest(), len(data), path.stat().st_mtime_ns
    )


def _run(
    manifest: Manifest, jobs: Sequence[_Job], settings: Settings, progress: Progress | None
) -> None:
    """Fill the jobs' stores batch by batch; images are decoded by threads a few batches ahead."""
    transforms = list(dict.fromkeys(job.backbone.transform for job in jobs))
    place = [transforms.index(job.backbone.transform) for job in jobs]
    todo = np.any([job.todo for job in jobs], axis=0)
    size = {job.store.batch_size for job in jobs}
    if len(size) > 1:
        raise StoreError(
            "the stores were begun with different batch sizes "
            f"({', '.join(map(str, sorted(size)))}): "
            "finish them one by one, each with its own -m"
        )
    step = size.pop()
    batches = [
        np.arange(start, min(start + step, len(manifest)))
        for start in range(0, len(manifest), step)
        if todo[start : start + step].any()
    ]
    finished, bad = int((~todo).sum()), 0
    if progress:
        progress(finished, len(manifest), bad)
    with ThreadPoolExecutor(settings.workers or os.cpu_count() or 1) as pool:
        for rows, images in _ahead(pool, manifest, batches, transforms, settings):
            good = [image for image in images if not image.reason]
            reasons = {image.row: image.reason for image in images if image.reason}
            if reasons and settings.on_error == "fail":
                row, reason = next(iter(reasons.items()))
                raise ImageError(
                    f"{manifest.root / manifest.path[row]}: {reason}. "
                    "Mend or remove it, or take --on-error skip"
                )
            for job, t in zip(jobs, place, strict=True):
                if job.todo[rows].any():
                    _fill(job, t, good, reasons)
            finished += int(todo[rows].sum())
            bad += len(reasons)
            if progress:
                progress(finished, len(manifest), bad)


def _fill(job: _Job, transform: int, good: Sequence[_Loaded], reasons: dict[int, str]) -> None:
    """Compute a batch, all of it as in an undisturbed run, and commit what was pending."""
    features = job.compute(torch.stack([image.pixels[transform] for image in good])) if good else {}
    keep = np.array([bool(job.todo[image.row]) for image in good], dtype=bool)
    kept = [image for image, k in zip(good, keep, strict=True) if k]
    job.store.commit(
        np.array([image.row for image in kept], dtype=np.int64),
        {name: values[keep] for name, values in features.items()},
        {name: [getattr(image, name) for image in kept] for name in ("hash", "size", "mtime_ns")},
        {row: reason for row, reason in reasons.items() if job.todo[row]},
    )


def _ahead(
    pool: ThreadPoolExecutor,
    manifest: Manifest,
    batches: Sequence[NDArray[np.integer]],
    transforms: Sequence[Transform],
    settings: Settings,
    *,
    depth: int = 3,
) -> Iterator[tuple[NDArray[np.integer], list[_Loaded]]]:
    """Yield each batch with its images in order, decoding up to `depth` batches ahead."""
    queue: deque[tuple[NDArray[np.integer], list[Future[_Loaded]]]] = deque()
    waiting = iter(batches)

    def submit() -> None:
        rows = next(waiting, None)
        if rows is not None:
            paths = (manifest.root / manifest.path[i] for i in rows)
            work = [
                pool.submit(_load, int(i), p, transforms, settings)
                for i, p in zip(rows, paths, strict=True)
            ]
            queue.append((rows, work))

    for _ in range(depth):
        submit()
    try:
        while queue:
            rows, work = queue.popleft()
            yield rows, [future.result() for future in work]
            submit()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
