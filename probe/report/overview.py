"""Charts across results: gain, scenarios, C, depth, shots, convergence, where their data exist.

What varies in a chart is along its axis; all else of a result tells its lines apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from probe.draw.charts import Axis, Bars, Chart, Dots, Lines, Series
from probe.draw.tables import in_words
from probe.report.gather import Cell, by_column, more_is_better
from probe.report.verdict import Column, Standing
from probe.results import Result

REFERENCES = ("deit", "resnet152", "efficientnet_lite0")  # the study's, and other supervised ones
SCENARIOS = ("frozen-linear", "frozen-deit", "frozen-knn", "unfrozen-linear", "unfrozen-deit")


def gain(found: Sequence[Column]) -> Iterator[Chart]:
    """Yield the study's figure: each model's gain on the reference, mean over data sets."""
    first = {column.dataset: column for column in reversed(found)}
    scored = [{s.cell.model: s for s in column.standings} for column in first.values()]
    common = [name for name in scored[0] if all(name in column for column in scored)]
    if len(common) < 2:
        return
    reference = _reference([scored[0][name] for name in common])
    if any(column[reference].value == 0 for column in scored):
        return
    gains = {
        name: float(np.mean([_gain(column[name], column[reference]) for column in scored]))
        for name in common
    }
    order = sorted(common, key=lambda name: -gains[name])
    cells = [scored[0][name].cell for name in order]
    several = len({cell.result.scenario for cell in cells}) > 1
    where = "the data set" if len(first) == 1 else f"{len(first)} data sets"
    best, worst = order[0], order[-1]
    said = f"from {best} ({gains[best]:+.1f} %) to {worst} ({gains[worst]:+.1f} %)"
    yield Bars(
        name="gain",
        title="Relative gain",
        alt=f"Relative gain of {len(order)} models against {reference}, {said}.",
        y=Axis("relative gain, %"),
        values=[gains[name] for name in order],
        classifiers=[c.result.scenario if several else c.result.head for c in cells],
        foundations=[
            f"{c.side}: {c.result.backbone}" if c.side else c.result.backbone for c in cells
        ],
        sizes=[None if c.random else _pretraining(c.result.backbone) for c in cells],
        doubtful=[cell.random for cell in cells],
        reference=order.index(reference),
        caption=f"Score relative to {reference}, mean over {where}. Under each bar its classifier "
        "and its foundation; below, how many images it was pre-trained on (none where its weights "
        "are random, and then the bar is hollow).",
    )


def scenarios(leads: Sequence[Cell]) -> Iterator[Chart]:
    """Yield frozen against unfrozen for each column with several scenarios."""
    for (dataset, metric), cells in by_column(leads).items():
        names = sorted({c.result.scenario for c in cells}, key=_place)
        rows = list(dict.fromkeys(_but(c, "scenario", "head", "protocol") for c in cells))
        if len(names) < 2:
            continue
        series = []
        for k, name in enumerate(names):
            mine = [c for c in cells if c.result.scenario == name]
            y = [rows.index(_but(c, "scenario", "head", "protocol")) for c in mine]
            series.append(scores(name.replace("-", ", "), mine, y=y, colour=k))
        yield Dots(
            name=f"scenarios-{dataset}-{metric}",
            title=f"Frozen and unfrozen: {dataset}",
            alt=f"{in_words(metric)} of {len(rows)} models in {len(names)} scenarios on {dataset}.",
            x=Axis(in_words(metric)),
            rows=rows,
            series=series,
            caption="Test scores with 95 % intervals.",
        )


def strengths(leads: Sequence[Cell]) -> Iterator[Chart]:
    """Yield the mean score of the folds against C for each column, a band from fold to fold."""
    for (dataset, metric), cells in by_column(leads).items():
        series = [s for k, cell in enumerate(cells) for s in _strength(cell, k)]
        if not series:
            continue
        yield Lines(
            name=f"C-{dataset}-{metric}",
            title=f"Choice of C: {dataset}",
            alt=f"{in_words(metric)} on folds of {dataset} against C, for {len(cells)} models.",
            x=Axis("C (inverse strength of the penalty)", log=True),
            y=Axis(in_words(metric)),
            series=series,
            focus=True,
            caption="On folds of the training images, not on the test split: mean, and from the "
            "lowest fold to the highest. A dot marks the C that was chosen.",
        )


def depth(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield score by layer, for each column where a model was probed at several."""

    def layer(r: Result) -> str:
        return r.feature.split("/")[0]

    for (dataset, metric), group in by_column(cells).items():
        full = [c for c in group if c.result.shots is None]
        lines = _lines(full, layer, "feature", pool=True)
        if not lines:
            continue
        layers = sorted({layer(c.result) for line in lines.values() for c in line}, key=_depth)
        series = []
        for k, (name, line) in enumerate(lines.items()):
            line.sort(key=lambda c: _depth(layer(c.result)))
            places = [layers.index(layer(c.result)) for c in line]
            series.append(scores(name, line, colour=k, x=places))
        yield Lines(
            name=f"depth-{dataset}-{metric}",
            title=f"Score by depth: {dataset}",
            alt=f"{in_words(metric)} on {dataset} at {len(layers)} layers, from {layers[0]} to "
            f"{layers[-1]}, of {len(series)} models.",
            x=Axis("layer", names=layers),
            y=Axis(in_words(metric)),
            series=series,
            focus=True,
            caption="Test scores of a head on each layer's features, with 95 % intervals.",
        )


