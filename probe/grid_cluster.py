"""The grid on a Ray cluster: features by all workers together, then each cell as a task of its own.

Cells, their log, what is skipped and how a failure is said are those of grid.py. Workers write
predictions, heads and lines of results.jsonl; the log is the driver's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from features.cluster import Cluster
from features.distributed import fill_by
from features.extract import ImageProgress
from probe.cells import Cell
from probe.grid import Outcome, attempt, by_data_set, divide, log, one_line, prepare


class Worker:
    """Computes cells, one after the other."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._about = about

    def compute(self, cell: Cell) -> Outcome:
        """Return what became of a cell."""
        return attempt(cell, self._about)


def run_grid_on(
    cluster: Cluster,
    cells: Sequence[Cell],
    *,
    about: Mapping[str, Any] | None = None,
    images: Callable[[str], ImageProgress | None] = lambda _: None,
) -> Iterator[Outcome]:
    """Yield what became of each cell as it comes in, as grid.run_grid does."""
    done, todo = divide(cells)
    yield from (Outcome(cell, "skipped") for cell in done)
    ready: list[Cell] = []
    for group in by_data_set(todo):
        failed = prepare(
            group,
            images(group[0].manifest.dataset),
            engine=partial(fill_by, cluster.pool),
            ask=cluster.ask,
            settle=cluster.settle,
        )
        for cell in group:
            if cell.backbone in failed:
                outcome = Outcome(cell, "failed", (), one_line(failed[cell.backbone]))
                log(outcome)
                yield outcome
            else:
                ready.append(cell)
    if not ready:
        return
    with cluster.pool(Worker, about or {}) as pool:
        run = pool.run(
            "compute", ready, in_hand=lambda cell: (id(cell), cell.name), keep_going=True
        )
        for cell, found in run:
            if isinstance(found, Exception):
                outcome = Outcome(cell, "failed", (), one_line(found))
            else:
                outcome = replace(found, cell=cell)  # the one that was asked for, not its copy
            log(outcome)
            yield outcome
