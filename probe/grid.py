"""The grid: backbones x data sets x scenarios, cell by cell, each done once.

Words: a cell is one backbone on one data set in one scenario, with its settings. Features come
first, one decoding for all backbones of a data set; then the cells, one after the other. What
became of each is a line of cells.jsonl, beside results.jsonl. A cell is done where a line with its
fingerprint says so and its results and predictions are there; a cell that fails is reported, and
the others go on.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from features.backbones import Backbone, Fit, load_backbone
from features.effects import with_effect
from features.errors import MedprobeError, ProbeError
from features.extract import Engine, extract
from features.extract import Progress as Images
from features.files import append_line, read_lines
from features.lock import writing
from features.manifest import Manifest, digest
from features.plan import Ask, run_locally, store_path
from features.plan import Settings as Extraction
from features.schema import check, parse
from features.urls import Location
from probe import sweep
from probe.results import PATIENCE, Result, load, unwritable
from probe.schema import Logged
from probe.solve.path import Progress
from probe.train import checkpoints, finetune
from probe.train.training import Say
from probe.train.tuned import feature_of

LOG = "cells.jsonl"

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std


@dataclass(frozen=True)
class Cell(ABC):
    """What is computed, all of it: a worker elsewhere needs nothing else. See its two kinds."""

    manifest: Manifest
    backbone: str
    scenario: str
    extraction: Extraction
    features: Path  # where stores are
    out: Path  # where results go
    weights: str | None = None
    image_size: int | None = None
    fit: Fit | None = None  # None is the backbone's own
    normalize: Statistics | None = None  # None is the backbone's own
    rows: str = ""  # digest_of(manifest), for the fingerprint

    @property
    def name(self) -> str:
        """Return what a person calls it."""
        return f"{self.manifest.dataset} x {self.backbone}, {self.scenario}"

    @property
    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """Return the settings of its heads."""

    @property
    def store(self) -> Path:
        """Return where its features are."""
        return store_path(self.features, self.manifest.dataset, self.backbone)

    def wanted(self, backbone: Backbone) -> set[str]:
        """Return the features that must be extracted for it beside those that are asked for."""
        return set()

    @abstractmethod
    def run(self, about: Mapping[str, Any], heads: Progress | None, epochs: Say) -> list[Result]:
        """Compute it, its features being there, and write its results."""

    def load(self) -> Backbone:
        """Return the backbone, anew each time: training changes it."""
        found = load_backbone(self.backbone, self.weights, self.image_size, self.fit)
        return found.normalised_by(*self.normalize) if self.normalize else found

    def fingerprint(self) -> str:
        """Return a digest of all that its numbers depend on."""
        return digest(
            {
                "rows": self.rows,
                "backbone": [self.backbone, self.weights, _stat(_weights_file(self.weights))],
                "image": [self.image_size, self.normalize, *((self.fit,) if self.fit else ())],
                "extraction": with_effect(replace(self.extraction, batch_size=None)),
                "scenario": self.scenario,
                "heads": [with_effect(settings) for settings in self.settings],
                "version": version("medprobe"),
            }
        )


@dataclass(frozen=True, kw_only=True)
class ProbeCell(Cell):
    """A cell whose heads the sweep solves."""

    probing: sweep.Settings

    @property
    def settings(self) -> tuple[sweep.Settings, ...]:
        """Return the settings of its heads."""
        return (self.probing,)

    def run(self, about: Mapping[str, Any], heads: Progress | None, epochs: Say) -> list[Result]:
        """Probe the store."""
        return sweep.probe_all(
            self.store,
            out=self.out,
            settings=self.probing,
            command=str(about.get("command", "")),
            versions=about.get("versions", {}),
            progress=heads,
        )


@dataclass(frozen=True, kw_only=True)
class TrainCell(Cell):
    """A cell whose heads, or whole models, are trained: with one of `runs` for each seed."""

    runs: tuple[finetune.Settings, ...]

    @property
    def name(self) -> str:
        """Return what a person calls it, with what is not as usual in its training."""
        return " ".join([super().name, *self.runs[0].name.split()[1:]])

    @property
    def settings(self) -> tuple[finetune.Settings, ...]:
        """Return the settings of its heads."""
        return self.runs

    def wanted(self, backbone: Backbone) -> set[str]:
        """Return the layers that linear heads read, which start from their probe."""
        return {
            feature_of(backbone, tokens=False, drop_last=one.drop_last)
            for one in self.runs
            if one.head == "linear" and one.init == "probe" and one.drop_last
        }

    def run(self, about: Mapping[str, Any], heads: Progress | None, epochs: Say) -> list[Result]:
        """Train with each seed, on the store where the backbone stays as it is."""
        found = []
        for settings in self.runs:
            how: dict[str, Any] = {
                "out": self.out, "settings": settings, "say": epochs, "about": about
            }  # fmt: skip
            if self.scenario.startswith("unfrozen"):
                found.append(finetune.finetune(self.store, self.load(), **how))
            else:
                found.append(finetune.train_on_store(self.store, **how))
        return found


def digest_of(manifest: Manifest) -> str:
    """Return a digest of a manifest's rows, labels, splits, and its files' sizes and times."""
    columns = {"subject": manifest.subject, "label": manifest.label, **manifest.columns}
    return digest(
        [
            *(manifest.dataset, manifest.digest(), manifest.split_digest(), manifest.metric),
            list(manifest.classes),
            {name: values.tolist() for name, values in columns.items()},
            [_stat(manifest.file(row)) for row in range(len(manifest))],
        ]
    )


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: "done", "skipped" (it was done before) or "failed", with a reason."""

    cell: Cell
    status: str
    results: tuple[Result, ...] = ()
    reason: str = ""
    seconds: float = 0.0


