"""Draw charts into files: a chart in, one Drawing out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from probe.draw.charts import Axis, Bars, Chart, Dots, Heat, Lines, Points
from probe.draw.drawing import (
    CELL,
    FOLD,
    INK,
    MUTED,
    PALETTE,
    RULE,
    VERMILLION,
    Drawing,
    printable,
    render,
    style,
)
from probe.draw.tables import power, score

NUMBERED = 15  # rows up to which a cell of a matrix holds its text
NAMED = 40  # rows up to which it names them
ROLES = {"ink": INK, "muted": MUTED, "fold": FOLD, "mark": VERMILLION}
DASH = (0, (3, 2))


def draw(chart: Chart) -> Drawing:
    """Draw a chart by our own settings."""
    drawn = {Lines: _lines, Dots: _dots, Bars: _bars, Heat: _heat, Points: _points}
    with style():
        return render(drawn[type(chart)](chart), chart.alt)  # type: ignore[operator]


def _lines(chart: Lines) -> Figure:
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    banded = [s for s in chart.series if len(s.low) and s.look == "line"]
    for s in chart.series:
        x = np.array([np.nan if v is None else v for v in s.x], dtype=float)
        y, low, high = (_array(v) for v in (s.y, s.low, s.high))
        colour = _colour(s.colour)
        looks = {"line": "", "dots": "o", "both": "o", "cross": "x"}
        line = "" if s.look in ("dots", "cross") else DASH if s.dash else "-"
        (drawn,) = axes.plot(x, y, color=colour, linewidth=0.8 if s.thin else 1.5)
        drawn.set(linestyle=line, marker=looks[s.look], markersize=3.4, markeredgewidth=0.8)
        if s.legend:
            drawn.set_label(_short(s.name, 34))
        if s in banded and (len(banded) < 3 or s is banded[0]):  # more would hide each other
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        elif len(low) and s.look != "line":
            axes.vlines(x, low, high, color=colour, linewidth=1.0, alpha=0.7)
    if chart.diagonal:
        axes.plot([0, 1], [0, 1], color=FOLD, linewidth=0.8, linestyle=DASH, zorder=1)
    if chart.marker:
        at, said = chart.marker
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=DASH, zorder=1.5, label=said)
    _axis(axes, chart.x, "x")
    _axis(axes, chart.y, "y")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        _legend(figure)
    return figure


def _dots(chart: Dots) -> Figure:
    L, S = len(chart.rows), len(chart.series)
    figure = Figure(figsize=(5.2, 0.9 + (0.17 + 0.09 * S) * L), layout="constrained")
    axes = figure.add_subplot()
    if chart.line is not None:
        axes.axvline(chart.line, color=INK, linewidth=0.8, linestyle=DASH)
    for k, s in enumerate(chart.series):
        rows = np.array(s.y, dtype=float) + (k - (S - 1) / 2) * min(0.22, 0.8 / S)
        colour = _colour(s.colour)
        if len(s.low):
            axes.hlines(rows, _array(s.low), _array(s.high), color=colour, linewidth=1.2, alpha=0.6)
        axes.plot(_array(s.x), rows, "o", color=colour, markersize=4.5, label=_short(s.name, 34))
    _axis(axes, chart.x, "x")
    axes.set_ylim(L - 0.4, -0.6)
    axes.set_yticks(np.arange(L), [_short(name, 34) for name in chart.rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    if S > 1:
        _legend(figure)
    return figure


def _bars(chart: Bars) -> Figure:
    """Draw bars above, the sizes of pre-training below, each model named between them."""
    n = len(chart.values)
    figure = Figure(figsize=(max(3.6, 1.2 + 0.5 * n), 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    places = np.arange(n)
    colours = [PALETTE[0] if v >= 0 else VERMILLION for v in chart.values]
    for i, value in enumerate(chart.values):
        hatch = "////" if chart.doubtful[i] else ""
        face = "none" if hatch else colours[i]
        above.bar(i, value, 0.62, color=face, edgecolor=colours[i], hatch=hatch, linewidth=0.9)
        side = "bottom" if value >= 0 else "top"
        above.text(i, value, f"{value:+.1f}".replace("-", "−"), ha="center", va=side, fontsize=7.5)  # noqa: RUF001
    above.axhline(0, color=INK, linewidth=0.8)
    above.margins(y=0.15)
    above.set_ylabel(_short(chart.y.title, 40))
    words = zip(chart.classifiers, chart.foundations, strict=True)
    labels = [f"{_short(c, 14)}\n{_short(f, 18)}" for c, f in words]
    above.set_xticks(places, labels, rotation=90 if n > 5 else 0, fontsize=7.5)
    above.tick_params(axis="x", length=0, labelbottom=True)
    sizes = _array(chart.sizes)
    below.bar(places, np.nan_to_num(sizes, nan=1.0), 0.62, color=FOLD)
    below.set_yscale("log")
    below.set_ylim(1e4, 1e10)
    below.set_yticks([1e5, 1e7, 1e9], [power(v) for v in (1e5, 1e7, 1e9)])
    below.set_yticks([], minor=True)
    below.set_ylabel("images of\npre-training")
    below.tick_params(axis="x", length=0, labelbottom=False)
    return figure


def _heat(chart: Heat) -> Figure:
    down, across = len(chart.y.names), len(chart.x.names)
    K = max(down, across)
    side = 3.0 if K <= 6 else min(0.42 * K, 6.3) if K <= NUMBERED else 5.0
    names = [_short(name, 18) for name in chart.x.names]
    rows = [_short(name, 18) for name in chart.y.names]
    margin = 0.3 + (0.062 * max(map(len, [*names, *rows]), default=0) if K <= NAMED else 0.4)
    figure = Figure(figsize=(side + margin, side * down / across + margin), layout="constrained")
    axes = figure.add_subplot()
    small = 8.5 if K <= 6 else 7 if K <= NUMBERED else 5.5
    shares = np.nan_to_num(np.array([_array(row) for row in chart.shares]))
    there = [(int(i), int(j)) for i, j in np.argwhere(shares > 0)]
    cells = PatchCollection([Rectangle((j, i), 1, 1) for i, j in there], linewidth=0)
    cells.set_facecolor([to_rgba(CELL, float(shares[at])) for at in there])
    axes.add_collection(cells)
    for i, j in np.ndindex(down, across):
        if K <= NUMBERED and chart.texts[i][j]:
            ink = "#ffffff" if shares[i, j] > 0.78 else INK if shares[i, j] else FOLD
            text = axes.text(j + 0.5, i + 0.5, chart.texts[i][j], color=ink, fontsize=small + 1)
            text.set(ha="center", va="center", in_layout=False)
    axes.set(xlim=(0, across), ylim=(down, 0), aspect="equal")
    axes.set(xlabel=chart.x.title, ylabel=chart.y.title)
    axes.spines[["top", "right"]].set_visible(True)
    if K <= NUMBERED:
        axes.hlines(np.arange(1, down), 0, across, color=RULE, linewidth=0.5)
        axes.vlines(np.arange(1, across), 0, down, color=RULE, linewidth=0.5)
    if K <= NAMED:
        turn = 0 if max(map(len, names)) <= (8 if K <= 6 else 2) else 90
        axes.set_xticks(np.arange(across) + 0.5, names, rotation=turn, fontsize=small)
        axes.set_yticks(np.arange(down) + 0.5, rows, fontsize=small)
        axes.tick_params(length=0)
    return figure


def _points(chart: Points) -> Figure:
    """Draw the first layout, coloured by the first fact."""
    across, down, x, y = next(iter(chart.layouts.values()))
    values, codes = next(iter(chart.facts.values()))
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    place = np.array(codes)
    for k, value in enumerate(values):
        here = place == k
        look = {"s": 13, "linewidths": 0, "alpha": 0.75, "rasterized": here.sum() > 200}
        colour = FOLD if value == "other" else _colour(k)
        axes.scatter(
            _array(x)[here], _array(y)[here], color=colour, label=_short(value, 24), **look
        )
    axes.set(xlabel=across.title, ylabel=down.title, xticks=[], yticks=[])
    _legend(figure)
    return figure


def _array(values: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _colour(which: int | str) -> str:
    return ROLES[which] if isinstance(which, str) else PALETTE[which % len(PALETTE)]


def _short(text: str, limit: int) -> str:
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    few = {label: handle for handle, label in zip(handles[:14], labels[:14], strict=True)}
    look = {"frameon": False, "fontsize": 8.5, "handlelength": 1.6, "columnspacing": 1.4}
    columns = 3 if max(map(len, few)) < 20 else 2
    figure.legend(
        few.values(), few.keys(), loc="outside upper left", ncols=columns, borderaxespad=0, **look
    )


def _axis(axes: Axes, axis: Axis, which: str) -> None:
    """Set an axis' title, scale, range and ticks."""
    getattr(axes, f"set_{which}label")(_short(axis.title, 44))
    if axis.names:
        turn = 45 if sum(map(len, axis.names)) > 50 else 0
        places = np.arange(len(axis.names))
        axes.set_xticks(places, [_short(name, 12) for name in axis.names], rotation=turn)
    elif axis.log:
        _decades(axes)
    elif axis.span:
        getattr(axes, f"set_{which}lim")(*axis.span)
    if not axis.names and not axis.log:
        ticks = getattr(axes, f"{which}axis")
        low, high = getattr(axes, f"get_{which}lim")()
        if low > -1.2 and high < 1.2:
            ticks.set_major_formatter(
                lambda v, _: score(round(v, 3)).rstrip("0").rstrip(".") or "0"
            )


def _decades(axes: Axes) -> None:
    """Show the values of x on a logarithmic axis, with at most seven ticks on powers of ten."""
    shown = [line.get_xdata() for line in axes.lines]
    values = np.concatenate([np.asarray(x, dtype=float) for x in shown])
    values = values[values > 0]
    low, high = float(values.min()), float(values.max())
    axes.set_xscale("log")
    spare = max((high / low) ** 0.03, 1.05)
    axes.set_xlim(low / spare, high * spare)
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first) / 7))
    ticks = [10.0**e for e in range(first, last + 1, step)] or [low]
    if len(few := np.unique(values)) <= 8:
        ticks = few.tolist()
    axes.set_xticks(ticks, [power(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
