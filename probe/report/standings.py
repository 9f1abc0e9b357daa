"""Tables of the whole: models against data sets, and the paired tests of the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from probe.draw.tables import Scored, Table
from probe.report.verdict import Column


def main_table(found: Sequence[Column]) -> Table:
    """Return models against data sets, in a column of its own what one must know of a test."""
    models = {s.entry.model: s.entry for column in found for s in column.standings}
    scored = [{s.entry.model: s for s in column.standings} for column in found]
    names, caution = ["model"], [any(s.entry.few for s in column.standings) for column in found]
    for column, few in zip(found, caution, strict=True):
        title = f"{column.dataset}, {column.words}"
        names += [title, f"{column.dataset}, caution"] if few else [title]
    rows: list[list[Any]] = []
    for model in models:
        row: list[Any] = [model]
        for standings, few in zip(scored, caution, strict=True):
            there = standings.get(model)
            row.append(there.scored if there else None)
            row += [there.entry.few if there else ""] if few else []
        rows.append(row)
    caption = "Test scores with 95 % intervals"
    if any(s.mark for column in found for s in column.standings):
        caption += "; bold: the best, italic: not distinguishable from it"
    return Table("main", caption, names, rows)


def tests_table(found: Sequence[Column]) -> Table:
    """Return every paired test of the best."""
    rows = []
    for column in found:
        for s in column.standings:
            if s is column.best:
                continue
            d = s.difference
            rows.append(
                [
                    *(column.dataset, column.words, column.best.entry.model, s.entry.model),
                    Scored(d.value, d.ci_low, d.ci_high) if d else None,
                    d.p if d else None,
                    s.p,
                    (d.test if d else s.why_not) + ("; untrained" if s.untrained else ""),
                ]
            )
    names = ["dataset", "metric", "best", "other", "best - other", "p", "adjusted p", "test"]
    caption = "Paired tests of the best of each data set; adjusted p allows for the search for it"
    return Table("tests", caption, names, rows)