def run_grid(
    cells: Sequence[Cell],
    *,
    about: Mapping[str, Any] | None = None,
    images: Callable[[str], Images | None] = lambda _: None,
    heads: Progress | None = None,
    epochs: Say = lambda _: None,
) -> Iterator[Outcome]:
    """Yield what became of each cell as it goes: those done before first, then by data set.

    about: "command" and "versions" for the results. images(dataset), heads and epochs are told of
    progress.
    """
    done, todo = divide(cells)
    yield from (Outcome(cell, "skipped") for cell in done)
    for group in by_data_set(todo):
        failed = prepare(group, images(group[0].manifest.dataset))
        for cell in group:
            if cell.backbone in failed:
                outcome = Outcome(cell, "failed", (), said(failed[cell.backbone]))
            else:
                outcome = attempt(cell, about or {}, heads, epochs)
            log(outcome)
            yield outcome


def divide(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Return the cells that were done before, and those to do."""
    done = {out: done_in(out) for out in {cell.out for cell in cells}}
    groups: tuple[list[Cell], list[Cell]] = ([], [])
    for cell in cells:
        groups[cell.fingerprint() not in done[cell.out]].append(cell)
    return groups


def by_data_set(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Return the cells of each manifest."""
    groups: dict[int, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(id(cell.manifest), []).append(cell)
    return list(groups.values())


def attempt(
    cell: Cell,
    about: Mapping[str, Any],
    heads: Progress | None = None,
    epochs: Say = lambda _: None,
) -> Outcome:
    """Compute a cell whose features are there; whatever goes wrong is the reason it failed."""
    start = time.perf_counter()
    try:
        found = cell.run(about, heads, epochs)
    except Exception as error:
        return Outcome(cell, "failed", (), said(error), time.perf_counter() - start)
    return Outcome(cell, "done", tuple(found), seconds=time.perf_counter() - start)


def said(error: Exception) -> str:
    """Return an error in a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MedprobeError) else f"{type(error).__name__}: {text}"


def prepare(
    cells: Sequence[Cell],
    progress: Images | None = None,
    *,
    engine: Engine | None = None,
    ask: Ask = run_locally,
    settle: Callable[[Extraction], Extraction] = lambda settings: settings,
) -> dict[str, Exception]:
    """Extract what cells of one data set need; return the backbones for which that failed.

    Backbones of which the same is wanted are extracted together. Where that fails, each is
    extracted alone, to find the one at fault. engine and ask are as for extract; settle fits
    settings to them.
    """
    failed: dict[str, Exception] = {}
    wanted: dict[Extraction, list[Backbone]] = {}
    mine = {cell.backbone: [c for c in cells if c.backbone == cell.backbone] for cell in cells}
    for name, group in mine.items():
        try:
            backbone = group[0].load()
            wanted.setdefault(_extraction(backbone, group), []).append(backbone)
        except (MedprobeError, OSError, RuntimeError) as error:
            failed[name] = error
    for settings, backbones in wanted.items():
        where: dict[str, Any] = {"out": cells[0].features, "progress": progress}
        where |= {"engine": engine, "ask": ask}
        where["settings"] = settle(settings)
        try:
            extract(cells[0].manifest, backbones, **where)
        except (MedprobeError, OSError, RuntimeError) as error:
            if len(backbones) == 1:
                failed[backbones[0].spec.name] = error
                continue
            for one in backbones:
                try:
                    extract(cells[0].manifest, [one], **where)
                except (MedprobeError, OSError, RuntimeError) as own:
                    failed[one.spec.name] = own
    return failed


def _extraction(backbone: Backbone, cells: Sequence[Cell]) -> Extraction:
    """Return what is extracted for the cells of one backbone: what was asked, and what heads need.

    An appended DeiT on frozen features needs tokens; a linear head that starts from the probe
    needs the layer it reads.
    """
    settings = cells[0].extraction
    layers: set[str] = set().union(*(cell.wanted(backbone) for cell in cells))
    if layers and settings.layers != "all":
        asked = "final" if settings.layers == "last" else settings.layers
        named = [layer.split("/")[0] for layer in sorted(layers)]
        settings = replace(settings, layers=",".join(dict.fromkeys([*asked.split(","), *named])))
    tokens = any(cell.scenario == "frozen-deit" for cell in cells)
    return replace(settings, tokens=settings.tokens or tokens)


def log(outcome: Outcome) -> None:
    """Add a line to cells.jsonl."""
    cell = outcome.cell
    line = {
        "fingerprint": cell.fingerprint(),
        "dataset": cell.manifest.dataset,
        "backbone": cell.backbone,
        "scenario": cell.scenario,
        "status": outcome.status,
        "reason": outcome.reason,
        "results": [result.identity.digest for result in outcome.results],
        "seconds": round(outcome.seconds, 3),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        cell.out.mkdir(parents=True, exist_ok=True)
        with writing(cell.out / ".results", patience=PATIENCE):
            append_line(cell.out / LOG, json.dumps(line))
    except OSError as error:
        raise unwritable(cell.out, error) from None


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the lines of cells.jsonl; none where there is no such file.

    Half a line at the end, of a run that was stopped, is left out with a warning.
    """
    path = out / LOG
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            value = parse(line)
            check(value, Logged)
        except ValueError as error:
            raise ProbeError(
                f"{path}, line {number} is not a cell: {error}; remove that line"
            ) from None
        found.append(value)
    return found


def done_in(out: Path) -> set[str]:
    """Return the fingerprints of cells that were done, and whose results are there with files."""
    log = [line for line in read_log(out) if line.get("status") == "done"]
    if not log or not (out / "results.jsonl").is_file():
        return set()
    there = {r.identity.digest for r in load(out) if (out / r.predictions).is_file()}
    return {str(line["fingerprint"]) for line in log if set(line.get("results", [""])) <= there}


def seconds_left(todo: Sequence[Cell], done: Sequence[Outcome]) -> float | None:
    """Estimate what cells will take by the mean of their scenario's, else of all; None if unknown.

    Cells that failed count as much as they took.
    """
    took = [(o.cell.scenario, o.seconds) for o in done if o.status != "skipped"]
    if not took:
        return None
    every = [seconds for _, seconds in took]

    def mean(scenario: str) -> float:
        mine = [seconds for name, seconds in took if name == scenario] or every
        return sum(mine) / len(mine)

    return sum(mean(cell.scenario) for cell in todo)


def _stat(path: Location | None) -> list[int]:
    """Return size and time of a file; nothing where there is none."""
    try:
        found = path.stat() if path else None
    except OSError:
        found = None
    return [found.st_size, found.st_mtime_ns] if found else []


def _weights_file(weights: str | None) -> Path | None:
    if weights is None or weights == "random":
        return None
    path = Path(weights)
    return path / checkpoints.FOLDER / checkpoints.BEST if path.is_dir() else path
