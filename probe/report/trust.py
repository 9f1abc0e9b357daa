"""Three questions, answered in plain words: which backbone, how sure, and can it be trusted.

Each answer is a few statements about the data set that the page is headed by, each with a link to
what it rests on. What was not looked at is said, too: a page without a warning is no proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from probe.draw.tables import interval, p_value, score
from probe.report.verdict import Column, Standing
from probe.results import Result
from probe.score.paired import ALPHA

SHOWN = 4  # models that a sentence names
LEVEL = 0.05
SHARES = ("accuracy", "balanced_accuracy")  # metrics whose 1 means that no image is called wrongly


@dataclass(frozen=True)
class Statement:
    """A sentence, where its evidence is on the page, and whether it is a warning."""

    text: str
    link: str
    warning: bool = False


@dataclass(frozen=True)
class Answer:
    """A question and what is said to it."""

    question: str
    statements: list[Statement]


def answers(column: Column, place: int) -> list[Answer]:
    """Return the three answers of a column; `place` is the number of its data set on the page."""
    return [
        Answer("Which backbone?", list(_which(column))),
        Answer("How sure?", list(_how_sure(column))),
        Answer("Can it be trusted?", list(_trust(column, f"#data-{place}"))),
    ]


def _which(column: Column) -> Iterator[Statement]:
    best, link = column.best, f"#{column.best.entry.key}"
    name, also = best.entry.name, best.entry.also
    said = f"{name} ({also})" if also else name
    if best.untrained:
        yield Statement(f"None: {said} was never trained, and nothing else was tested.", link, True)
    elif column.contest:
        yield Statement(f"{said}, the best of {column.among} on {column.dataset}.", link)
    else:
        yield Statement(f"{said} is the only one that was tested on {column.dataset}.", link)


def _how_sure(column: Column) -> Iterator[Statement]:
    best, r = column.best, column.shown
    link = f"#{best.entry.key}"
    who = f"{r.n_subjects_test} subjects" if r.subjects_known else "unknown subjects"
    of = f" of {who}" if r.subjects_known else ""
    yield Statement(
        f"{column.words} {score(best.value)} {interval(r.ci_low, r.ci_high)} on {r.n_test} images"
        f"{of}: the true score lies in the brackets in 95 of 100 such studies.",
        link,
    )
    if column.corrected:
        yield Statement(column.corrected, link)
    rivals = [s for s in column.standings if s is not best and not s.untrained]
    better = [s for s in rivals if s.p is not None and s.p < ALPHA]
    tied = [s for s in rivals if s.p is not None and s.p >= ALPHA]
    if better:
        yield Statement(f"Clearly better than {_names(better)}.", "#results")
    if tied:
        yield Statement(
            f"Tied with {_names(tied)}: these images can't tell them apart.", "#results"
        )
    if r.metric in SHARES and best.value == 1:
        most = 1 - LEVEL ** (1 / r.n_subjects_test)
        yield Statement(
            f"No image was called wrongly, which excludes an error rate above {most:.1%}.", link
        )
    if r.few:
        yield Statement(f"{r.few[0].upper()}{r.few[1:]}.", link, True)


def _trust(column: Column, data: str) -> Iterator[Statement]:
    best, r = column.best, column.shown
    link = f"#{best.entry.key}"
    found = [*_of_data(r, data, link), *_of_controls(column, link)]
    if not r.converged:
        found.append(Statement("A head did not converge.", link, True))
    if r.edge:
        found.append(Statement(f"{r.edge}.", link, True))
    yield from sorted(found, key=lambda statement: not statement.warning)
    if open_ := _not_asked(column):
        yield Statement(f"Not asked: {'; '.join(open_)}.", data)


def _of_data(r: Result, data: str, link: str) -> Iterator[Statement]:
    if r.audit.get("leaks"):
        line = str(r.audit.get("line", "")).partition(";")[0]
        yield Statement(f"{line[0].upper()}{line[1:]}: the score may be too high.", data, True)
    elif r.audit:
        yield Statement("No subject and no file is in two parts that must be apart.", data)
    if n := r.audit.get("conflicts"):
        groups = "group of identical images has" if n == 1 else "groups of identical images have"
        yield Statement(f"{n} {groups} contrary labels.", data, True)
    if not r.subjects_known:
        yield Statement(
            "Which images are of one subject is not known: if some are, the interval is too short "
            "and the score may be too high.",
            link,
            True,
        )


def _of_controls(column: Column, link: str) -> Iterator[Statement]:
    r, untrained = column.shown, column.untrained
    if untrained and untrained.difference:
        d, name = untrained.difference, untrained.entry.parts["backbone"]
        gain = f"{_signed(d.value)} {interval(d.ci_low, d.ci_high)}"
        if d.p < ALPHA:
            said = f"Its training counts: {gain} over an untrained {name} ({p_value(d.p)})."
        else:
            said = f"It can't be told from an untrained {name} ({gain}, {p_value(d.p)})."
        yield Statement(said, "#results", d.p >= ALPHA)
    if r.control and r.control.get("value") is not None:
        value = float(r.control["value"])
        high = r.control.get("ci_high")
        lost = high is not None and float(high) >= r.ci_low
        yield Statement(
            f"With shuffled labels it scores {score(value)}"
            f"{': no less than the interval allows' if lost else ''}.",
            link,
            lost,
        )


def _not_asked(column: Column) -> list[str]:
    """Return what was not looked at, and how it can be."""
    out = []
    if not column.untrained and not column.best.untrained:
        out.append("is it better than an untrained network (extract with --weights random)")
    if not column.shown.control and column.shown.scenario.startswith("frozen"):
        out.append("what do shuffled labels give (probe --control shuffle)")
    if not column.shown.subgroups:
        out.append("is it as good in every group (probe --by COLUMN)")
    return out


def _names(standings: Sequence[Standing]) -> str:
    said = [f"{s.entry.name} ({p_value(s.p or 0.0)})" for s in standings[:SHOWN]]
    more = len(standings) - SHOWN
    return ", ".join(said) + (f" and {more} more" if more > 0 else "")


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else '-'}{score(abs(value))}"
