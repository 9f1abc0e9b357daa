"""The commands of the study's analyses."""

from __future__ import annotations

from pathlib import Path

import click

from features.console import FILE, echo

out_option = click.option(
    "-o",
    "out",
    type=FILE,
    default="analysis",
    show_default=True,
    help="The folder that files are written to.",
)
results_argument = click.argument("results", nargs=-1, required=True, type=FILE)


@click.group()
def analyze() -> None:
    """Draw how layers score, how training converges, how alike layers are.

    Each writes figures (SVG, PNG) and their data (CSV). `medprobe report
    --analysis DIR` takes the CKA into its page.

    \b
    medprobe analyze convergence results
    """


@analyze.command()
@results_argument
@out_option
def layers(results: tuple[Path, ...], out: Path) -> None:
    """Draw the scores of RESULTS by depth, and by unfrozen and by dropped blocks.

    \b
    medprobe probe features/sample/efficientnet_lite0.h5 --feature all
    medprobe analyze layers results
    """
    from probe.analysis import layers as run

    _say(run(results, out))


@analyze.command()
@results_argument
@out_option
def convergence(results: tuple[Path, ...], out: Path) -> None:
    """Draw the validation scores of RESULTS by epoch, and say when they were near the best.

    \b
    medprobe analyze convergence results
    """
    from probe.analysis import convergence as run

    _say(run(results, out))


@analyze.command()
@click.argument("stores", nargs=-1, required=True, type=FILE)
@click.option(
    "--pool",
    help="The pool of the layers to compare, such as mean. The default is that of the "
    "default feature.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=4),
    default=256,
    show_default=True,
    help="The number of images per unbiased estimate.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The seed that draws the batches.",
)
@out_option
def cka(stores: tuple[Path, ...], pool: str | None, batch_size: int, seed: int, out: Path) -> None:
    """Draw linear CKA between STORES of the same images.

    Two stores of one backbone, such as pre-trained and fine-tuned: each layer
    against each. Otherwise the last layers of all.

    \b
    medprobe extract D -m B --layers all
    medprobe extract D -m B --layers all --weights RUN_DIR -o tuned
    medprobe analyze cka features/D/B.h5 tuned/D/B.h5
    """
    from probe.analysis import likeness

    _say(likeness(stores, out, batch_size=batch_size, seed=seed, pool=pool))


def _say(paths: list[Path]) -> None:
    """Print the files that were written."""
    for path in paths:
        echo(path)
