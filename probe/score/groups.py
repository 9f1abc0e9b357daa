"""Groups of test images scored apart, and what a mean over outputs is over.

Shapes: N images, K classes, L findings. y is (N,) class index or (N, L) of 1, 0, NaN; z (N, K) or
(N, L) log-odds (log_odds.py). An output is a finding, or a class against the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.score.caveats import RARE
from probe.score.intervals import fewest, intervals
from probe.score.metrics import METRICS, Metric, evaluate, scores_for

SMALL = 50  # subjects; a group with fewer is flagged
SHOWN = 3  # of what is left out of a mean
MAX_VALUES = 10  # a numeric column with more values is cut into quartiles


def subgroups(
    y: NDArray[Any],
    z: NDArray[np.float64],
    subjects: NDArray[Any],
    columns: Mapping[str, NDArray[Any]],
    metric: Metric,
    classes: Sequence[str],
    *,
    fold: NDArray[Any] | None = None,
    n: int,
    seed: int,
    method: str,
    longer: float = 1.0,
) -> list[dict[str, Any]]:
    """Return the metric with its interval in every group of every column, (N,) each; subjects (N,).

    fold (N,) is the fold whose head gave each row, where there are several.

    A mean over outputs (findings, classes) is over those that every group of a column has, so that
    groups can be held against each other; where no output is in all groups, over each group's own.
    Each has column, group, n, subjects, value, ci_low, ci_high (None where not defined), small:
    True with fewer than SMALL subjects, or fewer than RARE of a class; and left_out: the outputs
    that are not in its mean, though they are in that of all images.
    """
    scored_groups = []
    overall = undefined(metric, y, z) if columns else set()
    for name, given in columns.items():
        values = grouped(given)
        groups = {group: values == group for group in sorted(set(values.tolist()))}
        lacks = {group: undefined(metric, y[rows], z[rows]) for group, rows in groups.items()}
        for group, out_of_mean in _evened(lacks, z.shape[1]).items():
            rows = groups[group]
            reduced, y_kept, z_kept = without(metric, y[rows], z[rows], out_of_mean)
            score = intervals(
                [reduced],
                y_kept,
                scores_for(reduced, z_kept, None if fold is None else fold[rows]),
                subjects[rows],
                n=n,
                rng=np.random.default_rng(seed),
                method=method,
                longer=longer,
            )[metric.name]
            count = len(np.unique(subjects[rows]))
            entry = {"column": name, "group": group or "(not given)", "n": int(rows.sum())}
            small = count < SMALL or fewest(y_kept, subjects[rows]) < RARE
            left_out = [classes[k] for k in sorted(out_of_mean - overall)]
            entry |= {"subjects": count, **score, "small": small, "left_out": left_out}
            scored_groups.append(entry)
    return scored_groups


def _evened(lacks: Mapping[str, set[int]], K: int) -> dict[str, set[int]]:
    """Return what each group's mean is without: what any group lacks, if something is left.

    A group that has none of the K outputs has no score, and takes nothing from the others.
    """
    some = [lacking for lacking in lacks.values() if len(lacking) < K]
    united = set().union(*some)
    if len(united) == K:
        return dict(lacks)
    return {group: united | lacking for group, lacking in lacks.items()}


def without(
    metric: Metric, y: NDArray[Any], z: NDArray[np.float64], left_out: set[int]
) -> tuple[Metric, NDArray[Any], NDArray[np.float64]]:
    """Return the metric with labels and log-odds of the outputs that its mean is over.

    y (N,) or (N, L), z (N, K) or (N, L). Of classes, the mean over some against the rest is that
    over findings which each image has one of. Nothing changes where no output, or all are left out.
    """
    kept = [k for k in range(z.shape[1]) if k not in left_out]
    if not left_out or not kept:
        return metric, y, z
    if y.ndim == 2:
        return metric, y[:, kept], z[:, kept]
    against = METRICS.get(("multilabel", metric.name))
    if against is None:  # a mean over pairs of classes
        return metric, y, z
    return against, (y[:, None] == kept).astype(float), z[:, kept]


def undefined(metric: Metric, y: NDArray[Any], z: NDArray[np.float64]) -> set[int]:
    """Return the outputs that a mean of a metric leaves out; none where it is no such mean.

    y (N,) or (N, L), z (N, K) or (N, L) log-odds.
    """
    if y.ndim == 2:
        each = (
            evaluate(metric, y[:, k : k + 1], scores_for(metric, z[:, k : k + 1]))
            for k in range(y.shape[1])
        )
        return {k for k, value in enumerate(each) if np.isnan(value[0])}
    if not metric.ranking or z.shape[1] == 2:
        return set()
    positive = np.bincount(y, minlength=z.shape[1])
    return set(np.flatnonzero((positive == 0) | (positive == len(y))).tolist())


def uneven(groups: Sequence[dict[str, Any]], *, shown: int = 3) -> str:
    """Say which outputs groups' means are without, by column; "" where nothing is left out.

    Groups of a column that are without the same ones can be held against each other.
    """
    sentences = []
    for column in dict.fromkeys(group["column"] for group in groups):
        scored = [g for g in groups if g["column"] == column and g["value"] is not None]
        lists = [tuple(g.get("left_out") or ()) for g in scored]
        if len(set(lists)) == 1 and lists[0]:
            sentences.append(
                f"by {column}, the mean is over what every group has, "
                f"so without {some_of(lists[0], shown)}"
            )
        elif len(set(lists)) > 1:
            each = [
                f"{g['group']} without {some_of(names, shown)}"
                for g, names in zip(scored, lists, strict=True)
                if names
            ]
            sentences.append(
                f"by {column}, each mean is over what the group has, so that groups can't be held "
                f"against each other: {'; '.join(each)}"
            )
    return "; ".join(sentences)


def some_of(names: Sequence[str], shown: int) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"


def averaged(task: str, metric: str, outputs: Mapping[str, Mapping[str, Any]]) -> str:
    """Say over how many findings (or classes) a score is the mean, and which are left out, why.

    "" where it is no such mean, or one of all classes. `outputs` is what per_output returned.
    """
    known = METRICS.get((task, metric))
    ranked = known is not None and known.ranking and metric != "auroc_ovo"
    if not outputs or len(outputs) < 2 or (task == "multiclass" and not ranked):
        return ""
    left: dict[str, list[str]] = {}
    for name, o in outputs.items():
        present, absent = o["positives"] or 0, o["negatives"] or 0
        why = ""
        if not present and not absent:
            why = "not scored"
        elif (ranked or metric == "f1") and not present:
            why = "no test image has it" if task == "multilabel" else "no test image is of it"
        elif ranked and not absent:
            why = "every test image has it"
        if why:
            left.setdefault(why, []).append(name)
    count = len(outputs) - sum(map(len, left.values()))
    what = "findings" if task == "multilabel" else "classes"
    if not left:
        return f"mean of {count} findings" if task == "multilabel" else ""
    without = "; ".join(f"{some_of(names, SHOWN)} ({why})" for why, names in left.items())
    return f"mean of {count} of {len(outputs)} {what}, without {without}"


def grouped(values: NDArray[Any]) -> NDArray[Any]:
    """Return group names (N,) of values (N,): themselves, or quartiles of many numbers."""
    given = values != ""
    if len(set(values[given].tolist())) <= MAX_VALUES:
        return values
    try:
        numbers = values[given].astype(float)
    except ValueError:
        return values
    edges = np.unique(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    digits = len(f"{edges[-1]:g}".split(".")[0])
    names = np.array([f"{a:0{digits}g} to {b:0{digits}g}" for a, b in pairwise(edges)])
    out = np.full(len(values), "", dtype=names.dtype)
    out[given] = names[place]
    return out
