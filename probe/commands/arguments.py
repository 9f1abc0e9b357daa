"""Options of probing, scoring and training, and what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import together
from features.console import FILE, echo

if TYPE_CHECKING:
    pass


POSITIVE = click.IntRange(min=1)
SHARE = click.FloatRange(0, 1, min_open=True)

resampling_options = together(  # how intervals are made
    click.option(
        "--bootstrap",
        type=click.IntRange(min=100),
        default=1000,
        show_default=True,
        help="The number of resamples of the subjects.",
    ),
    click.option(
        "--interval",
        type=click.Choice(["bayesian", "percentile", "bca"]),
        default="bayesian",
        show_default=True,
        help="The kind of bootstrap interval, of 95 %. The last two are too short where "
        "subjects are few.",
    ),
)

grouping_options = together(  # what one score is of
    click.option(
        "--by",
        multiple=True,
        metavar="COLUMN",
        help="Score each group of a column too, such as sex; may be repeated.",
    ),
    click.option(
        "--aggregate",
        type=click.Choice(["mean", "max"]),
        help="Score the images of a unit together, by the mean or the largest of their "
        "probabilities.",
    ),
    click.option(
        "--unit",
        default="subject",
        show_default=True,
        help="The column whose images --aggregate joins. Images without a value are scored alone.",
    ),
)

scoring_options = together(  # what is scored, and how; of any head
    click.option(
        "--metric",
        help="The metric that chooses C and heads the report (docs/metrics.md). The default "
        "is the data set's own.",
    ),
    click.option(
        "--uncertain",
        type=click.Choice(["zeros", "ones", "ignore"]),
        default="zeros",
        show_default=True,
        help="What -1 counts as. With ignore, empty cells are left out too.",
    ),
    resampling_options,
    grouping_options,
    click.option(
        "--threshold",
        type=click.Choice(["youden", "f1"]),
        default="youden",
        show_default=True,
        help="The rule that chooses a threshold, on images that were held out of training.",
    ),
    click.option(
        "--seeds",
        type=POSITIVE,
        help="The number of draws of each number of --shots, or of training runs.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="The first seed: of folds, draws and training.",
    ),
    click.option("--strict-splits", is_flag=True, help="Refuse splits that leak."),
)

applying_options = together(  # of a saved head, to a store or to images
    click.option(
        "--weights",
        metavar="FILE",
        help="The backbone's weights, where the head was fitted on weights of a file.",
    ),
    click.option(
        "--features",
        "stores",
        type=FILE,
        default="features",
        show_default=True,
        help="The folder in which the store of a DATASET's features is made or completed.",
    ),
    click.option(
        "--name",
        "dataset_name",
        metavar="NAME",
        help="The name of a DATASET, which its store is called by.",
    ),
    click.option(
        "--path-col",
        default="path",
        show_default=True,
        help="The column of a table (csv:FILE) that holds the images' paths.",
    ),
)

results_option = click.option(
    "-o",
    "out",
    type=FILE,
    default="results",
    show_default=True,
    help="The folder that results are added to.",
)

outer_option = click.option(
    "--outer",
    metavar="N|subject",
    help="Test every image once, in N outer folds by subject (or leave out one subject at a "
    "time), with --folds inside each: nested cross-validation. Given splits don't count.",
)

probing_options = together(  # of heads that are solved
    outer_option,
    click.option(
        "--feature",
        metavar="LAYER/POOL|all",
        help="The feature to probe instead of the store's default one; all takes every "
        "vector in it.",
    ),
    click.option(
        "--C",
        "strengths",
        metavar="LIST",
        help="The strengths to try, as in scikit-learn, such as 0.01,1,100.",
    ),
    click.option(
        "--k",
        "neighbours",
        metavar="LIST",
        help="The numbers of neighbours to try, for --head knn.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0, min_open=True),
        help="The temperature of the neighbours' votes, for --head knn.",
    ),
    click.option(
        "--folds",
        type=click.IntRange(min=2),
        help="The number of folds, instead of the protocol's.",
    ),
    click.option(
        "--shots",
        metavar="LIST",
        help="The numbers of training images per class, such as 1,2,4,all. Not for several "
        "findings per image.",
    ),
    click.option(
        "--repeats", type=POSITIVE, help="The number of times that --outer deals its folds anew."
    ),
    click.option(
        "--calibrate",
        type=click.Choice(["temperature", "platt", "isotonic"]),
        help="Recalibrate probabilities, fitted to the images that folds held out.",
    ),
    click.option(
        "--conformal",
        type=click.FloatRange(0.5, 1, min_open=True, max_open=True),
        help="Make prediction sets that hold the label with this frequency, such as .9.",
    ),
    click.option(
        "--control",
        type=click.Choice(["shuffle"]),
        help="Fit to shuffled labels too, which shows the score without information.",
    ),
)

deit_options = together(  # of the appended DeiT
    click.option(
        "--head-size",
        type=click.Choice(["deit-tiny", "deit-small", "deit-base"]),
        default="deit-base",
        show_default=True,
        help="The size of the appended DeiT, for --head deit.",
    ),
    click.option(
        "--head-weights",
        metavar="FILE|random",
        help="The weights of the appended DeiT. The default is ImageNet's, from the hub.",
    ),
)

loop_options = together(  # of the training loop
    click.option(
        "--epochs", type=POSITIVE, default=100, show_default=True, help="The number of epochs."
    ),
    click.option(
        "--batch-size",
        type=POSITIVE,
        default=64,
        show_default=True,
        help="The number of images per batch of each process.",
    ),
    click.option(
        "--accumulate",
        type=POSITIVE,
        default=1,
        help="Compute a batch in this many pieces, to save memory.",
    ),
    click.option(
        "--checkpointing", is_flag=True, help="Compute blocks twice, which saves much more memory."
    ),
    click.option("--lr", type=float, default=1e-4, show_default=True, help="The learning rate."),
    click.option(
        "--weight-decay",
        type=float,
        default=1e-5,
        show_default=True,
        help="The weight decay, of all but biases and norms.",
    ),
    click.option(
        "--warmup",
        type=click.IntRange(min=0),
        help="The number of warm-up steps. The default is 1000, or 5 epochs if that is less.",
    ),
    click.option(
        "--schedule",
        type=click.Choice(["constant", "cosine"]),
        default="constant",
        show_default=True,
        help="How the learning rate goes on after the warm-up.",
    ),
    click.option(
        "--clip",
        type=float,
        default=1.0,
        show_default=True,
        help="The norm that gradients are clipped at.",
    ),
    click.option(
        "--layer-decay",
        type=SHARE,
        default=1.0,
        show_default=True,
        help="The factor of the learning rate per layer downwards.",
    ),
    click.option("--patience", type=POSITIVE, help="Stop after N epochs that were not better."),
    click.option(
        "--balance",
        type=click.Choice(["none", "weights", "sampling"]),
        default="none",
        show_default=True,
        help="How classes of different sizes are balanced: by weights in the loss, or by sampling.",
    ),
    click.option(
        "--no-augment", is_flag=True, help="Train on images as they are, without augmentation."
    ),
    click.option(
        "--mixed",
        type=click.Choice(["no", "bf16", "fp16"]),
        default="no",
        show_default=True,
        help="The precision of the passes in training.",
    ),
    click.option(
        "--tensorboard", type=FILE, metavar="DIR", help="Write scalars to this folder too."
    ),
)


external_options = together(  # how a head is tested on other data
    click.option(
        "--class",
        "names",
        multiple=True,
        metavar="THEIRS=HEAD'S",
        help="Which class of the data is which of the head's, where their names differ; may be"
        " repeated.",
    ),
    click.option(
        "--leave-shared-out",
        is_flag=True,
        help="Leave out images that share a subject or their bytes with the training images.",
    ),
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
    numbers = [str(word) for word in words if is_number(str(word)) and not word.exists()]
    if not numbers:
        return
    lists = {"--C": "strengths", "--k": "neighbours", "--shots": "shots"}
    named = [(option, given[name]) for option, name in lists.items() if given.get(name)]
    option, first = named[0] if len(named) == 1 else ("--C", "0.1")
    whole = ",".join(word.strip(",") for word in (first, *numbers))
    raise click.UsageError(
        f"{' '.join(numbers)}: no such store. A list has commas and no spaces: write {option} "
        f"{whole}"
    )


def say_added(out: Path) -> None:
    """Say on standard error that a folder holds results, which stay, or can't be read."""
    from features.errors import ProbeError
    from probe.results import load

    path = out / "results.jsonl"
    if not path.is_file():
        return
    try:
        n = len(load(out))
    except ProbeError as error:
        message = f"Warning: {error}"
    else:
        message = (
            f"{out} holds {n} result{'s. They stay' if n != 1 else '. It stays'}; only one of the "
            "same data, head and settings is replaced. -o takes another folder"
        )
    echo(message, err=True)
