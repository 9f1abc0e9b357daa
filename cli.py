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
    from features.datasets import Options
    from features.manifest import Manifest
    from features.store import FeatureStore
    from probe.results import Result

FILE = click.Path(path_type=Path)
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "h5py", "pillow")


class Failure(click.ClickException):
    """An error of Medprobe as click prints it."""

    exit_code = 2


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
        ]
    ):
        command = option(command)
    return command


def options_of(given: dict[str, Any]) -> Options:
    """Return the source options among a command's arguments."""
    from features.datasets import Options

    names = ("path_col", "label_col", "subject_col", "split_col", "label_sep")
    return Options(**{name: given[name] for name in names}, seed=given["split_seed"])


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
@click.option("--batch-size", type=click.IntRange(min=1), help="Images per batch, and per commit.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="Decoding threads; default one per core."
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
    from features.extract import Settings, resolve_device
    from features.extract import extract as run

    manifest = open_dataset(dataset, options_of(given))
    if given["limit"]:
        manifest = manifest.head(given["limit"])
    if given["weights"] and given["weights"] != "random" and len(names) > 1:
        raise click.UsageError("--weights FILE goes with one backbone; give one -m")
    settings = Settings(
        layers=given["layers"],
        pools=tuple(given["pools"].split(",")) if given["pools"] else (),
        tokens=given["tokens"],
        precision=given["precision"],
        batch_size=given["batch_size"],
        workers=given["workers"],
        device=resolve_device(given["device"]),
        on_error=given["on_error"],
        overwrite=given["overwrite"],
    )
    loaded = [
        load_backbone(name, given["weights"], given["image_size"]) for name in dict.fromkeys(names)
    ]
    if statistics := parse_normalize(given["normalize"], manifest):
        loaded = [backbone.normalised_by(*statistics) for backbone in loaded]
    with bar(f"{manifest.dataset} x {', '.join(names)}", "images") as show:
        reports = run(
            manifest, loaded, out=given["out"], settings=settings, progress=images_per_second(show)
        )
    if json_:
        return as_json([asdict(r) for r in reports])
    for r in reports:
        done = f"{r.computed} images computed" if r.computed else "nothing to compute"
        click.echo(f"{r.store}: {done}, {r.reused} already there, {len(r.bad)} bad")
        for path, reason in list(r.bad.items())[:5]:
            click.echo(f"  bad: {path}: {reason}", err=True)
        if len(r.bad) > 5:
            click.echo(f"  and {len(r.bad) - 5} more: medprobe inspect {r.store}", err=True)
    return None


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
    from features.store import FeatureStore

    with FeatureStore.open(store) as opened:
        wrong = {feature: rows.tolist() for feature, rows in opened.verify()}
        done = int((opened.done == 1).sum())
    if json_:
        as_json({"store": str(store), "rows": done, "damaged": wrong})
    for feature, rows in wrong.items():
        if rows and not json_:
            click.echo(f"{store}: {feature}: {len(rows)} of {done} rows are damaged: {rows[:20]}")
    if any(wrong.values()):
        click.echo("Compute them anew with `medprobe extract ... --overwrite always`.", err=True)
        click.get_current_context().exit(1)
    if not json_:
        click.echo(f"{store}: {done} rows of {len(wrong)} features are as they were written")


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
    from features.extract import resolve_device
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
    if json_:
        as_json([asdict(result) for result in found])


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
