"""Read what a report is made of: results with predictions, cleaned, without names if asked.

Words: an entry is one result of one side; a side is a set of results that is held against another
("A", "B"; "" where there is one set only). An entry is a leading one where it stands for its model:
all training images (or the most shots), the final layer, its first seed. Private means that
neither pixels nor paths nor ids of images and subjects go into what is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from features.errors import ContradictedError, ProbeError
from probe.draw.drawing import printable
from probe.draw.tables import in_words
from probe.identity import Identity, data_names, in_one, in_scenario, model_parts
from probe.pairing import read_checked_predictions
from probe.results import Predictions, Result, load
from probe.score.groups import averaged
from probe.score.metrics import METRICS

# What orders results of one score, so that a report is the same each time.
TIES = attrgetter("backbone", "weights", "scenario", "head", "feature", "protocol", "seed", "store")
NAMES = ("subject", "path", "id")  # columns whose groups would name people and files


@dataclass(frozen=True)
class Entry:
    """One result: its anchor on the page, where it was found, and what its head said."""

    key: str
    side: str
    folder: Path
    result: Result
    store: str  # as in results.jsonl, whatever `result` says of it
    identity: Identity  # that of the row, before it was cleaned
    predictions: Predictions | None = None
    missing: str = ""  # why there are no predictions
    contradicted: str = ""  # what its predictions score otherwise than its row says
    parts: Mapping[str, str] = field(default_factory=dict)  # of its model's name, see model_parts

    @property
    def random(self) -> bool:
        """Say whether the backbone was never trained."""
        return self.result.weights == "random"

    @property
    def leak(self) -> str:
        """Say what of its splits leaks, as in "the splits leak: 1 subject is in ..."; else ""."""
        found = self.result.audit
        return str(found.get("line", "")).partition(";")[0] if found.get("leaks") else ""

    @property
    def mean(self) -> str:
        """Say over how many findings its score is the mean, without which, and why; else ""."""
        return averaged(self.result.task, self.result.metric, self.result.outputs)

    @property
    def positive(self) -> str:
        """Return which of two classes is the positive one, the last; "" where there are not two."""
        two = self.result.task == "multiclass" and len(self.result.classes) == 2
        return self.result.classes[1] if two else ""

    @property
    def name(self) -> str:
        """Return its model's name: the backbone, and of the rest what varies."""
        return in_one(self.parts)

    @property
    def also(self) -> str:
        """Return the scenario in words, where the name doesn't say it."""
        return "" if "scenario" in self.parts else in_scenario(self.result.scenario)

    def without(self, *left_out: str) -> str:
        """Return its model's name without some of its parts."""
        return in_one({part: word for part, word in self.parts.items() if part not in left_out})

    @property
    def tagged(self) -> bool:
        """Say whether the weights are random and the name doesn't say so."""
        return self.random and "weights" not in self.parts

    @property
    def model(self) -> str:
        """Return the name with a word where the weights are random."""
        return f"{self.name} (random weights)" if self.tagged else self.name

    @property
    def few(self) -> str:
        """Return "few subjects" or "few images" where no interval of its test is sure, else ""."""
        if not self.result.few:
            return ""
        return "few subjects" if self.result.subjects_known else "few images"

    @property
    def column(self) -> tuple[str, str]:
        """Return data set and metric."""
        return self.result.dataset, self.result.metric


def gather(sides: Sequence[tuple[str, Sequence[Path]]], *, private: bool) -> list[Entry]:
    """Return the entries of named sides, sorted by data set and metric, then best first.

    A source is a results folder or its results.jsonl. Raises ProbeError where there is no result.
    """
    found: list[Entry] = []
    for side, sources in sides:
        files = {(s / "results.jsonl" if s.is_dir() else s).resolve(): s for s in sources}
        rows = [(file.parent, raw) for file, source in files.items() for raw in load(source)]
        if not rows:
            where = ", ".join(map(str, sources)) or "no folder"
            raise ProbeError(
                f"no results in {where}: run `medprobe probe STORE -o DIR`, then report DIR"
            )
        found += [_cell(side, folder, raw, private) for folder, raw in rows]
    names = data_names([c.identity for c in found], [c.result.label_from for c in found])
    found = [
        replace(entry, result=replace(entry.result, dataset=printable(name)))
        for entry, name in zip(found, names, strict=True)
    ]
    found.sort(key=_rank)
    return [replace(entry, key=f"r{i}") for i, entry in enumerate(found, 1)]


