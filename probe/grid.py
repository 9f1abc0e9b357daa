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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from features.backbones import Backbone
from features.errors import MedprobeError, ProbeError
from features.extract import ExtractionEngine, ImageProgress, extract
from features.files import append_line, read_lines
from features.lock import writing
from features.plan import Ask, ExtractionSettings, run_locally
from features.schema import check, parse
from probe.cells import Cell
from probe.results import PATIENCE, Result, load, unwritable
from probe.schema import Logged
from probe.solve.path import HeadProgress
from probe.train.training import Say

LOG = "cells.jsonl"


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
    images: Callable[[str], ImageProgress | None] = lambda _: None,
    heads: HeadProgress | None = None,
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
                outcome = Outcome(cell, "failed", (), one_line(failed[cell.backbone]))
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
    heads: HeadProgress | None = None,
    epochs: Say = lambda _: None,
) -> Outcome:
    """Compute a cell whose features are there; whatever goes wrong is the reason it failed."""
    start = time.perf_counter()
    try:
        found = cell.run(about, heads, epochs)
    except Exception as error:
        return Outcome(cell, "failed", (), one_line(error), time.perf_counter() - start)
    return Outcome(cell, "done", tuple(found), seconds=time.perf_counter() - start)


def one_line(error: Exception) -> str:
    """Return an error in a line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MedprobeError) else f"{type(error).__name__}: {text}"


def prepare(
    cells: Sequence[Cell],
    progress: ImageProgress | None = None,
    *,
    engine: ExtractionEngine | None = None,
    ask: Ask = run_locally,
    settle: Callable[[ExtractionSettings], ExtractionSettings] = lambda settings: settings,
) -> dict[str, Exception]:
    """Extract what cells of one data set need; return the backbones for which that failed.

    Backbones of which the same is wanted are extracted together. Where that fails, each is
    extracted alone, to find the one at fault. engine and ask are as for extract; settle fits
    settings to them.
    """
    failed: dict[str, Exception] = {}
    wanted: dict[ExtractionSettings, list[Backbone]] = {}
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


def _extraction(backbone: Backbone, cells: Sequence[Cell]) -> ExtractionSettings:
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
