"""What the page shows of one leading result: its charts, its tables, its surest mistakes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

import numpy as np

from probe.draw.charts import Chart
from probe.draw.drawing import printable
from probe.draw.tables import Table
from probe.report.closeups import charts_of
from probe.report.gather import Cell
from probe.report.listings import tables_of
from probe.report.overview import folds
from probe.results import Predictions

SHOWN = 12  # images of a gallery


@dataclass(frozen=True)
class Example:
    """One answer worth a look: what was said of an image, how surely, and what is so."""

    id: str
    label: str
    said: str
    p: float


@dataclass(frozen=True)
class Panel:
    """What is shown of one cell."""

    cell: Cell
    inspect: str  # the command that names the bad images
    audit: str  # the command that names the images that leak
    store: str = ""  # what is said of its store where that isn't as it was
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    mistakes: list[Example] = field(default_factory=list)
    hits: list[Example] = field(default_factory=list)
    at_edge: bool = False  # the chosen C is the smallest or the largest that was tried
    fits: int = 0
    unconverged: int = 0  # fits that did not converge


def panel(cell: Cell, stem: str) -> Panel:
    """Return what there is to show; names of charts and tables begin with `stem`."""
    r, said = cell.result, cell.predictions
    C, _, converged = folds(r)
    mistakes, hits = examples(said) if said else ([], [])
    return Panel(
        cell=cell,
        inspect=f"medprobe inspect {shlex.quote(r.store)}",
        audit=f"medprobe audit {shlex.quote(r.store)}",
        charts=charts_of(r, said, stem),
        tables=tables_of(r, said, stem),
        mistakes=mistakes,
        hits=hits,
        at_edge=len(C) > 1 and bool(np.isclose(r.C or 0.0, [C.min(), C.max()], atol=0).any()),
        fits=converged.size,
        unconverged=int((~converged).sum()),
    )


def examples(predictions: Predictions) -> tuple[list[Example], list[Example]]:
    """Return the most confident mistakes and the least confident hits, SHOWN of each.

    Of findings, an answer is right where it is on the label's side of .5, and an image stands with
    its most telling answer.
    """
    z, y, rows = (
        predictions.log_odds,
        predictions.labels,
        np.arange(len(predictions.labels)),
    )  # p is 1 of many
    if y.ndim == 1:
        sure, right = z.max(1)[:, None], (z.argmax(1) == y)[:, None]
        wrong = ~right
    else:
        sure, known = np.abs(z), ~np.isnan(y)
        right = known & ((z >= 0) == (y == 1))
        wrong = known & ~right
    sure = np.nan_to_num(sure, posinf=np.finfo(float).max)  # all neighbours agree
    worst, weakest = np.where(wrong, -sure, np.inf), np.where(right, sure, np.inf)  # (N, K) or 1
    chosen = []
    for order in (worst, weakest):
        column = order.argmin(1)
        first = np.argsort(order[rows, column], kind="stable")[:SHOWN]
        found = [i for i in first if np.isfinite(order[i, column[i]])]
        chosen.append([_example(predictions, i, int(column[i])) for i in found])
    return chosen[0], chosen[1]


def _example(predictions: Predictions, i: int, k: int) -> Example:
    p, names = predictions.probabilities[i], predictions.classes
    if predictions.labels.ndim == 1:
        label, call = names[predictions.labels[i]], names[int(p.argmax())]
        return Example(printable(predictions.ids[i]), label, call, float(p.max()))
    words, sure = (f"no {names[k]}", names[k]), float(max(p[k], 1 - p[k]))
    label, call = words[int(predictions.labels[i, k])], words[int(p[k] >= 0.5)]
    return Example(printable(predictions.ids[i]), label, call, sure)
