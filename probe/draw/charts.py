"""Charts as data: drawn on the page by plotly and in files by matplotlib from one description.

A colour is a place in the palette or a role: "ink", "muted", "fold" (one of many thin lines),
"mark" (what to look out for). Missing numbers are None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeAlias

from probe.draw.tables import Table

Numbers: TypeAlias = Sequence[float | None]


@dataclass(frozen=True)
class Axis:
    """An axis: its title, whether logarithmic, its range, and the names where it has no numbers."""

    title: str
    log: bool = False
    span: tuple[float, float] | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Series:
    """A line or points; low and high are a band around a line, a bar through points."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers = ()
    high: Numbers = ()
    colour: int | str = 0
    look: str = "line"  # "line", "dots", "both", "cross"
    thin: bool = False
    dash: bool = False
    legend: bool = True

    def band(self, i: int) -> tuple[float | None, float | None]:
        """Return the band at a point, None where there is none."""
        return (self.low[i], self.high[i]) if len(self.low) else (None, None)


@dataclass(frozen=True)
class Lines:
    """Lines and points over two axes. With `focus` a reader picks the series that is drawn bold."""

    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    caption: str = ""
    marker: tuple[float, str] | None = None  # a vertical line and what it says
    diagonal: bool = False
    focus: bool = False
    kind: str = field(default="lines", init=False)

    def table(self) -> Table:
        """Return every point."""
        names = ["series", self.x.title, self.y.title, "low", "high"]
        rows: list[list[Any]] = []
        for s in self.series:
            for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
                at = self.x.names[int(x)] if self.x.names and x is not None else x
                rows.append([s.name, at, y, *s.band(i)])
        return Table(self.name, self.title, names, rows)


@dataclass(frozen=True)
class Dots:
    """Rows of points with intervals, one series per colour; a line stands at `line`."""

    name: str
    title: str
    alt: str
    x: Axis
    rows: Sequence[str]
    series: Sequence[Series]  # y counts rows from the top
    caption: str = ""
    line: float | None = None
    kind: str = field(default="dots", init=False)

    def table(self) -> Table:
        """Return every point."""
        rows: list[list[Any]] = []
        for s in self.series:
            for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
                rows.append([self.rows[int(y or 0)], s.name, x, *s.band(i)])
        return Table(self.name, self.title, ["row", "series", self.x.title, "low", "high"], rows)


@dataclass(frozen=True)
class Bars:
    """The study's figure: a bar per model, and under it its classifier, foundation and data."""

    name: str
    title: str
    alt: str
    y: Axis
    values: Sequence[float]
    classifiers: Sequence[str]
    foundations: Sequence[str]
    sizes: Sequence[float | None]  # images of pre-training
    doubtful: Sequence[bool]  # random weights
    reference: int  # the place of the bar that the others are relative to
    caption: str = ""
    kind: str = field(default="bars", init=False)

    def table(self) -> Table:
        """Return every bar."""
        names = ["foundation", "classifier", self.y.title, "images of pre-training", "random"]
        columns = (self.foundations, self.classifiers, self.values, self.sizes, self.doubtful)
        rows = [
            [f, c, v, n and int(n), "yes" if d else "no"]
            for f, c, v, n, d in zip(*columns, strict=True)
        ]
        return Table(self.name, self.title, names, rows)


@dataclass(frozen=True)
class Heat:
    """A matrix: a cell is as dark as its share (0 to 1), and holds its text where there is room."""

    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    shares: Sequence[Numbers]
    texts: Sequence[Sequence[str]]
    caption: str = ""
    kind: str = field(default="heat", init=False)

    def table(self) -> Table:
        """Return every cell."""
        rows = [
            [down, across, text, share]
            for down, shares, texts in zip(self.y.names, self.shares, self.texts, strict=True)
            for across, share, text in zip(self.x.names, shares, texts, strict=True)
        ]
        names = [self.y.title, self.x.title, "value", "share of the row"]
        return Table(self.name, self.title, names, rows)


@dataclass(frozen=True)
class Points:
    """A map: images as points, laid out and coloured in one of several ways."""

    name: str
    title: str
    alt: str
    layouts: Mapping[str, tuple[Axis, Axis, Numbers, Numbers]]
    facts: Mapping[str, tuple[Sequence[str], Sequence[int]]]  # its values, one per point
    ids: Sequence[str] = ()  # "" or missing where nothing may name an image
    dataset: str = ""
    caption: str = ""
    kind: str = field(default="points", init=False)

    def table(self) -> Table:
        """Return every point."""
        ways = [f"{way} {axis}" for way in self.layouts for axis in (1, 2)]
        names = [*(["image"] if self.ids else []), *ways, *self.facts]
        columns: list[Sequence[Any]] = [self.ids] if self.ids else []
        for _, _, x, y in self.layouts.values():
            columns += [x, y]
        columns += [[values[i] for i in codes] for values, codes in self.facts.values()]
        return Table(self.name, self.title, names, list(zip(*columns, strict=True)))


Chart: TypeAlias = Lines | Dots | Bars | Heat | Points


def to_json(chart: Chart) -> dict[str, Any]:
    """Return a chart as JSON values, numbers with four digits: what the page draws."""
    rounded: dict[str, Any] = _short(chart)
    return rounded


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value else float(f"{value:.4g}")
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if is_dataclass(value):
        return {part.name: _short(getattr(value, part.name)) for part in fields(value)}
    return value
