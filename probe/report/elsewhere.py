"""Heads that were tested on other data than their own: trained on against tested on, in a table."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from probe.draw.drawing import printable
from probe.draw.tables import Scored, Table, in_words
from probe.report.gather import Entry, measure
from probe.results import Result

# Settings of an external test, which are not of the model (external.py).
TESTING = {"part", "classes", "shared_left_out", "trained_split", "trained_labels", "head"}


def matrices(entries: Sequence[Entry]) -> list[Table]:
    """Return a table per model and metric: rows are what trained, columns are what was tested.

    Where both are the same data set, the cell is the result on its own test images. Entries are the
    leading ones.
    """
    groups: dict[tuple[Hashable, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.side, entry.result.metric, *_model(entry)), []).append(entry)
    tested = [group for group in groups.values() if any(e.result.trained_on for e in group)]
    return [_matrix(k, group) for k, group in enumerate(tested, 1)]


def _model(entry: Entry) -> tuple[Hashable, ...]:
    """Return what a model is wherever it was trained and tested."""
    one = entry.identity
    own = {name: value for name, value in one.settings.items() if name not in TESTING}
    return replace(one, settings=own, trained_on="").model


def _matrix(number: int, group: Sequence[Entry]) -> Table:
    """Return one table. A data set is called by which part of it is meant where there are two."""
    pairs = [(_trained(entry), printable(entry.identity.dataset)) for entry in group]
    if len(set(pairs)) < len(pairs):
        pairs = [(_trained(entry), entry.result.dataset) for entry in group]
    cells: dict[tuple[str, str], Entry] = {}
    for pair, entry in zip(pairs, group, strict=True):
        cells.setdefault(pair, entry)
    trained, tested = (sorted(set(side)) for side in zip(*cells, strict=True))
    rows: list[list[Any]] = []
    for one in trained:
        there = [cells.get((one, other)) for other in tested]
        rows.append([one, *(_three(vars(entry.result)) if entry else None for entry in there)])
    first = group[0]
    caption = (
        f"{first.without('trained_on', 'settings')}: {measure(first.result)} with 95 % intervals, "
        "by the data that trained the head, and chose its C and threshold, and the data that "
        "tested it: where both are the same, on images that didn't train it; elsewhere on all "
        "that have a label"
    )
    names = ["trained on", *(f"on {other}" for other in tested)]
    return Table(f"elsewhere-{number}", caption, names, rows)


def _trained(entry: Entry) -> str:
    return printable(entry.result.trained_on or entry.identity.dataset)


def tables_of(r: Result, stem: str) -> list[Table]:
    """Return, of a test on other data, the drop by each metric and calibration in the large."""
    if not r.external:
        return []
    said, tables = r.external, []
    if drop := said.get("drop"):
        again = said.get("recalibrated", {})
        rows: list[list[Any]] = [
            [in_words(name), d["home"], d["here"], _three(d), again.get(name)]
            for name, d in drop.items()
        ]
        names = ["metric", r.trained_on, r.dataset, "drop", "by intercepts fitted here"]
        method = said.get("drop_method", "not known")
        caption = f"From {r.trained_on} to {r.dataset}. Interval of the drop: {method}"
        tables.append(Table(f"{stem}-drop", caption, names, rows))
    outputs = said.get("calibration", {})
    rows = [
        [name, c["observed"], c["expected"], _three(c["ratio"]), _three(c["intercept"])]
        for name, c in outputs.items()
    ]
    names = ["output", "observed", "expected", "observed / expected", "intercept"]
    caption = "Calibration in the large: 1 and 0 where as many are positive as the head expects"
    return [*tables, Table(f"{stem}-calibration", caption, names, rows)]


def _three(score: dict[str, Any]) -> Scored:
    return Scored(score.get("value"), score.get("ci_low"), score.get("ci_high"))
