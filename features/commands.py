"""The commands that say what there is and make stores."""

from __future__ import annotations

from collections.abc import Sequence
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
    say_random,
    source_options,
)
from features.console import (
    FOLDER,
    FaultFound,
    as_json,
    as_table,
    bar,
    device_option,
    duration,
    echo,
    images_per_second,
    json_option,
    stopping,
    versions,
)
from features.parsing import parse_batch_size, parse_fit, parse_normalize, weights_of

if TYPE_CHECKING:
    from features.backbones import Backbone, Known
    from features.estimate import Estimate
    from features.extract import ExtractionReport
    from features.manifest import Manifest
    from features.plan import ExtractionSettings


@click.command()
@click.option(
    "--modality",
    type=click.Choice(["general", "xray", "fundus", "derm", "histology", "ct"]),
    help="List only those that were trained on such images.",
)
@json_option
def backbones(modality: str | None, json_: bool) -> None:
    """List the backbones: the study's with parameters and input, then others by name.

    Any other model works as timm:NAME, openclip:NAME/TAG or hf:ORG/NAME (docs/backbones.md).

    \b
    medprobe backbones --modality xray
    """
    from features.backbones import BACKBONES, KNOWN

    known = [k for k in KNOWN.values() if not modality or modality in k.modality]
    study = [asdict(spec) for spec in BACKBONES.values() if modality in (None, "general")]
    if json_:
        return as_json(in_full(study, known))
    if study:
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
        as_table([names, *([row[n] for n in names] for row in study)])
    if known:
        if study:
            echo()
        head = ("name", "modality", "access", "licence", "source")
        lines = ((k.name, " ".join(k.modality), k.access, k.licence, k.page) for k in known)
        as_table([head, *lines])
    return None


def in_full(study: Sequence[dict[str, Any]], known: Sequence[Known]) -> list[dict[str, Any]]:
    """Return both tables as rows of the same fields; null is what only loading a model tells."""
    from features.backbones import Spec

    fields = [name for name in Spec.__dataclass_fields__ if name != "loader"]
    more = {"modality": ["general"], "route": None, "gated": False, "note": "", "described_in": ""}
    rows = [{**row, **more} for row in study]
    rows += [
        asdict(k)
        | {"source": k.page, "described_in": k.source, "default_feature": k.feature or None}
        for k in known
    ]
    return [{name: row.get(name) for name in (*fields, *more)} for row in rows]


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

    report = examine() | {"versions": versions()}
    if json_:
        return as_json(report)
    rows = [(k, v) for k, v in report.items() if k != "versions"]
    return as_table(
        [*rows, ("versions", ", ".join(f"{k} {v}" for k, v in report["versions"].items()))]
    )


@click.command()
@click.argument("dataset")
@click.option(
    "-m",
    "--backbone",
    "names",
    multiple=True,
    required=True,
    metavar="NAME[=FILE]",
    help="The backbone to use, and its weights file if they are not the published ones; "
    "may be repeated.",
)
@click.option(
    "-o",
    "out",
    type=FOLDER,
    default="features",
    show_default=True,
    help="The folder that stores are written to.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="[NAME=]FILE|random",
    help="Take these weights instead of the published ones; may be repeated.",
)
@click.option(
    "--layers",
    default="last",
    show_default=True,
    metavar="last|all|LIST",
    help="The layers whose features are stored, such as 3,7,final.",
)
@click.option(
    "--pool",
    "pools",
    metavar="LIST",
    help="How a layer becomes one vector: a list of pooled (the embedding that the model's library "
    "returns), cls, mean, cls+mean (side by side) and proj. The default is the backbone's.",
)
@click.option("--tokens", is_flag=True, help="Store the last layer's positions too, as float16.")
@click.option(
    "--views",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Store features of this many augmented views of each image too.",
)
@click.option(
    "--view-seed", type=click.IntRange(min=0), default=0, help="The seed that draws the views."
)
@click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="The number of images per batch, and per commit; auto measures what is fast.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="The number of processes that decode; by default as many as are needed.",
)
@device_option
@click.option(
    "--limit", type=click.IntRange(min=1), help="Take only N images, of every class and split."
)
@click.option(
    "--on-error",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    show_default=True,
    help="What to do at a bad image: skip and record it, or fail.",
)
@click.option(
    "--overwrite",
    type=click.Choice(["never", "stale", "always"]),
    default="never",
    show_default=True,
    help="What to do with a store that was made from something else.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only print what would be done, how large it will be and how long it will take.",
)
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
    from features.distributed import fill_by
    from features.extract import extract as run
    from features.plan import run_locally

    backbones, weights = weights_of(names, given["weights"])
    manifest = open_dataset(dataset, options_of(given))
    settings = extraction_of(given, batch_size=parse_batch_size(given["batch_size"]))
    fit = parse_fit(given["fit"])
    loaded = [load_backbone(name, weights[name], given["image_size"], fit) for name in backbones]
    say_random(weights)
    if statistics := parse_normalize(given["normalize"], manifest):
        loaded = [backbone.normalised_by(*statistics) for backbone in loaded]
    if given["dry_run"]:
        if given["engine"] != "local":
            raise click.UsageError("--dry-run measures this machine: leave --engine out")
        return say_estimate(manifest, loaded, given["out"], settings, json_=json_)
    with (
        engine_of(given) as cluster,
        bar(f"{manifest.dataset} x {', '.join(backbones)}", "images") as show,
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
            ask=cluster.ask if cluster else run_locally,
        )
    if json_:
        as_json([asdict(r) for r in reports])
        return refuse_empty(reports)
    for report in reports:
        say_report(report)
    if order := order_line(manifest):
        echo(f"  {order}", err=True)
    if shown := applied(manifest.path.tolist(), settings.window, settings.frame):
        window = shown["window"] if isinstance(shown["window"], str) else given["window"]
        echo(f"  DICOM: window {window}; of several frames: {shown['frame']}", err=True)
    return refuse_empty(reports)


