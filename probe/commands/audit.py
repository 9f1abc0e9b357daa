"""The command that looks for leaks between splits, and for columns that could be shortcuts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import options_of, source_options
from features.console import FILE, as_json, as_table, bar, echo, json_option, provenance
from features.parsing import parse_window

if TYPE_CHECKING:
    from features.audit import Audit
    from features.presence import Presence
    from probe.confounders import Confounder


@click.command()
@click.argument("dataset", metavar="DATASET|STORE")
@click.option(
    "--near",
    type=click.FloatRange(0, 1),
    default=0.99,
    show_default=True,
    help="The cosine of centred features from which two images of a STORE are near-duplicates.",
)
@click.option(
    "--feature",
    metavar="LAYER/POOL",
    help="The feature of a STORE to compare, instead of its default one.",
)
@click.option(
    "--window", metavar="C/W", help="The window of DICOM images of a DATASET, as for extract."
)
@click.option(
    "--frame",
    type=click.IntRange(min=1),
    help="The frame of DICOM files of a DATASET, as for extract.",
)
@click.option(
    "--predict",
    multiple=True,
    metavar="COLUMN",
    help="Say whether the features of a STORE tell this column, such as site, view or sex, and "
    "whether the label goes with it (docs/confounders.md); may be repeated.",
)
@click.option(
    "-o",
    "out",
    type=FILE,
    default="results",
    show_default=True,
    help="The folder of results that --predict adds what it found to, for the report.",
)
@source_options
@json_option
def audit(
    dataset: str,
    near: float,
    feature: str | None,
    predict: tuple[str, ...],
    out: Path,
    json_: bool,
    **given: Any,
) -> None:
    """Look for leaks between splits; exit 1 if there are any.

    Found are subjects and identical images in more than one split, identical images with contrary
    labels, and near-duplicates. Of a DATASET the files are read, and pixels compared; of a STORE
    the hashes and features that it holds.

    \b
    medprobe audit features/sample/efficientnet_lite0.h5
    """
    from features.audit import audit as run
    from features.audit import hash_images
    from features.datasets import open_dataset
    from features.presence import look, need_some
    from features.store import DONE, FeatureStore

    found: list[Confounder] = []
    if dataset.endswith(".h5") or Path(dataset).is_file():
        with FeatureStore.open(Path(dataset)) as store:
            report = run(
                store.manifest(),
                hashes=store.hashes(),
                features=store.read(feature or store.default_feature),
                usable=store.done == DONE,
                bad=store.bad(),
                threshold=near,
            )
        files = None
        if predict:
            found = confounding(Path(dataset), predict, feature, out)
    else:
        if predict:
            raise click.UsageError(
                f"--predict reads features, and {dataset} has none yet: extract it, and give the "
                "store"
            )
        manifest = open_dataset(dataset, options_of(given))
        need_some(manifest)
        files = look(manifest)
        with bar(manifest.dataset, "images") as show:
            hashes, pixels, bad = hash_images(
                manifest,
                window=parse_window(given["window"]),
                frame=given["frame"],
                progress=lambda done, of: show(done, of, ""),
            )
        report = run(manifest, hashes=hashes, pixel_hashes=pixels, bad=bad)
    say(report, files, found if predict else None, json_=json_)
    if report.leaks:
        click.get_current_context().exit(1)


def say(
    report: Audit, files: Presence | None, found: list[Confounder] | None, *, json_: bool
) -> None:
    """Print what was found, of columns too where they were asked for."""
    if json_:
        document = report.to_json() | ({"files": files.to_json()} if files else {})
        if found is not None:
            document["confounders"] = [
                asdict(one) | {"flagged": one.flagged, "line": one.line()} for one in found
            ]
        as_json(document)
    else:
        if files:
            echo(f"{report.dataset}: {files.line()}")
        show_audit(report)
        show_confounders(found or [])


def confounding(
    store: Path, columns: tuple[str, ...], feature: str | None, out: Path
) -> list[Confounder]:
    """Return what there is to say of columns of a store, and add it to a folder of results."""
    from probe.confounders import append
    from probe.confounding import confounders

    with bar(f"{store.parent.name} x {store.stem}", "columns") as show:
        found = confounders(
            store,
            columns,
            feature=feature,
            progress=lambda done, of: show(done, of, ""),
            **provenance(),
        )
    append(out, found)
    return found


def show_audit(report: Audit) -> None:
    """Print an audit as lines and a table."""
    splits = ", ".join(f"{k} {v}" for k, v in report.images.items())
    echo(f"{report.dataset}: {splits}; split {report.split_from}")
    echo(f"{report.line()}")
    for path, reason in list(report.bad.items())[:5]:
        echo(f"bad, in no group: {path}: {reason}")
    if len(report.bad) > 5:
        echo(f"and {len(report.bad) - 5} more bad images: --json has all")
    rows = [("what", "splits", "labels", "images")]
    shown = [
        *(("subject in several splits", g) for g in report.subjects),
        *(("same bytes", g) for g in report.bytes),
        *(("same pixels", g) for g in report.pixels),
        *((f"near ({g.cosine:.4f})", g) for g in report.near),
    ]
    for what, group in shown[:50]:
        labels = "contrary" if group.conflicts and group.kind != "subject" else ""
        names = ", ".join(group.images[:4]) + (", ..." if len(group.images) > 4 else "")
        rows.append((what, "/".join(dict.fromkeys(group.splits)), labels, names))
    if len(rows) > 1:
        as_table(rows)
    if len(shown) > 50:
        echo(f"and {len(shown) - 50} more: --json has all")
    if report.n_near:
        echo("Near-duplicates are a suspicion, and do not count as a leak.")
    for line in report.advice():
        echo(line)


def show_confounders(found: list[Confounder]) -> None:
    """Print a table of columns that may be shortcuts, and each in words."""
    from probe.confounders import COLUMNS
    from probe.draw.tables import in_text

    if not found:
        return
    looked_at = [one for one in found if not one.why]
    if looked_at:
        as_table([COLUMNS[:-2], *(list(map(in_text, one.row()[:-2])) for one in looked_at)])
    for one in found:
        echo(f"{'Shortcut? ' if one.flagged else ''}{one.line()}.")
        if one.left_out and not one.why:
            echo(f"  {one.left_out} images have no value of {one.column}, or a rare one: left out")
        if one.quartiles and not one.why:
            echo(f"  {one.column} is many numbers: cut into quartiles")
