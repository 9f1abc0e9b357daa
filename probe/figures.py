"""Draw the report's figures: arrays in, one Drawing out.

Shapes: J values of C, F folds, K classes, L findings.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from probe.drawing import BLUE, CELL, FOLD, INK, RULE, VERMILLION, Drawing, printable, render, style
from probe.tables import power

NUMBERED = 15  # classes up to which a cell of the confusion matrix holds its numbers
NAMED = 40  # classes up to which its rows and columns hold their names


def draw_curve(
    C: NDArray[Any],
    scores: NDArray[Any],
    converged: NDArray[Any],
    *,
    chosen: float,
    metric: str,
    key: str,
) -> Drawing:
    """Draw score against C: each fold, their mean, the chosen C and the fits that did not converge.

    C (J,) above 0, scores (J, F) with NaN where undefined, converged (J, F). The mean at a C is
    over its defined folds.
    """
    order = np.argsort(C)
    C, scores, converged = C[order], scores[order], converged[order].astype(bool)
    defined = np.isfinite(scores)
    mean = np.full(len(C), np.nan)
    mean[defined.any(1)] = [
        row[ok].mean() for row, ok in zip(scores, defined, strict=True) if ok.any()
    ]
    loose = ~converged & defined

    with style():
        figure = Figure(figsize=(5.2, 3.3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        known = [*C, chosen] if chosen > 0 else C
        _decades(axes, min(known), max(known))
        dot = "o" if len(C) == 1 else ""
        axes.plot(C, scores, color=FOLD, linewidth=0.7, marker=dot, markersize=3)
        axes.plot(C, mean, color=BLUE, linewidth=1.8, marker=dot, markersize=5)
        where = np.broadcast_to(C[:, None], scores.shape)
        axes.plot(
            where[loose], scores[loose], "x", color=VERMILLION, markersize=3.2, markeredgewidth=0.8
        )
        if chosen > 0:
            axes.axvline(chosen, color=INK, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1.5)
            near = int(np.argmin(np.abs(np.log(C) - math.log(chosen))))
            if math.isclose(C[near], chosen, rel_tol=1e-3):
                axes.plot([C[near]], [mean[near]], "o", color=BLUE, markersize=6)
        handles = [
            Line2D([], [], color=BLUE, linewidth=1.8, label=f"mean of {scores.shape[1]} folds"),
            Line2D([], [], color=FOLD, linewidth=0.9, label="each fold"),
            Line2D(
                [],
                [],
                color=INK,
                linewidth=0.8,
                linestyle=(0, (3, 2)),
                label=f"chosen C = {power(chosen)}",
            ),
        ]
        if scores.shape[1] == 1:
            handles[0].set_label("validation score")
            del handles[1]
        if loose.any():
            handles.append(
                Line2D(
                    [],
                    [],
                    color=VERMILLION,
                    marker="x",
                    linestyle="",
                    markersize=4,
                    label="not converged",
                )
            )
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=3 if len(handles) == 3 else 2,
            frameon=False,
            fontsize=9,
            handlelength=1.6,
            borderaxespad=0,
            columnspacing=1.6,
        )
        axes.set_xlabel("C (inverse strength of the penalty)")
        axes.set_ylabel(_short(metric, 40))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        alt = f"{metric} on {scores.shape[1]} folds against {len(C)} values of C"
        alt += f" from {power(C[0])} to {power(C[-1])}"
        if np.isfinite(mean).any():
            top = int(np.nanargmax(mean))
            alt += f"; the mean is highest, {mean[top]:.3f}, at C = {power(C[top])}"
        alt += f"; C = {power(chosen)} was chosen"
        alt += f"; {int((~converged).sum())} of {converged.size} fits did not converge."
        return render(figure, key, alt)


def draw_confusion(
    counts: NDArray[np.integer[Any]], classes: Sequence[str], *, key: str
) -> Drawing:
    """Draw counts (K, K), row = label, column = predicted; a cell is as dark as its row's share."""
    K = len(classes)
    totals = counts.sum(1, keepdims=True)
    share = counts / np.maximum(totals, 1)  # (K, K)
    side = 3.0 if K <= 6 else min(0.42 * K, 6.3) if K <= NUMBERED else 5.0
    names = [_short(name, 18) for name in classes]
    margin = 0.3 + (0.062 * max(map(len, names), default=0) if K <= NAMED else 0.4)
    with style():
        figure = Figure(figsize=(side + margin, side + margin), layout="constrained")
        axes = figure.add_subplot()
        small = 8.5 if K <= 6 else 7 if K <= NUMBERED else 5.5
        for i, j in np.ndindex(K, K):
            if counts[i, j]:
                cell = Rectangle(
                    (j, i), 1, 1, facecolor=CELL, alpha=float(share[i, j]), linewidth=0
                )
                axes.add_patch(cell)
            if K <= NUMBERED and totals[i, 0]:
                ink = "#ffffff" if share[i, j] > 0.78 else INK if counts[i, j] else FOLD
                middle = (j + 0.5, i + (0.5 if not counts[i, j] else 0.4))
                axes.text(
                    *middle,
                    str(counts[i, j]),
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=small + 1,
                )
                if counts[i, j]:
                    said = f"{share[i, j]:.0%}"
                    axes.text(
                        j + 0.5,
                        i + 0.72,
                        said,
                        ha="center",
                        va="center",
                        color=ink,
                        fontsize=small - 1.5,
                    )
        axes.set(xlim=(0, K), ylim=(K, 0), aspect="equal", xlabel="predicted", ylabel="label")
        axes.spines[["top", "right"]].set_visible(True)
        if K <= NUMBERED:
            edges = np.arange(1, K)
            axes.hlines(edges, 0, K, color=RULE, linewidth=0.5)
            axes.vlines(edges, 0, K, color=RULE, linewidth=0.5)
        if K <= NAMED:
            places = np.arange(K) + 0.5
            turn = 0 if max(map(len, names)) <= (8 if K <= 6 else 2) else 90
            axes.set_xticks(
                places,
                names,
                rotation=turn,
                fontsize=small,
            )
            axes.set_yticks(places, names, fontsize=small)
            axes.tick_params(length=0)
        right = int(np.trace(counts))
        alt = f"Confusion matrix of {int(counts.sum())} test images in {K} classes, "
        alt += f"{right} of them on the diagonal."
        return render(figure, key, alt)


