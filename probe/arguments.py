"""Options of probing, scoring and training, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import together
from features.console import FILE, echo

if TYPE_CHECKING:
    from probe import finetune, sweep

# Options that training.Training, and an appended DeiT, have under the same names.
LOOP = (
    *("epochs", "batch_size", "accumulate", "checkpointing", "lr", "weight_decay", "warmup"),
    *("schedule", "clip", "layer_decay", "patience", "balance", "mixed"),
)
DEIT = ("head_size", "head_weights")

POSITIVE = click.IntRange(min=1)
SHARE = click.FloatRange(0, 1, min_open=True)

scoring_options = together(  # what is scored, and how; of any head
    click.option(
        "--metric",
        help="What chooses and heads the report (docs/metrics.md); default the data set's own.",
    ),
    click.option(
        "--uncertain",
        type=click.Choice(["zeros", "ones", "ignore"]),
        default="zeros",
        show_default=True,
        help="What -1 counts as; with ignore, an empty cell is left out too.",
    ),
    click.option(
        "--bootstrap",
        type=click.IntRange(min=100),
        default=1000,
        show_default=True,
        help="Resamples of the subjects.",
    ),
    click.option(
        "--interval",
        type=click.Choice(["bayesian", "percentile", "bca"]),
        default="bayesian",
        show_default=True,
        help="Which bootstrap interval, of 95 %; the last two are too short of few subjects.",
    ),
    click.option(
        "--by", multiple=True, metavar="COLUMN", help="Also score every group, such as sex."
    ),
    click.option(
        "--aggregate",
        type=click.Choice(["mean", "max"]),
        help="Score a unit's images together; default each image.",
    ),
    click.option(
        "--unit", default="subject", show_default=True, help="What --aggregate joins: a column."
    ),
    click.option(
        "--threshold",
        type=click.Choice(["youden", "f1"]),
        default="youden",
        show_default=True,
        help="Rule for a threshold, chosen on what was held out of training.",
    ),
    click.option("--seeds", type=POSITIVE, help="Draws of each number of shots, or runs."),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="The first of --seeds.",
    ),
    click.option("--strict-splits", is_flag=True, help="Refuse splits that leak."),
)

probing_options = together(  # of heads that are solved
    click.option(
        "--feature",
        metavar="LAYER/POOL|all",
        help="Instead of the store's default feature; all: every vector that is in it.",
    ),
    click.option(
        "--C", "strengths", metavar="LIST", help="Strengths as in scikit-learn, such as 0.01,1,100."
    ),
    click.option("--k", "neighbours", metavar="LIST", help="knn: numbers of neighbours to try."),
    click.option(
        "--temperature", type=click.FloatRange(min=0, min_open=True), help="knn: of the votes."
    ),
    click.option("--folds", type=click.IntRange(min=2), help="Instead of the protocol's."),
    click.option(
        "--shots", metavar="LIST", help="Training images per class, such as 1,2,4,all; default all."
    ),
    click.option(
        "--control",
        type=click.Choice(["shuffle"]),
        help="Fit to shuffled labels as well: the score of no information.",
    ),
)

deit_options = together(  # of the appended DeiT
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
)

loop_options = together(  # of the training loop
    click.option("--epochs", type=POSITIVE, default=100, show_default=True),
    click.option("--batch-size", type=POSITIVE, default=64, show_default=True, help="Per process."),
    click.option(
        "--accumulate", type=POSITIVE, default=1, help="Pieces of a batch, to save memory."
    ),
    click.option(
        "--checkpointing", is_flag=True, help="Compute blocks twice, to save much more memory."
    ),
    click.option("--lr", type=float, default=1e-4, show_default=True),
    click.option("--weight-decay", type=float, default=1e-5, show_default=True),
    click.option(
        "--warmup", type=click.IntRange(min=0), help="Steps; default 1000, or 5 epochs if less."
    ),
    click.option(
        "--schedule",
        type=click.Choice(["constant", "cosine"]),
        default="constant",
        show_default=True,
    ),
    click.option("--clip", type=float, default=1.0, show_default=True, help="Norm of gradients."),
    click.option(
        "--layer-decay",
        type=SHARE,
        default=1.0,
        show_default=True,
        help="Of the rate of learning, per layer downwards.",
    ),
    click.option("--patience", type=POSITIVE, help="Stop after N epochs that were not better."),
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
        help="Precision of the passes in training.",
    ),
    click.option("--tensorboard", type=FILE, metavar="DIR", help="Also write scalars there."),
)


def scoring_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the scoring options but the seeds, by the names of evaluation.Scoring and settings."""
    names = ("metric", "uncertain", "bootstrap", "interval", "by", "aggregate", "unit", "threshold")
    if given["unit"] != "subject" and given["aggregate"] is None:
        raise click.UsageError(
            f"--unit {given['unit']} joins nothing: give --aggregate mean or max"
        )
    return {name: given[name] for name in (*names, "strict_splits")}


