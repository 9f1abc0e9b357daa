"""Charts of one result: its confusion, findings, curves, reliability, choice of C.

Shapes: N test images, K classes, L findings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from probe.draw.charts import Axis, Chart, Dots, Heat, Lines, Series
from probe.draw.tables import power, score
from probe.report.curves import Band, bands
from probe.report.gather import measure, more_is_better
from probe.report.trends import folds
from probe.results import Predictions, Result
from probe.score import calibration
from probe.score.decisions import THRESHOLDS, net_benefit
from probe.score.metrics import per_output
from probe.score.resampling import LEVEL

NAMED = 3  # curves without a band that are named
CURVES = 8  # outputs that are drawn one by one; of more, the commonest


def charts_of(r: Result, predictions: Predictions | None, stem: str) -> list[Chart]:
    """Return the charts of a result; `stem` begins their names."""
    charts: list[Chart] = []
    if predictions and predictions.labels.ndim == 1:
        charts.append(_confusion(confusion(predictions), predictions.classes, stem))
    elif predictions:
        charts += _findings(r, predictions, stem)
    if predictions:
        charts += _ranked(*bands(predictions), r, predictions, stem)
        charts.append(_reliability(r, predictions, stem))
        charts += _decisions(r, predictions, stem)
    if len(folds(r)[0]):
        charts.append(_strengths(r, stem))
    return charts


def confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Return counts (K, K), row = label, column = predicted."""
    counts = np.zeros((len(predictions.classes),) * 2, dtype=np.int64)
    np.add.at(counts, (predictions.labels, predictions.probabilities.argmax(1)), 1)
    return counts