def unfreezing(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield score against how many of the last blocks were trained; 0 is the frozen backbone."""
    yield from _by_blocks(
        cells,
        name="unfreezing",
        title="Score by unfrozen blocks",
        axis="last blocks that were trained",
        place=_unfrozen,
    )


def dropping(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield score against how many of the last blocks were dropped before training."""
    yield from _by_blocks(
        [c for c in cells if c.result.tuned.get("unfreeze") == "all"],
        name="dropping",
        title="Score by dropped blocks",
        axis="last blocks that were dropped",
        place=lambda r: str(r.tuned.get("drop_last", 0)),
    )


def _unfrozen(r: Result) -> str | None:
    """Return "all", a number of blocks, or None where it is no question."""
    if r.tuned.get("drop_last"):
        return None
    which = r.tuned.get("unfreeze", "none")
    return "0" if which == "none" else str(which).removeprefix("last:")


def _by_blocks(
    cells: Sequence[Cell],
    *,
    name: str,
    title: str,
    axis: str,
    place: Callable[[Result], str | None],
) -> Iterator[Chart]:
    """Yield a chart for each column where a model's results differ in a number of blocks.

    A model is a backbone with a kind of head; of several results at a place, the first seed's and
    the best feature's is drawn.
    """
    for (dataset, metric), group in by_column(cells).items():
        whole = [c for c in group if c.result.shots is None and place(c.result) is not None]
        lines: dict[str, dict[str, Cell]] = {}
        for c in sorted(whole, key=lambda c: c.result.seed):
            line = lines.setdefault(f"{_but(c, 'scenario')}, {c.result.head}", {})
            line.setdefault(str(place(c.result)), c)
        lines = {key: line for key, line in lines.items() if len(line) > 1}
        if not lines:
            continue
        names = sorted({at for line in lines.values() for at in line}, key=_count)
        series = []
        for k, (key, line) in enumerate(lines.items()):
            at = sorted(line, key=_count)
            places = [names.index(one) for one in at]
            series.append(scores(key, [line[one] for one in at], colour=k, x=places))
        yield Lines(
            name=f"{name}-{dataset}-{metric}",
            title=f"{title}: {dataset}",
            alt=f"{in_words(metric)} on {dataset} against {axis}, of {len(series)} models.",
            x=Axis(axis, names=names),
            y=Axis(in_words(metric)),
            series=series,
            focus=True,
            caption="Test scores with 95 % intervals.",
        )


def _count(text: str) -> float:
    """Return a number of blocks, "all" being the most."""
    return float("inf") if text == "all" else float(text)


def shots(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield score against training images per class, for each column where they differ."""
    for (dataset, metric), group in by_column(cells).items():
        few = [c for c in group if c.result.shots is not None]
        lines = _lines(few, lambda r: r.shots, "shots")
        if not lines:
            continue
        series: list[Series] = []
        for k, (name, line) in enumerate(lines.items()):
            numbers = sorted({c.result.shots or 0 for c in line})
            values = [[c.result.value for c in line if c.result.shots == n] for n in numbers]
            means, spread = [float(np.mean(v)) for v in values], [float(np.std(v)) for v in values]
            low, high = (
                [m + side * s for m, s in zip(means, spread, strict=True)] for side in (-1, 1)
            )
            series.append(Series(name, numbers, means, low, high, colour=k, look="both"))
        yield Lines(
            name=f"shots-{dataset}-{metric}",
            title=f"Score against shots: {dataset}",
            alt=f"{in_words(metric)} on {dataset} against training images per class, of "
            f"{len(series)} models.",
            x=Axis("training images per class", log=True),
            y=Axis(in_words(metric)),
            series=series,
            focus=True,
            caption="Mean over draws of the training images, and one standard deviation each way.",
        )


def convergence(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield the validation score and the training loss by epoch, for each column with histories."""
    for (dataset, metric), group in by_column([c for c in cells if c.result.history]).items():
        names = dict(zip((c.key for c in group), _names(group), strict=True))
        for key, what in (("value", in_words(metric)), ("train_loss", "training loss")):
            series = []
            for k, c in enumerate(group):
                epochs = [h["epoch"] for h in c.result.history]
                values = [h.get(key) for h in c.result.history]
                series.append(Series(names[c.key], epochs, values, colour=k))
            yield Lines(
                name=f"convergence-{key.replace('_', '-')}-{dataset}-{metric}",
                title=f"Convergence: {dataset}, {what}",
                alt=f"{what} by epoch on {dataset}, of {len(series)} runs.",
                x=Axis("epoch"),
                y=Axis(f"{what}, validation" if key == "value" else what),
                series=series,
                focus=True,
                caption="By epoch of fine-tuning.",
            )


def _lines(
    cells: Sequence[Cell], along: Callable[[Result], Any], *varying: str, pool: bool = False
) -> dict[str, list[Cell]]:
    """Return the groups of cells, by name, that differ in `along`; others are left out."""
    lines: dict[str, list[Cell]] = {}
    for cell in cells:
        name = _but(cell, *varying, "seed")
        if pool:
            name += f" {cell.result.feature.split('/')[-1]}"
        lines.setdefault(name, []).append(cell)
    return {name: line for name, line in lines.items() if len({along(c.result) for c in line}) > 1}


def _but(cell: Cell, *left_out: str) -> str:
    """Name a cell by its backbone and all that may matter but some parts of it."""
    r = cell.result
    parts = {
        "side": f"{cell.side}:" if cell.side else "",
        "backbone": r.backbone,
        "scenario": "" if r.scenario == "frozen-linear" else r.scenario,
        "weights": "(random weights)" if cell.random else "",
    }
    return " ".join(word for part, word in parts.items() if word and part not in left_out)


def _names(cells: Sequence[Cell]) -> list[str]:
    """Name runs by backbone and scenario, and by seed where there are several."""
    seeds = len({c.result.seed for c in cells}) > 1
    return [f"{_but(c)} seed {c.result.seed}" if seeds else _but(c) for c in cells]


def scores(
    name: str,
    cells: Sequence[Cell],
    *,
    colour: int,
    y: Sequence[int] | None = None,
    x: Sequence[int] = (),
) -> Series:
    """Return scores with intervals: at places x, or at rows y."""
    values = [c.result.value for c in cells]
    low, high = [c.result.ci_low for c in cells], [c.result.ci_high for c in cells]
    if y is not None:
        return Series(name, values, list(y), low, high, colour=colour, look="dots")
    return Series(name, list(x), values, low, high, colour=colour, look="both")


def _strength(cell: Cell, colour: int) -> list[Series]:
    """Return the folds' mean against C and the point that was chosen; nothing without scores."""
    C, scores, _ = folds(cell.result)
    defined = np.isfinite(scores)
    keep = defined.any(1) if len(C) else np.zeros(0, dtype=bool)
    if not keep.any():
        return []
    rows = [row[ok] for row, ok in zip(scores[keep], defined[keep], strict=True)]
    mean, low, high = ([float(f(row)) for row in rows] for f in (np.mean, np.min, np.max))
    line = Series(cell.model, C[keep].tolist(), mean, low, high, colour=colour)
    near = int(np.argmin(abs(np.log(C[keep]) - np.log(cell.result.C or np.inf))))
    if not np.isclose(C[keep][near], cell.result.C or 0.0, rtol=1e-3, atol=0):
        return [line]
    at = [float(C[keep][near])], [mean[near]]
    return [line, Series(cell.model, *at, colour=colour, look="dots", legend=False)]


def folds(result: Result) -> tuple[Any, Any, Any]:
    """Return C (J,), scores (J, F) and converged (J, F) by C; empty where none can be drawn."""
    C = np.array(result.folds.get("C") or [], dtype=float)
    scores = np.array(result.folds.get("scores") or [], dtype=float)  # None -> NaN
    if not np.isfinite(scores).any() or not (C > 0).all():
        return np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0), dtype=bool)
    converged = np.array(result.folds.get("converged") or np.ones_like(scores), dtype=bool)
    order = np.argsort(C)
    return C[order], scores[order], converged[order]


