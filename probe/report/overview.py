"""Charts across results: gain, scenarios, C, depth, shots, convergence, where their data exist.

What varies in a chart is along its axis; all else of a result tells its lines apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from probe.draw.charts import Axis, Bars, Chart, Dots, Lines, Series
from probe.draw.drawing import printable
from probe.draw.tables import in_words
from probe.identity import SEPARATOR, Identity, in_one, in_scenario, model_parts
from probe.report.gather import Cell, by_column, measure, more_is_better
from probe.report.verdict import Column, Standing
from probe.results import Result

COLOURS = 8  # of a chart, as in report.js
REFERENCES = ("deit", "resnet152", "efficientnet_lite0")  # the study's, and other supervised ones
SCENARIOS = (
    *("frozen-zero-shot", "frozen-linear", "frozen-deit", "frozen-knn"),
    *("unfrozen-linear", "unfrozen-deit"),
)


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
    less = [column.dataset for column in first.values() if column.direction]
    turned = f" Upwards is better, on {', '.join(less)} too, where less is." if less else ""
    best, worst = order[0], order[-1]
    said = f"from {best} ({gains[best]:+.1f} %) to {worst} ({gains[worst]:+.1f} %)"
    yield Bars(
        name="gain",
        title="Relative gain",
        alt=f"Relative gain of {len(order)} models against {reference}, {said}.",
        y=Axis("relative gain, %"),
        values=[gains[name] for name in order],
        classifiers=[_classifier(c, several) for c in cells],
        foundations=[c.parts["backbone"] for c in cells],
        sizes=[None if c.random else _pretraining(c.result.backbone) for c in cells],
        doubtful=[cell.random for cell in cells],
        reference=order.index(reference),
        caption=f"Score relative to {reference}, mean over {where}. Under each bar its classifier "
        "and its foundation; below, how many images it was pre-trained on (none where its weights "
        f"are random, and then the bar is hollow).{turned}",
    )


def _classifier(cell: Cell, several: bool) -> str:
    """Return all of a model's name but its backbone; without any, its scenario or head."""
    first = in_scenario(cell.result.scenario) if several else f"{cell.result.head} head"
    rest = cell.without("backbone", "scenario", "weights")
    return SEPARATOR.join(word for word in (first, rest) if word)


def scenarios(leads: Sequence[Cell]) -> Iterator[Chart]:
    """Yield frozen against unfrozen for each column with several scenarios.

    A row is a model but for scenario, head and protocol, which are its series.
    """
    for (dataset, metric), cells in by_column(leads).items():
        if len({c.result.scenario for c in cells}) < 2:
            continue
        rows = list(dict.fromkeys(_row(c) for c in cells))
        mine: dict[tuple[str, str, str], list[Cell]] = {}
        for c in sorted(cells, key=lambda c: _place(c.result.scenario)):
            r = c.result
            mine.setdefault((r.scenario, f"{r.head} head", f"protocol {r.protocol}"), []).append(c)
        series = []
        for k, (key, group) in enumerate(mine.items()):
            alike = [other for other in mine if other[0] == key[0]]
            more = [key[j] for j in (1, 2) if len({other[j] for other in alike}) > 1]
            y = [rows.index(_row(c)) for c in group]
            name = printable(SEPARATOR.join([in_scenario(key[0]), *more]))
            series.append(scores(name, group, y=y, colour=k))
        said = measure(cells[0].result)
        yield Dots(
            name=f"scenarios-{dataset}-{metric}",
            title=f"Frozen and unfrozen: {dataset}",
            alt=f"{said} of {len(rows)} models in {len(series)} scenarios on {dataset}.",
            x=Axis(said),
            rows=rows,
            series=series,
            caption="Test scores with 95 % intervals.",
        )


def _row(cell: Cell) -> str:
    name = cell.without("scenario", "head", "protocol")
    return f"{name} (random weights)" if cell.tagged else name


def strengths(leads: Sequence[Cell]) -> Iterator[Chart]:
    """Yield the mean score of the folds against C for each column, a band from fold to fold."""
    hue = _hues(leads)
    for (dataset, metric), cells in by_column(leads).items():
        colours = _colours(cells, hue)
        series = [s for k, cell in zip(colours, cells, strict=True) for s in _strength(cell, k)]
        if not series:
            continue
        yield Lines(
            name=f"C-{dataset}-{metric}",
            title=f"Choice of C: {dataset}",
            alt=f"{in_words(metric)} on folds of {dataset} against C, for {len(cells)} models.",
            x=Axis("C (inverse strength of the penalty)", log=True),
            y=Axis(measure(cells[0].result)),
            series=series,
            focus=True,
            caption="On folds of the training images, not on the test split: mean, and from the "
            "lowest fold to the highest. A dot marks the C that was chosen.",
        )


