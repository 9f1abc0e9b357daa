"""What was found of a column that may be a shortcut to the label: one line of confounders.jsonl.

A results folder holds confounders.jsonl beside results.jsonl: a line for each store, feature and
column that `medprobe audit --predict` looked at, the last one of each stands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from features.errors import ProbeError
from features.files import append_line, read_lines
from features.lock import writing
from features.schema import check, parse
from probe.draw.tables import Scored, interval, p_value, score
from probe.results import PATIENCE, unwritable
from probe.schema import Group, Value
from probe.score.ranks import holm

FILE = "confounders.jsonl"
ALPHA = 0.05


class Score(TypedDict):
    """A score with its interval; null where it is not defined."""

    value: Value
    ci_low: Value
    ci_high: Value


class Association(TypedDict):
    """Cramer's V of the label, or of a finding, with the column, and p before and after Holm's."""

    v: Value
    p: Value
    p_holm: Value


@dataclass(frozen=True)
class Confounder:
    """A column, whether features tell it, and how far it goes with the label.

    All scores are AUROCs (means over classes or findings) of the images that have a value of the
    column, out of fold by subject. `why` says why there are none.
    """

    dataset: str
    labels_digest: str
    backbone: str
    feature: str
    extraction: dict[str, Any]
    column: str
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""  # UTC, ISO 8601
    why: str = ""
    values: dict[str, int] = field(default_factory=dict)  # images of each
    quartiles: bool = False  # the values are quartiles of numbers
    left_out: int = 0  # images without a value, or with a rare one
    n: int = 0
    subjects: int = 0
    task: str = "multiclass"
    told: Score | None = None  # the column, from the features
    association: dict[str, Association] = field(default_factory=dict)  # by finding; "" of classes
    label: Score | None = None  # the label, from the features
    alone: Score | None = None  # the label, from the column alone
    strata: list[Group] = field(default_factory=list)  # `label` in each value's images
    across: Score | None = None  # `label` over the findings or classes that all of these are over
    balanced: Score | None = None  # trained on weights that part label and column
    unbalanced: Score | None = None  # trained on images as they are, over the same findings
    balanced_why: str = ""  # why there is no such score, or what it is without
    effective: float | None = None  # how many images the weights are worth (Kish 1965)

    @property
    def key(self) -> str:
        """Return what tells it from others; of two alike the later stands."""
        return json.dumps([*self.of, self.column], sort_keys=True)

    @property
    def of(self) -> tuple[Any, ...]:
        """Return which images, labels and features it is of."""
        return self.dataset, self.labels_digest, self.backbone, self.feature, self.extraction

    @property
    def strongest(self) -> tuple[str, Association] | None:
        """Return the finding ("" of classes) that goes most surely with the column, and how far."""
        found = [(n, a) for n, a in self.association.items() if a["p_holm"] is not None]
        key = lambda item: (item[1]["p_holm"], -(item[1]["v"] or 0))  # noqa: E731
        return min(found, key=key) if found else None

    @property
    def flagged(self) -> bool:
        """Say whether the label goes with the column (p < .05, Holm) and the features tell it."""
        strongest, low = self.strongest, self.told["ci_low"] if self.told else None
        goes = strongest is not None and (strongest[1]["p_holm"] or 0) < ALPHA
        return goes and low is not None and low > 0.5

    def line(self) -> str:
        """Say it in a sentence or two, without a stop at the end."""
        if self.why:
            return f"{self.column} can't be looked at: {self.why}"
        parts = [self._goes(), f"the features tell {self.column} with AUROC {_said(self.told)}"]
        metric = "mean AUROC" if self.task == "multilabel" else "AUROC"
        parts.append(
            f"{self.column} alone scores {metric} {_said(self.alone)} of the label, where the "
            f"features score {_said(self.label)}"
        )
        parts += self._within()
        if self.balanced:
            trained = f"trained with label and {self.column} made independent"
            same = f", without that {_said(self.unbalanced)}"
            parts.append(f"{trained}, it is {_said(self.balanced)}{same * bool(self.balanced_why)}")
        if self.balanced_why:
            parts.append(self.balanced_why)
        if self.only_shortcut:
            parts.append(f"within no {self.column} is the score clear of chance")
        return "; ".join(parts)

    @property
    def only_shortcut(self) -> bool:
        """Say whether a score that is clear of chance is so within no value of the column."""
        low = self.label["ci_low"] if self.label else None
        lows = [g["ci_low"] for g in self.strata if g["ci_low"] is not None]
        return self.flagged and low is not None and low > 0.5 and all(v <= 0.5 for v in lows)

    def _goes(self) -> str:
        if not self.strongest:
            return f"whether the label goes with {self.column} can't be said"
        name, found = self.strongest
        many = len(self.association) > 1
        p = p_value(found["p_holm"])
        numbers = f"Cramer's V {score(found['v'])}, {p}"
        if (found["p_holm"] or 0) >= ALPHA:
            what = "a finding" if many else "the label"
            at_most = f"{name}: {numbers}" if many else numbers
            return f"no sign that {what} goes with {self.column} ({at_most})"
        also = sum((a["p_holm"] or 0) < ALPHA for a in self.association.values() if a["p_holm"])
        more = f"; so do {also - 1} other findings" if also > 2 else ""
        more = "; so does 1 other finding" if also == 2 else more
        return f"{name or 'the label'} goes with {self.column} ({numbers}{more})"

    def _within(self) -> list[str]:
        """Say the score among the images of each value, and of all over the same findings."""
        if not self.strata:
            return []
        each = ", ".join(f"{_said(g)} within {self.column} {g['group']}" for g in self.strata)
        if self.across is None or self.across == self.label:
            return [f"the features' score is {each}"]
        what = "findings" if self.task == "multilabel" else "classes"
        return [f"over the {what} that all have, it is {each}, and {_said(self.across)} in all"]

    def row(self) -> list[Any]:
        """Return its cells under COLUMNS; a column that can't be looked at has none."""
        name, found = self.strongest or ("", None)
        v = found["v"] if found else None
        within = ", ".join(f"{g['group']} {_said(g)}" for g in self.strata)
        scores = [_scored(s) for s in (self.told, self.label, self.alone)]
        told, label, alone = scores
        goes = p_value(found["p_holm"]) if found else ""
        cells = [self.column, told, name, v, goes, alone, label, within or self.why]
        return [*cells, _scored(self.balanced) if self.balanced else self.balanced_why or None]


