"""Charts across models: gain over a reference, frozen and unfrozen scenarios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from probe.draw.charts import Axis, Bars, Chart, Dots, Series
from probe.draw.drawing import printable
from probe.identity import SEPARATOR, in_scenario
from probe.report.gather import Entry, by_column, measure, more_is_better
from probe.report.verdict import Column, Standing

REFERENCES = ("deit", "resnet152", "efficientnet_lite0")  # the study's, and other supervised ones
SCENARIOS = ("frozen-linear", "frozen-deit", "frozen-knn", "unfrozen-linear", "unfrozen-deit")


def gain(found: Sequence[Column]) -> Iterator[Chart]:
    """Yield the study's figure: each model's gain on the reference, mean over data sets."""
    first = {column.dataset: column for column in reversed(found)}
    scored = [{s.entry.model: s for s in column.standings} for column in first.values()]
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
    entries = [scored[0][name].entry for name in order]
    several = len({entry.result.scenario for entry in entries}) > 1
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
        classifiers=[_classifier(c, several) for c in entries],
        foundations=[c.parts["backbone"] for c in entries],
        sizes=[None if c.random else _pretraining(c.result.backbone) for c in entries],
        doubtful=[entry.random for entry in entries],
        reference=order.index(reference),
        caption=f"Score relative to {reference}, mean over {where}. Under each bar its classifier "
        "and its foundation; below, how many images it was pre-trained on (none where its weights "
        f"are random, and then the bar is hollow).{turned}",
    )


def _classifier(entry: Entry, several: bool) -> str:
    """Return all of a model's name but its backbone; without any, its scenario or head."""
    first = in_scenario(entry.result.scenario) if several else f"{entry.result.head} head"
    rest = entry.without("backbone", "scenario", "weights")
    return SEPARATOR.join(word for word in (first, rest) if word)


def scenarios(leads: Sequence[Entry]) -> Iterator[Chart]:
    """Yield frozen against unfrozen for each column with several scenarios.

    A row is a model but for scenario, head and protocol, which are its series.
    """
    for (dataset, metric), entries in by_column(leads).items():
        if len({c.result.scenario for c in entries}) < 2:
            continue
        rows = list(dict.fromkeys(_row(c) for c in entries))
        mine: dict[tuple[str, str, str], list[Entry]] = {}
        for c in sorted(entries, key=lambda c: place(c.result.scenario)):
            r = c.result
            mine.setdefault((r.scenario, f"{r.head} head", f"protocol {r.protocol}"), []).append(c)
        series = []
        for k, (key, group) in enumerate(mine.items()):
            alike = [other for other in mine if other[0] == key[0]]
            more = [key[j] for j in (1, 2) if len({other[j] for other in alike}) > 1]
            y = [rows.index(_row(c)) for c in group]
            name = printable(SEPARATOR.join([in_scenario(key[0]), *more]))
            series.append(scores(name, group, y=y, colour=k))
        said = measure(entries[0].result)
        yield Dots(
            name=f"scenarios-{dataset}-{metric}",
            title=f"Frozen and unfrozen: {dataset}",
            alt=f"{said} of {len(rows)} models in {len(series)} scenarios on {dataset}.",
            x=Axis(said),
            rows=rows,
            series=series,
            caption="Test scores with 95 % intervals.",
        )


def _row(entry: Entry) -> str:
    name = entry.without("scenario", "head", "protocol")
    return f"{name} (random weights)" if entry.tagged else name


def scores(
    name: str,
    entries: Sequence[Entry],
    *,
    colour: int,
    y: Sequence[int] | None = None,
    x: Sequence[int] = (),
) -> Series:
    """Return scores with intervals: at places x, or at rows y."""
    values = [c.result.value for c in entries]
    low, high = [c.result.ci_low for c in entries], [c.result.ci_high for c in entries]
    if y is not None:
        return Series(name, values, list(y), low, high, colour=colour, look="dots")
    return Series(name, list(x), values, low, high, colour=colour, look="both")


def _reference(standings: Sequence[Standing]) -> str:
    """Return the study's reference or the next best known, with trained weights; else the last.

    The study's is DeiT, unfrozen with a linear head, where there is one.
    """
    as_there = [s for s in standings if s.entry.result.scenario == "unfrozen-linear"]
    for backbone in REFERENCES:
        for s in [*as_there, *standings]:
            if s.entry.result.backbone == backbone and not s.entry.random:
                return s.entry.model
    return standings[-1].entry.model


def _gain(one: Standing, reference: Standing) -> float:
    """Return per cent of the reference, upwards where the model is better."""
    sign = 1 if more_is_better(one.entry.result.task, one.entry.result.metric) else -1
    return sign * 100 * (one.value - reference.value) / abs(reference.value)


def _pretraining(backbone: str) -> float | None:
    """Return how many images a backbone was pre-trained on."""
    from features.backbones import BACKBONES

    spec = BACKBONES.get(backbone)
    return spec.pretraining_images if spec else None


def place(scenario: str) -> tuple[int, str]:
    """Return a scenario's place in charts: the study's own first, then others by name."""
    known = scenario in SCENARIOS
    return (SCENARIOS.index(scenario) if known else len(SCENARIOS), scenario)
