"""Tables of one result: other metrics, groups, thresholds, findings, mistakes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.draw.tables import Scored, Table, in_words
from probe.report.closeups import confusion, outputs
from probe.report.gather import measure
from probe.results import Predictions, Result

MISTAKES = 10  # kinds of mistakes that are listed


def tables_of(r: Result, predictions: Predictions | None, stem: str) -> list[Table]:
    """Return the tables of a result that have rows; `stem` begins their names."""
    tables = [_metrics(r, stem), *_groups(r, stem), *_thresholds(r, stem)]
    if predictions and predictions.labels.ndim == 1:
        tables.append(_most_frequent(confusion(predictions), predictions.classes, stem))
    elif predictions:
        tables.append(_outputs(r, predictions, stem))
    return [table for table in tables if table.rows]


def _metrics(r: Result, stem: str) -> Table:
    rows = [
        [in_words(name), Scored(m.get("value"), m.get("ci_low"), m.get("ci_high"))]
        for name, m in sorted(r.metrics.items())
        if name != r.metric
    ]
    caption = "Other metrics"
    if r.task == "multiclass" and len(r.classes) == 2:
        caption += f"; positive class: {r.classes[1]}"
    return Table(f"{stem}-metrics", caption, ["metric", "value"], rows)


def _groups(r: Result, stem: str) -> list[Table]:
    """Return the score of each group; of subjects where they are known, and what a mean lacks."""
    uneven = any(g.get("left_out") for g in r.subgroups)
    names = ["group", "images", "subjects", measure(r), "not in its mean"]
    kept = [True, True, r.subjects_known, True, uneven]
    rows: list[list[Any]] = [
        [
            f"{g['column']} {g['group']}{' (few)' if g['small'] else ''}",
            *(g["n"], g["subjects"]),
            Scored(g["value"], g["ci_low"], g["ci_high"]),
            ", ".join(g.get("left_out") or ()),
        ]
        for g in r.subgroups
    ]
    caption = f"By group. {caveat}" if (caveat := uneven_means(r)) else "By group"
    rows = [[cell for cell, keep in zip(row, kept, strict=True) if keep] for row in rows]
    columns = [name for name, keep in zip(names, kept, strict=True) if keep]
    return [Table(f"{stem}-groups", caption, columns, rows)]


def uneven_means(r: Result) -> str:
    """Say in a sentence that groups' scores are means over different outputs; "" where not.

    Of rows of earlier versions, which don't say what was left out, it is said where it may be so.
    """
    known = all("left_out" in g for g in r.subgroups)
    if not r.subgroups or (known and not any(g["left_out"] for g in r.subgroups)):
        return ""
    if not known and r.task != "multilabel":
        return ""
    what = "findings" if r.task == "multilabel" else "classes"
    which = "" if known else ", which may not be the same in each"
    return (
        f"A score is the mean over the {what} that the group has{which}: groups differ in that too."
    )


def _thresholds(r: Result, stem: str) -> list[Table]:
    rows = []
    for name, t in (r.thresholds.get("outputs") or {}).items():
        rates = [t.get(rate) or {} for rate in ("sensitivity", "specificity")]
        scored = [Scored(m.get("value"), m.get("ci_low"), m.get("ci_high")) for m in rates]
        rows.append([name, t["threshold"], *scored])
    first = "finding" if r.task == "multilabel" else "positive class"
    names = [first, "threshold", "sensitivity", "specificity"]
    rule, on = (r.thresholds.get(key, "") for key in ("rule", "chosen_on"))
    caption = f"At a threshold, chosen by {rule} on {on}, not on the test split"
    return [Table(f"{stem}-thresholds", caption, names, rows)]


def _outputs(r: Result, predictions: Predictions, stem: str) -> Table:
    """Return AUROC and counts per finding, best first, those without one last."""
    rows = [
        [
            name,
            o["auroc"],
            o["average_precision"],
            int(o["positives"] or 0),
            int(o["negatives"] or 0),
            len(predictions.labels) - int(o["positives"] or 0) - int(o["negatives"] or 0),
        ]
        for name, o in outputs(r, predictions)
    ]
    rows.sort(key=lambda row: math.inf if row[1] is None else -float(row[1] or 0))
    names = ["finding", "AUROC", "average precision", "positives", "negatives", "not labelled"]
    return Table(f"{stem}-findings", "Findings", names, rows)


def _most_frequent(counts: NDArray[np.int64], classes: Sequence[str], stem: str) -> Table:
    K = len(classes)
    wrong = counts * ~np.eye(K, dtype=bool)
    places = [divmod(int(p), K) for p in np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]]
    rows: list[list[Any]] = [
        [classes[i], classes[j], int(wrong[i, j]), float(wrong[i, j] / counts[i].sum())]
        for i, j in places
        if wrong[i, j]
    ]
    names = ["label", "predicted", "images", "of the label"]
    return Table(f"{stem}-mistakes", "The most frequent mistakes", names, rows)
