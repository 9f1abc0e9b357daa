"""Charts of scores against what was varied: C, depth, unfrozen and dropped blocks, shots, epochs.

What varies in a chart is along its axis; all else of a result tells its lines apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from probe.draw.charts import Axis, Chart, Lines, Series
from probe.draw.drawing import printable
from probe.draw.tables import in_words
from probe.identity import SEPARATOR, Identity, in_one, model_parts
from probe.report.gather import Entry, by_column, measure
from probe.report.overview import place, scores
from probe.results import Result

COLOURS = 8  # of a chart, as in report.js


def strengths(leads: Sequence[Entry]) -> Iterator[Chart]:
    """Yield the mean score of the folds against C for each column, a band from fold to fold."""
    hue = _hues(leads)
    for (dataset, metric), entries in by_column(leads).items():
        colours = _colours(entries, hue)
        series = [s for k, entry in zip(colours, entries, strict=True) for s in _strength(entry, k)]
        if not series:
            continue
        yield Lines(
            name=f"C-{dataset}-{metric}",
            title=f"Choice of C: {dataset}",
            alt=f"{in_words(metric)} on folds of {dataset} against C, for {len(entries)} models.",
            x=Axis("C (inverse strength of the penalty)", log=True),
            y=Axis(measure(entries[0].result)),
            series=series,
            focus=True,
            caption="On folds of the images that heads are trained on: mean, and from the lowest "
            "fold to the highest. A dot marks the C that was chosen.",
        )


def depth(entries: Sequence[Entry]) -> Iterator[Chart]:
    """Yield score by layer, for each column where a model was probed at several."""

    def layer(r: Result) -> str:
        return r.feature.split("/")[0]

    hue = _hues(entries)
    for (dataset, metric), group in by_column(entries).items():
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


def unfreezing(entries: Sequence[Entry]) -> Iterator[Chart]:
    """Yield score against how many of the last blocks were trained; 0 is the frozen backbone."""
    yield from _by_blocks(
        entries,
        name="unfreezing",
        title="Score by unfrozen blocks",
        axis="last blocks that were trained",
        place=_unfrozen,
    )


def dropping(entries: Sequence[Entry]) -> Iterator[Chart]:
    """Yield score against how many of the last blocks were dropped before training."""
    yield from _by_blocks(
        [c for c in entries if c.result.tuned.get("unfreeze") == "all"],
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
    entries: Sequence[Entry],
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
    for (dataset, metric), group in by_column(entries).items():
        whole = [c for c in group if c.result.shots is None and place(c.result) is not None]
        alike = [replace(c.identity, scenario="", feature="", protocol="") for c in whole]
        names_of = dict(zip((c.key for c in whole), _names(whole, alike), strict=True))
        lines: dict[str, dict[str, Entry]] = {}
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


def shots(entries: Sequence[Entry]) -> Iterator[Chart]:
    """Yield score against training images per class, for each column where they differ."""
    hue = _hues(entries)
    for (dataset, metric), group in by_column(entries).items():
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


def convergence(entries: Sequence[Entry]) -> Iterator[Chart]:
    """Yield the validation score and the training loss by epoch, for each column with histories."""
    hue = _hues(entries)
    for (dataset, metric), group in by_column([c for c in entries if c.result.history]).items():
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


def _hues(entries: Sequence[Entry]) -> dict[tuple[str, ...], int]:
    """Return a colour for each kind of model, the same in every chart of a report."""
    known = sorted({_hue(entry) for entry in entries}, key=lambda hue: (place(hue[2]), hue))
    return {hue: k for k, hue in enumerate(known)}


def _hue(entry: Entry) -> tuple[str, ...]:
    r = entry.result
    return r.backbone, r.weights, r.scenario, r.head, r.protocol, r.scored_by, entry.side


def _colours(entries: Sequence[Entry], hues: dict[tuple[str, ...], int]) -> list[int]:
    """Return the colours of a chart's entries; where two would be alike, their places."""
    found = [hues[_hue(entry)] for entry in entries]
    apart = len({k % COLOURS for k in found}) == len(found)
    return found if apart else list(range(len(entries)))


def _lines(
    entries: Sequence[Entry], along: Callable[[Result], Any], same: Sequence[Identity]
) -> dict[str, list[Entry]]:
    """Return the groups of entries, by name, that differ in `along`; others are left out.

    same: the entries' identities, made alike in what is along the axis.
    """
    lines: dict[str, list[Entry]] = {}
    for entry, name in zip(entries, _names(entries, same), strict=True):
        lines.setdefault(name, []).append(entry)
    return {name: line for name, line in lines.items() if len({along(c.result) for c in line}) > 1}


def _names(
    entries: Sequence[Entry], identities: Sequence[Identity], *, settings: bool = False
) -> list[str]:
    """Name entries by what tells their identities apart."""
    out = []
    for entry, mine in zip(entries, model_parts(identities, settings=settings), strict=True):
        name = in_one(mine) + (
            " (random weights)" if entry.random and "weights" not in mine else ""
        )
        out.append(printable(f"{entry.side}: {name}" if entry.side else name))
    return out


def _runs(entries: Sequence[Entry]) -> list[str]:
    """Name runs by their models, and by seed where there are several."""
    seeds = len({c.result.seed for c in entries}) > 1
    names = _names(entries, [c.identity for c in entries], settings=True)
    return [
        f"{name}{SEPARATOR}seed {c.result.seed}" if seeds else name
        for name, c in zip(names, entries, strict=True)
    ]


def _strength(entry: Entry, colour: int) -> list[Series]:
    """Return the folds' mean against C and the point that was chosen; nothing without scores."""
    C, scores, _ = folds(entry.result)
    defined = np.isfinite(scores)
    keep = defined.any(1) if len(C) else np.zeros(0, dtype=bool)
    if not keep.any():
        return []
    rows = [row[ok] for row, ok in zip(scores[keep], defined[keep], strict=True)]
    mean, low, high = ([float(f(row)) for row in rows] for f in (np.mean, np.min, np.max))
    line = Series(entry.model, C[keep].tolist(), mean, low, high, colour=colour)
    near = int(np.argmin(abs(np.log(C[keep]) - np.log(entry.result.C or np.inf))))
    if not np.isclose(C[keep][near], entry.result.C or 0.0, rtol=1e-3, atol=0):
        return [line]
    at = [float(C[keep][near])], [mean[near]]
    return [line, Series(entry.model, *at, colour=colour, look="dots", legend=False)]


def folds(result: Result) -> tuple[Any, Any, Any]:
    """Return C (J,), scores (J, F) and converged (J, F) by C; empty where none can be drawn."""
    C = np.array(result.folds.get("C") or [], dtype=float)
    scores = np.array(result.folds.get("scores") or [], dtype=float)  # None -> NaN
    if not np.isfinite(scores).any() or not (C > 0).all():
        return np.zeros(0), np.zeros((0, 0)), np.zeros((0, 0), dtype=bool)
    converged = np.array(result.folds.get("converged") or np.ones_like(scores), dtype=bool)
    order = np.argsort(C)
    return C[order], scores[order], converged[order]


def _depth(layer: str) -> tuple[int, str]:
    return (1, layer) if layer == "final" else (0, layer)
