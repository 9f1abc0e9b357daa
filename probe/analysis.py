"""The study's analyses: score by layers, convergence, likeness of layers. Charts and tables.

layers       score against depth, and against how many last blocks were trained or dropped
convergence  validation score by epoch, and the first epoch near the best
cka          pre-trained against fine-tuned layers, or the last layers of several backbones
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.layout import VIEWS
from features.store import FeatureStore
from probe import cka
from probe.draw.charts import Axis, Chart, Heat
from probe.draw.tables import Table
from probe.report import slug, trends
from probe.report.files import write_figures, write_tables
from probe.report.gather import Entry, gather, more_is_better
from probe.report.processes import several

NEAR = (0.95, 0.99)  # shares of the best score whose first epochs are told


def layers(sources: Sequence[Path], out: Path) -> list[Path]:
    """Draw scores against depth; return the files. ProbeError where nothing varies in depth."""
    entries = gather([("", sources)], private=False)
    made = chain(trends.depth(entries), trends.unfreezing(entries), trends.dropping(entries))
    charts = list(made)
    if not charts:
        raise ProbeError(
            f"{', '.join(map(str, sources))}: no model was scored at several depths; run "
            "`medprobe probe STORE --feature all` on a store of `medprobe extract --layers all`, "
            "or `medprobe run --unfreeze last:1,last:2,all`"
        )
    return _write(out, charts, [])


def convergence(sources: Sequence[Path], out: Path) -> list[Path]:
    """Draw validation scores by epoch, and tell how soon they are near the best."""
    entries = [c for c in gather([("", sources)], private=False) if c.result.history]
    if not entries:
        raise ProbeError(
            f"{', '.join(map(str, sources))}: no result was trained by epochs; "
            "run `medprobe finetune` or `medprobe run` first"
        )
    return _write(out, list(trends.convergence(entries)), [speed(entries)])


def speed(entries: Sequence[Entry]) -> Table:
    """Return the best epoch of each run, and the first whose score is near that of the best.

    Near is at least a share of the best score, for metrics that are better when larger; at most
    its inverse times the best for the others.
    """
    rows: list[list[Any]] = []
    for entry in entries:
        r = entry.result
        values = np.array([h["value"] for h in r.history], dtype=float)
        up = more_is_better(r.task, r.metric)
        if not np.isfinite(values).any():
            continue
        best = int(np.nanargmax(values) if up else np.nanargmin(values))
        first = [_first(values, values[best], share, up) for share in NEAR]
        rows.append([r.dataset, r.backbone, r.scenario, r.protocol, r.seed, r.metric])
        rows[-1] += [float(values[0]), float(values[best]), best, *first]
    names = ["dataset", "backbone", "scenario", "protocol", "seed", "metric", "at the start"]
    names += ["best", "epoch", *(f"epoch of {share:.0%}" for share in NEAR)]
    return Table(
        "convergence", "Validation score by epoch: how soon it is near its best", names, rows
    )


def _first(values: NDArray[np.float64], best: float, share: float, up: bool) -> int | None:
    """Return the first epoch whose score (E,) is near; None where best <= 0 has no share."""
    if best <= 0:
        return None
    near = values >= share * best if up else values <= best / share
    return int(np.flatnonzero(near)[0])


def likeness(
    paths: Sequence[Path], out: Path, *, batch_size: int, seed: int, pool: str | None = None
) -> list[Path]:
    """Draw linear CKA between stores; return the files.

    Two stores of one backbone with several layers: each of the first (down) against each of the
    second (across), such as pre-trained and fine-tuned. Otherwise the last layers of all, each
    against each. pool: of the layers; None is that of the default feature.
    """
    if len(paths) < 2:
        raise ProbeError("CKA compares: give two stores or more")
    with ExitStack() as stack:
        stores = [stack.enter_context(FeatureStore.open(path)) for path in paths]
        names = [store.fingerprint["backbone"]["name"] for store in stores]
        layers = [_layers(store, pool) for store in stores]
        if len(stores) == 2 and names[0] == names[1] and min(map(len, layers)) > 1:
            chart, table = _by_layers(stores, layers, batch_size, seed)
        else:
            chart, table = _by_backbones(stores, names, batch_size, seed)
    return _write(out, [chart], [table])


def _by_layers(
    stores: Sequence[FeatureStore], layers: Sequence[list[str]], batch_size: int, seed: int
) -> tuple[Heat, Table]:
    (rows, columns), name = layers, stores[0].fingerprint["backbone"]["name"]
    wanted = [(stores[0], f) for f in rows] + [(stores[1], f) for f in columns]
    found = cka.of_stores(wanted, batch_size=batch_size, seed=seed)[: len(rows), len(rows) :]
    down, across = (str(store.path.parent.parent) for store in stores)
    return _heat(
        f"{name}-layers",
        f"CKA of {name}'s layers",
        found,
        Axis(across, names=[f.split("/")[0] for f in columns]),
        Axis(down, names=[f.split("/")[0] for f in rows]),
    )


def _layers(store: FeatureStore, pool: str | None) -> list[str]:
    """Return a store's layers, one feature of each: block00, block01, ..., final."""
    known = [name for name in store.features if not name.endswith((VIEWS, "/tokens"))]
    inner = sorted(name for name in known if not name.startswith("final/"))
    pools = sorted({name.split("/")[1] for name in inner}, reverse=True)  # mean before cls
    default = store.default_feature
    of_default = default.split("/")[1]
    kind = pool or (of_default if of_default in pools else next(iter(pools), of_default))
    last = f"final/{pool}" if pool else default
    return [n for n in inner if n.endswith(f"/{kind}")] + [n for n in [last] if n in known]


