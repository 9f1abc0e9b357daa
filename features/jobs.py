"""A job: one backbone and the store it fills, batch by batch.

Row i of a store is in batch i // batch_size, whatever is computed when and beside what. A batch is
computed whole, without its bad images and without those whose bytes an earlier row has; so a run
that was stopped computes the same batches as an undisturbed one, and its features are the same to
the bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.backbones import Backbone
from features.devices import PRECISIONS
from features.errors import StoreError
from features.layout import VIEWS
from features.store import DONE, PENDING, FeatureStore
from features.workers import Loaded

LARGEST_CHUNK = 2048  # images decoded as one, where backbones have different batch sizes

Features = dict[str, NDArray[np.floating[Any]]]


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows as decoded: `pixels` (n, 1 + V, S, S, 3) uint8 for one transform each.

    copies maps a row to the earlier one that has the same bytes.
    """

    rows: NDArray[np.int64]
    images: Sequence[Loaded]
    pixels: Sequence[Tensor]
    copies: dict[int, int]


class Job:
    """One backbone and the store it fills."""

    def __init__(
        self,
        store: FeatureStore,
        backbone: Backbone,
        device: str,
        wanted: NDArray[np.bool_] | None = None,
    ) -> None:
        """Take up a store's pending rows, or of these only the wanted ones (N,)."""
        self.store, self.backbone, self.device = store, backbone, device
        self.dtype = PRECISIONS[store.fingerprint["precision"]]
        self.views = [name for name in store.features if name.endswith(VIEWS)]
        self.plain = [name for name in store.features if name not in self.views]
        self.n_views = store.features[self.views[0]][0] if self.views else 0
        done = store.done
        self.todo = done == PENDING if wanted is None else (done == PENDING) & wanted
        self.computed = int(self.todo.sum())
        self.good = int((done == DONE).sum())  # before this run
        # Which rows were computed before in batches as they are now, and not copied.
        self._fresh = _first_of_their_bytes(store, done) & ~store.taken

    def look(self) -> None:
        """Take up what is pending in the store by now."""
        self.todo = self.store.done == PENDING

    def needs(self) -> NDArray[np.bool_]:
        """Return which rows are in a batch with something to do, (N,)."""
        size = self.store.batch_size
        batches = np.add.reduceat(self.todo, np.arange(0, len(self.todo), size)) > 0
        return np.repeat(batches, size)[: len(self.todo)]

    def fill(self, chunk: Chunk, transform: int, a: int, commits: Commits) -> None:
        """Compute the batch that begins at row `a` of a chunk and have it committed."""
        b = min(a + self.store.batch_size, len(chunk.rows))
        rows, images = chunk.rows[a:b], chunk.images[a:b]
        if not self.todo[rows].any():
            return
        fresh = np.array(
            [not m.reason and int(i) not in chunk.copies for i, m in zip(rows, images, strict=True)]
        )
        computed = self._compute(chunk.pixels[transform][a:b], fresh) if fresh.any() else Pass()
        written = self.todo[rows]
        if not np.array_equal(fresh, self._fresh[rows]):
            # Beside other images than before, the last bits of all may be others: all are written.
            written = written | np.array([not image.reason for image in images])
        commits.add(lambda: self._commit(rows, images, fresh, written, computed, chunk.copies))

    @torch.inference_mode()
    def _compute(self, pixels: Tensor, fresh: NDArray[np.bool_]) -> Pass:
        """Start the passes over pixels (n, 1 + V, S, S, 3); nothing here waits for a GPU."""
        if not fresh.all():
            pixels = pixels[torch.from_numpy(fresh)]
            pixels = pixels.pin_memory() if self.device.startswith("cuda") else pixels
        pixels = pixels.to(self.device, non_blocking=True)
        features: dict[str, Tensor] = {}
        if self.plain:
            features |= self._features(pixels[:, 0], self.plain)
        if self.views:
            names = [name.removesuffix(VIEWS) for name in self.views]
            of_views = [self._features(pixels[:, 1 + v], names) for v in range(self.n_views)]
            features |= {
                name + VIEWS: torch.stack([f[name] for f in of_views], 1) for name in names
            }
        return Pass({name: _to_host(value) for name, value in features.items()}, _mark(self.device))

    def _features(self, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return features of pixels (n, side, side, 3): vectors (n, D) float32, tokens float16."""
        features = self.backbone.network(self.backbone.normalise(pixels, self.dtype), names)
        return {
            n: value.float() if value.ndim == 2 else value.half() for n, value in features.items()
        }

    def _commit(
        self,
        rows: NDArray[np.int64],
        images: Sequence[Loaded],
        fresh: NDArray[np.bool_],
        written: NDArray[np.bool_],
        computed: Pass,
        copies: dict[int, int],
    ) -> None:
        """Commit the rows (n,) of a batch that are `written` (n,); `fresh` (n,) were computed."""
        features = computed.wait()
        values = {
            name: self._whole(name, rows, fresh, features.get(name), copies)
            for name in self.store.features
        }
        kept = [image for image, w in zip(images, written, strict=True) if w]
        self.store.commit(
            rows[written],
            {name: v[written] for name, v in values.items()},
            {name: [getattr(m, name) for m in kept] for name in ("hash", "size", "mtime_ns")},
            {
                int(i): m.reason
                for i, m, w in zip(rows, images, written, strict=True)
                if m.reason and w
            },
            {int(i): m.remark for i, m in zip(rows, images, strict=True) if m.remark},
        )

    def _whole(
        self,
        name: str,
        rows: NDArray[np.int64],
        fresh: NDArray[np.bool_],
        computed: NDArray[np.floating[Any]] | None,
        copies: dict[int, int],
    ) -> NDArray[np.floating[Any]]:
        """Return a feature of all rows (n,), (n, ...): computed, copied, or zeros of bad ones.

        computed (m, ...) is of the m rows that are `fresh` (n,).
        """
        if computed is not None and fresh.all():
            return computed
        out = np.zeros((len(rows), *self.store.features[name]), np.float32)
        if computed is not None:
            out[fresh] = computed
        for k, i in enumerate(rows.tolist()):
            if i in copies:
                inside = np.flatnonzero((rows == copies[i]) & fresh)
                earlier = self._earlier(name, copies[i]) if not len(inside) else out
                out[k] = earlier[inside[0] if len(inside) else 0]
        return out

    def _earlier(self, name: str, row: int) -> NDArray[np.floating[Any]]:
        """Return a feature of a row that was committed before, (1, ...)."""
        where = np.array([row])
        if self.store.columns["done"].take(where)[0] != DONE:
            raise StoreError(
                f"{self.store.path}: images have changed while they were read, and some are now "
                f"the same as row {row}; give the same command again"
            )
        return self.store.read(name, where)


def taken_by_all(jobs: Sequence[Job]) -> NDArray[np.bool_]:
    """Return which rows all stores had before they grew, (N,): they are in no batch any more."""
    return np.asarray(np.all([job.store.taken for job in jobs], axis=0))


def chunk_size(jobs: Sequence[Job]) -> int:
    """Return the least number of rows that is whole batches of every job."""
    sizes = sorted({job.store.batch_size for job in jobs})
    step = math.lcm(*sizes)
    if step > max(LARGEST_CHUNK, sizes[-1]):
        raise StoreError(
            "the stores were begun with batch sizes that don't go together "
            f"({', '.join(map(str, sizes))}): finish them one by one, each with its own -m"
        )
    return step


@dataclass(frozen=True)
class Pass:
    """Features on their way from the device, and the event after which they are there."""

    features: dict[str, Tensor] | None = None
    event: torch.cuda.Event | None = None

    def wait(self) -> Features:
        """Return the features of B images: (B, D), (B, T, D) of tokens, (B, V, ...) of views."""
        if self.event:
            self.event.synchronize()
        return {name: value.numpy() for name, value in (self.features or {}).items()}


class Commits:
    """Commits in order on a thread of their own, at most `ahead` waiting; a context manager.

    Writing and forcing to disk take no time from the passes. An error surfaces at the next `add`
    or at the end.
    """

    def __init__(self, ahead: int = 2) -> None:
        self._thread = ThreadPoolExecutor(1, "commit")
        self._waiting: deque[Future[None]] = deque()
        self._ahead = ahead

    def add(self, commit: Callable[[], None]) -> None:
        """Queue a commit; wait while as many as `ahead` are queued."""
        while len(self._waiting) >= self._ahead:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(commit))

    def __enter__(self) -> Self:
        """Return the queue."""
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        """Wait for all; where another error is on its way, theirs come second."""
        self._thread.shutdown(wait=True)
        if error_type is None:
            for commit in self._waiting:
                commit.result()


def _to_host(value: Tensor) -> Tensor:
    """Return a tensor (any shape) in the host's memory; a copy from a GPU may still go on."""
    if value.device.type == "cpu":
        return value
    out = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return out.copy_(value, non_blocking=True)


def _mark(device: str) -> torch.cuda.Event | None:
    """Return an event after all that was asked of the device until now."""
    if not device.startswith("cuda"):
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _first_of_their_bytes(store: FeatureStore, done: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which rows are done and not copies of an earlier row, or of one taken over, (N,)."""
    first = np.zeros(len(done), dtype=bool)
    rows = np.flatnonzero(done == DONE)
    rows = rows[np.argsort(~store.taken[rows], kind="stable")]
    if len(rows):
        _, where = np.unique(store.columns["manifest/hash"].read()[rows], return_index=True)
        first[rows[where]] = True
    return first
