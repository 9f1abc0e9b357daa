"""Write figures as SVG, PNG and CSV, and tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from probe.draw.charts import Chart
from probe.draw.figures import draw
from probe.draw.tables import Table
from probe.report.processes import Map

FEW = 40  # figures for which processes of their own are not worth their start


def write_figures(folder: Path, charts: Sequence[Chart], run: Map) -> None:
    """Draw every chart into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for _ in run(partial(_write, folder), charts, few=FEW):
        pass


def write_tables(folder: Path, tables: Sequence[Table]) -> None:
    """Write every table into `folder`, three times."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        kinds = {"csv": table.csv(), "md": table.markdown(), "tex": table.latex()}
        for kind, text in kinds.items():
            (folder / f"{table.name}.{kind}").write_text(text, encoding="utf-8", newline="")


def _write(folder: Path, chart: Chart) -> None:
    drawing = draw(chart)
    (folder / f"{chart.name}.svg").write_bytes(drawing.svg)
    (folder / f"{chart.name}.png").write_bytes(drawing.png)
    text = chart.table().csv()
    (folder / f"{chart.name}.csv").write_text(text, encoding="utf-8", newline="")
