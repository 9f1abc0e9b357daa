"""What a head said of the test images, scored: per image or per subject, by group, at a threshold.

Shapes: N images (or units: subjects, studies), K classes, L findings. y is (N,) class index or (N,
L) of 1, 0, NaN; z (N, K) or (N, L) log-odds (log_odds.py). A threshold is chosen on what folds or
the val split held out, never on the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import Manifest
from probe.score import log_odds
from probe.score.calibration import reliability
from probe.score.groups import RARE, subgroups
from probe.score.intervals import METHODS, SAID, intervals, sides_of
from probe.score.metrics import METRICS, Metric, one_vs_rest, per_output
from probe.score.ranking import totals

# Of fewer subjects, or fewer than RARE of a class (or side of a finding), no interval can be relied
# on: benchmarks/bench_statistics.py
FEW = 20
SHOWN = 3  # of what there is too few of


@dataclass(frozen=True)
class Scoring:
    """How test answers are scored."""

    seed: int = 0  # of folds and of the bootstrap
    bootstrap: int = 1000  # resamples of the subjects
    interval: str = METHODS[0]
    aggregate: str | None = None  # "mean" or "max" of the images of a unit
    unit: str = "subject"  # or a column of the manifest
    by: tuple[str, ...] = ()  # columns whose groups are scored apart
    threshold: str = "youden"  # or "f1": the rule, applied to what was held out

    @property
    def scored_by(self) -> str:
        """Return what one answer stands for: "image", or "subject (mean)"."""
        return f"{self.unit} ({self.aggregate})" if self.aggregate else "image"


@dataclass(frozen=True)
class LabelledPredictions:
    """Predictions and labels to score: ids, subjects and columns (N,), y, log-odds z."""

    ids: NDArray[Any]
    subjects: NDArray[Any]
    y: NDArray[Any]
    z: NDArray[np.float64]
    columns: Mapping[str, NDArray[Any]]
    has_subjects: bool = True  # else images are taken as independent
    alone: int = 0  # images without a unit, each of which is one of its own

    @property
    def independent(self) -> str:
        """Return what is taken as independent: "subject", or "image" where none are known."""
        return "subject" if self.has_subjects else "image"

    @cached_property
    def p(self) -> NDArray[np.float64]:
        """Return the probabilities, of z's shape (N, K) or (N, L)."""
        return log_odds.probabilities(self.z)


def answers(
    manifest: Manifest,
    rows: NDArray[np.integer],
    y: NDArray[Any],
    z: NDArray[np.float64],
    y_train: NDArray[Any],
    settings: Scoring,
) -> LabelledPredictions:
    """Return what is scored: one answer per image, or per unit.

    rows (N,) of the manifest; y (N,) or (N, L), z (N, K) or (N, L) of these. A finding that
    training showed one side of only has no label here: a head can't rank it, and scored it would be
    .5.
    """
    if y.ndim == 2:
        both = (y_train == 1).any(0) & (y_train == 0).any(0)
        y = np.where(both, y, np.nan)
    columns = {name: column(manifest, name, rows) for name in settings.by}
    ids, subjects = manifest.id[rows], manifest.subject[rows]
    found = LabelledPredictions(ids, subjects, y, z, columns, manifest.has_subjects)
    if settings.aggregate is None:
        return found
    return aggregate(found, column(manifest, settings.unit, rows), settings.aggregate)


def check(
    manifest: Manifest, rows: NDArray[np.integer], y: NDArray[Any], settings: Scoring
) -> None:
    """Raise ProbeError where columns or units can't be scored, before a fit; rows (N,)."""
    answers(manifest, rows, y, np.zeros((len(y), len(manifest.classes))), y, settings)


def extras(
    answers: LabelledPredictions,
    classes: Sequence[str],
    metric: Metric,
    *,
    held_out: tuple[NDArray[Any], NDArray[np.float64]],
    chosen_on: str,
    settings: Scoring,
) -> dict[str, Any]:
    """Return what a Result says beside its scores, by the names of its fields.

    held_out is (y, z) of images outside the test split, shapes (M,) or (M, L) and (M, K).
    """
    again: dict[str, Any] = {
        "n": settings.bootstrap,
        "seed": settings.seed,
        "method": settings.interval,
    }
    rule = settings.threshold
    return {
        "interval": f"{SAID[settings.interval].format(answers.independent)}, "
        f"{settings.bootstrap} resamples, 95 %",
        "subjects_known": answers.has_subjects,
        "few": few(answers.y, answers.subjects, classes, answers.independent),
        "scored_by": settings.scored_by,
        "outputs": _outputs(answers, classes, **again),
        "reliability": reliability(answers.y, answers.p),
        "subgroups": subgroups(
            answers.y,
            answers.z,
            answers.subjects,
            {name: answers.columns[name] for name in settings.by},
            metric,
            classes,
            **again,
        ),
        "thresholds": {
            "rule": rule,
            "chosen_on": chosen_on,
            "outputs": at_thresholds(held_out, answers, classes, rule=rule, **again),
        },
    }