def draw_findings(
    names: Sequence[str], positives: Sequence[int], auroc: Sequence[float], *, key: str
) -> Drawing:
    """Draw one dot per finding at its AUROC, (L,) each; a line at .5 stands for guessing."""
    L = len(names)
    with style():
        figure = Figure(figsize=(5.2, 0.7 + 0.2 * L), layout="constrained")
        axes = figure.add_subplot()
        rows = np.arange(L)
        axes.hlines(rows, 0.5, auroc, color=FOLD, linewidth=0.8)
        axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.plot(auroc, rows, "o", color=BLUE, markersize=5)
        axes.set(
            xlim=(min(0.5, *auroc) - 0.03, 1.0),
            ylim=(L - 0.4, -0.6),
            xlabel="AUROC (.5 is guessing)",
        )
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.1f}".replace("0.", "."))
        labels = [f"{_short(name, 26)} ({n})" for name, n in zip(names, positives, strict=True)]
        axes.set_yticks(rows, labels)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        best, worst = int(np.argmax(auroc)), int(np.argmin(auroc))
        low, high = (f"{auroc[i]:.3f} ({names[i]})" for i in (worst, best))
        alt = f"AUROC of {L} findings, from {low} to {high}."
        return render(figure, key, alt)


def _short(text: str, limit: int) -> str:
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _decades(axes: Axes, low: float, high: float) -> None:
    """Show C from low to high, with at most seven ticks on whole powers of ten."""
    spare = max((high / low) ** 0.03, 1.05)
    axes.set_xlim(low / spare, high * spare)
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first) / 7))
    ticks = [10.0**e for e in range(first, last + 1, step)] or [low]
    axes.set_xticks(ticks, [power(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