def order_line(manifest: Manifest) -> str:
    """Say which of two classes is the positive one, or the order that was given; else nothing."""
    classes = manifest.classes
    if manifest.task != "multiclass" or len(classes) < 2:
        return ""
    given = " as given by --classes" if manifest.order_from == "given" else ""
    if len(classes) > 2:
        return f"order of classes{given}: {' < '.join(classes)}" if given else ""
    turn = "" if given else f"; --classes {as_names(classes[::-1])} turns them round"
    return f"positive class: {classes[1]}, the second of {', '.join(classes)}{given}{turn}"


def as_names(names: Sequence[str]) -> str:
    """Return names as --classes takes them, for a shell."""
    import csv
    import io
    import shlex

    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow(names)
    return shlex.quote(file.getvalue())


def say_report(report: ExtractionReport) -> None:
    """Print what became of a store, and on standard error what is bad."""
    bad = report.bad
    done = f"{report.computed} images computed"
    if report.reused and not report.computed:
        done = "nothing to compute"
    echo(f"{report.store}: {done}, {report.reused} already there, {len(bad)} bad")
    if report.twin:
        echo(f"  its features are those of {report.twin}: the same images", err=True)
    if report.added:
        echo(f"  added {', '.join(report.added)}", err=True)
    for path, reason in list(bad.items())[:5]:
        echo(f"  bad: {path}: {reason}", err=True)
    if len(bad) > 5:
        echo(f"  and {len(bad) - 5} more: medprobe inspect {report.store}", err=True)
    for remark, count in report.remarks.items():
        echo(f"  {count} images: {remark}", err=True)


def refuse_empty(reports: Sequence[ExtractionReport]) -> None:
    """Raise FaultFound where no image of a store could be read."""
    for r in reports:
        if r.images and len(r.bad) == r.images:
            raise FaultFound(
                f"{r.store}: none of its {r.images} images could be read: "
                f"{'; '.join(dict.fromkeys(r.bad.values()))[:200]}"
            )


def say_estimate(
    manifest: Manifest,
    backbones: list[Backbone],
    out: Path,
    settings: ExtractionSettings,
    *,
    json_: bool,
) -> None:
    """Print what --dry-run found; exit 1 where no file is there."""
    from features.estimate import estimate
    from features.presence import look, nothing_there

    files = look(manifest)
    if files.missing == files.images and not json_:
        raise FaultFound(nothing_there(manifest.dataset, files))
    estimates, decoding = estimate(manifest, backbones, out=out, settings=settings)
    if json_:
        stores = [asdict(e) for e in estimates]
        as_json({"files": files.to_json(), "stores": stores, "decode_seconds": decoding})
    else:
        echo(f"{manifest.dataset}: {files.line()}")
        say_stores(estimates, decoding, settings)
    if files.missing == files.images:
        raise FaultFound(nothing_there(manifest.dataset, files))


def say_stores(estimates: list[Estimate], decoding: float, settings: ExtractionSettings) -> None:
    """Print what filling the stores will take."""
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
                for e in estimates
            ),
        ]
    )
    for e in estimates:
        if e.twin:
            echo(f"{e.store}: {e.twin} has these features, and they are copied from there")
    alone, together = (
        sum(e.seconds for e in estimates),
        "beside" if settings.device != "cpu" else "and",
    )
    echo(
        f"expected: {duration(alone)} of forward passes {together} {duration(decoding)} of decoding"
    )


COMMANDS = (backbones, datasets, doctor, extract)  # in order of use