def _outputs(
    answers: LabelledPredictions, classes: Sequence[str], *, n: int, seed: int, method: str
) -> dict[str, dict[str, float | None]]:
    """Return what per_output says, of findings with the interval of their AUROC."""
    found = per_output(answers.y, answers.z, classes)
    if answers.y.ndim == 1:
        return found
    metric = METRICS["multilabel", "auroc"]
    for k, one in enumerate(found.values()):
        if one["auroc"] is None:
            continue
        known = ~np.isnan(answers.y[:, k])
        mine = answers.y[known, k : k + 1], answers.z[known, k : k + 1], answers.subjects[known]
        rng = np.random.default_rng(seed)
        three = intervals([metric], *mine, n=n, rng=rng, method=method)[metric.name]
        one |= {end: three[end] for end in ("ci_low", "ci_high")}
    return found


def column(manifest: Manifest, name: str, rows: NDArray[np.integer]) -> NDArray[Any]:
    """Return a column of the manifest at rows (N,). Raises ProbeError where it has none."""
    if name in ("subject", "path", "id"):
        return np.asarray(getattr(manifest, name)[rows])
    if name not in manifest.columns:
        found = ", ".join(manifest.columns) or "none"
        raise ProbeError(
            f"{manifest.dataset} has no column {name!r}: found {found}; "
            "columns come with the data set, see docs/datasets.md"
        )
    return np.asarray(manifest.columns[name][rows])


def aggregate(answers: LabelledPredictions, units: NDArray[Any], how: str) -> LabelledPredictions:
    """Return one answer per unit: the mean, or the largest, of its images' probabilities.

    units (N,) names the unit of each image. A finding is there where any image has it. An image
    without a unit ("") is one of its own, under its id. Raises ProbeError for images of one unit
    with different classes, or of different subjects.
    """
    alone = units == ""
    names = np.where(alone, answers.ids.astype(np.str_), units)
    if set(names[alone].tolist()) & set(names[~alone].tolist()):
        raise ProbeError("an image without a unit is called as a unit is: see --unit")
    names, first, member = np.unique(names, return_index=True, return_inverse=True)
    if (answers.subjects != answers.subjects[first][member]).any():
        raise ProbeError("a unit to aggregate has images of several subjects: see --unit")
    y = answers.y[first]
    if how == "max":
        z = log_odds.largest(answers.z, member, len(names), classes=y.ndim == 1)
    else:
        z = log_odds.mean(answers.z, member, len(names))
    if y.ndim == 1:
        differ = np.flatnonzero(answers.y != y[member])
        if len(differ):
            raise ProbeError(
                f"images of {names[member[differ[0]]]} have different classes: "
                "leave --aggregate out, or name a --unit of one class each"
            )
    else:
        y = np.full((len(names), answers.y.shape[1]), -1.0)
        np.maximum.at(y, member, np.where(np.isnan(answers.y), -1, answers.y))
        y[y < 0] = np.nan
    mixed = {
        name: np.array(
            [
                v[member == k][0] if len(set(v[member == k])) == 1 else "several"
                for k in range(len(names))
            ]
        )
        for name, v in answers.columns.items()
    }
    subjects, known = answers.subjects[first], answers.has_subjects
    return LabelledPredictions(names, subjects, y, z, mixed, known, int(alone.sum()))


