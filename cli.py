"""The command line.

A command parses, calls one function and prints; heavy imports happen inside commands. Results go to
standard output, messages and progress to standard error. Exit codes: 0 done, 1 the work found a
fault, 2 the call was wrong, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.errors import MedprobeError

if TYPE_CHECKING:
    from features.audit import Audit
    from features.backbones import Backbone
    from features.datasets import Options
    from features.manifest import Manifest
    from features.plan import Settings
    from features.store import FeatureStore
    from probe.results import Result

FILE = click.Path(path_type=Path)
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "h5py", "pillow")


class Failure(click.ClickException):
    """An error of Medprobe as click prints it."""

    exit_code = 2


class Damaged(Failure):
    """A fault that the work found."""

    exit_code = 1


class Commands(click.Group):
    """A group whose errors are one or two lines, and whose commands stand in order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands as they were added."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; turn errors into messages and exit codes."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo(
                "Stopped. What is stored stays; the same command goes on from here.", err=True
            )
            ctx.exit(130)
        except Exception as error:
            if os.environ.get("MEDPROBE_DEBUG") == "1":
                raise
            message = str(error)
            if not isinstance(error, (MedprobeError, OSError)):
                message = (
                    f"{type(error).__name__}: {message} "
                    "(a fault of the program; MEDPROBE_DEBUG=1 shows where)"
                )
            raise Failure(message) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="medprobe")
def cli() -> None:
    """Extract features once, probe many heads quickly, believe the numbers.

    \b
    medprobe extract folder:images -m efficientnet_lite0
    medprobe probe features/images/efficientnet_lite0.h5
    medprobe report results
    """


def main() -> None:
    """Run the program; SIGTERM stops it as Ctrl-C does."""
    import warnings

    def say(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"Warning: {message}", err=True)

    warnings.showwarning = say
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cli()


def as_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def as_table(rows: Sequence[Sequence[Any]]) -> None:
    """Print rows in columns."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        click.echo("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def versions() -> dict[str, str]:
    """Return what ran: Python, Medprobe and the libraries that numbers depend on."""
    from importlib.metadata import version

    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: version(name) for name in ("medprobe", *LIBRARIES)}


@contextmanager
def bar(title: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show progress on standard error if on a terminal; yields a function (done, of, remark)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[remark]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(title, total=None, remark="")

        def show(done: int, of: int, remark: str = "") -> None:
            progress.update(task, completed=done, total=of, remark=remark)

        yield show


json_option = click.option("--json", "json_", is_flag=True, help="Print one JSON document.")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how a data set is read."""
    for option in reversed(
        [
            click.option(
                "--path-col", default="path", show_default=True, help="csv: the image's path."
            ),
            click.option("--label-col", default="label", show_default=True, help="csv: the label."),
            click.option(
                "--subject-col", default="subject", show_default=True, help="csv: the patient."
            ),
            click.option(
                "--split-col", default="split", show_default=True, help="csv: train, val or test."
            ),
            click.option(
                "--label-sep", metavar="CHAR", help="csv: splits a cell into several labels."
            ),
            click.option(
                "--split-seed",
                default=0,
                show_default=True,
                help="Draws a split where none is given.",
            ),
            click.option(
                "--split",
                type=click.Choice(["default", "drawn", "study", "official"]),
                default="default",
                show_default=True,
                help="default: the given one, else drawn.",
            ),
            click.option(
                "--test-share",
                type=click.FloatRange(0, 1, min_open=True, max_open=True),
                default=0.2,
                show_default=True,
                help="Of a drawn split.",
            ),
            click.option(
                "--val-share",
                type=click.FloatRange(0, 1, max_open=True),
                default=0.0,
                help="Of a drawn split; without, C is chosen on folds.",
            ),
            click.option("--test-fold", metavar="I/K", help="Test on fold I of K drawn ones."),
            click.option(
                "--merge", multiple=True, metavar="NEW=OLD+OLD", help="Classes to make one of."
            ),
            click.option(
                "--subject-from-dicom", is_flag=True, help="Take DICOM's patient id as subject."
            ),
        ]
    ):
        command = option(command)
    return command


