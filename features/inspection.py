"""The commands that look into stores and data sets and change nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.arguments import options_of, source_options
from features.console import FILE, FaultFound, as_json, as_table, bar, echo, json_option
from features.parsing import parse_window

if TYPE_CHECKING:
    from features.audit import Audit
    from features.store import FeatureStore


@click.command()
@click.argument("store", type=FILE)
@json_option
def inspect(store: Path, json_: bool) -> None:
    """Show what is in STORE, from what it was made, and how complete it is.

    \b
    medprobe inspect features/sample/efficientnet_lite0.h5
    """
    from features.store import FeatureStore

    with FeatureStore.open(store) as opened:
        description = describe(opened)
    if json_:
        return as_json(description)
    bad, remarks, made = (
        description.pop("bad"),
        description.pop("remarks"),
        description.pop("fingerprint"),
    )
    parity = description.pop("parity")
    as_table([(name, in_a_line(value)) for name, value in description.items()])
    if parity:
        echo("beside its own library")
        as_table(rows_of(parity))
    echo("made from")
    as_table(rows_of(made))
    for path, reason in bad.items():
        echo(f"bad: {path}: {reason}")
    for remark, count in remarks.items():
        echo(f"{count} images: {remark}")
    return None


def in_a_line(value: Any) -> str:
    """Return a JSON value as text: lists with commas between their items, objects with names."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {in_a_line(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " x ".join(map(str, value)) if is_shape(value) else ", ".join(map(in_a_line, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def is_shape(value: list[Any]) -> bool:
    """Say whether a list is of whole numbers alone."""
    return bool(value) and all(type(v) is int for v in value)


def rows_of(values: dict[str, Any], prefix: str = "  ") -> list[tuple[str, str]]:
    """Return nested JSON objects as rows of a table, with names such as image.size."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            rows += rows_of(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, in_a_line(value)))
    return rows


def describe(store: FeatureStore) -> dict[str, Any]:
    """Return what `inspect` shows."""
    manifest, done = store.manifest(), store.done
    return {
        "store": str(store.path),
        "dataset": manifest.dataset,
        "note": manifest.note,
        "images": len(manifest),
        "done": int((done == 1).sum()),
        "pending": int((done == 0).sum()),
        "features": {k: list(v) for k, v in store.features.items()},
        "default_feature": store.default_feature,
        "task": manifest.task,
        "classes": list(manifest.classes),
        "label_from": manifest.label_from,
        "labelled_by": manifest.labelled_by,
        "splits": {
            s: int((manifest.split == s).sum()) for s in dict.fromkeys(manifest.split.tolist())
        },
        "split_from": manifest.split_from,
        "split_digest": manifest.split_digest(),
        "fingerprint_digest": store.fingerprint_digest,
        "fingerprint": store.fingerprint,
        "parity": store.parity,
        "bad": {str(manifest.path[i]): reason for i, reason in store.bad().items()},
        "remarks": dict(Counter(store.remarks().values())),
    }


@click.command()
@click.argument("store", type=FILE)
@json_option
def verify(store: Path, json_: bool) -> None:
    """Check all of STORE against its checksums; exit 1 names the bad rows.

    \b
    medprobe verify features/sample/efficientnet_lite0.h5
    """
    from features.errors import StoreError
    from features.store import FeatureStore

    try:
        with FeatureStore.open(store) as opened:
            wrong = {name: rows.tolist() for name, rows in opened.verify()}
            marks, features = opened.columns["done"].read(), len(opened.features)
            done, pending = (int((marks == mark).sum()) for mark in (1, 0))
            unverifiable = opened.unverifiable()
    except StoreError as error:
        if not store.is_file():
            raise
        raise FaultFound(str(error)) from None
    if json_:
        report = {"store": str(store), "rows": done, "pending": pending, "damaged": wrong}
        as_json(report | {"unverifiable": unverifiable})
    for name, rows in wrong.items():
        if rows and not json_:
            echo(f"{store}: {name}: {len(rows)} of {done} rows are damaged: {rows[:20]}")
    if unverifiable:
        echo(f"Warning: {store}: {unverifiable}.", err=True)
    if any(wrong.values()):
        echo("Compute them anew with `medprobe extract ... --overwrite always`.", err=True)
        click.get_current_context().exit(1)
    if not json_:
        left = f"; {pending} are still to be done" if pending else ""
        what = "1 feature" if features == 1 else f"{features} features"
        echo(f"{store}: {done} rows of {what} match their checksums{left}")


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
@source_options
@json_option
def audit(dataset: str, near: float, feature: str | None, json_: bool, **given: Any) -> None:
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
    else:
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
    if json_:
        as_json(report.to_json() | ({"files": files.to_json()} if files else {}))
    else:
        if files:
            echo(f"{report.dataset}: {files.line()}")
        show_audit(report)
    if report.leaks:
        click.get_current_context().exit(1)


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


COMMANDS = (inspect, verify, audit)  # in order of use
