"""The command that fits heads on stored features: by the sweep, or by training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from features.arguments import engine_of, engine_options
from features.console import (
    FILE,
    FaultFound,
    as_json,
    bar,
    device_option,
    echo,
    json_option,
    provenance,
)
from probe.commands.arguments import (
    deit_options,
    external_options,
    loop_options,
    probing_options,
    refuse_spaces,
    results_option,
    say_added,
    scoring_options,
)
from probe.commands.finetune import say
from probe.commands.said import say_external, say_results
from probe.commands.settings import (
    DEIT,
    LOOP,
    external_of,
    parse_columns,
    probing_of,
    prompts_of,
    refuse_seeds,
    seeds_of,
    training_of,
)

if TYPE_CHECKING:
    from features.cluster import Cluster
    from probe.cluster import RowWorkers
    from probe.results import Result

    Probe = Callable[[Path, tuple[str, ...]], list[Result]]  # store, columns to score by

SHOWN = 8  # stores of a folder that an error names


@click.command()
@click.argument("stores", nargs=-1, required=True, type=FILE)
@results_option
@click.option(
    "--protocol",
    default="dinov2-logreg",
    show_default=True,
    help="The preset of strengths and folds (docs/protocols.md). The preset study trains"
    " the head instead.",
)
@click.option(
    "--head",
    type=click.Choice(["linear", "knn", "deit", "zero-shot"]),
    help="The kind of head instead of the protocol's; deit trains an appended DeiT on "
    "the store's tokens, zero-shot takes its weights from --prompts.",
)
@click.option(
    "--prompts",
    type=FILE,
    metavar="FILE",
    help="Texts of the classes, for --head zero-shot: a line `class: prompt` each, and templates"
    " with {} (docs/zero-shot.md).",
)
@click.option(
    "--weights",
    metavar="FILE",
    help="The weights that the store's features were made with, where of a file, for --head"
    " zero-shot.",
)
@click.option(
    "--with",
    "columns",
    metavar="COLUMNS",
    help="Fit heads of these columns, such as age,sex, alone and beside the image too, and say"
    " what the image adds to them (docs/confounders.md).",
)
@probing_options
@click.option(
    "--leave-out",
    metavar="COLUMN",
    help="Leave out each value of a column in turn, such as site: tested by a head of the others,"
    " as with --outer.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Leave these images out of training and test; may be repeated.",
)
@click.option(
    "--test-on",
    multiple=True,
    type=FILE,
    metavar="STORE",
    help="Test the heads on this store too, such as another hospital's; may be repeated"
    " (docs/external.md).",
)
@external_options
@scoring_options
@deit_options
@loop_options
@device_option
@engine_options
@json_option
def probe(stores: tuple[Path, ...], out: Path, json_: bool, **given: Any) -> None:
    """Choose C on folds of the training images, refit, and test once.

    All strengths, folds and draws are solved together. Features that don't fit
    the memory are read block by block. Writes lines of results.jsonl, the
    predictions and the heads. An appended DeiT (--head deit), and the head of
    --protocol study, are trained by epochs instead.

    \b
    medprobe probe features/sample/efficientnet_lite0.h5
    """
    from features.errors import MedprobeError

    trained = given["head"] == "deit" or given["protocol"] == "study"
    refuse_spaces(stores, given)
    refuse(trained)
    refuse_folders(stores)
    say_added(out)
    known = columns_of(stores, given["by"])
    found: list[Result] = []
    failed = []
    with (trained_heads if trained else solved)(out, given) as probe_one:
        for store in stores:
            try:
                results = probe_one(store, known[store])
            except MedprobeError as error:
                if len(stores) == 1:
                    raise
                echo(f"Error: {error}", err=True)
                failed.append(store)
                continue
            if not json_:
                say_results(results, out, trained=trained)
            found += [*results, *elsewhere(results, out, given, quiet=json_)]
    if json_:
        as_json([asdict(result) for result in found])
    if failed:
        raise FaultFound(f"{len(failed)} of {len(stores)} stores have no result, see above")


def elsewhere(
    results: Sequence[Result], out: Path, given: dict[str, Any], *, quiet: bool
) -> list[Result]:
    """Test the heads of results on the stores of --test-on; print it."""
    if not given["test_on"]:
        for option in ("names", "leave_shared_out"):
            if given[option]:
                name = {"names": "class"}.get(option, option.replace("_", "-"))
                raise click.UsageError(f"--{name} is of --test-on: give that, or leave it out")
        return []
    from probe.external import test_each

    settings = external_of(given)
    by = columns_of(given["test_on"], given["by"])
    others = {path: replace(settings, by=by[path]) for path in given["test_on"]}
    saved = [result for result in results if "columns" not in result.settings]
    if len(saved) < len(results):
        echo("  heads of columns are not kept: that of the image is tested on the others", err=True)
    found = test_each(saved, out, others, **provenance())
    for result in found:
        if not quiet:
            say_external(result)
    return found


def refuse_folders(stores: Sequence[Path]) -> None:
    """Raise UsageError for a folder in place of a store; it names the stores in it."""
    for folder in stores:
        if not folder.is_dir():
            continue
        found = sorted(path.as_posix() for path in folder.rglob("*.h5") if path.is_file())
        if not found:
            raise click.UsageError(f"{folder} is a folder without stores: see `medprobe extract`")
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise click.UsageError(
            f"{folder} is a folder: name the stores to probe, of {', '.join(found[:SHOWN])}{more}"
        )


def columns_of(stores: Sequence[Path], by: tuple[str, ...]) -> dict[Path, tuple[str, ...]]:
    """Return which of the columns to score by each store has, and say which it hasn't.

    A column that no store has is kept for all: asked for, it is an error.
    """
    from features.errors import StoreError
    from features.store import FeatureStore

    known: dict[Path, tuple[str, ...]] = dict.fromkeys(stores, by)
    if not by or len(stores) == 1:
        return known
    there: dict[Path, set[str]] = {}
    for path in stores:
        try:
            with FeatureStore.open(path) as store:
                there[path] = {*store.manifest().columns, "subject", "path", "id"}
        except StoreError:  # said where it is probed
            continue
    for path, columns in there.items():
        missing = [c for c in by if c not in columns and any(c in t for t in there.values())]
        for name in missing:
            echo(f"{path} has no column {name}: it is not scored by it", err=True)
        known[path] = tuple(c for c in by if c not in missing)
    return known


def refuse(trained: bool) -> None:
    """Raise UsageError where an option was given that goes with the other kind of head."""
    ctx = click.get_current_context()
    solved_only = {"strengths", "neighbours", "temperature", "folds", "shots", "control"}
    solved_only |= {"repeats", "calibrate", "conformal", "leave_out", "exclude"}
    solved_only |= {"engine", "address", "num_cpus_per_worker", "num_gpus_per_worker"}
    trained_only = {*LOOP, *DEIT, "no_augment", "tensorboard"}
    solved_only |= {"prompts", "weights", "columns"}
    foreign = solved_only if trained else trained_only
    for parameter in ctx.command.params:
        by_default = ctx.get_parameter_source(str(parameter.name)) is ParameterSource.DEFAULT
        if parameter.name not in foreign or by_default:
            continue
        if trained:
            kind, remedy = "solved", "leave it, or --head deit and --protocol study, out"
        else:
            kind, remedy = "trained", "leave it out, or give --head deit or --protocol study"
        raise click.UsageError(f"{parameter.opts[0]} goes with a head that is {kind}: {remedy}")


@contextmanager
def solved(out: Path, given: dict[str, Any]) -> Iterator[Probe]:
    """Yield what probes a store by the sweep, scored by the columns given."""
    from probe.heads import fit_heads
    from probe.sweep import probe_all

    with engine_of(given) as cluster, row_workers(cluster) as team:
        fit = team.fit_heads if team else fit_heads
        settings = probing_of(given, protocol=given["protocol"], head=given["head"])
        text = prompts_of(given)
        refuse_seeds(settings)
        if team and settings.resolve().head != "linear":
            raise click.UsageError("--engine ray fits linear heads: leave it out for others")
        columns = parse_columns(given["columns"])
        if team and columns:
            raise click.UsageError("--with codes columns in one process: leave --engine ray out")

        def probe_one(store: Path, by: tuple[str, ...]) -> list[Result]:
            how: dict[str, Any] = {"settings": replace(settings, by=by), "fit": fit, **provenance()}
            how |= {"text": text, "columns": columns}
            with bar(f"{store.parent.name} x {store.stem}", "heads") as show:
                return probe_all(store, out=out, progress=passes(show), **how)

        yield probe_one


def row_workers(cluster: Cluster | None) -> AbstractContextManager[RowWorkers | None]:
    """Return the workers that hold rows, where a cluster works."""
    if cluster is None:
        return nullcontext()
    from probe.cluster import RowWorkers

    return RowWorkers(cluster)


@contextmanager
def trained_heads(out: Path, given: dict[str, Any]) -> Iterator[Probe]:
    """Yield what trains heads on a store, one per seed, scored by the columns given."""
    from probe.train.finetune import train_on_store

    head = given["head"] or "linear"
    if head in ("knn", "zero-shot"):
        raise click.UsageError(f"--protocol study has a linear or a deit head, not {head}")
    protocol = "study" if given["protocol"] == "study" else "finetune"

    def probe_one(store: Path, by: tuple[str, ...]) -> list[Result]:
        how: dict[str, Any] = {"feature": given["feature"], "out": out, "say": say}
        return [
            train_on_store(
                store,
                settings=training_of(given | {"by": by}, seed, protocol=protocol, head=head),
                about=provenance(),
                **how,
            )
            for seed in seeds_of(given)
        ]

    yield probe_one


def passes(show: Callable[[int, int, str], None]) -> Callable[[int, int, int], None]:
    """Return a progress function that says how far the slowest head of the batch is."""
    return lambda done, of, n: show(done, of, f"{n} passes over the data")
