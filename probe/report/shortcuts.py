"""Columns of the table beside the results: which may be shortcuts, and what the image adds to them.

The first is what `medprobe audit --predict` found, the second of `medprobe probe --with`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probe.confounders import COLUMNS, Confounder, load
from probe.draw.drawing import printable
from probe.draw.tables import Scored, Table, gained, in_words, p_value
from probe.report.gather import Entry


@dataclass(frozen=True)
class Shortcut:
    """A sentence beside the headline: of which data set and model, and whether it is flagged."""

    dataset: str
    model: str
    line: str
    flagged: bool


def shortcuts(leads: Sequence[Entry], best: Sequence[Entry]) -> tuple[list[Shortcut], Table]:
    """Return a sentence for each column that was looked at of the best entries, and a table of all.

    Columns that show nothing are said in one sentence for each data set.
    """
    known: dict[Path, list[Confounder]] = {}
    said: list[Shortcut] = []
    rows: list[list[Any]] = []
    seen: set[tuple[str, str]] = set()
    for entry in [*best, *leads]:
        if entry.folder not in known:
            known[entry.folder] = load(entry.folder)
        mine = [one for one in known[entry.folder] if _is_of(one, entry)]
        if not mine or (entry.result.dataset, (key := mine[0].key)) in seen:
            continue
        seen.add((entry.result.dataset, key))
        where = (entry.result.dataset, entry.result.backbone)
        rows += [[*where, *(_plain(cell) for cell in one.row())] for one in mine]
        if any(entry is one for one in best):
            said += _sentences(where, mine)
    table = Table(
        "shortcuts",
        "Columns that may be shortcuts, out of fold by subject; AUROCs with 95 % intervals",
        ["dataset", "backbone", *COLUMNS],
        rows,
    )
    return said, table


def gains(leads: Sequence[Entry]) -> tuple[list[Shortcut], Table]:
    """Return what the image adds to columns alone: a sentence for each data set, and a table."""
    found = [entry for entry in leads if entry.result.gain]
    said: dict[tuple[str, str], Shortcut] = {}
    for entry in found:  # the best of each data set and metric comes first
        r = entry.result
        model = f"{r.backbone} (random weights)" if entry.random else r.backbone
        said.setdefault(entry.column, Shortcut(r.dataset, model, gained(r), False))
    rows = [
        [
            *(r.dataset, r.backbone, in_words(r.metric), printable(r.gain["over"])),
            *(r.gain["alone"], Scored(r.value, r.ci_low, r.ci_high)),
            Scored(r.gain["value"], r.gain["ci_low"], r.gain["ci_high"]),
            *(p_value(r.gain["p"]), r.gain["test"]),
        ]
        for r in (entry.result for entry in found)
    ]
    names = ["dataset", "backbone", "metric", "columns", "columns alone", "image and columns"]
    names += ["the image adds", "p", "test"]
    caption = "What the image adds to columns of the table alone, on the same test images"
    return list(said.values()), Table("gains", caption, names, rows)


def _sentences(where: tuple[str, str], found: Sequence[Confounder]) -> list[Shortcut]:
    said = [Shortcut(*where, printable(one.line()), True) for one in found if one.flagged]
    clear = [one.column for one in found if not one.flagged and not one.why]
    if clear:
        line = f"no sign of a shortcut was found in {', '.join(clear)}: see the table"
        said.append(Shortcut(*where, printable(line), False))
    said += [Shortcut(*where, printable(one.line()), False) for one in found if one.why]
    return said


def _is_of(one: Confounder, entry: Entry) -> bool:
    """Say whether a confounder is of an entry's images, labels and features."""
    identity = entry.identity
    mine = (identity.dataset, identity.labels_digest, identity.backbone, identity.feature)
    return one.of == (*mine, dict(identity.extraction))


def _plain(cell: Any) -> Any:
    return printable(cell) if isinstance(cell, str) else cell
