"""Say which model to take, and how sure that is.

Words: a column is one data set scored by one metric; a standing is a model's place in it. Within a
column the best model is held against every other on the same test images. That it was found on
these images too is allowed for (score/winner.py): among models that are alike, the chance that
the best is called better than any is 5 %. A model is "not distinguishable" where that can't be
ruled out, which does not say that it is as good. The score of the best is given as it is, and
corrected for having been chosen. An untrained model (random weights) is never the best, nor among
those that the best was chosen from: it is tested against the best by itself. Where there is no
second trained model, none is called the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from probe.draw.tables import Scored, interval, p_value, score
from probe.pairing import (
    PairedTest,
    chosen_among,
    in_order,
    interval_of_seeds,
    paired_test,
    paired_tests,
    unpaired,
)
from probe.report.gather import Entry, by_column, direction, measure, more_is_better, siblings
from probe.results import Predictions, Result
from probe.score.metrics import METRICS, Metric
from probe.score.paired import ALPHA, Difference
from probe.score.ranks import Ranks, ranks
from probe.score.winner import Winner

RESAMPLES = 2000  # as `medprobe compare`


@dataclass(frozen=True)
class Standing:
    """A model in a column; of several seeds the mean, with the interval of the mean."""

    entry: Entry
    value: float
    deviation: float | None  # over seeds
    seeds: int
    ci_low: float
    ci_high: float
    mark: str = ""  # "best", "tied" with it, or "" where lower or not tested
    difference: Difference | None = None  # best minus this one
    p: float | None = None  # of the best being better, allowing for the search among trained ones
    why_not: str = ""  # why there is no test

    @property
    def scored(self) -> Scored:
        """Return the score with its interval and mark."""
        return Scored(self.value, self.ci_low, self.ci_high, self.mark)

    @property
    def said(self) -> str:
        """Say how it stands to the best, as in "is not distinguishable (p = .3)"."""
        if self.why_not:
            return f"can't be tested against it ({self.why_not})"
        if self.p is None:
            return ""
        verb = "is not distinguishable" if self.p >= ALPHA else "is worse"
        return f"{verb} ({p_value(self.p)})"

    @property
    def against(self) -> str:
        """Say how an untrained one stands to the best, as in " (p = .3 against the best)"."""
        if self.difference is None:
            return f" (it can't be tested: {self.why_not})"
        d = self.difference
        return f" ({p_value(d.p)} for a difference of {score(d.value)})"

    @property
    def untrained(self) -> bool:
        """Say whether its backbone has random weights."""
        return self.entry.random


@dataclass(frozen=True)
class Column:
    """One data set by one metric: its models, highest first (lowest, of a loss)."""

    dataset: str
    metric: str
    standings: list[Standing]
    chosen: Winner | None = None  # None where nothing can be held against the best
    among: int = 1  # models that it was chosen from, with the same test images

    @property
    def corrected(self) -> str:
        """Say in a sentence what the best scores, corrected for having been chosen; or ""."""
        if self.chosen is None or not self.contest:
            return ""
        c = self.chosen
        return (
            f"Chosen as the best of {self.among} on these images, it is estimated at "
            f"{score(c.estimate)} {interval(c.ci_low, c.ci_high)} on others."
        )

    @property
    def best(self) -> Standing:
        """Return the first trained model; where none is trained, the first."""
        return next((s for s in self.standings if not s.untrained), self.standings[0])

    @property
    def contest(self) -> bool:
        """Say whether one of several trained models is the best, and so can be called that."""
        return sum(not s.untrained for s in self.standings) > 1

    @property
    def next(self) -> Standing | None:
        """Return the model after the best, of those that are trained or not as it is."""
        alike = [s for s in self.standings if s.untrained == self.best.untrained]
        return alike[1] if len(alike) > 1 else None

    @property
    def untrained(self) -> Standing | None:
        """Return the highest of the untrained models, where there are trained ones too."""
        found = (s for s in self.standings if s.untrained and not self.best.untrained)
        return next(found, None)

    @property
    def shown(self) -> Result:
        """Return the result that the best stands with."""
        return self.best.entry.result

    @property
    def span(self) -> tuple[float, float]:
        """Return the ends of an axis that holds every score and interval, 0 and a score's 1."""
        low, high = [0.0], [1.0] if more_is_better(self.shown.task, self.metric) else []
        for s in self.standings:
            ends = [v for v in (s.value, s.ci_low, s.ci_high) if np.isfinite(v)]
            low, high = [*low, *ends], [*high, *ends]
        least, most = min(low), max(high, default=1.0)
        return least, most if most > least else least + 1.0

    @property
    def direction(self) -> str:
        """Return "less is better" of a loss, else nothing."""
        return direction(self.shown.task, self.metric)

    @property
    def words(self) -> str:
        """Return the metric as one says it, with its direction where less is better."""
        return measure(self.shown)