def _reference(standings: Sequence[Standing]) -> str:
    """Return the study's reference or the next best known, with trained weights; else the last.

    The study's is DeiT, unfrozen with a linear head, where there is one.
    """
    as_there = [s for s in standings if s.cell.result.scenario == "unfrozen-linear"]
    for backbone in REFERENCES:
        for s in [*as_there, *standings]:
            if s.cell.result.backbone == backbone and not s.cell.random:
                return s.cell.model
    return standings[-1].cell.model


def _gain(one: Standing, reference: Standing) -> float:
    """Return per cent of the reference, upwards where the model is better."""
    sign = 1 if more_is_better(one.cell.result.task, one.cell.result.metric) else -1
    return sign * 100 * (one.value - reference.value) / abs(reference.value)


def _pretraining(backbone: str) -> float | None:
    """Return how many images a backbone was pre-trained on."""
    from features.backbones import BACKBONES

    spec = BACKBONES.get(backbone)
    return spec.pretraining_images if spec else None


def _place(scenario: str) -> tuple[int, str]:
    known = scenario in SCENARIOS
    return (SCENARIOS.index(scenario) if known else len(SCENARIOS), scenario)


def _depth(layer: str) -> tuple[int, str]:
    return (1, layer) if layer == "final" else (0, layer)
