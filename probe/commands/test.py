"""The command that tests a saved head on other data than its own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from features.console import FILE, as_json, device_option, json_option, provenance
from probe.commands.arguments import (
    applying_options,
    external_options,
    grouping_options,
    resampling_options,
    results_option,
    say_added,
)
from probe.commands.predict import extracting, is_store
from probe.commands.said import say_external
from probe.commands.settings import external_of


@click.command()
@click.argument("head", metavar="HEAD|RESULTS", type=FILE)
@click.argument("source", metavar="STORE|DATASET")
@results_option
@click.option(
    "--split",
    "part",
    type=click.Choice(["all", "test"]),
    default="all",
    show_default=True,
    help="Test all labelled images, or those of the data's test split.",
)
@external_options
@click.option(
    "--home",
    type=FILE,
    metavar="STORE",
    help="The store that the head was trained on, where it isn't where its result says: what"
    " is shared with it is counted.",
)
@click.option("--metric", help="The metric that heads the result. The default is the head's own.")
@click.option(
    "--uncertain",
    type=click.Choice(["zeros", "ones", "ignore"]),
    help="What -1 counts as. With ignore, empty cells are left out too. The default is what it"
    " counted as where the head was trained.",
)
@resampling_options
@grouping_options
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The bootstrap's seed."
)
@applying_options
@click.option(
    "--label-col",
    default="label",
    show_default=True,
    help="The column of a table with the labels.",
)
@click.option(
    "--subject-col",
    default="subject",
    show_default=True,
    help="The column of a table with the patients.",
)
@click.option(
    "--label-sep",
    metavar="CHAR",
    help="The character between several labels in a table's cell, such as |.",
)
@device_option
@json_option
def test(
    head: Path, source: str, out: Path, weights: str | None, json_: bool, **given: Any
) -> None:
    """Test a saved head on other data, such as another hospital's: frozen, on their labels.

    HEAD is a heads.json, the run.json of a training run, or the folder of either; RESULTS a
    results folder with one head, or with one that suits STORE. A STORE must come from the head's
    backbone. A DATASET, such as csv:FILE, needs labels; its features are computed first, as for
    the head. Classes are matched by name. All labelled images are tested, whatever split they are
    in.

    Said are the scores with intervals, sensitivity and specificity at the head's own threshold,
    calibration in the large, the drop from the head's own test, and what the data share with the
    training images (docs/external.md).

    \b
    medprobe test results csv:B.csv -o results
    """
    from features.datasets import Options, open_dataset
    from probe import external
    from probe.saved import find_head

    settings = external_of(given)
    place = Path(source)
    labels = None
    if place.is_file() and is_store(place):
        head, store = find_head(head, place), place
    else:
        head = find_head(head)
        names = ("path_col", "label_col", "subject_col", "label_sep")
        options = Options(
            name=given["dataset_name"], whole=True, **{name: given[name] for name in names}
        )
        labels = open_dataset(source, options)
        store = extracting(head, labels, given["stores"], weights, given["device"])
    say_added(out)
    found = external.test(head, store, out=out, settings=settings, labels=labels, **provenance())
    if json_:
        return as_json(asdict(found))
    return say_external(found)