@dataclass(frozen=True)
class Overall:
    """The models that have a score in every one of several columns, by mean rank."""

    models: list[Entry]
    ranks: Ranks
    columns: int
    few: list[str]  # "few subjects", "few images": of each column whose intervals are not sure

    @property
    def caveat(self) -> str:
        """Say of how many data sets the test is too small; "" where of none."""
        if not self.few:
            return ""
        what = " or ".join(sorted({word.replace("few", "few test") for word in self.few}))
        verb = "has" if len(self.few) == 1 else "have"
        return f"{len(self.few)} of {self.columns} data sets {verb} {what}"

    @property
    def leader(self) -> int:
        """Return the place of the model with the smallest mean rank."""
        return int(np.argmin(self.ranks.mean))

    @property
    def tied(self) -> list[Entry]:
        """Return the models that Nemenyi's distance can't tell from the leader."""
        if self.ranks.critical is None:
            return []
        least = self.ranks.mean[self.leader]
        near = zip(self.models, self.ranks.mean, strict=True)
        leader = self.models[self.leader].key
        return [m for m, r in near if r - least < self.ranks.critical and m.key != leader]


def columns(leads: Sequence[Entry], entries: Sequence[Entry]) -> list[Column]:
    """Return the columns of the leading entries, tested."""
    return [_column(key, group, entries) for key, group in by_column(leads).items()]


def headline(found: Sequence[Column]) -> Column:
    """Return the column that the report's answer is about.

    It is one with a choice between trained models before one without; of these one whose interval
    is sure before one with few subjects; of these the one with the most test subjects.
    """

    def weight(column: Column) -> tuple[bool, bool, bool, int]:
        r = column.shown
        return column.contest, not column.best.untrained, not r.few, r.n_subjects_test

    return max(found, key=weight)  # the first, where several are equal


def overall(found: Sequence[Column]) -> Overall | None:
    """Rank trained models over data sets; None where there are no two, or no two data sets."""
    first = {column.dataset: column for column in reversed(found)}  # one metric of each
    whole = list(reversed(first.values()))
    tables = [{s.entry.model: s for s in c.standings if not s.untrained} for c in whole]
    common = [name for name in tables[0] if all(name in table for table in tables)]
    if len(whole) < 2 or len(common) < 2:
        return None
    table = np.array([[_upwards(t[name]) for name in common] for t in tables])
    few = [column.best.entry.few for column in whole if column.best.entry.few]
    return Overall([tables[0][name].entry for name in common], ranks(table), len(whole), few)


def _upwards(standing: Standing) -> float:
    result = standing.entry.result
    return standing.value if more_is_better(result.task, result.metric) else -standing.value


