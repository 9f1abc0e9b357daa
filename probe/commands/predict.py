"""The command that applies a saved head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.console import FILE, FaultFound, bar, device_option, echo, images_per_second
from features.files import write_whole
from probe.commands.arguments import applying_options

if TYPE_CHECKING:
    from features.extract import ExtractionReport
    from features.manifest import Manifest
    from probe.predict import Predicted

HDF5 = b"\x89HDF\r\n\x1a\n"  # how such a file begins


@click.command()
@click.argument("head", metavar="HEAD|RESULTS", type=FILE)
@click.argument("source", metavar="STORE|DATASET|IMAGE")
@click.option("-o", "out", type=FILE, help="The CSV file to write; default standard output.")
@applying_options
@click.option(
    "--threshold",
    "at_threshold",
    is_flag=True,
    help="Add what the report's thresholds call: the column call of two classes, call:FINDING of"
    " findings.",
)
@device_option
def predict(
    head: Path, source: str, out: Path | None, weights: str | None, stores: Path, **given: Any
) -> None:
    """Apply a saved head to every image and write class probabilities as CSV.

    HEAD is a heads.json, the run.json of a training run, or the folder of either. RESULTS is a
    results folder with one head, or with one that was fitted on the backbone of STORE.
    A STORE must come from the backbone, with the weights, that the head was fitted on. A DATASET,
    such as folder:DIR or csv:FILE, needs no labels; its features are computed first, as for the
    head, and stay in a store. An IMAGE is one file, of which no store is kept.

    The column predicted is the class of the largest p. The report's threshold, chosen on
    validation images, is another rule: --threshold. Images that are unlike the training images, by
    the features that the head reads, are counted and named on standard error.

    An image that can't be read, or whose features in the store are damaged, has a row too, with
    the reason in place of an answer; of the second kind the exit code is 1.

    \b
    medprobe predict results features/sample/efficientnet_lite0.h5 -o predictions.csv
    """
    from tempfile import TemporaryDirectory

    from features.datasets import Options, open_dataset, open_image
    from features.datasets.from_folder import is_image
    from probe.predict import predict as run
    from probe.saved import find_head

    place = Path(source)
    how = {"at_threshold": given["at_threshold"]}
    if place.is_file() and is_store(place):
        return write(run(find_head(head, place), place, **how), out)
    head = find_head(head)
    if place.is_file() and is_image(place):
        with TemporaryDirectory() as folder:
            about = (head, open_image(place), Path(folder), weights, given["device"])
            found = predicted(*about, **how)
        return write(found, out)
    options = Options(name=given["dataset_name"], path_col=given["path_col"], labelled=False)
    manifest = open_dataset(source, options)
    how["tell"] = say_store
    return write(predicted(head, manifest, stores, weights, given["device"], **how), out)


def is_store(path: Path) -> bool:
    """Say whether a file is meant as a store: by its suffix, or by its first bytes."""
    if path.suffix == ".h5":
        return True
    with path.open("rb") as file:
        return file.read(len(HDF5)) == HDF5


def predicted(
    head: Path, manifest: Manifest, stores: Path, weights: str | None, device: str, **how: Any
) -> Predicted:
    """Extract a manifest and apply a head, with a progress bar."""
    from features.devices import resolve_device
    from probe.predict import predict_images

    with bar(f"{manifest.dataset}: features", "images") as show:
        return predict_images(
            head,
            manifest,
            features=stores,
            weights=weights,
            device=resolve_device(device),
            progress=images_per_second(show),
            **how,
        )


def extracting(
    head: Path, manifest: Manifest, stores: Path, weights: str | None, device: str
) -> Path:
    """Extract a manifest as a head's images were, with a progress bar; return the store."""
    from features.devices import resolve_device
    from probe.predict import extract_for
    from probe.saved import read

    with bar(f"{manifest.dataset}: features", "images") as show:
        return extract_for(
            *(head, read(head), manifest),
            features=stores,
            weights=weights,
            device=resolve_device(device),
            progress=images_per_second(show),
            tell=say_store,
        )


def say_store(report: ExtractionReport) -> None:
    """Say on standard error where features were stored, which are applied to again."""
    echo(
        f"{report.store}: {report.computed} images computed, {report.reused} already there, "
        f"{len(report.bad)} bad",
        err=True,
    )


def write(found: Predicted, out: Path | None) -> None:
    """Write a table, and say how many images are without an answer.

    Raises FaultFound where the store is damaged, or where no image has one.
    """
    for line in (found.rule, found.remark()):
        if line:
            echo(line, err=True)
    if out is None:
        click.echo(found.table.encode("utf-8", "surrogateescape"), nl=False)
    else:
        write_whole(out, found.table.encode("utf-8", "surrogateescape"))
        echo(f"{out}: {found.images} images", err=True)
    if found.damaged or len(found.without) == found.images:
        raise FaultFound(found.line())
    if found.without:
        echo(f"Warning: {found.line()}", err=True)
