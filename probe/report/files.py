"""Write figures as SVG, PNG and CSV, and tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from probe.charts import Chart
from probe.figures import draw
from probe.tables import Table

MANY = 40  # figures for which processes of their own are worth their start


def write_figures(folder: Path, charts: Sequence[Chart], ours: re.Pattern[str]) -> None:
    """Draw every chart into `folder`, in several processes where there are many."""
    _clear(folder, ours)
    for chart, (svg, png) in zip(charts, _drawn(charts), strict=True):
        (folder / f"{chart.name}.svg").write_bytes(svg)
        (folder / f"{chart.name}.png").write_bytes(png)
        text = chart.table().csv()
        (folder / f"{chart.name}.csv").write_text(text, encoding="utf-8", newline="")


def write_tables(folder: Path, tables: Sequence[Table], ours: re.Pattern[str]) -> None:
    """Write every table into `folder`, three times."""
    _clear(folder, ours)
    for table in tables:
        kinds = {"csv": table.csv(), "md": table.markdown(), "tex": table.latex()}
        for kind, text in kinds.items():
            (folder / f"{table.name}.{kind}").write_text(text, encoding="utf-8", newline="")


def _clear(folder: Path, ours: re.Pattern[str]) -> None:
    """Make a folder, or remove from it what an earlier report wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if ours.fullmatch(old.name):
            old.unlink()


def _drawn(charts: Sequence[Chart]) -> Iterator[tuple[bytes, bytes]]:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if cores == 1 or len(charts) < MANY:
        yield from map(_files, charts)
        return
    # Started anew, not forked: this process has threads.
    with ProcessPoolExecutor(min(cores, 8), mp_context=get_context("forkserver")) as pool:
        yield from pool.map(_files, charts, chunksize=4)


def _files(chart: Chart) -> tuple[bytes, bytes]:
    drawing = draw(chart)
    return drawing.svg, drawing.png
