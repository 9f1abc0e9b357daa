"""The command that trains backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import options_of, parse_normalize, source_options
from features.console import (
    FILE,
    as_json,
    bar,
    device_option,
    images_per_second,
    json_option,
    provenance,
)

if TYPE_CHECKING:
    from probe.results import Result

POSITIVE = click.IntRange(min=1)


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the training loop."""
    for option in reversed(
        [
            click.option("--epochs", type=POSITIVE, default=100, show_default=True),
            click.option(
                "--batch-size", type=POSITIVE, default=64, show_default=True, help="Per process."
            ),
            click.option(
                "--accumulate", type=POSITIVE, default=1, help="Pieces of a batch, to save memory."
            ),
            click.option("--lr", type=float, default=1e-4, show_default=True),
            click.option("--weight-decay", type=float, default=1e-5, show_default=True),
            click.option(
                "--warmup", type=click.IntRange(min=0), help="Steps; default 1000, or 5 epochs."
            ),
            click.option(
                "--schedule",
                type=click.Choice(["constant", "cosine"]),
                default="constant",
                show_default=True,
            ),
            click.option("--clip", type=float, default=1.0, show_default=True),
            click.option(
                "--layer-decay",
                type=click.FloatRange(0, 1, min_open=True),
                default=1.0,
                show_default=True,
                help="Of the rate of learning, per layer downwards.",
            ),
            click.option(
                "--patience", type=POSITIVE, help="Stop after N epochs that were not better."
            ),
            click.option(
                "--balance",
                type=click.Choice(["none", "weights", "sampling"]),
                default="none",
                show_default=True,
                help="Of classes.",
            ),
            click.option("--no-augment", is_flag=True, help="Train on images as they are."),
            click.option(
                "--mixed",
                type=click.Choice(["no", "bf16", "fp16"]),
                default="no",
                show_default=True,
                help="Precision of the passes.",
            ),
            click.option(
                "--head-size",
                type=click.Choice(["deit-tiny", "deit-small", "deit-base"]),
                default="deit-base",
                show_default=True,
                help="Of --head deit.",
            ),
            click.option(
                "--head-weights",
                metavar="FILE|random",
                help="For --head deit; default ImageNet's, from the hub.",
            ),
            click.option("--metric", help="What chooses the epoch; default the data set's own."),
            click.option(
                "--uncertain",
                type=click.Choice(["zeros", "ones", "ignore"]),
                default="zeros",
                show_default=True,
                help="What -1 counts as; ignore leaves it out.",
            ),
            click.option("--seed", default=0, show_default=True, help="The first of --seeds."),
            click.option("--seeds", type=POSITIVE, default=1, help="Runs."),
            click.option("--strict-splits", is_flag=True, help="Refuse splits that leak."),
        ]
    ):
        command = option(command)
    return command


def settings_of(given: dict[str, Any], seed: int, **more: Any) -> Any:
    """Return finetune.Settings of a command's arguments."""
    from features.devices import resolve_device
    from probe.finetune import Settings
    from probe.training import Training

    loop = ["epochs", "batch_size", "accumulate", "lr", "weight_decay", "warmup", "schedule"]
    loop += ["clip", "layer_decay", "patience", "balance", "mixed"]
    training = Training(
        **{name: given[name] for name in loop},
        augment=not given["no_augment"],
        device=resolve_device(given["device"]),
        seed=seed,
    )
    rest = ["head_size", "head_weights", "metric", "uncertain", "strict_splits"]
    return Settings(**{name: given[name] for name in rest}, **more, seed=seed, training=training)


@click.command()
@click.argument("dataset")
@click.option("-m", "--backbone", "name", required=True, help="A backbone.")
@click.option("-o", "out", type=FILE, default="results", show_default=True)
@click.option(
    "--features",
    "stores",
    type=FILE,
    default="features",
    show_default=True,
    help="Where the store of frozen features is, or goes.",
)
@click.option("--weights", metavar="FILE|random", help="Weights other than the published ones.")
@click.option("--head", type=click.Choice(["linear", "deit"]), default="linear", show_default=True)
@click.option(
    "--unfreeze", default="all", show_default=True, metavar="all|none|last:K", help="Blocks."
)
@click.option("--drop-last", type=click.IntRange(min=0), default=0, help="Blocks to do without.")
@click.option(
    "--init",
    type=click.Choice(["probe", "random"]),
    default="probe",
    show_default=True,
    help="Of a linear head: the sweep's solution, or as in the study.",
)
@click.option("--image-size", type=int, metavar="N", help="Side in pixels; default the backbone's.")
@click.option("--normalize", default="model", show_default=True, metavar="model|dataset|MEAN/STD")
@training_options
@device_option
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
    from features.backbones import load_backbone
    from features.datasets import open_dataset
    from features.extract import extract
    from features.plan import Settings as Extraction
    from features.plan import store_path
    from probe.finetune import finetune as run
    from probe.training import processes
    from probe.tuned import feature_of

    manifest = open_dataset(dataset, options_of(given))
    found: list[Result] = []
    for seed in range(given["seed"], given["seed"] + given["seeds"]):
        backbone = load_backbone(name, given["weights"], given["image_size"])
        if statistics := parse_normalize(given["normalize"], manifest):
            backbone = backbone.normalised_by(*statistics)
        settings = settings_of(
            given,
            seed,
            **{k: given[k] for k in ("head", "unfreeze", "drop_last", "init")},
        )
        feature = feature_of(backbone, tokens=False, drop_last=given["drop_last"])
        extraction = Extraction(
            layers=feature.split("/")[0].replace("final", "last"),
            precision="float32",
            device=settings.training.device,
        )
        process = processes(settings.training.device)
        with process.main_process_first():
            if process.is_main_process and not found:  # the first seed's serves all
                with bar(f"{manifest.dataset} x {name}: frozen features", "images") as show:
                    extract(
                        manifest,
                        [backbone],
                        out=stores,
                        settings=extraction,
                        progress=images_per_second(show),
                    )
        store = store_path(stores, manifest.dataset, name)
        result = run(store, backbone, out=out, settings=settings, say=say, about=provenance())
        found.append(result)
        if not json_ and process.is_main_process:
            say_tuned(result)
    if json_ and process.is_main_process:
        as_json([asdict(result) for result in found])


def say(record: dict[str, Any]) -> None:
    """Print an epoch on standard error."""
    loss = "start" if record["train_loss"] is None else f"loss {record['train_loss']:.4f}"
    value = "not defined" if record["value"] is None else f"{record['value']:.4f}"
    click.echo(
        f"  epoch {record['epoch']}: {loss}, validation {value}, {record['seconds']:.1f} s",
        err=True,
    )


def say_tuned(result: Result) -> None:
    """Print a result in one line, and the audit's on standard error."""
    click.echo(
        f"{result.dataset} x {result.backbone}, {result.scenario}: "
        f"{result.metric} {result.value:.3f} [{result.ci_low:.3f}, {result.ci_high:.3f}] "
        f"on {result.n_test} test images, epoch {result.folds['epoch']}"
    )
    click.echo(f"  {result.audit['line']}", err=True)