def probing_of(given: dict[str, Any], **more: Any) -> sweep.Settings:
    """Return what to probe, and how."""
    from features.devices import resolve_device
    from probe.sweep import Settings

    names = ("feature", "temperature", "folds", "control", "seeds", "seed")
    return Settings(
        C=parse_strengths(given["strengths"]),
        k=parse_counts(given["neighbours"], "--k"),
        shots=parse_shots(given["shots"]),
        device=resolve_device(given["device"]),
        **{name: given[name] for name in names},
        **scoring_of(given),
        **more,
    )


def training_of(given: dict[str, Any], seed: int, **more: Any) -> finetune.Settings:
    """Return what to train, and how, with one seed."""
    from features.devices import resolve_device
    from probe.finetune import Settings
    from probe.training import Training

    training = Training(
        **{name: given[name] for name in LOOP},
        augment=not given["no_augment"],
        tensorboard=str(given["tensorboard"]) if given["tensorboard"] else None,
        device=resolve_device(given["device"]),
        seed=seed,
    )
    rest = {name: given[name] for name in DEIT} | scoring_of(given)
    return Settings(**rest, **more, seed=seed, training=training)


def seeds_of(given: dict[str, Any]) -> range:
    """Return the seeds of runs."""
    return range(given["seed"], given["seed"] + (given["seeds"] or 1))


def refuse_seeds(settings: sweep.Settings) -> None:
    """Raise UsageError where --seeds asks for draws, and there is nothing to draw."""
    if settings.seeds is not None and settings.filled().shots == (None,):
        raise click.UsageError(
            "--seeds draws training images, and all are taken: give --shots, such as --shots 1,4, "
            "or leave --seeds out (--seed deals the folds)"
        )


def is_number(text: str) -> bool:
    """Say whether a word is a number, perhaps with a comma at its end."""
    try:
        float(text.strip(","))
    except ValueError:
        return False
    return True


def refuse_spaces(words: Sequence[Path], given: dict[str, Any]) -> None:
    """Raise UsageError where numbers stand for files: a list that was written with spaces."""
    loose = [str(word) for word in words if is_number(str(word)) and not word.exists()]
    if not loose:
        return
    lists = {"--C": "strengths", "--k": "neighbours", "--shots": "shots"}
    named = [(option, given[name]) for option, name in lists.items() if given.get(name)]
    option, first = named[0] if len(named) == 1 else ("--C", "0.1")
    whole = ",".join(word.strip(",") for word in (first, *loose))
    raise click.UsageError(
        f"{' '.join(loose)}: no such store. A list has commas and no spaces: write {option} {whole}"
    )


def say_added(out: Path) -> None:
    """Say on standard error that a folder holds results, which stay."""
    path = out / "results.jsonl"
    if not path.is_file():
        return
    with path.open("rb") as file:
        n = sum(1 for _ in file)
    echo(
        f"{out} holds {n} result{'s' * (n != 1)}: this adds to them, and replaces those of the "
        "same. Take -o for a folder of its own",
        err=True,
    )


def parse_strengths(text: str | None) -> tuple[float, ...] | None:
    """Return the values of --C."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < v < float("inf") for v in values):
        raise click.BadParameter(
            f"{text!r}: want positive numbers with commas between them", param_hint="--C"
        )
    return values


def parse_counts(text: str | None, option: str) -> tuple[int, ...] | None:
    """Return the values of --k: whole numbers from 1 on."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(
            f"{text!r}: want whole numbers from 1 on with commas between them", param_hint=option
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_shots(text: str | None) -> tuple[int | None, ...] | None:
    """Return the values of --shots, None for all."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    few = parse_counts(",".join(p for p in parts if p != "all") or None, "--shots") or ()
    return (*few, None) if "all" in parts else few
