"""Turn results into a page that opens anywhere, with its figures and tables as files beside it.

    gather     results and predictions -> entries        verdict    which model, how surely
    elsewhere  heads tested on other data
    standings  its tables                                versus     A and B -> paired tests
    overview   entries -> charts across models           trends     charts along C, depth, shots
    panels     one entry, by closeups (its charts),      curves     ROC and precision-recall, bands
               listings (its tables) and examples        thumbnails images that are still there
    stores     what is still in the stores: map, audit
    shortcuts  what the audit of columns found
    analysis   CKA tables -> charts                       page       all of it -> HTML

Results in, files out: nothing here needs a backbone or a head. The same results, stores and images
give the same bytes.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from features.errors import ProbeError
from features.files import sync
from probe.draw.charts import Chart, to_json
from probe.draw.tables import Scored, Table, csv_table, in_words
from probe.report import overview, trends
from probe.report.analysis import cka_charts
from probe.report.checklist import checklist
from probe.report.elsewhere import matrices
from probe.report.gather import Entry, direction, gather, leading
from probe.report.page import page, scripts
from probe.report.panels import Panel, panel
from probe.report.processes import Map, alone, several
from probe.report.shortcuts import Shortcut, gains, shortcuts
from probe.report.standings import main_table, tests_table
from probe.report.stores import StoreView, audit_table, look
from probe.report.trust import Answer, answers
from probe.report.verdict import Column, Overall, columns, headline
from probe.report.verdict import overall as rank
from probe.report.versus import SIDES, matches, versus_charts, versus_table
from probe.results import ABANDONED, Result

FEW = 7  # panels for which processes of their own are not worth their start
OURS = re.compile(r"\d{3,}-.+\.(svg|png|csv|md|tex)")  # what an earlier report may have left
DRAFT = ".report-"  # of the folder in which one is written


@dataclass(frozen=True)
class Options:
    """What goes into a report."""

    compare: tuple[Path, Path] | None = None  # A and B, beside the sources
    analysis: Path | None = None  # a folder with cka*.csv
    private: bool = False  # neither pixels nor paths nor ids of images and subjects
    dicom: bool = False  # small copies of DICOM images too
    fetch: bool = False  # small copies of images at URLs too: they are fetched


@dataclass(frozen=True)
class Section:
    """A part of the page with charts."""

    key: str
    title: str
    charts: list[Chart]


@dataclass(frozen=True)
class Dataset:
    """What the page says of one data set."""

    name: str
    panels: list[Panel]
    audit: Table | None = None
    line: str = ""
    bad: Table | None = None
    thumbnails: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All that is written."""

    entries: list[Entry]
    columns: list[Column]
    first: Column | None  # what the headline is about, where it isn't about all
    overall: Overall | None
    sections: list[Section]
    datasets: list[Dataset]
    tables: list[Table]  # of the whole
    versus: Table | None = None
    answers: list[Answer] = field(default_factory=list)  # of the data set that is said first
    left_out: list[str] = field(default_factory=list)  # rows, and why
    shortcuts: list[Shortcut] = field(default_factory=list)  # said beside the headline

    @property
    def results(self) -> list[Result]:
        """Return every result, as it may be shown."""
        return [entry.result for entry in self.entries]

    @property
    def elsewhere(self) -> list[Table]:
        """Return the tables of heads that were tested on other data than their own."""
        return [table for table in self.tables if table.name.startswith("000-elsewhere-")]

    def charts(self) -> Iterator[Chart]:
        """Yield every chart."""
        panels = chain.from_iterable(dataset.panels for dataset in self.datasets)
        yield from chain.from_iterable(section.charts for section in self.sections)
        yield from chain.from_iterable(one.charts for one in panels)

    def all_tables(self) -> Iterator[Table]:
        """Yield every table."""
        yield from self.tables
        for dataset in self.datasets:
            yield from (t for t in (dataset.audit, dataset.bad) if t and t.rows)
            yield from chain.from_iterable(one.tables for one in dataset.panels)


def write_report(sources: Sequence[Path], out: Path, options: Options | None = None) -> Path:
    """Write index.html, results.csv and .md, checklist.md, figures/, tables/; return index.html.

    A source is a results folder or its results.jsonl. index.html needs no other file. All is
    written beside the former report first, which stays whole until then; its figures and tables are
    removed, other files stay. Raises ProbeError where there is no result, or where the report can't
    be written.
    """
    options = options or Options()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(f"{DRAFT}*"):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=DRAFT, dir=out) as folder:
            draft = Path(folder)
            _write(sources, draft, options)
            _take_place(draft, out)
    except OSError as error:
        raise ProbeError(
            f"{out}: the report can't be written ({error.strerror or error}); a former one is as "
            "it was. Make room, or give another -o"
        ) from None
    return out / "index.html"


