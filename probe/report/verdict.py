"""Say which model to take, and how sure that is.

Words: a column is one data set scored by one metric; a standing is a model's place in it. Within a
column the best model is tested against every other in pairs, on the same test images, and p is
adjusted for their number (Holm). That the best was found on these images too makes the tests a
little keen: a model that is not distinguishable is safely so, one that is lower may be so by luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from probe.compare import in_order, paired_test, unpaired
from probe.metrics import METRICS
from probe.ranks import Ranks, holm, ranks
from probe.report.gather import Cell, by_column, more_is_better, siblings
from probe.results import Predictions
from probe.statistics import Difference
from probe.tables import Scored, Table, in_words, p_value

ALPHA = 0.05
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
    p: float | None = None  # adjusted
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
    names = ["dataset", "metric", "best", "other", "best - other", "p", "Holm's p", "test"]
    return Table("tests", "Paired tests of the best of each data set", names, rows)


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
    best = replace(standings[0], mark="best")
    ours = best.cell.predictions and in_order(best.cell.predictions)
    tested = [_against(best, ours, other) for other in standings[1:]]
    adjusted = iter(holm([s.difference.p for s in tested if s.difference]).tolist())
    rest = []
    for standing in tested:
        p = next(adjusted) if standing.difference else None
        tied = "tied" if p is not None and p >= ALPHA else ""
        rest.append(replace(standing, p=p, mark=tied))
    return Column(*key, [best, *rest])


def _against(best: Standing, ours: Predictions | None, other: Standing) -> Standing:
    """Test the best against another."""
    result = best.cell.result
    metric = METRICS.get((result.task, result.metric))
    if ours is None or other.cell.predictions is None:
        return replace(other, why_not="no predictions")
    theirs = in_order(other.cell.predictions)
    if why_not := unpaired(ours, theirs):
        return replace(other, why_not=why_not)
    if metric is None:
        return replace(other, why_not="not a metric of this task")
    found = paired_test(metric, ours, theirs, n=RESAMPLES, seed=0)
    return replace(other, difference=found)
