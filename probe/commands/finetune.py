"""The command that trains backbones."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import extraction_of, image_options, options_of, source_options
from features.console import (
    FILE,
    as_json,
    bar,
    device_option,
    echo,
    images_per_second,
    json_option,
    provenance,
)
from features.parsing import parse_fit, parse_normalize
from probe.commands.arguments import (
    deit_options,
    loop_options,
    outer_option,
    results_option,
    say_added,
    scoring_options,
)
from probe.commands.settings import seeds_of, training_of

if TYPE_CHECKING:
    from probe.results import Result


@click.command()
@click.argument("dataset")
@click.option("-m", "--backbone", "name", required=True, help="The backbone to train.")
@results_option
@click.option(
    "--features",
    "stores",
    type=FILE,
    default="features",
    show_default=True,
    help="The folder of stores. The store of the frozen features is made or completed there.",
)
@click.option(
    "--weights",
    metavar="FILE|random",
    help="Start from these weights instead of the published ones.",
)
@click.option(
    "--head",
    type=click.Choice(["linear", "deit"]),
    default="linear",
    show_default=True,
    help="The head to train on the backbone.",
)
@click.option(
    "--unfreeze",
    default="all",
    show_default=True,
    metavar="all|none|last:K",
    help="The blocks that are trained.",
)
@click.option(
    "--drop-last",
    type=click.IntRange(min=0),
    default=0,
    help="The number of blocks at the end to leave out.",
)
@click.option(
    "--init",
    type=click.Choice(["probe", "random"]),
    default="probe",
    show_default=True,
    help="Where a linear head starts: at the sweep's solution, or at random as in the study.",
)
@outer_option
@deit_options
@loop_options
@scoring_options
@image_options
@device_option
@click.option(
    "--limit", type=click.IntRange(min=1), help="Take only N images, of every class and split."
)
@source_options
@json_option
def finetune(dataset: str, name: str, out: Path, stores: Path, json_: bool, **given: Any) -> None:
    """Train a backbone with a head on DATASET, and test the best epoch once.

    Frozen features are extracted first: a linear head starts at their probe. A
    run that was stopped goes on from its last epoch when the same command is
    given again. On several GPUs: torchrun --nproc-per-node 4 -m cli finetune ...

    \b
    medprobe finetune csv:labels.csv -m efficientnet_lite0 --epochs 10
    """
    from features.datasets import open_dataset
    from probe.cells import TrainCell
    from probe.grid import prepare
    from probe.train.training import processes

    manifest = open_dataset(dataset, options_of(given))
    kept = {name: given[name] for name in ("head", "unfreeze", "drop_last", "init")}
    cell = TrainCell(
        manifest=manifest,
        backbone=name,
        scenario=f"unfrozen-{given['head']}",
        runs=tuple(training_of(given, seed, **kept) for seed in seeds_of(given)),
        extraction=extraction_of(given),
        features=stores,
        out=out,
        weights=given["weights"],
        image_size=given["image_size"],
        fit=parse_fit(given["fit"]),
        normalize=parse_normalize(given["normalize"], manifest),
    )
    process = processes(cell.extraction.device)
    with process.main_process_first():
        if process.is_main_process:
            with bar(f"{manifest.dataset} x {name}: frozen features", "images") as show:
                for error in prepare([cell], images_per_second(show)).values():
                    raise error
    if process.is_main_process:
        say_added(out)
    found = cell.run(provenance(), None, say)
    if not process.is_main_process:
        return
    for result in found if not json_ else ():
        say_tuned(result, out)
        say_audit(result)
    if json_:
        as_json([asdict(result) for result in found])


def say(record: dict[str, Any]) -> None:
    """Print an epoch on standard error."""
    loss = "start" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}"
    value = "not defined" if record["value"] is None else f"{record['value']:.4f}"
    echo(
        f"  epoch {record['epoch']}: {loss}, validation {value}, {record['seconds']:.1f} s",
        err=True,
    )


def about_labels(result: Result) -> str:
    """Return what a result's line says of its labels where that is not plain.

    That is their column, if it isn't called label, and which of two classes is the positive one.
    """
    said = ""
    if result.label_from not in ("", "label", "label_*"):
        said += f"; labels: {result.label_from}"
    if result.positive:
        said += f"; positive: {result.positive}"
    return said


def say_notes(result: Result) -> None:
    """Print over what a score is the mean; on standard error, what is otherwise than one may think.

    The latter are notes of the result.
    """
    from probe.score.groups import averaged
    from probe.tested import TOLD

    if mean := averaged(result.task, result.metric, result.outputs):
        echo(f"  {result.metric} is the {mean}")
    for note in result.notes:
        if TOLD.match(note):
            echo(f"  {note}", err=True)


def say_audit(result: Result) -> None:
    """Print on standard error what the audit of the splits found, and where there is more."""
    found = result.audit
    echo(f"  {found['line']}", err=True)
    if found["leaks"] or found["conflicts"]:
        store = shlex.quote(result.store)
        echo(f"  which images, and what to do: medprobe audit {store}", err=True)


def tested_in(result: Result) -> str:
    """Say how the images were tested."""
    if not result.outer:
        return f"{result.n_test} test images"
    scores = [v for v in result.outer.get("scores", ()) if v is not None]
    spread = f", by fold {min(scores):.3f} to {max(scores):.3f}" if scores else ""
    return f"{result.n_test} images, each tested once ({result.outer['kind']}{spread})"


def say_tuned(result: Result, out: Path) -> None:
    """Print a result in one line and its head, on standard error what must be known of it."""
    epoch = f", epoch {result.folds['epoch']}" if "epoch" in result.folds else ""
    echo(
        f"{result.dataset} x {result.backbone}, {result.scenario}: "
        f"{result.metric} {result.value:.3f} [{result.ci_low:.3f}, {result.ci_high:.3f}] "
        f"on {tested_in(result)}{epoch}{about_labels(result)}"
    )
    if result.heads:
        echo(f"  head: {out / result.heads}")
    say_notes(result)
    if result.few:
        click.echo(f"  {result.few}", err=True)
    if result.weights == "random":
        echo("  the backbone's weights were random at the start", err=True)