def _column(key: tuple[str, str], leads: Sequence[Entry], entries: Sequence[Entry]) -> Column:
    standings = []
    for entry in leads:
        values = [c.result.value for c in siblings(entry, entries)]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        low, high = _interval(entry, entries)
        standings.append(Standing(entry, float(np.mean(values)), deviation, len(values), low, high))
    standings.sort(key=_upwards, reverse=True)
    best = Column(*key, standings).best
    rivals = [s for s in standings if s.untrained == best.untrained]
    untrained = [s for s in standings if s.untrained != best.untrained]
    tested, chosen, among = _held_against(rivals, entries)
    if not best.untrained and len(rivals) > 1:
        rivals = [replace(best, mark="best"), *(_marked(s) for s in tested)]
    else:
        rivals = [best, *tested]
    alone = [_alone(s, best, entries) for s in untrained]
    return Column(*key, sorted([*rivals, *alone], key=_upwards, reverse=True), chosen, among)


def _interval(entry: Entry, entries: Sequence[Entry]) -> tuple[float, float]:
    """Return the interval of the mean over seeds, as `medprobe compare` has it."""
    result, metric = entry.result, METRICS.get((entry.result.task, entry.result.metric))
    seeds = _answers(entry, entries)
    of_mean = interval_of_seeds(metric, seeds, n=RESAMPLES, seed=0) if metric else None
    return of_mean or (result.ci_low, result.ci_high)


def _marked(standing: Standing) -> Standing:
    tied = standing.p is not None and standing.p >= ALPHA
    return replace(standing, mark="tied") if tied else standing


def _alone(standing: Standing, best: Standing, entries: Sequence[Entry]) -> Standing:
    """Return an untrained model tested against the best trained one: no search led to it."""
    metric = METRICS.get((best.entry.result.task, best.entry.result.metric))
    pair = [_answers(s.entry, entries) for s in (best, standing)]
    if why_not := _untestable(metric, pair):
        return replace(standing, why_not=why_not)
    ours, theirs = pair
    if why_not := unpaired(ours[0], theirs[0]):
        return replace(standing, why_not=why_not)
    assert metric
    return replace(standing, difference=paired_test(metric, ours, theirs, n=RESAMPLES, seed=0))


def _untestable(metric: Metric | None, answers: Sequence[Sequence[Predictions]]) -> str:
    if metric is None:
        return "not a metric of this task"
    return "" if all(answers) else "no predictions"


def _answers(entry: Entry, entries: Sequence[Entry]) -> list[Predictions]:
    return [in_order(c.predictions) for c in _seeds(entry, entries) if c.predictions]


def _held_against(
    standings: Sequence[Standing], entries: Sequence[Entry]
) -> tuple[list[Standing], Winner | None, int]:
    """Return all but the best, tested against it; how it was chosen, and among how many."""
    best, *others = standings
    metric = METRICS.get((best.entry.result.task, best.entry.result.metric))
    predictions = [_answers(s.entry, entries) for s in standings]
    if metric is None or not predictions[0]:
        return [replace(s, why_not=_untestable(metric, predictions)) for s in others], None, 1
    tested = [k for k, seeds in enumerate(predictions) if seeds]
    kept, chosen = chosen_among(metric, [predictions[k] for k in tested], n=RESAMPLES, seed=0)
    places = [tested[k] for k in kept]
    pairs = [(predictions[0], seeds) for seeds in predictions[1:]]
    tests = [PairedTest(), *paired_tests(metric, pairs, n=RESAMPLES, seed=0)]
    p: dict[int, float] = {}
    if chosen:
        own = [tests[k].difference for k in places]
        chosen = chosen.no_surer_than([test.p if test else None for test in own])
        p = dict(zip(places, chosen.p, strict=True))
    out = [
        replace(standing, difference=tests[k].difference, p=p.get(k), why_not=tests[k].why_not)
        for k, standing in enumerate(others, 1)
    ]
    return out, chosen, len(places)


def _seeds(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries of all seeds of an entry, itself first."""
    return [entry, *(c for c in siblings(entry, entries) if c.key != entry.key)]
