"""The command that runs the whole grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from features.arguments import (
    engine_of,
    engine_options,
    extraction_of,
    image_options,
    options_of,
    say_random,
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
from features.parsing import parse_fit, parse_normalize, weights_of
from probe.commands.arguments import (
    deit_options,
    is_number,
    loop_options,
    probing_of,
    probing_options,
    refuse_seeds,
    results_option,
    say_added,
    scoring_options,
    seeds_of,
    training_of,
)
from probe.commands.finetune import say

if TYPE_CHECKING:
    from features.cluster import Cluster
    from probe.grid import Cell, Outcome

SCENARIOS = ["frozen-linear", "frozen-deit", "unfrozen-linear", "unfrozen-deit"]
# What the study's protocol sets, where nothing else is said. In the loop every epoch augments anew;
# heads on stored features get as many views instead.
STUDY = {"image_size": 224, "fit": "squash:256"}  # params.json: Resize (256, 256), CenterCrop 224
STUDY |= {"init": "random", "epochs": 100, "lr": 1e-4, "weight_decay": 1e-5}
STUDY |= {"schedule": "constant", "batch_size": 64, "clip": 1.0, "layer_decay": 1.0, "views": 4}


def read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the options of a TOML file as defaults: what the command line says counts more.

    A key is an option's long name. Of an option that may be repeated, and of one that takes a list
    with commas, the value may be a list. A dataset may be a table: `source`, and options that hold
    for it alone.
    """
    import tomllib

    if path is None:
        return
    if is_number(str(path)) and not path.is_file():
        raise click.UsageError(
            f"{path} is no TOML file: a list has commas and no spaces, such as --C 0.1,{path},10"
        )
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path} is no TOML file ({error})") from None
    datasets = found.get("dataset", [])
    datasets = datasets if isinstance(datasets, list) else [datasets]
    found["dataset"] = sources = []
    for dataset in datasets:
        own = dict(dataset) if isinstance(dataset, dict) else {"source": dataset}
        sources.append(str(own.pop("source", "")))
        ctx.meta.setdefault(f"{__name__}.{sources[-1]}", []).append(_options(ctx, path, own))
    ctx.default_map = _options(ctx, path, found)


def _options(ctx: click.Context, path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return values by the names of parameters."""
    import difflib

    known = {
        name.lstrip("-"): parameter
        for parameter in ctx.command.params
        for name in parameter.opts
        if name.startswith("--")
    }
    given = {}
    for key, value in found.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}" if close else f"want one of {', '.join(known)}"
            raise click.BadParameter(f"{path}: unknown key {key!r}: {hint}")
        option = known[key]
        if isinstance(value, dict):
            raise click.BadParameter(f"{path}: {key} is a table: want a value or a list")
        if getattr(option, "multiple", False):
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            value = ",".join(f'"{v}"' if "," in str(v) else str(v) for v in value)
        assert option.name
        given[option.name] = value
    return given


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
    help="The numbers of blocks to do without in unfrozen scenarios, one cell for each.",
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


def cells_of(given: dict[str, Any]) -> list[Cell]:
    """Return the cells of a command's arguments: by data set, then backbone, then scenario."""
    from features.datasets import open_dataset
    from features.devices import resolve_device
    from probe.grid import digest_of

    if given["protocol"] == "study":
        study = STUDY | ({"mixed": "fp16"} if resolve_device(given["device"]) == "cuda" else {})
        given = given | {k: v for k, v in study.items() if _is_default(k)}
    backbones, weights = weights_of(given["backbones"], given["weights"])
    say_random(weights)
    named: dict[str, Any] = {}
    cells = []
    for place, dataset in enumerate(given["datasets"]):
        before = given["datasets"][:place].count(dataset)
        mine = given | _of_dataset(dataset, before, given)
        read = (dataset, options_of(mine))
        manifest = open_dataset(*read)
        other = named.setdefault(manifest.dataset, read)
        if other != read:
            raise click.UsageError(
                f"{other[0]} and {dataset} are both called {manifest.dataset}: "
                "give one a `name` of its own, in a table of CONFIG"
            )
        rows = digest_of(manifest)
        for backbone in backbones:
            for scenario in given["scenarios"] or SCENARIOS:
                cells += [
                    kind(
                        manifest=manifest,
                        rows=rows,
                        backbone=backbone,
                        scenario=scenario,
                        extraction=extraction_of(mine),
                        features=given["stores"],
                        out=given["out"],
                        weights=weights[backbone],
                        image_size=given["image_size"],
                        fit=parse_fit(given["fit"]),
                        normalize=parse_normalize(mine["normalize"], manifest),
                        **heads,
                    )
                    for kind, heads in _heads(scenario, mine)
                ]
    return cells


def _of_dataset(dataset: str, before: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return what holds for one data set: by the file, or by the study's protocol.

    The file may have several tables with one source; `before` of them were asked for.
    The study's is the data set's own mean and std, and the study's split of it, where there are.
    """
    from features.datasets import SOURCES

    tables = click.get_current_context().meta.get(f"{__name__}.{dataset}", [])
    told: dict[str, Any] = tables[before] if before < len(tables) else {}
    source = SOURCES.get(dataset.partition(":")[0])
    if given["protocol"] != "study" or source is None:
        return told
    own = {"normalize": "dataset", "split": "study"} if "study" in source.splits else {}
    if not own:
        echo(
            f"{dataset} has no statistics or split of the study: the backbone's own normalisation "
            "and the data set's split are taken",
            err=True,
        )
    return {name: value for name, value in own.items() if _is_default(name)} | told


def _heads(scenario: str, given: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Return the kind of a scenario's cells and the settings of their heads.

    There are several in unfrozen scenarios: one for each depth that is asked.
    """
    from probe.grid import ProbeCell, TrainCell

    study = given["protocol"] == "study"
    if scenario == "frozen-linear" and not study:
        probing = probing_of(given, protocol=given["protocol"])
        if {*given["scenarios"]} == {"frozen-linear"}:  # other scenarios run once per seed
            refuse_seeds(probing)
        return [(ProbeCell, {"probing": probing})]
    kept = {"protocol": "study" if study else "finetune", "head": scenario.split("-")[1]}
    depths: list[dict[str, Any]] = [{"unfreeze": "none", "init": "random"}]
    if scenario.startswith("unfrozen"):
        depths = [
            {"unfreeze": unfreeze, "drop_last": drop, "init": given["init"]}
            for unfreeze in given["unfreeze"].split(",")
            for drop in _numbers(given["drop_last"])
        ]
    runs = [
        tuple(training_of(given, seed, **kept, **depth) for seed in seeds_of(given))
        for depth in depths
    ]
    return [(TrainCell, {"runs": one}) for one in runs]


def _numbers(text: str) -> list[int]:
    parts = str(text).split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(
            f"{text!r}: want whole numbers with commas between them", param_hint="--drop-last"
        )
    return [int(part) for part in parts]


def _is_default(name: str) -> bool:
    """Say whether neither the command line nor a file gave an option."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.DEFAULT


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