def leading(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that stand for their models, named by what tells them apart."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        one = replace(entry.identity, feature="", shots=None)
        groups.setdefault((entry.side, *entry.column, one.model), []).append(entry)
    kept: list[Entry] = []
    for group in groups.values():
        most = max((c.result.shots or float("inf")) for c in group)
        group = [c for c in group if (c.result.shots or float("inf")) == most]
        final = [c for c in group if c.result.feature.split("/")[0] == "final"]
        deepest = max(c.result.feature.split("/")[0] for c in group)
        group = final or [c for c in group if c.result.feature.split("/")[0] == deepest]
        by_feature: dict[str, Entry] = {}
        for c in sorted(group, key=lambda c: c.result.seed):
            by_feature.setdefault(c.result.feature, c)
        kept += by_feature.values()
    named: dict[str, Entry] = {}
    for side in {entry.side for entry in kept}:
        mine = [entry for entry in kept if entry.side == side]
        for entry, parts in zip(mine, model_parts([c.identity for c in mine]), strict=True):
            first = {"backbone": f"{side}: {parts['backbone']}"} if side else {}
            words = {part: printable(word) for part, word in (parts | first).items()}
            named[entry.key] = replace(entry, parts=words)
    return [named[entry.key] for entry in entries if entry.key in named]


def by_column(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """Return the entries of each data set and metric."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.column, []).append(entry)
    return groups


def siblings(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries of all seeds of an entry, itself among them."""
    mine = (entry.side, entry.column, entry.identity.model)
    return [c for c in entries if (c.side, c.column, c.identity.model) == mine]


def _rank(entry: Entry) -> tuple[Any, ...]:
    """Sort by data set and metric, then best first."""
    r = entry.result
    best_first = -r.value if more_is_better(r.task, r.metric) else r.value
    return (r.dataset, r.metric, best_first, *TIES(r), entry.side)


def more_is_better(task: str, metric: str) -> bool:
    """Say which way a metric goes; one that isn't ours counts as a score."""
    known = METRICS.get((task, metric))
    return known is None or known.higher


def direction(task: str, metric: str) -> str:
    """Return what to add to a metric's name: "less is better" of a loss, else nothing."""
    return "" if more_is_better(task, metric) else "less is better"


def measure(result: Result) -> str:
    """Return a result's metric in words with its direction, for an axis or a column."""
    way = direction(result.task, result.metric)
    return f"{in_words(result.metric)} ({way})" if way else in_words(result.metric)


def _cell(side: str, folder: Path, raw: Result, private: bool) -> Entry:
    result = Result(**clean(asdict(raw)))
    shown = _nameless(result) if private else result
    entry = Entry("", side, folder, shown, raw.store, raw.identity)
    try:
        said = read_checked_predictions(folder, raw)
    except ContradictedError as error:
        return replace(entry, contradicted=error.differ)
    except ProbeError as error:
        why = "no predictions can be read" if private else printable(str(error))
        return replace(entry, missing=why)
    return replace(
        entry, predictions=replace(said, classes=[printable(name) for name in said.classes])
    )


def _nameless(result: Result) -> Result:
    """Return a result without paths and ids: of a path, its last part."""
    weights = result.tuned.get("head_weights")
    return replace(
        result,
        store=_last(result.store),
        command=_without_folders(result.command),
        labelled_by=_without_folders(result.labelled_by),
        predictions="",
        heads="",
        tuned=result.tuned | ({"head_weights": _last(weights)} if weights else {}),
        subgroups=[group for group in result.subgroups if group["column"] not in NAMES],
    )


def _last(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def _without_folders(command: str) -> str:
    """Return a command line whose paths are only their last part: folders may name people.

    Its words are a shell's: a folder's name may have blanks.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # not a command line
        return ""
    return shlex.join(_last(word) for word in words)


def clean(value: Any) -> Any:
    """Return a JSON value whose texts can be put into XML and UTF-8."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return value
