"""Sensitivity and specificity at a threshold that was chosen on other images than the test split's.

Those are what folds or the val split held out. Shapes: N test images, M held-out ones, K classes, L
findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.score import log_odds
from probe.score.intervals import intervals
from probe.score.metrics import Metric, one_vs_rest
from probe.score.predictions import LabelledPredictions
from probe.score.ranking import totals

Labelled = tuple[NDArray[Any], NDArray[np.float64]]  # y (M,) or (M, L), log-odds z (M, K)


@dataclass(frozen=True)
class HeldOut:
    """What thresholds are chosen on: for the head that is kept, and for each outer fold's head."""

    final: Labelled
    folds: Sequence[Labelled] = ()  # none where one head gave all predictions


@dataclass(frozen=True)
class Frozen:
    """Thresholds that were chosen before, output -> what at_thresholds returned of it then."""

    outputs: Mapping[str, Mapping[str, Any]]


def limit_of(chosen: Mapping[str, Any]) -> float:
    """Return the log-odds from which a threshold calls; infinite where it calls all, or none."""
    z = chosen.get("log_odds")
    return float(z) if z is not None else (np.inf if round(chosen["threshold"]) else -np.inf)


def choose_threshold(truth: NDArray[Any], score: NDArray[Any], rule: str) -> float | None:
    """Return the threshold at or above which is called positive, by truth (N,) and score (N,).

    youden: largest sensitivity + specificity; f1: largest F1. The highest of several such.
    None where one side is missing.
    """
    known = ~np.isnan(truth)
    t, s = truth[known] == 1, score[known]
    if t.all() or not t.any():
        return None
    order = np.argsort(-s, kind="stable")
    last = np.flatnonzero(np.r_[s[order][1:] != s[order][:-1], True])  # infinite ones tie too
    hits, called = np.cumsum(t[order])[last], last + 1.0
    if rule == "f1":
        gain = 2 * hits / (called + t.sum())  # F1 = 2 TP / (predicted + actual positives)
    else:
        # J = sensitivity + specificity - 1 = TPR - FPR (Youden 1950).
        gain = hits / t.sum() - (called - hits) / (~t).sum()
    return float(s[order][last][np.argmax(gain)])


def at_thresholds(
    held_out: HeldOut | Frozen,
    predictions: LabelledPredictions,
    classes: Sequence[str],
    *,
    rule: str,
    n: int,
    seed: int,
    method: str,
    longer: float = 1.0,
) -> dict[str, dict[str, Any]]:
    """Return per finding (or of two classes, the second) threshold, sensitivity and specificity.

    The threshold is chosen on what was held out for the head that is kept, or was before; the rest
    is measured on the predictions, with intervals, each fold's by its own head's threshold. It is a
    probability; `log_odds` is what calls are made by, None where infinite; `positives` and
    `negatives` count the images it was chosen on. Of more than two classes there are none.
    """
    if predictions.y.ndim == 1 and predictions.z.shape[1] != 2:
        return {}
    names = classes if predictions.y.ndim == 2 else classes[1:]
    out: dict[str, dict[str, Any]] = {}
    before = _chosen(held_out, names, rule)
    tested = one_vs_rest(predictions.y, predictions.z)
    for name, found, (truth, score) in zip(names, before, tested, strict=True):
        if found is None:
            continue
        chosen, limits = found
        # A fold whose head was given one side only has no threshold, and calls nothing.
        limit = np.array([np.nan if one is None else one for one in limits])
        limit = limit[predictions.fold if predictions.fold is not None else 0]
        truth = np.where(np.isnan(limit), np.nan, truth)
        known = ~np.isnan(truth)
        called = (score >= limit).astype(float)
        out[name] = chosen
        for side, rate in ((1, "sensitivity"), (0, "specificity")):
            on_side = truth == side
            if not known.any():
                continue
            if not on_side.any():
                out[name][rate] = dict.fromkeys(("value", "ci_low", "ci_high"))
                continue
            metric = Metric(rate, rate, partial(_rate, side=side), "at a threshold")
            rng = np.random.default_rng(seed)
            arrays = truth[on_side], called[on_side], predictions.subjects[on_side]
            out[name] |= intervals([metric], *arrays, n=n, rng=rng, method=method, longer=longer)
    return out


def _chosen(
    held_out: HeldOut | Frozen, names: Sequence[str], rule: str
) -> Iterator[tuple[dict[str, Any], list[float | None]] | None]:
    """Yield of each output its threshold, as it is said, and the log-odds by which folds call."""
    if isinstance(held_out, Frozen):
        keep = ("threshold", "log_odds", "positives", "negatives")
        for name in names:
            known = held_out.outputs.get(name) or {}
            if known.get("threshold") is None:
                yield None
                continue
            yield {key: known[key] for key in keep if key in known}, [limit_of(known)]
        return
    heads = [one_vs_rest(*held_out.final), *(one_vs_rest(*fold) for fold in held_out.folds)]
    for before, *by_fold in zip(*heads, strict=True):
        threshold = choose_threshold(before[0], before[1], rule)
        if threshold is None:
            yield None
            continue
        said = {
            "threshold": float(log_odds.probabilities(np.array(threshold))),
            "log_odds": threshold if np.isfinite(threshold) else None,
            "positives": float((before[0] == 1).sum()),
            "negatives": float((before[0] == 0).sum()),
        }
        yield said, [choose_threshold(of[0], of[1], rule) for of in by_fold] or [threshold]


def _rate(
    truth: NDArray[Any], called: NDArray[Any], *, side: int
) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return a function of weights (B, N): the share of one side called right, (B,).

    truth (N,) of 1, 0 and NaN, called (N,) of 1 and 0.
    """
    on_side = (truth == side).astype(float)
    sums = totals(np.stack([on_side * (called == side), on_side], axis=1))

    def scorer(weights: NDArray[Any]) -> NDArray[Any]:
        hits, of = sums(weights).T
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(of > 0, hits / of, np.nan))

    return scorer
