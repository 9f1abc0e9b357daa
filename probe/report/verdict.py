"""Say which model to take, and how sure that is.

Words: a column is one data set scored by one metric; a standing is a model's place in it. Within a
column the best model is held against every other on the same test images. That it was found on
these images too is allowed for (score/selection.py): among models that are alike, the chance that
the best is called better than any is 5 %. A model is "not distinguishable" where that can't be
ruled out, which does not say that it is as good. The score of the best is given as it is, and
corrected for having been chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from probe.compare import chosen_among, in_order, paired_test, unpaired
from probe.draw.tables import Scored, Table, in_words, interval, p_value, score
from probe.report.gather import Cell, by_column, more_is_better, siblings
from probe.score.metrics import METRICS
from probe.score.paired import ALPHA, Difference
from probe.score.ranks import Ranks, ranks
from probe.score.selection import Chosen

RESAMPLES = 2000  # as `medprobe compare`


@dataclass(frozen=True)
class Standing:
    """A model in a column; of several seeds the mean, with the interval of the first."""

    cell: Cell
    value: float
    deviation: float | None  # over seeds
    seeds: int
    mark: str = ""  # "best", "tied" with it, or "" where lower or not tested
    difference: Difference | None = None  # best minus this one
    p: float | None = None  # of the best being better, allowing for the search
    why_not: str = ""  # why there is no test

    @property
    def scored(self) -> Scored:
        """Return the score with its interval and mark."""
        return Scored(self.value, self.cell.result.ci_low, self.cell.result.ci_high, self.mark)

    @property
    def said(self) -> str:
        """Say how it stands to the best, as in "is not distinguishable (p = .3)"."""
        if self.why_not:
            return f"can't be tested against it ({self.why_not})"
        verb = "is not distinguishable" if self.mark == "tied" else "is worse"
        return f"{verb} ({p_value(self.p)})"


@dataclass(frozen=True)
class Column:
    """One data set by one metric: its models, best first."""

    dataset: str
    metric: str
    standings: list[Standing]
    chosen: Chosen | None = None  # None where nothing can be held against the best
    among: int = 1  # models that it was chosen from, with the same test images

    @property
    def corrected(self) -> str:
        """Say in a sentence what the best scores, corrected for having been chosen; or ""."""
        if self.chosen is None:
            return ""
        c = self.chosen
        return (
            f"Chosen as the best of {self.among} on these images, it is estimated at "
            f"{score(c.estimate)} {interval(c.ci_low, c.ci_high)} on others."
        )

    @property
    def best(self) -> Standing:
        """Return the first."""
        return self.standings[0]

    @property
    def words(self) -> str:
        """Return the metric as one says it."""
        return in_words(self.metric)


@dataclass(frozen=True)
class Overall:
    """The models that have a score in every one of several columns, by mean rank."""

    models: list[Cell]
    ranks: Ranks
    columns: int

    @property
    def leader(self) -> int:
        """Return the place of the model with the smallest mean rank."""
        return int(np.argmin(self.ranks.mean))

    @property
    def tied(self) -> list[Cell]:
        """Return the models that Nemenyi's distance can't tell from the leader."""
        if self.ranks.critical is None:
            return []
        least = self.ranks.mean[self.leader]
        near = zip(self.models, self.ranks.mean, strict=True)
        leader = self.models[self.leader].key
        return [m for m, r in near if r - least < self.ranks.critical and m.key != leader]


def columns(leads: Sequence[Cell], cells: Sequence[Cell]) -> list[Column]:
    """Return the columns of the leading cells, tested."""
    return [_column(key, group, cells) for key, group in by_column(leads).items()]


def overall(found: Sequence[Column]) -> Overall | None:
    """Rank models over data sets; None where there are no two models or no two data sets."""
    first = {column.dataset: column for column in reversed(found)}  # one metric of each
    whole = list(reversed(first.values()))
    tables = [{s.cell.model: s for s in column.standings} for column in whole]
    common = [name for name in tables[0] if all(name in table for table in tables)]
    if len(whole) < 2 or len(common) < 2:
        return None
    table = np.array([[_upwards(t[name]) for name in common] for t in tables])
    return Overall([tables[0][name].cell for name in common], ranks(table), len(whole))


def tests_table(found: Sequence[Column]) -> Table:
    """Return every paired test of the best."""
    rows = []
    for column in found:
        for s in column.standings[1:]:
            d = s.difference
            rows.append(
                [
                    *(column.dataset, column.words, column.best.cell.model, s.cell.model),
                    Scored(d.value, d.ci_low, d.ci_high) if d else None,
                    d.p if d else None,
                    s.p,
                    d.test if d else s.why_not,
                ]
            )
    names = ["dataset", "metric", "best", "other", "best - other", "p", "adjusted p", "test"]
    caption = "Paired tests of the best of each data set; adjusted p allows for the search for it"
    return Table("tests", caption, names, rows)


def main_table(found: Sequence[Column]) -> Table:
    """Return models against data sets."""
    models = list(dict.fromkeys(s.cell.model for column in found for s in column.standings))
    scored = [{s.cell.model: s.scored for s in column.standings} for column in found]
    names = ["model", *(f"{column.dataset}, {column.words}" for column in found)]
    rows = [[model, *(column.get(model) for column in scored)] for model in models]
    caption = "Test scores with 95 % intervals; bold: the best, italic: not distinguishable from it"
    return Table("main", caption, names, rows)


def _upwards(standing: Standing) -> float:
    result = standing.cell.result
    return standing.value if more_is_better(result.task, result.metric) else -standing.value


def _column(key: tuple[str, str], leads: Sequence[Cell], cells: Sequence[Cell]) -> Column:
    standings = []
    for cell in leads:
        values = [c.result.value for c in siblings(cell, cells)]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        standings.append(Standing(cell, float(np.mean(values)), deviation, len(values)))
    standings.sort(key=_upwards, reverse=True)
    tested, chosen, among = _held_against(standings, cells)
    return Column(*key, [replace(standings[0], mark="best"), *tested], chosen, among)


def _held_against(
    standings: Sequence[Standing], cells: Sequence[Cell]
) -> tuple[list[Standing], Chosen | None, int]:
    """Return all but the best, tested against it; how it was chosen, and among how many."""
    best, *others = standings
    metric = METRICS.get((best.cell.result.task, best.cell.result.metric))
    said = [[in_order(c.predictions) for c in _seeds(s.cell, cells) if c.predictions]
            for s in standings]  # fmt: skip
    if metric is None or not said[0]:
        why = "not a metric of this task" if metric is None else "no predictions"
        return [replace(s, why_not=why) for s in others], None, 1
    there = [k for k, seeds in enumerate(said) if seeds]
    kept, chosen = chosen_among(metric, [said[k] for k in there], n=RESAMPLES, seed=0)
    places = [there[k] for k in kept]
    p = dict(zip(places, chosen.p, strict=True)) if chosen else {}
    out = []
    for k, standing in enumerate(others, 1):
        if not said[k]:
            out.append(replace(standing, why_not="no predictions"))
        elif k not in p:
            out.append(replace(standing, why_not=unpaired(said[0][0], said[k][0])))
        else:
            found = paired_test(
                metric, said[0][0], said[k][0], n=RESAMPLES, seed=0, pairs=len(p) - 1
            )
            mark = "tied" if p[k] >= ALPHA else ""
            out.append(replace(standing, difference=found, p=p[k], mark=mark))
    return out, chosen, len(places)


def _seeds(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of all seeds of a cell, itself first."""
    return [cell, *(c for c in siblings(cell, cells) if c.key != cell.key)]