def _write(sources: Sequence[Path], draft: Path, options: Options) -> None:
    from probe.report.files import stills, write_figures, write_tables

    with several() as run:
        report = make(sources, options, run)
        write_figures(draft / "figures", list(report.charts()), run)
    write_tables(draft / "tables", list(report.all_tables()))
    said = page("results.md.j2", report=report)
    for name, text in (
        ("results.csv", csv_table(report.results)),
        ("results.md", said),
        ("checklist.md", checklist(report.columns)),
        ("index.html", html(report, options, stills(draft / "figures", _first_charts(report)))),
    ):
        (draft / name).write_text(text, encoding="utf-8", newline="")


def _first_charts(report: Report) -> list[Chart]:
    """Return the charts that a page shows at first: those of the whole, and a result of each."""
    panels = [dataset.panels[0] for dataset in report.datasets]
    groups = [section.charts for section in report.sections] + [one.charts for one in panels]
    return list(chain.from_iterable(groups))


def _take_place(draft: Path, out: Path) -> None:
    """Move a report from where it was written; index.html, which needs no other file, last."""
    for name in ("figures", "tables"):
        (out / name).mkdir(exist_ok=True)
        new = {file.name for file in (draft / name).iterdir()}
        for old in (out / name).iterdir():
            if OURS.fullmatch(old.name) and old.name not in new:
                old.unlink()
        for file in new:
            (draft / name / file).replace(out / name / file)
    for file in ("results.csv", "results.md", "checklist.md", "index.html"):
        sync(draft / file)
        (draft / file).replace(out / file)


def make(sources: Sequence[Path], options: Options, run: Map = alone) -> Report:
    """Compute what a report says."""
    sides: list[tuple[str, Sequence[Path]]] = [("", sources)] if sources else []
    if options.compare:
        sides += [(side, [path]) for side, path in zip(SIDES, options.compare, strict=True)]
    found_all = gather(sides or [("", [])], private=options.private)
    entries = [entry for entry in found_all if not entry.contradicted]
    left_out = [_refused(entry) for entry in found_all if entry.contradicted]
    if not entries:
        raise ProbeError(f"no result is left to report: {left_out[0]}")
    for line in left_out:
        warnings.warn(line, stacklevel=3)
    leads = leading(entries)
    found = columns(leads, entries)
    own = [c for c in found if not all(s.entry.result.trained_on for s in c.standings)] or found
    ranked = rank(own)
    said, columns_table = shortcuts(leads, [column.best.entry for column in found])
    added, gains_table = gains(leads)
    tables = [main_table(found), tests_table(found), provenance(entries), *matrices(leads)]
    tables += [table for table in (columns_table, gains_table) if table.rows]
    pairs = matches(leads) if options.compare else []
    versus = versus_table(pairs) if options.compare else None
    datasets = _datasets(leads, options, run)
    asked = headline(own)
    place = [dataset.name for dataset in datasets].index(asked.dataset) + 1
    return Report(
        entries=entries,
        columns=found,
        first=None if ranked else headline(own),
        overall=ranked,
        sections=_sections(entries, leads, own, options, versus_charts(pairs)),
        datasets=datasets,
        answers=answers(asked, place),
        tables=[_renamed(t, f"000-{t.name}") for t in [*tables, *([versus] if versus else [])]],
        versus=versus,
        left_out=left_out,
        shortcuts=[*added, *said],
    )


def _refused(entry: Entry) -> str:
    """Say that a row is left out whose predictions don't score what it says."""
    r = entry.result
    seed = f", seed {r.seed}" if r.seed else ""
    return (
        f"left out: {r.backbone} on {r.dataset} ({r.scenario}, {r.feature}{seed}): its predictions "
        f"are not what its row in results.jsonl says ({entry.contradicted}); run it again: "
        f"{r.command}"
    )


def _sections(
    entries: Sequence[Entry],
    leads: Sequence[Entry],
    found: Sequence[Column],
    options: Options,
    versus: Sequence[Chart],
) -> list[Section]:
    """Return the sections that have anything to show, in the page's order."""
    made: list[tuple[str, str, Sequence[Chart]]] = [
        ("versus", "A against B", versus),
        ("gain", "Gain over the reference", list(overview.gain(found))),
        ("scenarios", "Frozen and unfrozen", list(overview.scenarios(leads))),
        ("strength", "Score against C", list(trends.strengths(leads))),
        ("depth", "Score by depth", list(trends.depth(entries))),
        ("unfreezing", "Score by unfrozen blocks", list(trends.unfreezing(entries))),
        ("dropping", "Score by dropped blocks", list(trends.dropping(entries))),
        ("shots", "Score against shots", list(trends.shots(entries))),
        ("convergence", "Convergence", list(trends.convergence(entries))),
        ("cka", "Likeness of layers", cka_charts(options.analysis)),
    ]
    return [
        Section(key, title, [_renamed(chart, f"000-{slug(chart.name)}") for chart in charts])
        for key, title, charts in made
        if charts
    ]