COLUMNS = (
    *("column", "told by features", "goes most with", "Cramer's V", "p (Holm)"),
    *("label from column alone", "label from features", "within each value", "balanced training"),
)


def _said(given: Any) -> str:
    if not given or given["value"] is None:
        return "not defined"
    return f"{score(given['value'])} {interval(given['ci_low'], given['ci_high'])}".strip()


def _scored(given: Score | None) -> Scored | None:
    return Scored(given["value"], given["ci_low"], given["ci_high"]) if given else None


def adjusted(found: Sequence[Confounder]) -> list[Confounder]:
    """Return confounders with p_holm: p adjusted for all columns and findings together."""
    places = [
        (k, name) for k, one in enumerate(found) for name, a in one.association.items()
        if a["p"] is not None
    ]  # fmt: skip
    p = holm([float(found[k].association[name]["p"] or 0) for k, name in places])
    known = dict(zip(places, p.tolist(), strict=True))
    return [
        replace(
            one,
            association={
                name: Association(v=a["v"], p=a["p"], p_holm=known.get((k, name)))
                for name, a in one.association.items()
            },
        )
        for k, one in enumerate(found)
    ]


def append(folder: Path, found: Sequence[Confounder]) -> None:
    """Add lines to folder/confounders.jsonl. Raises ProbeError where they can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / ".results", patience=PATIENCE):
            for one in found:
                append_line(folder / FILE, json.dumps(asdict(one), allow_nan=False))
    except OSError as error:
        raise unwritable(folder, error) from None


def load(folder: Path) -> list[Confounder]:
    """Read a folder's confounders; of two of one key the later stands. none where no file is."""
    path = folder / FILE
    if not path.is_file():
        return []
    found: dict[str, Confounder] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            value = parse(line)
            check(value, Confounder)
            one = Confounder(**value)
        except ValueError as error:
            raise ProbeError(
                f"{path}, line {number} is not a confounder: {error}; remove that line"
            ) from None
        found[one.key] = one
    return list(found.values())
