"""What the page shows of one leading result: its charts, its tables, its surest mistakes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

import numpy as np

from probe.draw.charts import Chart
from probe.draw.drawing import printable
from probe.draw.tables import Table, in_words
from probe.report import elsewhere
from probe.report.closeups import charts_of
from probe.report.gather import Entry
from probe.report.listings import tables_of
from probe.report.trends import folds
from probe.results import Predictions, Result

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
    """What is shown of one entry."""

    entry: Entry
    inspect: str  # the command that names the bad images
    audit: str  # the command that names the images that leak
    store: str = ""  # what is said of its store where that isn't as it was
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    mistakes: list[Example] = field(default_factory=list)
    hits: list[Example] = field(default_factory=list)
    ends: str = ""  # which values are an end of their own interval, and why
    calibration: str = ""  # in words
    fits: int = 0
    unconverged: int = 0  # fits that did not converge


def panel(entry: Entry, stem: str) -> Panel:
    """Return what there is to show; names of charts and tables begin with `stem`."""
    r, said = entry.result, entry.predictions
    _, _, converged = folds(r)
    mistakes, hits = examples(said) if said else ([], [])
    return Panel(
        entry=entry,
        inspect=f"medprobe inspect {shlex.quote(r.store)}",
        audit=f"medprobe audit {shlex.quote(r.store)}",
        charts=charts_of(r, said, stem),
        tables=[*tables_of(r, said, stem), *elsewhere.tables_of(r, stem)],
        mistakes=mistakes,
        hits=hits,
        ends=at_an_end(r),
        calibration=calibration_in_words(r),
        fits=converged.size,
        unconverged=int((~converged).sum()),
    )


def calibration_in_words(r: Result) -> str:
    """Say how well calibrated probabilities are, how they were recalibrated, and what sets hold."""
    found, said = r.calibration, []
    scores = found.get("after") or found.get("scores") or {}
    for name, title in (("slope", "Calibration slope"), ("intercept", "calibration in the large")):
        m = scores.get(f"calibration_{name}") or {}
        if m.get("value") is not None:
            ends = m.get("ci_low"), m.get("ci_high")
            interval = f" [{ends[0]:.2f}, {ends[1]:.2f}]" if None not in ends else ""
            said.append(f"{title} {m['value']:.2f}{interval}")
    text = f"{', '.join(said)}: 1 and 0 are calibrated." if said else ""
    if "method" in found:
        was, now = (found[w].get("ece", {}).get("value") for w in ("before", "after"))
        text += f" Recalibrated by {found['method']}, on images that folds held out"
        text += f": calibration error {was:.3f} before, {now:.3f} after." if was and now else "."
    if r.conformal:
        held = r.conformal["coverage"]["value"]
        text += (
            f" Sets that should hold the label of {r.conformal['level']:.0%} hold that of "
            f"{held:.1%}, with {r.conformal['size']:.2f} classes each."
        )
    return text.strip()


def at_an_end(r: Result) -> str:
    """Say which scores are an end of their own interval, and why; "" where none is.

    A score of 0 or 1 is the best or the worst that there is, and has nothing beyond it.
    """
    names = []
    for name, m in sorted(r.metrics.items()):
        value, low, high = (m.get(key) for key in ("value", "ci_low", "ci_high"))
        if value is None or low is None or high is None or low == high or value in (0, 1):
            continue
        if value in (low, high):
            names.append(in_words(name))
    if not names:
        return ""
    verb = "is" if len(names) == 1 else "are"
    own = "its own interval" if len(names) == 1 else "their own intervals"
    return (
        f"{' and '.join(names) if len(names) < 3 else ', '.join(names)} {verb} an end of {own}: "
        "resamples all lie on one side, because resampling adds noise that moves such a score one "
        "way (a calibration error up), and the interval was drawn out to the value"
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
