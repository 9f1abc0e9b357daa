"""Turn results into a page that opens anywhere, with its figures and tables as files beside it.

Words: a panel is what the page shows of one result; a finding is one label of a multilabel task; a
sentence says the best result of one data set by one metric. Results in, files out: no store is
opened, and nothing is computed that needs an image, a backbone or a head. The same results give
the same bytes.
"""

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from features.errors import ProbeError
from probe.drawing import Drawing, printable
from probe.figures import NUMBERED, draw_confusion, draw_curve, draw_findings
from probe.results import Predictions, Result, load, read_predictions
from probe.tables import csv_table, in_markdown, in_words, interval, power, score

# What orders results of one score, so that a report is the same each time.
TIES = attrgetter("backbone", "weights", "scenario", "head", "feature", "protocol", "seed", "store")


@dataclass(frozen=True)
class Curve:
    """How C was chosen."""

    figure: Drawing
    at_edge: bool  # the chosen C is the smallest or the largest that was tried
    fits: int
    loose: int  # fits that did not converge


@dataclass(frozen=True)
class Confusion:
    """How each class was predicted: counts (K, K), row = label, column = predicted."""

    figure: Drawing
    classes: list[str]
    counts: NDArray[np.integer[Any]]
    largest: list[tuple[str, str, int]]  # label, predicted, images; the ten most frequent mistakes
    numbered: bool  # few enough classes for numbers


@dataclass(frozen=True)
class Finding:
    """One label of a multilabel task; `auroc` is None where the test split has one class of it."""

    name: str
    positives: int
    negatives: int
    unlabelled: int
    auroc: float | None


@dataclass(frozen=True)
class Panel:
    """What the page shows of one result."""

    key: str  # the anchor, "r1"
    result: Result
    others: list[tuple[str, dict[str, float | None]]]  # metric in words, its value and interval
    inspect: str  # the command that names the bad images
    curve: Curve | None
    confusion: Confusion | None = None
    findings: Sequence[Finding] = ()  # best AUROC first, those without one last
    dots: Drawing | None = None
    missing: str = ""  # why nothing is shown of the predictions

    @property
    def figures(self) -> dict[str, Drawing]:
        """Name each figure that there is: C, confusion, findings."""
        found = {
            "C": self.curve and self.curve.figure,
            "confusion": self.confusion and self.confusion.figure,
            "findings": self.dots,
        }
        return {name: drawing for name, drawing in found.items() if drawing}


@dataclass(frozen=True)
class Sentence:
    """The best of `among` results of one data set by one metric, on `splits` different splits."""

    panel: Panel
    among: int
    splits: int


def write_report(sources: Sequence[Path], out: Path) -> Path:
    """Write index.html, results.csv, results.md and figures/ into `out`; return index.html's path.

    A source is a results folder or its results.jsonl. index.html needs no other file. Figures that
    an earlier report left in `out` are removed. Raises ProbeError where there is no result.
    """
    files = {(s / "results.jsonl" if s.is_dir() else s).resolve(): s for s in sources}
    found = [(file.parent, result) for file, source in files.items() for result in load(source)]
    if not found:
        where = ", ".join(map(str, sources)) or "no folder"
        raise ProbeError(
            f"no results in {where}: run `medprobe probe STORE -o DIR`, then report DIR"
        )
    found.sort(key=lambda pair: _rank(pair[1]))
    panels = [_panel(f"r{i}", folder, result) for i, (folder, result) in enumerate(found, 1)]

    (out / "figures").mkdir(parents=True, exist_ok=True)
    for old in (out / "figures").iterdir():
        if re.fullmatch(r"\d{3,}-.+-(C|confusion|findings)\.(svg|png)", old.name):
            old.unlink()
    for i, panel in enumerate(panels, 1):
        for name, drawing in panel.figures.items():
            stem = f"{i:03}-{_slug(panel.result)}-{name}"
            (out / "figures" / f"{stem}.svg").write_bytes(drawing.svg)
            (out / "figures" / f"{stem}.png").write_bytes(drawing.png)
    results = [panel.result for panel in panels]
    sentences = _sentences(panels)
    (out / "results.csv").write_text(csv_table(results), encoding="utf-8", newline="")
    (out / "results.md").write_text(
        _page("results.md.j2", panels, sentences), encoding="utf-8", newline="\n"
    )
    index = out / "index.html"
    index.write_text(_page("report.html.j2", panels, sentences), encoding="utf-8", newline="\n")
    return index


def _rank(result: Result) -> tuple[Any, ...]:
    """Sort by data set and metric, then best first."""
    return (result.dataset, result.metric, -result.value, *TIES(result))


def _slug(result: Result) -> str:
    parts = (result.dataset, result.backbone, result.scenario)
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.")[:32] or "x" for part in parts)


