"""Tables of one result: other metrics, groups, thresholds, findings, mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.draw.tables import Scored, Table, in_words
from probe.report.closeups import confusion, outputs
from probe.report.gather import measure
from probe.results import Predictions, Result
from probe.score.caveats import RARE
from probe.score.groups import averaged, uneven

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
    """Return the score of each group, the subjects where they are known, and what a mean lacks."""
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
    caption = f"By group: {caveat}" if (caveat := uneven_means(r)) else "By group"
    rows = [[entry for entry, keep in zip(row, kept, strict=True) if keep] for row in rows]
    columns = [name for name, keep in zip(names, kept, strict=True) if keep]
    return [Table(f"{stem}-groups", caption, columns, rows)]


def uneven_means(r: Result) -> str:
    """Say over which outputs groups' scores are means, where not over all; "" where over all.

    Of rows of earlier versions, which don't say what was left out, it is said where it may be so.
    """
    if all("left_out" in g for g in r.subgroups):
        return uneven(r.subgroups)
    if r.task != "multilabel":
        return ""
    return (
        "each mean is over the findings that the group has, which may not be the same in each, so "
        "that groups can't be held against each other"
    )


def _thresholds(r: Result, stem: str) -> list[Table]:
    rows: list[list[Any]] = []
    found = r.thresholds.get("outputs") or {}
    counted = all("positives" in t for t in found.values())
    for name, t in found.items():
        rates = [t.get(rate) or {} for rate in ("sensitivity", "specificity")]
        scored = [Scored(m.get("value"), m.get("ci_low"), m.get("ci_high")) for m in rates]
        few = _least(t) < RARE or _least(r.outputs.get(name) or {}) < RARE
        chosen_on = [int(t["positives"])] if counted else []
        rows.append([f"{name}{' (few)' if few else ''}", t["threshold"], *chosen_on, *scored])
    first = "finding" if r.task == "multilabel" else "positive class"
    names = [first, "threshold", *["positives before"] * counted, "sensitivity", "specificity"]
    rule, on = (r.thresholds.get(key, "") for key in ("rule", "chosen_on"))
    caption = f"At a threshold, chosen by {rule} on {on}, not on the test split"
    if counted:
        caption += "; positives before: the positive images that it was chosen on"
    if any("(few)" in row[0] for row in rows):
        caption += (
            f"; few: it was chosen, or tested, on fewer than {RARE} images with or without it, and "
            "says little"
        )
    return [Table(f"{stem}-thresholds", caption, names, rows)]


def _least(counts: Mapping[str, Any]) -> float:
    """Return how many images the smaller side has; many where it isn't known."""
    sides = [counts.get(side) for side in ("positives", "negatives")]
    return min((side for side in sides if side is not None), default=math.inf)


def _outputs(r: Result, predictions: Predictions, stem: str) -> Table:
    """Return AUROC and counts per finding, best first, those without one last."""
    rows: list[list[Any]] = [
        [
            name,
            Scored(o["auroc"], o.get("ci_low"), o.get("ci_high")),
            o["average_precision"],
            int(o["positives"] or 0),
            int(o["negatives"] or 0),
            len(predictions.labels) - int(o["positives"] or 0) - int(o["negatives"] or 0),
        ]
        for name, o in outputs(r, predictions)
    ]
    rows.sort(key=lambda row: math.inf if row[1].value is None else -row[1].value)
    names = ["finding", "AUROC", "AP", "positives", "negatives", "not labelled"]
    if not any(row[-1] for row in rows):
        names, rows = names[:-1], [row[:-1] for row in rows]
    mean = averaged(r.task, "auroc", dict(outputs(r, predictions)))
    return Table(f"{stem}-findings", f"Findings: the AUROC of all is the {mean}", names, rows)


def _most_frequent(counts: NDArray[np.int64], classes: Sequence[str], stem: str) -> Table:
    """Return the mistakes with the largest counts (K, K), label by predicted class."""
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