def few(
    y: NDArray[Any], subjects: NDArray[Any], classes: Sequence[str], unit: str = "subject"
) -> str:
    """Say of what a test set has too few for its interval to be trusted; "" where of nothing.

    y (N,) or (N, L), subjects (N,). That is fewer than FEW subjects, or fewer than RARE of a class
    that is there, or of a side of a finding that has both.
    """
    said = []
    if (count := len(np.unique(subjects))) < FEW:
        said.append(f"{count} in all")
    rare = sorted((count, k, side) for k, side, count in sides_of(y, subjects) if count < RARE)
    for count, k, side in rare:
        of = (
            f"of class {classes[k]}" if y.ndim == 1 else f"with{'' if side else 'out'} {classes[k]}"
        )
        said.append(f"{count} {of}")
    if not said:
        return ""
    more = f" and too few of {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return (
        f"few test {unit}s: {', '.join(said[:SHOWN])}{more}; "
        "so few that no 95 % interval can be relied on"
    )


def caveat(low: float, high: float, subjects: int, unit: str = "subject") -> str:
    """Return what to say of an interval without width; "" for others.

    Every resample of answers that are all right is all right, and the bootstrap can't tell how
    wrong others may be; the rule of three can (Hanley & Lippman-Hand 1983).
    """
    if low != high:
        return ""
    return (
        f"every resample scores {low:.3f}, so the interval has no width; with {subjects} {unit}s "
        f"an error rate of {min(1, 3 / subjects):.1%} can't be excluded"
    )


def choose_threshold(truth: NDArray[Any], score: NDArray[Any], rule: str) -> float | None:
    """Return the threshold at or above which is called positive, by truth (N,) and score (N,).

    youden: largest sensitivity + specificity; f1: largest F1. Of equals the highest. None where
    one side is missing.
    """
    known = ~np.isnan(truth)
    t, s = truth[known] == 1, score[known]
    if t.all() or not t.any():
        return None
    order = np.argsort(-s, kind="stable")
    last = np.flatnonzero(np.r_[s[order][1:] != s[order][:-1], True])  # infinite ones tie too
    hits, called = np.cumsum(t[order])[last], last + 1.0
    if rule == "f1":
        gain = 2 * hits / (called + t.sum())
    else:
        gain = hits / t.sum() - (called - hits) / (~t).sum()
    return float(s[order][last][np.argmax(gain)])


def at_thresholds(
    held_out: tuple[NDArray[Any], NDArray[np.float64]],
    answers: LabelledPredictions,
    classes: Sequence[str],
    *,
    rule: str,
    n: int,
    seed: int,
    method: str,
) -> dict[str, dict[str, Any]]:
    """Return per finding (or of two classes, the second) threshold, sensitivity and specificity.

    The threshold is chosen on held_out, (y, z) of images that are not in the test split; the rest
    is measured on the answers, with intervals. It is a probability; `log_odds` is what calls were
    made by, None where infinite; `positives` and `negatives` are the images it was chosen on. Of
    more than two classes there are none.
    """
    if answers.y.ndim == 1 and answers.z.shape[1] != 2:
        return {}
    names = classes if answers.y.ndim == 2 else classes[1:]
    out: dict[str, dict[str, Any]] = {}
    chosen = zip(one_vs_rest(*held_out), one_vs_rest(answers.y, answers.z), strict=True)
    for name, (before, (truth, score)) in zip(names, chosen, strict=True):
        threshold = choose_threshold(*before, rule)
        if threshold is None:
            continue
        known = ~np.isnan(truth)
        called = (score >= threshold).astype(float)
        out[name] = {
            "threshold": float(log_odds.probabilities(np.array(threshold))),
            "log_odds": threshold if np.isfinite(threshold) else None,
            "positives": float((before[0] == 1).sum()),
            "negatives": float((before[0] == 0).sum()),
        }
        for side, rate in ((1, "sensitivity"), (0, "specificity")):
            there = truth == side
            if not known.any():
                continue
            if not there.any():
                out[name][rate] = dict.fromkeys(("value", "ci_low", "ci_high"))
                continue
            metric = Metric(rate, rate, partial(_rate, side=side), "at a threshold")
            rng = np.random.default_rng(seed)
            said = truth[there], called[there], answers.subjects[there]
            out[name] |= intervals([metric], *said, n=n, rng=rng, method=method)
    return out


def _rate(
    truth: NDArray[Any], called: NDArray[Any], *, side: int
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return a function of weights: the share of one side that is called right."""
    there = (truth == side).astype(float)
    sums = totals(np.stack([there * (called == side), there], axis=1))

    def scorer(weights: NDArray[Any]) -> NDArray[Any]:
        hits, of = sums(weights).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(of > 0, hits / of, np.nan))

    return scorer
