"""Scores of groups of the test images: by sex, by site, by quartiles of age."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.score.caveats import RARE
from probe.score.intervals import fewest, intervals
from probe.score.metrics import Metric, evaluate, scores_for
from probe.score.predictions import LabelledPredictions

SMALL = 50  # subjects; a group with fewer is flagged
GROUPS = 10  # a numeric column with more values is cut into quartiles


def subgroups(
    predictions: LabelledPredictions,
    names: Sequence[str],
    metric: Metric,
    classes: Sequence[str],
    *,
    n: int,
    seed: int,
    method: str,
) -> list[dict[str, Any]]:
    """Return the metric with its interval in every group of every named column.

    Each has column, group, n, subjects, value, ci_low, ci_high (None where not defined), small:
    True with fewer than SMALL subjects, or too few of a class (see few); and left_out: the outputs
    that are not in its mean, though they are in that of all images.
    """
    out = []
    overall = undefined(metric, predictions.y, predictions.z) if names else set()
    for name in names:
        values = _grouped(predictions.columns[name])
        for group in sorted(set(values.tolist())):
            rows = values == group
            subjects = predictions.subjects[rows]
            interval = intervals(
                [metric],
                predictions.y[rows],
                scores_for(metric, predictions.z[rows]),
                subjects,
                n=n,
                rng=np.random.default_rng(seed),
                method=method,
            )[metric.name]
            count = len(np.unique(subjects))
            about = {"column": name, "group": group or "(not given)", "n": int(rows.sum())}
            small = count < SMALL or fewest(predictions.y[rows], subjects) < RARE
            lacks = undefined(metric, predictions.y[rows], predictions.z[rows])
            left_out = [classes[k] for k in sorted(lacks - overall)]
            about |= {"subjects": count, **interval, "small": small, "left_out": left_out}
            out.append(about)
    return out


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
    """Say which outputs which groups' means are without; "" where all have the same."""
    lacking = []
    for group in groups:
        names = group.get("left_out") or []
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        if names:
            lacking.append(
                f"{group['column']} {group['group']} without {', '.join(names[:shown])}{more}"
            )
    if not lacking:
        return ""
    return f"groups' scores are means over what each has: {'; '.join(lacking)}"


def _grouped(values: NDArray[Any]) -> NDArray[Any]:
    """Return group names: the values, or quartiles of numbers with many of them."""
    given = values != ""
    if len(set(values[given].tolist())) <= GROUPS:
        return values
    try:
        numbers = values[given].astype(float)
    except ValueError:
        return values
    # One edge may be several quantiles, where a value is frequent: there are fewer groups then.
    edges = np.unique(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
    quartile = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    digits = len(f"{edges[-1]:g}".split(".")[0])
    names = np.array([f"{a:0{digits}g} to {b:0{digits}g}" for a, b in pairwise(edges)])
    out = np.full(len(values), "", dtype=names.dtype)
    out[given] = names[quartile]
    return out