def _datasets(leads: Sequence[Entry], options: Options, run: Map) -> list[Dataset]:
    """Return the panels of each data set, with what its stores and images still give."""
    from probe.report.thumbnails import LIMIT, thumbnails

    closer = run(partial(closely, private=options.private), leads, few=FEW)
    groups: dict[str, list[tuple[Panel, StoreView | None]]] = {}
    for one, stored in closer:
        groups.setdefault(one.entry.result.dataset, []).append((one, stored))
    out = []
    for name, found in groups.items():
        panels = [one for one, _ in found]
        there = [(one, stored) for one, stored in found if stored]
        if not there:
            out.append(Dataset(name, panels))
            continue
        one, first = there[0]
        pictures: dict[str, str] = {}
        if not options.private:
            ids = [e.id for p in panels for e in (*p.mistakes, *p.hits)]
            ids += first.map.ids if first.map else []
            limit = LIMIT // len(groups)
            pictures = thumbnails(first, ids, dicom=options.dicom, fetch=options.fetch, limit=limit)
        line, audit = "", None
        if whole := next(((one, stored) for one, stored in there if not stored.anew), None):
            one, first = whole
            line, audit = audit_table(first, stem_of(one.entry), private=options.private)
        out.append(Dataset(name, panels, audit, line, first.bad, pictures))
    return out


def closely(entry: Entry, *, private: bool) -> tuple[Panel, StoreView | None]:
    """Return one result's panel, and its store where it still is."""
    stem = stem_of(entry)
    stored, remark = look(entry, stem, private=private)
    one = replace(panel(entry, stem), store=remark)
    if stored and stored.map:
        one.charts.append(stored.map)
    return one, stored


def stem_of(entry: Entry) -> str:
    """Return what the names of an entry's charts and tables begin with."""
    r = entry.result
    parts = (r.dataset, r.backbone, r.scenario)
    return f"{int(entry.key[1:]):03}-{'-'.join(slug(part) for part in parts)}"


def provenance(entries: Sequence[Entry]) -> Table:
    """Return what each number was made from, and the command that makes it again."""
    rows = [
        [
            *(r.dataset, r.backbone, r.weights, r.scenario, r.feature, r.protocol),
            *(in_words(r.metric), Scored(r.value, r.ci_low, r.ci_high)),
            *("all" if r.shots is None else r.shots, r.seed, r.store, r.store_fingerprint),
            *(r.split_digest, r.label_from, r.labelled_by, r.command),
            *(round(r.seconds, 1), r.created),
            ", ".join(f"{name} {version}" for name, version in sorted(r.versions.items())),
        ]
        for r in (entry.result for entry in entries)
    ]
    names = ["dataset", "backbone", "weights", "scenario", "feature", "protocol", "metric", "value"]
    names += ["shots", "seed", "store", "store fingerprint", "split digest", "label column"]
    names += ["labelled by", "command", "seconds", "created", "versions"]
    return Table("provenance", "Provenance", names, rows)


def slug(text: str) -> str:
    """Return a text that may stand in any file's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:48] or "x"


def _renamed(one: Any, name: str) -> Any:
    return replace(one, name=name)


def html(report: Report, options: Options, stills: Mapping[str, str] | None = None) -> str:
    """Return the page; `stills` are pictures of charts, for where no script runs."""
    three = ("value", "ci_low", "ci_high")
    scores = {
        entry.key: {name: [m.get(k) for k in three] for name, m in entry.result.metrics.items()}
        for entry in report.entries
    }
    data = {
        "charts": {chart.name: to_json(chart) for chart in report.charts()},
        "images": {d.name: d.thumbnails for d in report.datasets},
        "scores": scores,
    }
    results = report.results
    ways = {(name, direction(r.task, name)) for r in results for name in r.metrics}
    return page(
        "report.html.j2",
        report=report,
        data=data,
        private=options.private,
        stills=stills or {},
        metrics=dict(sorted(ways)),
        scenarios=sorted({r.scenario for r in results}),
        several={
            name: len({getattr(r, name) for r in results}) > 1
            for name in ("protocol", "seed", "shots")
        },
        versions={str(sorted(r.versions.items())) for r in results},
        labelled=any(r.label_from or r.labelled_by for r in results),
        **scripts(),
    )