def depth(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield score by layer, for each column where a model was probed at several."""

    def layer(r: Result) -> str:
        return r.feature.split("/")[0]

    hue = _hues(cells)
    for (dataset, metric), group in by_column(cells).items():
        full = [c for c in group if c.result.shots is None]
        pools = [c.result.feature.split("/")[-1] for c in full]
        same = [replace(c.identity, feature=pool) for c, pool in zip(full, pools, strict=True)]
        lines = _lines(full, layer, same)
        if not lines:
            continue
        layers = sorted({layer(c.result) for line in lines.values() for c in line}, key=_depth)
        series = []
        colours = _colours([line[0] for line in lines.values()], hue)
        for (name, line), k in zip(lines.items(), colours, strict=True):
            line.sort(key=lambda c: _depth(layer(c.result)))
            places = [layers.index(layer(c.result)) for c in line]
            series.append(scores(name, line, colour=k, x=places))
        yield Lines(
            name=f"depth-{dataset}-{metric}",
            title=f"Score by depth: {dataset}",
            alt=f"{in_words(metric)} on {dataset} at {len(layers)} layers, from {layers[0]} to "
            f"{layers[-1]}, of {len(series)} models.",
            x=Axis("layer", names=layers),
            y=Axis(measure(group[0].result)),
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
        alike = [replace(c.identity, scenario="", feature="", protocol="") for c in whole]
        names_of = dict(zip((c.key for c in whole), _names(whole, alike), strict=True))
        lines: dict[str, dict[str, Cell]] = {}
        for c in sorted(whole, key=lambda c: c.result.seed):
            line = lines.setdefault(names_of[c.key], {})
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
            y=Axis(measure(group[0].result)),
            series=series,
            focus=True,
            caption="Test scores with 95 % intervals.",
        )


def _count(text: str) -> float:
    """Return a number of blocks, "all" being the most."""
    return float("inf") if text == "all" else float(text)


def shots(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield score against training images per class, for each column where they differ."""
    hue = _hues(cells)
    for (dataset, metric), group in by_column(cells).items():
        same = [replace(c.identity, shots=None) for c in group]
        lines = _lines(group, lambda r: r.shots, same)
        if not lines:
            continue
        series: list[Series] = []
        colours = _colours([line[0] for line in lines.values()], hue)
        whole = any(c.result.shots is None for line in lines.values() for c in line)
        for (name, line), k in zip(lines.items(), colours, strict=True):
            at = [_per_class(c.result) for c in line]
            numbers = sorted(set(at))
            values = [
                [c.result.value for c, n in zip(line, at, strict=True) if n == number]
                for number in numbers
            ]
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
            y=Axis(measure(group[0].result)),
            series=series,
            focus=True,
            caption="Mean over draws of the training images, and one standard deviation each way."
            + (
                ""
                if not whole
                else " The last point is of all training images, at their mean number per class."
            ),
        )


def _per_class(r: Result) -> float:
    """Return how many training images there were per class, on average where all were used."""
    return float(r.shots) if r.shots is not None else round(r.n_train / len(r.classes), 1)


def convergence(cells: Sequence[Cell]) -> Iterator[Chart]:
    """Yield the validation score and the training loss by epoch, for each column with histories."""
    hue = _hues(cells)
    for (dataset, metric), group in by_column([c for c in cells if c.result.history]).items():
        colours = _colours(group, hue)
        names = dict(zip((c.key for c in group), _runs(group), strict=True))
        for key, what in (("value", in_words(metric)), ("train_loss", "training loss")):
            series = []
            for k, c in zip(colours, group, strict=True):
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


def _hues(cells: Sequence[Cell]) -> dict[tuple[str, ...], int]:
    """Return a colour for each kind of model, the same in every chart of a report."""
    known = sorted({_hue(cell) for cell in cells}, key=lambda hue: (_place(hue[2]), hue))
    return {hue: k for k, hue in enumerate(known)}


def _hue(cell: Cell) -> tuple[str, ...]:
    r = cell.result
    return r.backbone, r.weights, r.scenario, r.head, r.protocol, r.scored_by, cell.side


def _colours(cells: Sequence[Cell], hues: dict[tuple[str, ...], int]) -> list[int]:
    """Return the colours of a chart's cells; where two would be alike, their places."""
    found = [hues[_hue(cell)] for cell in cells]
    apart = len({k % COLOURS for k in found}) == len(found)
    return found if apart else list(range(len(cells)))


def _lines(
    cells: Sequence[Cell], along: Callable[[Result], Any], same: Sequence[Identity]
) -> dict[str, list[Cell]]:
    """Return the groups of cells, by name, that differ in `along`; others are left out.

    same: the cells' identities, made alike in what is along the axis.
    """
    lines: dict[str, list[Cell]] = {}
    for cell, name in zip(cells, _names(cells, same), strict=True):
        lines.setdefault(name, []).append(cell)
    return {name: line for name, line in lines.items() if len({along(c.result) for c in line}) > 1}


def _names(
    cells: Sequence[Cell], identities: Sequence[Identity], *, settings: bool = False
) -> list[str]:
    """Name cells by what tells their identities apart."""
    out = []
    for cell, mine in zip(cells, model_parts(identities, settings=settings), strict=True):
        name = in_one(mine) + (" (random weights)" if cell.random and "weights" not in mine else "")
        out.append(printable(f"{cell.side}: {name}" if cell.side else name))
    return out


def _runs(cells: Sequence[Cell]) -> list[str]:
    """Name runs by their models, and by seed where there are several."""
    seeds = len({c.result.seed for c in cells}) > 1
    names = _names(cells, [c.identity for c in cells], settings=True)
    return [
        f"{name}{SEPARATOR}seed {c.result.seed}" if seeds else name
        for name, c in zip(names, cells, strict=True)
    ]


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