def _by_backbones(
    stores: Sequence[FeatureStore], names: Sequence[str], batch_size: int, seed: int
) -> tuple[Heat, Table]:
    wanted = [(store, store.default_feature) for store in stores]
    found = cka.of_stores(wanted, batch_size=batch_size, seed=seed)
    if len(set(names)) < len(names):
        names = [f"{s.path.parent.parent}: {n}" for s, n in zip(stores, names, strict=True)]
    axis = Axis("", names=list(names))
    return _heat("last-layers", "CKA of last layers", found, axis, axis)


def _heat(
    name: str, title: str, values: NDArray[np.float64], across: Axis, down: Axis
) -> tuple[Heat, Table]:
    """Return a matrix (down, across) as a chart, and as the table that the report reads."""
    name = f"cka-{slug(name)}"
    numbers = [[None if np.isnan(v) else float(v) for v in row] for row in values]
    chart = Heat(
        name=name,
        title=title,
        alt=f"Linear CKA of {len(down.names)} by {len(across.names)} layers or backbones.",
        x=across,
        y=down,
        shares=[[None if v is None else min(max(v, 0.0), 1.0) for v in row] for row in numbers],
        texts=[["" if v is None else f"{v:.2f}" for v in row] for row in numbers],
        caption="Linear CKA: 1 where two layers hold the same but for rotation and scale.",
    )
    rows = [[at, *row] for at, row in zip(down.names, numbers, strict=True)]
    return chart, Table(name, title, ["", *across.names], rows)


def _write(out: Path, charts: Sequence[Chart], tables: Sequence[Table]) -> list[Path]:
    """Write figures with their data, then tables, which replace a chart's data of one name."""
    with several() as run:
        write_figures(out, charts, run)
    write_tables(out, tables)
    kinds = {chart.name: ("svg", "png", "csv") for chart in charts}
    kinds |= {t.name: (*kinds.get(t.name, ()), "csv", "md", "tex") for t in tables}
    return [
        out / f"{name}.{kind}" for name, found in kinds.items() for kind in dict.fromkeys(found)
    ]