def options_of(given: dict[str, Any]) -> Options:
    """Return the source options among a command's arguments."""
    from features.datasets import Options

    names = (
        "path_col",
        "label_col",
        "subject_col",
        "split_col",
        "label_sep",
        "subject_from_dicom",
        "split",
        "test_share",
        "val_share",
        "merge",
    )
    return Options(
        **{name: given[name] for name in names},
        seed=given["split_seed"],
        test_fold=parse_fold(given["test_fold"]),
    )


def parse_fold(text: str | None) -> tuple[int, int] | None:
    """Return I and K of --test-fold."""
    if text is None:
        return None
    i, _, k = text.partition("/")
    if i.isdecimal() and k.isdecimal() and 1 <= int(i) <= int(k) and int(k) > 1:
        return int(i), int(k)
    raise click.BadParameter(f"{text!r}: want I/K such as 1/5", param_hint="--test-fold")


@cli.command()
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


@cli.command()
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


@cli.command()
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


@cli.command()
@click.argument("dataset")
@click.option(
    "-m", "--backbone", "names", multiple=True, required=True, help="A backbone; may be repeated."
)
@click.option(
    "-o", "out", type=FILE, default="features", show_default=True, help="Where stores go."
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
@click.option("--image-size", type=int, metavar="N", help="Side in pixels; default the backbone's.")
@click.option(
    "--normalize",
    default="model",
    show_default=True,
    metavar="model|dataset|MEAN/STD",
    help="MEAN and STD are one number, or three with commas.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the forward pass; features are stored as float32.",
)
@click.option(
    "--views",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Also so many augmented views of each image.",
)
@click.option("--view-seed", type=click.IntRange(min=0), default=0, help="Draws the views.")
@click.option(
    "--exact-decode", "exact", is_flag=True, help="Decode large images in full, and slower."
)
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
@click.option(
    "--window", metavar="C/W", help="DICOM: centre and width of grey, instead of the header's."
)
@click.option(
    "--frame", type=click.IntRange(min=1), help="DICOM: which of several; default the middle one."
)
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
    from features.devices import resolve_device
    from features.dicom import applied
    from features.extract import extract as run
    from features.plan import Settings

    manifest = open_dataset(dataset, options_of(given))
    if given["limit"]:
        manifest = manifest.head(given["limit"])
    if given["weights"] and given["weights"] != "random" and len(names) > 1:
        raise click.UsageError("--weights FILE goes with one backbone; give one -m")
    same = ("layers", "tokens", "views", "view_seed", "exact", "precision", "workers")
    settings = Settings(
        **{name: given[name] for name in (*same, "on_error", "overwrite")},
        pools=tuple(given["pools"].split(",")) if given["pools"] else (),
        batch_size=parse_batch_size(given["batch_size"]),
        device=resolve_device(given["device"]),
        window=parse_window(given["window"]),
        frame=given["frame"],
    )
    loaded = [
        load_backbone(name, given["weights"], given["image_size"]) for name in dict.fromkeys(names)
    ]
    if statistics := parse_normalize(given["normalize"], manifest):
        loaded = [backbone.normalised_by(*statistics) for backbone in loaded]
    if given["dry_run"]:
        return say_estimate(manifest, loaded, given["out"], settings, json_=json_)
    with bar(f"{manifest.dataset} x {', '.join(names)}", "images") as show, stopping() as stop:
        reports = run(
            manifest,
            loaded,
            out=given["out"],
            settings=settings,
            progress=images_per_second(show),
            stop=stop,
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


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 42 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def parse_batch_size(text: str) -> int | None:
    """Return the number of --batch-size, or None for auto."""
    if text == "auto":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise click.BadParameter(f"{text!r}: want a number, or auto", param_hint="--batch-size")


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a wish, the second into a stop; yields "stop?"."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)
        click.echo("Stopping after this batch; once more stops at once.", err=True)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse_window(text: str | None) -> tuple[float, float] | None:
    """Return centre and width of --window."""
    if text is None:
        return None
    try:
        center, width = (float(part) for part in text.split("/"))
        if abs(center) < float("inf") and 0 < width < float("inf"):
            return center, width
    except ValueError:
        pass
    raise click.BadParameter(
        f"{text!r}: want CENTRE/WIDTH such as 40/400, width above 0", param_hint="--window"
    )


def parse_normalize(
    text: str, manifest: Manifest
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and std of --normalize, or None for the backbone's own."""
    if text == "model":
        return None
    if text == "dataset":
        if manifest.normalize is None:
            raise click.BadParameter(
                f"{manifest.dataset} has no published mean and std: give them as MEAN/STD",
                param_hint="--normalize",
            )
        return manifest.normalize
    try:
        mean, std = (tuple(float(v) for v in part.split(",")) for part in text.split("/"))
        if {len(mean), len(std)} <= {1, 3} and all(s > 0 for s in std):
            return mean, std
    except ValueError:
        pass
    raise click.BadParameter(
        f"{text!r}: want model, dataset, or MEAN/STD such as .5/.25 or .4,.3,.2/.3,.2,.1",
        param_hint="--normalize",
    )


def images_per_second(show: Callable[[int, int, str], None]) -> Callable[[int, int, int], None]:
    """Return a progress function that adds the speed since its first call."""
    import time

    first: list[tuple[float, int]] = []

    def progress(done: int, of: int, bad: int) -> None:
        first.append((time.monotonic(), done))
        (t0, n0), (t1, _) = first[0], first[-1]
        speed = f"{(done - n0) / (t1 - t0):.1f}/s" if t1 > t0 else ""
        show(done, of, speed + (f" {bad} bad" if bad else ""))

    return progress


@cli.command()
@click.argument("store", type=FILE)
@json_option
def inspect(store: Path, json_: bool) -> None:
    """Show what is in STORE, from what it was made, and how complete it is.

    \b
    medprobe inspect features/sample/efficientnet_lite0.h5
    """
    from features.store import FeatureStore

    with FeatureStore.open(store) as opened:
        found = describe(opened)
    if json_:
        return as_json(found)
    bad = found.pop("bad")
    as_table(
        [
            (k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False))
            for k, v in found.items()
        ]
    )
    for path, reason in bad.items():
        click.echo(f"bad: {path}: {reason}")
    return None


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
        "splits": {
            s: int((manifest.split == s).sum()) for s in dict.fromkeys(manifest.split.tolist())
        },
        "split_from": manifest.split_from,
        "split_digest": manifest.split_digest(),
        "fingerprint_digest": store.fingerprint_digest,
        "fingerprint": store.fingerprint,
        "bad": {str(manifest.path[i]): reason for i, reason in store.bad().items()},
    }


@cli.command()
@click.argument("store", type=FILE)
@json_option
def verify(store: Path, json_: bool) -> None:
    """Check every stored row of STORE against its checksum; exit 1 names the bad rows.

    \b
    medprobe verify features/sample/efficientnet_lite0.h5
    """
    from features.errors import StoreError
    from features.store import FeatureStore

    try:
        with FeatureStore.open(store) as opened:
            wrong = {feature: rows.tolist() for feature, rows in opened.verify()}
            done, pending = (int((opened.done == mark).sum()) for mark in (1, 0))
    except StoreError as error:
        if not store.is_file():
            raise
        raise Damaged(str(error)) from None
    if json_:
        as_json({"store": str(store), "rows": done, "pending": pending, "damaged": wrong})
    for feature, rows in wrong.items():
        if rows and not json_:
            click.echo(f"{store}: {feature}: {len(rows)} of {done} rows are damaged: {rows[:20]}")
    if any(wrong.values()):
        click.echo("Compute them anew with `medprobe extract ... --overwrite always`.", err=True)
        click.get_current_context().exit(1)
    if not json_:
        left = f"; {pending} are still to be done" if pending else ""
        features = len(wrong) - 1  # the source is checked too
        click.echo(f"{store}: {done} rows of {features} features are as they were written{left}")


@cli.command()
@click.argument("dataset", metavar="DATASET|STORE")
@click.option(
    "--near",
    type=click.FloatRange(0, 1),
    default=0.99,
    show_default=True,
    help="STORE: cosine of centred features from which images are near-duplicates.",
)
@click.option("--feature", metavar="LAYER/POOL", help="STORE: instead of its default feature.")
@click.option("--window", metavar="C/W", help="DICOM of DATASET: as for extract.")
@click.option("--frame", type=click.IntRange(min=1), help="DICOM of DATASET: as for extract.")
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
    from features.store import DONE, FeatureStore

    if dataset.endswith(".h5") or Path(dataset).is_file():
        with FeatureStore.open(Path(dataset)) as store:
            found = run(
                store.manifest(),
                hashes=store.source()["hash"].tolist(),
                features=store.read(feature or store.default_feature),
                usable=store.done == DONE,
                threshold=near,
            )
    else:
        manifest = open_dataset(dataset, options_of(given))
        with bar(manifest.dataset, "images") as show:
            hashes, pixels, usable = hash_images(
                manifest,
                window=parse_window(given["window"]),
                frame=given["frame"],
                progress=lambda done, of: show(done, of, ""),
            )
        found = run(manifest, hashes=hashes, pixel_hashes=pixels, usable=usable)
    if json_:
        as_json(found.to_json())
    else:
        show_audit(found)
    if found.leaks:
        click.get_current_context().exit(1)


def show_audit(found: Audit) -> None:
    """Print an audit as lines and a table."""
    splits = ", ".join(f"{k} {v}" for k, v in found.images.items())
    click.echo(f"{found.dataset}: {splits}; split {found.split_from}")
    click.echo(f"{found.line()}")
    rows = [("what", "splits", "labels", "images")]
    shown = [
        *(("subject in several splits", g) for g in found.subjects),
        *(("same bytes", g) for g in found.bytes),
        *(("same pixels", g) for g in found.pixels),
        *((f"near ({g.cosine:.4f})", g) for g in found.near),
    ]
    for what, group in shown[:50]:
        labels = "contrary" if group.conflicts and group.kind != "subject" else ""
        names = ", ".join(group.images[:4]) + (", ..." if len(group.images) > 4 else "")
        rows.append((what, "/".join(dict.fromkeys(group.splits)), labels, names))
    if len(rows) > 1:
        as_table(rows)
    if len(shown) > 50:
        click.echo(f"and {len(shown) - 50} more: --json has all")
    if found.n_near:
        click.echo("Near-duplicates are a suspicion, and do not count as a leak.")


@cli.command()
@click.argument("stores", nargs=-1, required=True, type=FILE)
@click.option(
    "-o", "out", type=FILE, default="results", show_default=True, help="Where results go."
)
@click.option(
    "--protocol",
    default="dinov2-logreg",
    show_default=True,
    help="A preset of strengths and folds.",
)
@click.option("--head", type=click.Choice(["linear", "knn"]), help="Default the protocol's.")
@click.option(
    "--feature",
    metavar="LAYER/POOL|all",
    help="Instead of the store's default feature; all: every vector that is in it.",
)
@click.option("--metric", help="What chooses C and heads the report; default the data set's own.")
@click.option(
    "--C", "strengths", metavar="LIST", help="Strengths as in scikit-learn, such as 0.01,1,100."
)
@click.option("--k", "neighbours", metavar="LIST", help="knn: numbers of neighbours to try.")
@click.option(
    "--temperature", type=click.FloatRange(min=0, min_open=True), help="knn: of the votes."
)
@click.option("--folds", type=click.IntRange(min=2), help="Instead of the protocol's.")
@click.option(
    "--shots", metavar="LIST", help="Training images per class, such as 1,2,4,all; default all."
)
@click.option("--seeds", type=click.IntRange(min=1), help="Draws of each number of shots.")
@click.option("--seed", default=0, show_default=True, help="The first seed of draws and folds.")
@click.option(
    "--control",
    type=click.Choice(["shuffle"]),
    help="Fit to shuffled labels as well: the score of no information.",
)
@click.option(
    "--uncertain",
    type=click.Choice(["zeros", "ones", "ignore"]),
    default="zeros",
    show_default=True,
    help="What -1 counts as; with ignore, an empty cell is left out too.",
)
@click.option(
    "--bootstrap",
    type=click.IntRange(min=100),
    default=1000,
    show_default=True,
    help="Resamples of the subjects.",
)
@click.option(
    "--interval",
    type=click.Choice(["percentile", "bca"]),
    default="percentile",
    show_default=True,
    help="Which bootstrap interval, of 95 %.",
)
@click.option("--by", multiple=True, metavar="COLUMN", help="Also score every group, such as sex.")
@click.option(
    "--aggregate",
    type=click.Choice(["mean", "max"]),
    help="Score a unit's images together; default each image.",
)
@click.option(
    "--unit", default="subject", show_default=True, help="What --aggregate joins: a column."
)
@click.option(
    "--threshold",
    type=click.Choice(["youden", "f1"]),
    default="youden",
    show_default=True,
    help="Rule for a threshold, chosen on what was held out of training.",
)
@click.option("--strict-splits", is_flag=True, help="Refuse splits that leak.")
@device_option
@json_option
def probe(
    stores: tuple[Path, ...],
    out: Path,
    strengths: str | None,
    neighbours: str | None,
    shots: str | None,
    json_: bool,
    **given: Any,
) -> None:
    """Choose C on folds of the training images, refit, and test once.

    All strengths, folds and draws are solved together. Features that don't fit
    the memory are read block by block. Writes lines of results.jsonl, the
    predictions and the heads.

    \b
    medprobe probe features/sample/efficientnet_lite0.h5
    """
    from features.devices import resolve_device
    from probe.sweep import Settings
    from probe.sweep import probe_all as run

    given["device"] = resolve_device(given["device"])
    settings = Settings(
        C=parse_strengths(strengths),
        k=parse_counts(neighbours, "--k"),
        shots=parse_shots(shots),
        **given,
    )
    command = "medprobe " + shlex.join(sys.argv[1:])
    found = []
    for store in stores:
        with bar(f"{store.parent.name} x {store.stem}", "heads") as show:
            results = run(
                store,
                out=out,
                settings=settings,
                command=command,
                versions=versions(),
                progress=passes(show),
            )
        found += results
        if not json_:
            for result in results:
                say_result(result, several=len(results) > 1)
            click.echo(f"  {results[0].audit['line']}", err=True)
    if json_:
        as_json([asdict(result) for result in found])


def say_group(metric: str, group: dict[str, Any]) -> None:
    """Print the metric of one group."""
    low, high = group["ci_low"], group["ci_high"]
    score = "not defined"
    if group["value"] is not None:
        score = f"{group['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
    click.echo(
        f"  {group['column']} {group['group']}: {metric} {score}, n = {group['n']}, "
        f"{group['subjects']} subjects" + (" (few)" if group["small"] else "")
    )


def say_result(result: Result, *, several: bool) -> None:
    """Print a result in one line, and on standard error what must be known of it."""
    cell = [result.feature] if several else []
    cell += [f"{result.shots} shots, seed {result.seed}"] if result.shots else []
    chosen = f"C = {result.C:.3g}" if result.C else f"k = {result.folds['chosen']}"
    click.echo(
        f"{' '.join([f'{result.dataset} x {result.backbone}', *cell])}: "
        f"{result.metric} {result.value:.3f} [{result.ci_low:.3f}, {result.ci_high:.3f}] "
        f"on {result.n_test} test images, {chosen}"
    )
    if control := result.control:
        click.echo(
            f"  with shuffled labels: {control['value']:.3f} "
            f"[{control['ci_low']:.3f}, {control['ci_high']:.3f}]"
        )
    if result.ci_low == result.ci_high:
        click.echo(f"  {result.notes[-1]}", err=True)
    for group in result.subgroups:
        say_group(result.metric, group)
    if result.weights == "random":
        click.echo("  the backbone's weights are random: the score says nothing about it", err=True)
    if not result.converged:
        click.echo("  not every head converged: see the result's notes and folds", err=True)


def passes(show: Callable[[int, int, str], None]) -> Callable[[int, int, int], None]:
    """Return a progress function that says how far the slowest head of the batch is."""
    return lambda done, of, n: show(done, of, f"{n} passes over the data")


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


@cli.command()
@click.argument("head", type=FILE)
@click.argument("store", type=FILE)
@click.option("-o", "out", type=FILE, help="A CSV file; default standard output.")
def predict(head: Path, store: Path, out: Path | None) -> None:
    """Apply a saved HEAD to every image of STORE and write class probabilities as CSV.

    The store must come from the backbone, with the weights, that the head was fitted on.

    \b
    medprobe predict results/sample/efficientnet_lite0/*/heads.json \\
        features/sample/efficientnet_lite0.h5 -o said.csv
    """
    from probe.predict import predict as run

    text = run(head, store)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8", newline="")
        click.echo(f"{out}: {text.count(chr(10)) - 1} images", err=True)


@cli.command()
@click.argument("results", nargs=-1, required=True, type=FILE)
@click.option(
    "--resamples",
    type=click.IntRange(min=100),
    default=2000,
    show_default=True,
    help="Of the paired bootstrap and the permutation test.",
)
@click.option("--seed", default=0, show_default=True, help="For them.")
@json_option
def compare(results: tuple[Path, ...], resamples: int, seed: int, json_: bool) -> None:
    """Say whether the models of RESULTS differ: in pairs on each data set, by ranks over all.

    The p of a pair is of a permutation test by subject, or of DeLong's for the AUROC of two classes
    and independent images, and Holm's for the number of pairs of a data set.

    \b
    medprobe compare results
    """
    from probe.compare import compare_results

    found = compare_results(results, n=resamples, seed=seed)
    if json_:
        return as_json(found.to_json())
    rows: list[tuple[str, ...]] = [("dataset", "model", "metric", "value", "interval", "seeds")]
    for score in found.scores:
        spread = "" if score.deviation is None else f" (sd {score.deviation:.3f})"
        interval = f"[{score.ci_low:.3f}, {score.ci_high:.3f}]"
        seeds = str(len(score.seeds))
        value = f"{score.value:.3f}{spread}"
        rows.append((score.dataset, score.model, score.metric, value, interval, seeds))
    as_table(rows)
    rows = [("dataset", "a", "b", "a - b", "interval", "p", "Holm's p", "test")]
    for pair in found.pairs:
        d = pair.difference
        if d is None:
            rows.append((pair.dataset, pair.a, pair.b, "", "", "", "", pair.why_not))
            continue
        interval = f"[{d.ci_low:+.3f}, {d.ci_high:+.3f}]"
        p = (f"{d.p:.4f}", f"{pair.p_holm:.4f}")
        rows.append((pair.dataset, pair.a, pair.b, f"{d.value:+.3f}", interval, *p, d.test))
    if len(rows) > 1:
        click.echo()
        as_table(rows)
    if found.ranks and len(found.datasets) > 1:
        click.echo(f"\nmean ranks over {len(found.datasets)} data sets (1 is best)")
        as_table([(m, f"{r:.2f}") for m, r in zip(found.models, found.ranks.mean, strict=True)])
        if found.ranks.p is None:
            click.echo(f"no test: {found.ranks.why_not}")
        else:
            click.echo(
                f"Friedman's p = {found.ranks.p:.4f}; ranks {found.ranks.critical:.2f} apart "
                "differ (Nemenyi, 5 %)"
            )
    return None


@cli.command()
@click.argument("results", nargs=-1, required=True, type=FILE)
@click.option(
    "-o", "out", type=FILE, default="report", show_default=True, help="Where the report goes."
)
def report(results: tuple[Path, ...], out: Path) -> None:
    """Write one HTML page, figures and tables of RESULTS (folders, or results.jsonl files).

    \b
    medprobe report results
    """
    from probe.report import write_report

    click.echo(write_report(results, out))


if __name__ == "__main__":
    main()
