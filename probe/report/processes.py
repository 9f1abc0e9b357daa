"""Map over many jobs in several processes; few stay in this one, which is sooner done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from typing import Protocol, TypeVar

from threadpoolctl import threadpool_limits

from features.interpreters import inherited

Job = TypeVar("Job")
Done = TypeVar("Done")
MOST = 8  # processes


class Map(Protocol):
    """Like map, in order; `few` or fewer jobs are done in this process."""

    def __call__(
        self, function: Callable[[Job], Done], jobs: Sequence[Job], *, few: int
    ) -> Iterable[Done]:
        """Yield what the function makes of each job."""
        ...


def alone(function: Callable[[Job], Done], jobs: Sequence[Job], *, few: int = 0) -> Iterable[Done]:
    """Map in this process, a Map itself."""
    return map(function, jobs)


@contextmanager
def several() -> Iterator[Map]:
    """Yield a Map whose processes start with the first job that is given to them."""
    context = get_context("forkserver")  # started anew, not forked: this process has threads
    heavy = ["probe.report.panels", "probe.report.stores", "probe.draw.figures"]
    context.set_forkserver_preload(heavy)
    with ProcessPoolExecutor(min(cores(), MOST), context, threadpool_limits, (1,)) as pool:
        yield partial(_map, pool)


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _map(
    pool: ProcessPoolExecutor, function: Callable[[Job], Done], jobs: Sequence[Job], *, few: int
) -> Iterable[Done]:
    if cores() == 1 or len(jobs) <= few:
        return alone(function, jobs)
    with inherited():  # of the server, which starts with the first job
        ensure_running()
    return pool.map(function, jobs, chunksize=max(1, min(4, len(jobs) // (4 * cores()))))
