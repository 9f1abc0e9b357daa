"""Options that several commands have: what is read, what images become, which machines work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from features.console import echo, provenance
from features.parsing import parse_fold, parse_names, parse_window

if TYPE_CHECKING:
    from features.cluster import Cluster
    from features.datasets import Options
    from features.plan import ExtractionSettings

LONGEST = 30_000  # characters of a command that a store keeps; an attribute has 64 kB at most
Command: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]


def together(*options: Command) -> Command:
    """Return a decorator that adds options to a command in the order given."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


source_options = together(  # how a data set is read
    click.option(
        "--name",
        "dataset_name",
        metavar="NAME",
        help="The name of the data set, which its folders are called by. The default is that"
        " of its file or folder.",
    ),
    click.option(
        "--path-col",
        default="path",
        show_default=True,
        help="The column of a table (csv:FILE) with the images' paths.",
    ),
    click.option(
        "--label-col",
        default="label",
        show_default=True,
        help="The column of a table with the labels.",
    ),
    click.option(
        "--subject-col",
        default="subject",
        show_default=True,
        help="The column of a table with the patients, whose images stay together.",
    ),
    click.option(
        "--split-col",
        default="split",
        show_default=True,
        help="The column of a table with the splits: train, val or test.",
    ),
    click.option(
        "--label-sep",
        metavar="CHAR",
        help="The character between several labels in a table's cell, such as |; each image "
        "then has any number of findings.",
    ),
    click.option(
        "--keep-na",
        is_flag=True,
        help="Take NA, None and NaN in a table for labels or subjects, and not for missing values.",
    ),
    click.option(
        "--split-seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="The seed that draws a split where none is given, and the images of --limit.",
    ),
    click.option(
        "--split",
        type=click.Choice(["default", "drawn", "study", "official"]),
        default="default",
        show_default=True,
        help="Which split to use; default takes the given one, and draws one where there is none.",
    ),
    click.option(
        "--test-share",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=0.2,
        show_default=True,
        help="The share of the subjects that a drawn split tests on.",
    ),
    click.option(
        "--val-share",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        help="The share of the subjects that a drawn split validates on. Without it C is "
        "chosen on folds.",
    ),
    click.option("--test-fold", metavar="I/K", help="Draw K folds, and test on fold I."),
    click.option(
        "--merge",
        multiple=True,
        metavar="NEW=OLD+OLD",
        help="Make one class of several; may be repeated.",
    ),
    click.option(
        "--classes",
        metavar="LIST",
        help="All classes in their order, such as benign,malignant: of two the last is the "
        "positive one, and quadratic kappa takes them as grades from low to high. By default "
        "names are sorted.",
    ),
    click.option(
        "--subject-from-dicom",
        is_flag=True,
        help="Take the patient id in each DICOM header as the subject.",
    ),
)

image_options = together(  # what becomes of an image
    click.option(
        "--image-size",
        type=click.IntRange(1),
        metavar="N",
        help="The side of the images in pixels. The default is the backbone's.",
    ),
    click.option(
        "--fit",
        default="model",
        show_default=True,
        metavar="model|crop|squash|pad",
        help="How an oblong image becomes square: crop its centre, squash the whole, or pad it. "
        "squash:256 squashes to 256 pixels and takes the centre.",
    ),
    click.option(
        "--normalize",
        default="model",
        show_default=True,
        metavar="model|dataset|MEAN/STD",
        help="How pixels are scaled: MEAN and STD are one number each, or three with commas "
        "between them.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="The precision of the forward pass. Features are stored as float32.",
    ),
    click.option(
        "--exact-decode",
        "exact",
        is_flag=True,
        help="Decode large images in full, which is slower.",
    ),
    click.option(
        "--window",
        metavar="C/W",
        help="The centre and width of the greys of DICOM images, instead of those in the header.",
    ),
    click.option(
        "--frame",
        type=click.IntRange(min=1),
        help="The frame to take of a DICOM file that has several. The default is the middle one.",
    ),
)


engine_options = together(  # which machines work
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Compute on this machine, or on a Ray cluster.",
    ),
    click.option(
        "--address",
        metavar="auto|HOST:PORT",
        help="The address of the Ray cluster. By default one on this machine is found or started.",
    ),
    click.option(
        "--num-gpus-per-worker",
        type=click.FloatRange(min=0),
        metavar="X",
        help="The GPUs of each Ray worker. The default is 1 where the cluster has any.",
    ),
    click.option(
        "--num-cpus-per-worker",
        type=click.FloatRange(min=0, min_open=True),
        metavar="N",
        help="The CPUs of each Ray worker. The default is 1, or as many as there are per GPU.",
    ),
)


@contextmanager
def engine_of(given: dict[str, Any]) -> Iterator[Cluster | None]:
    """Take the engine's options out of a command's arguments; connect to the cluster, if any."""
    engine, address = given.pop("engine"), given.pop("address")
    gpus, cpus = given.pop("num_gpus_per_worker"), given.pop("num_cpus_per_worker")
    if engine == "local":
        if address or gpus is not None or cpus is not None:
            raise click.UsageError("--address and --num-...-per-worker go with --engine ray")
        yield None
        return
    try:
        from features.cluster import Cluster
    except ModuleNotFoundError as error:
        raise click.UsageError(
            f"--engine ray needs {error.name}: pip install 'medprobe[ray]'"
        ) from None
    with Cluster(address, gpus=gpus, cpus=cpus, device=given["device"]) as cluster:
        yield cluster


def options_of(given: dict[str, Any]) -> Options:
    """Return the source options among a command's arguments."""
    from features.datasets import Options

    names = (
        "path_col",
        "label_col",
        "subject_col",
        "split_col",
        "label_sep",
        "keep_na",
        "subject_from_dicom",
        "split",
        "test_share",
        "val_share",
        "merge",
    )
    command = provenance()["command"]
    return Options(
        **{name: given[name] for name in names},
        name=given["dataset_name"],
        seed=given["split_seed"],
        limit=given.get("limit"),
        test_fold=parse_fold(given["test_fold"]),
        classes=parse_names(given["classes"], "--classes"),
        command=command if len(command) <= LONGEST else "",
    )


def say_random(weights: Mapping[str, str | None]) -> None:
    """Say on standard error which backbones have random weights."""
    names = [name for name, given in weights.items() if given == "random"]
    if names:
        echo(f"random weights, not the published ones: {', '.join(names)}", err=True)


def extraction_of(given: dict[str, Any], **more: Any) -> ExtractionSettings:
    """Return what to extract, of those options that a command has."""
    from features.devices import resolve_device
    from features.plan import ExtractionSettings

    names = ["layers", "tokens", "views", "view_seed", "exact", "precision", "frame"]
    names += ["workers", "on_error", "overwrite"]
    pools = given.get("pools")
    return ExtractionSettings(
        **{name: given[name] for name in names if name in given},
        **more,
        pools=tuple(pools.split(",")) if pools else (),
        device=resolve_device(given["device"]),
        window=parse_window(given["window"]),
    )
