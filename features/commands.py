"""The commands that say what there is and make stores."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import (
    engine_of,
    engine_options,
    extraction_of,
    image_options,
    options_of,
    parse_batch_size,
    parse_normalize,
    source_options,
)
from features.console import (
    FOLDER,
    as_json,
    as_table,
    bar,
    device_option,
    duration,
    images_per_second,
    json_option,
    stopping,
    versions,
)

if TYPE_CHECKING:
    from features.backbones import Backbone
    from features.manifest import Manifest
    from features.plan import Settings


@click.command()
@json_option
def backbones(json_: bool) -> None:
    """List the backbones: parameters, input, source, licence, data.

    Any other model works as timm:NAME, openclip:NAME/TAG or hf:ORG/NAME.

    \b
    medprobe backbones
    """
    from features.backbones import BACKBONES

    rows = [asdict(spec) for spec in BACKBONES.values()]
    for row in rows:
        del row["loader"]
    if json_:
        return as_json(rows)
    names = (
        "name",
        "params",
        "input_size",
        "default_feature",
        "feature_dim",
        "pretraining_data",
        "licence",
        "source",
    )
    return as_table([names, *([row[n] for n in names] for row in rows)])


@click.command()
@json_option
def datasets(json_: bool) -> None:
    """List the kinds of data set and how each is written.

    \b
    medprobe datasets
    """
    from features.datasets import SOURCES

    rows = [{"name": s.name, "usage": s.usage, "what": s.what} for s in SOURCES.values()]
    if json_:
        return as_json(rows)
    return as_table([(row["usage"], row["what"]) for row in rows])


@click.command()
@json_option
def doctor(json_: bool) -> None:
    """Say what will happen on this machine: device, precision, versions, hub, disk.

    \b
    medprobe doctor
    """
    from features.doctor import examine

    found = examine() | {"versions": versions()}
    if json_:
        return as_json(found)
    rows = [(k, v) for k, v in found.items() if k != "versions"]
    return as_table(
        [*rows, ("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items()))]
    )


@click.command()
@click.argument("dataset")
@click.option(
    "-m", "--backbone", "names", multiple=True, required=True, help="A backbone; may be repeated."
)
@click.option(
    "-o", "out", type=FOLDER, default="features", show_default=True, help="Where stores go."
)
@click.option("--weights", metavar="FILE|random", help="Weights other than the published ones.")
@click.option(
    "--layers",
    default="last",
    show_default=True,
    metavar="last|all|LIST",
    help="Such as 3,7,final.",
)
@click.option("--pool", "pools", metavar="LIST", help="Of cls, mean, proj; default the backbone's.")
@click.option("--tokens", is_flag=True, help="Also the last layer's positions, as float16.")
@click.option(
    "--views",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Also so many augmented views of each image.",
)
@click.option("--view-seed", type=click.IntRange(min=0), default=0, help="Draws the views.")
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="Images per batch, and per commit.",
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Processes that decode; default as needed."
)
@device_option
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N images.")
@click.option(
    "--on-error",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    show_default=True,
    help="For bad images.",
)
@click.option(
    "--overwrite",
    type=click.Choice(["never", "stale", "always"]),
    default="never",
    show_default=True,
    help="What to do with a store made from something else.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, how large, how long.")
@image_options
@engine_options
@source_options
@json_option
def extract(dataset: str, names: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Compute features of DATASET and store them, one HDF5 file per backbone.

    A run that was stopped goes on where it was; a store that is complete is not computed again.
    DATASET is one of `medprobe datasets`.

    \b
    medprobe extract csv:labels.csv -m efficientnet_lite0
    """
    from features.backbones import load_backbone
    from features.datasets import open_dataset
    from features.dicom import applied
    from features.extract import extract as run
    from features.spread import fill_by

    manifest = open_dataset(dataset, options_of(given))
    if given["limit"]:
        manifest = manifest.head(given["limit"])
    if given["weights"] and given["weights"] != "random" and len(names) > 1:
        raise click.UsageError("--weights FILE goes with one backbone; give one -m")
    settings = extraction_of(given, batch_size=parse_batch_size(given["batch_size"]))
    loaded = [
        load_backbone(name, given["weights"], given["image_size"]) for name in dict.fromkeys(names)
    ]
    if statistics := parse_normalize(given["normalize"], manifest):
        loaded = [backbone.normalised_by(*statistics) for backbone in loaded]
    if given["dry_run"]:
        if given["engine"] != "local":
            raise click.UsageError("--dry-run measures this machine: leave --engine out")
        return say_estimate(manifest, loaded, given["out"], settings, json_=json_)
    with (
        engine_of(given) as cluster,
        bar(f"{manifest.dataset} x {', '.join(names)}", "images") as show,
        stopping() as stop,
    ):
        reports = run(
            manifest,
            loaded,
            out=given["out"],
            settings=cluster.settle(settings) if cluster else settings,
            progress=images_per_second(show),
            stop=stop,
            engine=partial(fill_by, cluster.pool) if cluster else None,
        )
    if json_:
        return as_json([asdict(r) for r in reports])
    for r in reports:
        done = f"{r.computed} images computed" if r.computed else "nothing to compute"
        click.echo(f"{r.store}: {done}, {r.reused} already there, {len(r.bad)} bad")
        if r.added:
            click.echo(f"  added {', '.join(r.added)}", err=True)
        for path, reason in list(r.bad.items())[:5]:
            click.echo(f"  bad: {path}: {reason}", err=True)
        if len(r.bad) > 5:
            click.echo(f"  and {len(r.bad) - 5} more: medprobe inspect {r.store}", err=True)
        for remark, count in r.remarks.items():
            click.echo(f"  {count} images: {remark}", err=True)
    if shown := applied(manifest.path.tolist(), settings.window, settings.frame):
        window = shown["window"] if isinstance(shown["window"], str) else given["window"]
        click.echo(f"  DICOM: window {window}; of several frames: {shown['frame']}", err=True)
    return None


def say_estimate(
    manifest: Manifest, backbones: list[Backbone], out: Path, settings: Settings, *, json_: bool
) -> None:
    """Print what --dry-run found."""
    from features.estimate import estimate

    found, decoding = estimate(manifest, backbones, out=out, settings=settings)
    if json_:
        return as_json({"stores": [asdict(e) for e in found], "decode_seconds": decoding})
    as_table(
        [
            ("store", "precision", "to do", "on disk", "passes"),
            *(
                (
                    e.store,
                    e.precision,
                    f"{e.to_do} of {e.images} images",
                    f"{e.bytes_needed / 1e6:,.1f} MB",
                    duration(e.seconds),
                )
                for e in found
            ),
        ]
    )
    alone, together = sum(e.seconds for e in found), "beside" if settings.device != "cpu" else "and"
    return click.echo(
        f"expected: {duration(alone)} of forward passes {together} {duration(decoding)} of decoding"
    )


COMMANDS = (backbones, datasets, doctor, extract)  # in order of use
