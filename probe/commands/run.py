"""The command that runs the whole grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import (
    engine_of,
    engine_options,
    image_options,
    source_options,
)
from features.console import (
    FILE,
    FaultFound,
    as_json,
    as_table,
    bar,
    device_option,
    duration,
    echo,
    images_per_second,
    json_option,
    provenance,
)
from probe.commands.arguments import (
    deit_options,
    loop_options,
    probing_options,
    results_option,
    say_added,
    scoring_options,
)
from probe.commands.cells import SCENARIOS, cells_of
from probe.commands.config import read_config
from probe.commands.finetune import say

if TYPE_CHECKING:
    from features.cluster import Cluster
    from probe.cells import Cell
    from probe.grid import Outcome


@click.command()
@click.argument(
    "config", required=False, type=FILE, is_eager=True, callback=read_config, expose_value=False
)
@click.option(
    "-m",
    "--backbone",
    "backbones",
    multiple=True,
    metavar="NAME[=FILE]",
    help="A backbone, and its weights file if they are not the published ones; may be repeated.",
)
@click.option("-d", "--dataset", "datasets", multiple=True, help="A data set; may be repeated.")
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    type=click.Choice(SCENARIOS),
    help="A scenario to run; may be repeated. The default is all four.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="[NAME=]FILE|random",
    help="Take these weights instead of the published ones; may be repeated.",
)
@results_option
@click.option(
    "--features",
    "stores",
    type=FILE,
    default="features",
    show_default=True,
    help="The folder of stores.",
)
@click.option(
    "--protocol",
    default="dinov2-logreg",
    show_default=True,
    help="The preset of probing (docs/protocols.md); study does everything as in the study.",
)
@click.option(
    "--layers",
    default="last",
    show_default=True,
    metavar="last|all|LIST",
    help="The layers to extract.",
)
@click.option(
    "--pool",
    "pools",
    metavar="LIST",
    help="How a layer's positions become one vector. The default is the backbone's.",
)
@click.option(
    "--views",
    type=click.IntRange(min=0),
    default=0,
    help="The number of augmented views to extract.",
)
@click.option(
    "--unfreeze",
    default="all",
    show_default=True,
    metavar="LIST",
    help="The blocks to train in unfrozen scenarios, one cell for each of a list of all,"
    " last:1, last:2, ...",
)
@click.option(
    "--drop-last",
    default="0",
    show_default=True,
    metavar="LIST",
    help="The numbers of blocks to leave out in unfrozen scenarios, one cell for each.",
)
@click.option(
    "--init",
    type=click.Choice(["probe", "random"]),
    default="probe",
    show_default=True,
    help="Where a linear head starts in unfrozen scenarios: at the sweep's solution, or at random.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Take only N images of each data set.")
@click.option("--dry-run", is_flag=True, help="Only list the cells, and which of them are done.")
@scoring_options
@probing_options
@deit_options
@loop_options
@image_options
@device_option
@engine_options
@source_options
@json_option
def run(out: Path, json_: bool, dry_run: bool, **given: Any) -> None:
    """Run every backbone on every data set in every scenario, skipping what is done.

    CONFIG is a TOML file with options by their long names. A cell that fails is
    reported and the others go on; run the same command again for the rest.

    \b
    medprobe run -m efficientnet_lite0 -d sample --scenario frozen-linear
    """
    for name in ("backbones", "datasets"):
        if not given[name]:
            raise click.UsageError(f"no {name}: give some by -{name[0].replace('b', 'm')}")
    if dry_run:
        return say_plan(cells_of(given | {"out": out}), json_)
    say_added(out)
    outcomes: list[Outcome] = []
    with engine_of(given) as cluster, bar("features", "images") as show:
        given["device"] = cluster.device if cluster else given["device"]
        cells = cells_of(given | {"out": out})
        for outcome in outcomes_of(cells, cluster, lambda _: images_per_second(show)):
            outcomes.append(outcome)
            if not json_:
                say_outcome(outcome, outcomes, cells)
    failed = [o for o in outcomes if o.status == "failed"]
    if json_:
        as_json([to_json(o) for o in outcomes])
    if failed:
        names = ", ".join(o.cell.name for o in failed[:3]) + (" ..." if len(failed) > 3 else "")
        raise FaultFound(
            f"{len(failed)} of {len(cells)} cells failed ({names}); "
            "correct what their lines say, and run the same command again for these"
        )
    return None


def say_plan(cells: Sequence[Cell], json_: bool) -> None:
    """Print which cells there are, which of them are done, and how many files are there.

    Exit 1 where a data set has none. With --json, what is said of files goes to standard error.
    """
    from features.presence import look, nothing_there
    from probe.grid import by_data_set, divide

    without = []
    for [first, *_] in by_data_set(cells):
        files = look(first.manifest)
        if files.missing == files.images:
            without.append(nothing_there(first.manifest.dataset, files))
        else:
            echo(f"{first.manifest.dataset}: {files.line()}", err=json_)
    done = {id(cell) for cell in divide(cells)[0]}
    rows = [(cell.name, "done" if id(cell) in done else "to do") for cell in cells]
    if json_:
        as_json([*map(list, rows)])
    else:
        as_table(rows)
    if without:
        raise FaultFound("; ".join(without))


def outcomes_of(
    cells: Sequence[Cell], cluster: Cluster | None, images: Callable[[str], Any]
) -> Iterator[Outcome]:
    """Run the grid, here or on a cluster."""
    if cluster is None:
        from probe.grid import run_grid

        yield from run_grid(cells, about=provenance(), images=images, epochs=say)
    else:
        from probe.grid_cluster import run_grid_on

        yield from run_grid_on(cluster, cells, about=provenance(), images=images)


def say_outcome(outcome: Outcome, outcomes: Sequence[Outcome], cells: Sequence[Cell]) -> None:
    """Print a line for a cell, and how long the rest may take."""
    from probe.grid import seconds_left

    n = len(outcomes)
    line = f"[{n}/{len(cells)}] {outcome.cell.name}: "
    if outcome.status == "skipped":
        return echo(f"{line}done before")
    if outcome.status == "failed":
        line += f"FAILED: {outcome.reason}"
    else:
        line += "; ".join(
            f"{r.metric} {r.value:.3f} [{r.ci_low:.3f}, {r.ci_high:.3f}]"
            for r in outcome.results[:3]
        )
        line += f" and {len(outcome.results) - 3} more" if len(outcome.results) > 3 else ""
    gone = {id(o.cell) for o in outcomes}
    left = seconds_left([cell for cell in cells if id(cell) not in gone], outcomes)
    rest = f"; about {duration(left)} left" if left and n < len(cells) else ""
    return echo(f"{line} ({duration(outcome.seconds)}{rest})")


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON values."""
    from dataclasses import asdict

    cell = outcome.cell
    return {
        "dataset": cell.manifest.dataset,
        "backbone": cell.backbone,
        "scenario": cell.scenario,
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": round(outcome.seconds, 3),
        "results": [asdict(result) for result in outcome.results],
    }
