"""Set two sets of results side by side, "A" and "B", and test each pair that belongs together.

Two results belong together where they agree in all that the two sets can agree in: what no
result of A has in common with any of B (frozen here, unfrozen there) is what is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product

from probe.draw.charts import Axis, Chart, Dots
from probe.draw.tables import Scored, Table, in_words
from probe.identity import PARTS, SEPARATOR
from probe.pairing import in_order, paired_tests
from probe.report.gather import Entry, measure
from probe.report.overview import scores
from probe.report.verdict import RESAMPLES
from probe.results import Predictions
from probe.score.metrics import METRICS
from probe.score.paired import Difference

SIDES = ("A", "B")


@dataclass(frozen=True)
class Match:
    """A result of A, the one of B that belongs to it, and A minus B."""

    a: Entry
    b: Entry
    difference: Difference | None = None
    p: float | None = None  # adjusted within the data set and metric
    why_not: str = ""


def matches(leads: Sequence[Entry]) -> list[Match]:
    """Return the pairs of A and B, tested."""
    left, right = ([c for c in leads if c.side == side] for side in SIDES)
    shared = [part for part in PARTS if _values(left, part) & _values(right, part)]
    belong = [
        (a, b)
        for a, b in product(left, right)
        if a.column == b.column
        and all(getattr(a.result, part) == getattr(b.result, part) for part in shared)
    ]
    out: list[Match] = []
    for _, group in groupby(belong, key=lambda pair: pair[0].column):
        out += _tested(list(group))
    return out


def _tested(pairs: Sequence[tuple[Entry, Entry]]) -> list[Match]:
    """Test pairs of one data set and metric."""
    first = pairs[0][0].result
    metric = METRICS.get((first.task, first.metric))
    if metric is None:
        return [Match(a, b, why_not="not a metric of this task") for a, b in pairs]
    answers = [(_answers(a), _answers(b)) for a, b in pairs]
    tests = paired_tests(metric, answers, n=RESAMPLES, seed=0)
    return [
        Match(a, b, test.difference, test.p_holm, test.why_not)
        for (a, b), test in zip(pairs, tests, strict=True)
    ]


def _answers(entry: Entry) -> list[Predictions]:
    return [in_order(entry.predictions)] if entry.predictions else []


def versus_table(found: Sequence[Match]) -> Table:
    """Return both scores of each pair, their difference, and p."""
    rows = []
    for m in found:
        a, b, d = m.a.result, m.b.result, m.difference
        rows.append(
            [
                *(a.dataset, measure(a), _bare(m.a), _bare(m.b)),
                Scored(a.value, a.ci_low, a.ci_high),
                Scored(b.value, b.ci_low, b.ci_high),
                Scored(d.value, d.ci_low, d.ci_high) if d else None,
                d.p if d else None,
                m.p,
                d.test if d else m.why_not,
            ]
        )
    names = ["dataset", "metric", "A", "B", "score A", "score B", "A - B", "p", "Holm's p", "test"]
    return Table("versus", "A against B, in pairs on the same test images", names, rows)


def versus_charts(found: Sequence[Match]) -> list[Chart]:
    """Return a chart per data set and metric: each pair's two scores."""
    charts: list[Chart] = []
    for (dataset, metric), group in groupby(found, key=lambda match: match.a.column):
        pairs = list(group)
        rows = [_both(m) for m in pairs]
        series = [
            scores(side, [m.b if k else m.a for m in pairs], y=range(len(pairs)), colour=k)
            for k, side in enumerate(SIDES)
        ]
        charts.append(
            Dots(
                name=f"versus-{dataset}-{metric}",
                title=f"A against B: {dataset}",
                alt=f"{in_words(metric)} of {len(pairs)} pairs of A and B on {dataset}.",
                x=Axis(measure(pairs[0].a.result)),
                rows=rows,
                series=series,
                caption="Test scores with 95 % intervals.",
            )
        )
    return charts


def _values(entries: Sequence[Entry], part: str) -> set[str]:
    return {str(getattr(c.result, part)) for c in entries}


def _bare(entry: Entry) -> str:
    """Return an entry's model without its side, with its scenario."""
    name = entry.model.removeprefix(f"{entry.side}: ")
    return f"{name}{SEPARATOR}{entry.also}" if entry.also else name


def _both(match: Match) -> str:
    a, b = _bare(match.a), _bare(match.b)
    return a if a == b else f"{a} / {b}"
