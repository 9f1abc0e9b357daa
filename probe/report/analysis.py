"""Read what `analysis` folders hold of CKA, the likeness of layers.

A table is a CSV named cka*.csv: a matrix with the names of columns in its first row and of rows in
its first column, or a list with a column `cka` after two that name row and column.
"""

from __future__ import annotations

import csv
from pathlib import Path

from features.errors import ProbeError
from probe.draw.charts import Axis, Heat
from probe.draw.drawing import printable
from probe.draw.tables import score


def cka_charts(folder: Path | None) -> list[Heat]:
    """Return a chart per table. Raises ProbeError for a folder without, or one that is no CKA."""
    if folder is None:
        return []
    files = sorted(folder.rglob("cka*.csv")) if folder.is_dir() else []
    if not files:
        raise ProbeError(f"no cka*.csv in {folder}: want the folder of `medprobe analyze`")
    return [_chart(path) for path in files]


def _chart(path: Path) -> Heat:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        if "cka" in header:
            rows_, columns, values = _from_list(header, rows)
        else:
            rows_, columns = [row[0] for row in rows], header[1:]
            values = [[float(v) for v in row[1 : len(header)]] for row in rows]
        if not values or any(len(row) != len(columns) for row in values):
            raise ValueError("rows of different lengths")
    except (OSError, ValueError, KeyError) as error:
        raise ProbeError(f"{path} is no table of CKA ({error}): want a matrix or a list") from None
    words = printable(path.stem.removeprefix("cka").strip("-_ ").replace("_", " "))
    return Heat(
        name=f"cka-{words or 'layers'}",
        title=f"CKA: {words}" if words else "CKA",
        alt=f"Linear CKA of {len(rows_)} by {len(columns)} layers or backbones.",
        x=Axis("", names=[printable(name) for name in columns]),
        y=Axis("", names=[printable(name) for name in rows_]),
        shares=[[min(max(v, 0.0), 1.0) for v in row] for row in values],
        texts=[[score(round(v, 2)).removesuffix("0") for v in row] for row in values],
        caption="Linear CKA: 1 where two layers hold the same but for rotation and scale.",
    )


def _from_list(
    header: list[str], rows: list[list[str]]
) -> tuple[list[str], list[str], list[list[float]]]:
    place = header.index("cka")
    down, across = [j for j in range(len(header)) if j != place][:2]
    names = [list(dict.fromkeys(row[j] for row in rows)) for j in (down, across)]
    found = {(row[down], row[across]): float(row[place]) for row in rows}
    return *names, [[found[a, b] for b in names[1]] for a in names[0]]  # type: ignore[return-value]