def _confusion(counts: NDArray[np.int64], classes: Sequence[str], stem: str) -> Heat:
    """Draw counts (K, K), label by predicted class, coloured by their share of the label."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right, N, K = int(np.trace(counts)), int(counts.sum()), len(classes)
    return Heat(
        name=f"{stem}-confusion",
        title="Confusion matrix",
        alt=f"Confusion matrix of {N} test images in {K} classes, {right} of them on the diagonal.",
        x=Axis("predicted", names=list(classes)),
        y=Axis("label", names=list(classes)),
        shares=shares.tolist(),
        texts=[[str(n) for n in row] for row in counts.tolist()],
        caption="Test images by label and prediction; a cell is as dark as its share of the row.",
    )


def _findings(r: Result, predictions: Predictions, stem: str) -> list[Chart]:
    """Draw AUROC per finding, best first, where it is defined."""
    found = [(name, o) for name, o in outputs(r, predictions) if o["auroc"] is not None]
    if not found:
        return []
    found.sort(key=lambda pair: -(pair[1]["auroc"] or 0))
    areas = [float(o["auroc"] or 0) for _, o in found]
    ends = [f"{areas[i]:.3f} ({found[i][0]})" for i in (-1, 0)]
    return [
        Dots(
            name=f"{stem}-findings",
            title="AUROC per finding",
            alt=f"AUROC of {len(found)} findings, from {ends[0]} to {ends[1]}.",
            x=Axis("AUROC (.5 is guessing)", span=(min(0.5, *areas) - 0.03, 1.0)),
            rows=[f"{name} ({o['positives']:.0f})" for name, o in found],
            series=[Series("AUROC", areas, list(range(len(found))), look="dots")],
            line=0.5,
            caption="In brackets, the number of positive test images.",
        )
    ]


def _ranked(
    roc: Sequence[Band], pr: Sequence[Band], r: Result, predictions: Predictions, stem: str
) -> list[Chart]:
    """Draw ROC and precision-recall curves with their bands, and say which have none and why."""
    if not roc:
        return []
    labels = predictions.labels
    positive = [
        int(((labels == k) if labels.ndim == 1 else (labels[:, k] == 1)).sum())
        for k in range(len(predictions.classes))
    ]
    common = [
        predictions.classes[k] for k in np.argsort(-np.array(positive), kind="stable")[:CURVES]
    ]
    left_out = len(roc) - 1 - CURVES
    more = f" The {CURVES} with the most positives are drawn." if left_out > 0 else ""
    kinds = (
        ("roc", "ROC", "AUROC", roc, "false positive rate", "true positive rate"),
        ("pr", "Precision and recall", "AP", pr, "recall", "precision"),
    )
    charts: list[Chart] = []
    for curve, title, area, given, x, y in kinds:
        shown = [b for k, b in enumerate(given) if b.name in common or (k == 0 and len(given) > 1)]
        grid = np.linspace(0, 1, len(shown[0].middle)).tolist()
        series = [
            Series(
                f"{b.name} ({area} {score(b.area)})",
                grid,
                b.middle.tolist(),
                b.low.tolist(),
                b.high.tolist(),
                colour="ink" if k == 0 and len(shown) > 1 else k - (len(shown) > 1),
            )
            for k, b in enumerate(shown)
        ]
        charts.append(
            Lines(
                name=f"{stem}-{curve}",
                title=title,
                alt=f"{title} of {len(shown)} curves; {series[0].name}.",
                x=Axis(x, span=(0, 1)),
                y=Axis(y, span=(0, 1)),
                series=series,
                diagonal=curve == "roc",
                focus=True,
                caption=_of_bands(shown, r) + more,
            )
        )
    return charts


def _decisions(r: Result, predictions: Predictions, stem: str) -> list[Chart]:
    """Draw the net benefit of acting by the model, of two classes, beside acting on everybody."""
    y, p = predictions.labels, predictions.probabilities
    if y.ndim == 2 or p.shape[1] != 2 or len(np.unique(y)) < 2:
        return []
    truth, x = y.astype(float), THRESHOLDS.tolist()
    model = net_benefit(truth, p[:, 1])
    everybody = net_benefit(truth, np.ones(len(y)))
    share = float(truth.mean())
    best = float((model - np.maximum(everybody, 0)).max())
    return [
        Lines(
            name=f"{stem}-decisions",
            title="Decision curve",
            alt=f"Net benefit against the threshold; at most {best:.3f} above acting on everybody "
            "or nobody.",
            x=Axis(f"threshold of probability of {predictions.classes[1]}", span=(0, 1)),
            y=Axis("net benefit", span=(-0.05, max(0.05, share * 1.05))),
            series=[
                Series("by the model", x, model.tolist()),
                Series("everybody", x, np.maximum(everybody, -0.05).tolist(), colour=1, dash=True),
                Series("nobody", [0.0, 1.0], [0.0, 0.0], colour=2, dash=True),
            ],
            caption="True positives per image, less needless actions weighed by the odds of the "
            "threshold (Vickers & Elkin 2006): where the model's line is the highest, acting by it "
            "is worth more than acting on everybody or on nobody.",
        )
    ]


def _of_bands(shown: Sequence[Band], r: Result) -> str:
    """Say what the bands are, whether they are sure, and of what there is none, and why."""
    unit = "subject" if r.subjects_known else "image"
    missing: dict[str, list[str]] = {}
    for b in shown:
        if b.why_not:
            missing.setdefault(b.why_not.format(unit), []).append(b.name)
    said = ""
    if any(not b.why_not for b in shown):
        said = f"The band is 95 %, pointwise, from resampling {unit}s."
        said += f" With few {unit}s it is not reliable." if r.few else ""
    if r.outer:
        said += " Heads of all outer folds together: the score itself is the mean of the folds'."
    for why, names in missing.items():
        rest = len(names) - NAMED
        more = f" and {rest} more" if rest > 0 else ""
        said += f" No band for {', '.join(names[:NAMED])}{more}: {why}."
    return said.strip()


def _reliability(r: Result, predictions: Predictions, stem: str) -> Lines:
    """Draw how often an answer is right against how sure it was, with Wilson's intervals."""
    bins = r.reliability or calibration.reliability(predictions.labels, predictions.probabilities)
    n = np.array([b["images"] for b in bins])
    f = np.array([b["frequency"] for b in bins])
    z = norm.ppf((1 + LEVEL) / 2)
    middle = (f + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z * np.sqrt(f * (1 - f) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    what = "the label" if predictions.labels.ndim == 1 else "a finding (all of them together)"
    return Lines(
        name=f"{stem}-reliability",
        title="Reliability",
        alt=f"Frequency against confidence in {len(bins)} bins of {int(n.sum())} answers.",
        x=Axis("predicted probability", span=(0, 1)),
        y=Axis("observed frequency", span=(0, 1)),
        series=[
            Series(
                "bins",
                [b["confidence"] for b in bins],
                f.tolist(),
                (middle - reach).tolist(),
                (middle + reach).tolist(),
                look="both",
            )
        ],
        diagonal=True,
        caption=f"How often {what} is as predicted. On the diagonal, a probability is how often "
        "the head is right; below it the head is too sure. 95 % intervals (Wilson).",
    )


def _strengths(r: Result, stem: str) -> Lines:
    """Draw score against C: each fold, their mean, the chosen C and the fits that did not converge.

    The mean at a C is over its defined folds.
    """
    C, scores, converged = folds(r)
    defined, x = np.isfinite(scores), C.tolist()
    mean = [
        float(row[ok].mean()) if ok.any() else None for row, ok in zip(scores, defined, strict=True)
    ]
    F, words = scores.shape[1], measure(r)
    columns = [[v if v == v else None for v in column] for column in scores.T.tolist()]
    series = [
        Series("each fold", x, column, colour="fold", thin=True, legend=k == 0)
        for k, column in enumerate(columns)
        if F > 1
    ]
    legend = f"mean of {F} folds" if F > 1 else "validation score"
    series.append(Series(legend, x, mean, look="both" if len(x) == 1 else "line"))
    j, k = np.nonzero(~converged & defined)
    if len(j):
        unconverged = C[j].tolist(), scores[j, k].tolist()
        series.append(Series("not converged", *unconverged, colour="mark", look="cross", thin=True))
    alt = f"{words} on {F} folds against {len(C)} values of C from {power(C[0])} to {power(C[-1])}"
    if known := [(m, c) for m, c in zip(mean, x, strict=True) if m is not None]:
        more = more_is_better(r.task, r.metric)
        top, at = max(known) if more else min(known)
        word = "highest" if more else "lowest"
        alt += f"; the mean is {word}, {top:.3f}, at C = {power(at)}"
    alt += f"; C = {power(r.C)} was chosen"
    alt += f"; {int((~converged).sum())} of {converged.size} fits did not converge."
    return Lines(
        name=f"{stem}-C",
        title="Choice of C",
        alt=alt,
        x=Axis("C (inverse strength of the penalty)", log=True),
        y=Axis(words),
        series=series,
        marker=(r.C, f"chosen C = {power(r.C)}") if r.C else None,
    )


def outputs(r: Result, predictions: Predictions) -> list[tuple[str, dict[str, float | None]]]:
    """Return AUROC, average precision and counts of every finding."""
    found = r.outputs or per_output(predictions.labels, predictions.log_odds, predictions.classes)
    return list(found.items())