def _clean(value: Any) -> Any:
    """Return a JSON value whose texts can be put into XML and UTF-8."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value


def _panel(key: str, folder: Path, raw: Result) -> Panel:
    result = Result(**_clean(asdict(raw)))
    metrics = sorted(result.metrics.items())
    panel = Panel(
        key=key,
        result=result,
        others=[(in_words(name), three) for name, three in metrics if name != result.metric],
        inspect=f"medprobe inspect {shlex.quote(result.store)}",
        curve=_curve(result, f"{key}c"),
    )
    try:
        predictions = read_predictions(folder / raw.predictions)
    except ProbeError as error:
        return replace(panel, missing=printable(str(error)))
    predictions = replace(predictions, classes=[printable(name) for name in predictions.classes])
    if predictions.labels.ndim == 1:
        return replace(panel, confusion=_confusion(predictions, f"{key}m"))
    findings = _findings(predictions)
    scored = [(f.name, f.positives, f.auroc) for f in findings if f.auroc is not None]
    dots = draw_findings(*zip(*scored, strict=True), key=f"{key}f") if scored else None
    return replace(panel, findings=findings, dots=dots)


def _curve(result: Result, key: str) -> Curve | None:
    """Draw the score against C; without scores, or with a C of 0, there is none."""
    folds = result.folds
    C = np.array(folds.get("C") or [], dtype=float)
    scores = np.array(folds.get("scores") or [], dtype=float)  # (J, F), None -> NaN
    if not np.isfinite(scores).any() or not (C > 0).all():
        return None
    converged = np.array(folds.get("converged") or np.ones_like(scores), dtype=bool)
    words = in_words(result.metric)
    return Curve(
        figure=draw_curve(C, scores, converged, chosen=result.C or 0.0, metric=words, key=key),
        at_edge=len(C) > 1 and bool(np.isclose(result.C or 0.0, [C.min(), C.max()], atol=0).any()),
        fits=converged.size,
        loose=int((~converged).sum()),
    )


def _confusion(predictions: Predictions, key: str) -> Confusion:
    classes = list(predictions.classes)
    K = len(classes)
    counts = np.zeros((K, K), dtype=np.int64)
    np.add.at(counts, (predictions.labels, predictions.probabilities.argmax(1)), 1)
    wrong = counts * ~np.eye(K, dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    places = [divmod(int(place), K) for place in order]
    return Confusion(
        figure=draw_confusion(counts, classes, key=key),
        classes=classes,
        counts=counts,
        largest=[(classes[i], classes[j], int(wrong[i, j])) for i, j in places if wrong[i, j]],
        numbered=K <= NUMBERED,
    )


def _findings(predictions: Predictions) -> list[Finding]:
    findings = []
    columns = zip(predictions.labels.T, predictions.probabilities.T, strict=True)
    for name, (y, p) in zip(predictions.classes, columns, strict=True):
        known = ~np.isnan(y)
        positives, negatives = int((y == 1).sum()), int((y == 0).sum())
        auroc = float(roc_auc_score(y[known], p[known])) if positives and negatives else None
        findings.append(Finding(name, positives, negatives, int((~known).sum()), auroc))
    return sorted(findings, key=lambda f: math.inf if f.auroc is None else -f.auroc)


def _sentences(panels: Sequence[Panel]) -> list[Sentence]:
    """Return the first, which is the best, of each data set and metric; panels come sorted."""
    groups: dict[tuple[str, str], list[Panel]] = {}
    for panel in panels:
        groups.setdefault((panel.result.dataset, panel.result.metric), []).append(panel)
    return [
        Sentence(group[0], len(group), len({panel.result.split_digest for panel in group}))
        for group in groups.values()
    ]


def _spread(values: Iterable[Any]) -> bool:
    return len(set(values)) > 1


def _page(template: str, panels: Sequence[Panel], sentences: Sequence[Sentence]) -> str:
    results = [panel.result for panel in panels]
    lowest = min(0.0, *(result.ci_low for result in results), *(r.value for r in results))
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page.filters |= {"score": score, "power": power, "words": in_words, "md": in_markdown}
    page.globals |= {
        "interval": interval,
        "inline": lambda drawing: Markup(drawing.inline),
        "place": partial(np.interp, xp=[np.floor(lowest * 10) / 10, 1.0], fp=[2.0, 98.0]),
        "lowest": score(np.floor(lowest * 10) / 10),
    }
    return page.get_template(template).render(
        panels=panels,
        sentences=sentences,
        datasets=list(dict.fromkeys(result.dataset for result in results)),
        several_protocols=_spread(result.protocol for result in results),
        several_seeds=_spread(result.seed for result in results),
    )
