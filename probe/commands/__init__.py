"""The commands that make, use and show results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from features.arguments import engine_of, engine_options, options_of, source_options
from features.console import (
    FILE,
    Damaged,
    as_json,
    as_table,
    bar,
    device_option,
    echo,
    images_per_second,
    json_option,
    provenance,
)
from features.files import write_whole
from probe.commands.analyze import analyze
from probe.commands.arguments import (
    DEIT,
    LOOP,
    deit_options,
    loop_options,
    probing_of,
    probing_options,
    refuse_spaces,
    say_added,
    scoring_options,
    seeds_of,
    training_of,
)
from probe.commands.finetune import finetune, say, say_tuned
from probe.commands.run import run

if TYPE_CHECKING:
    from features.cluster import Cluster
    from probe.cluster import RowWorkers
    from probe.results import Result

    Probe = Callable[[Path, tuple[str, ...]], list[Result]]  # store, columns to score by


@click.command()
@click.argument("stores", nargs=-1, required=True, type=FILE)
@click.option(
    "-o", "out", type=FILE, default="results", show_default=True, help="Where results go."
)
@click.option(
    "--protocol",
    default="dinov2-logreg",
    show_default=True,
    help="A preset of strengths and folds; study trains the head instead.",
)
@click.option(
    "--head",
    type=click.Choice(["linear", "knn", "deit"]),
    help="Default the protocol's; deit trains an appended DeiT on the store's tokens.",
)
@probing_options
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
            found += results
            if not json_:
                say_results(results, trained=trained)
    if json_:
        as_json([asdict(result) for result in found])
    if failed:
        raise Damaged(f"{len(failed)} of {len(stores)} stores have no result, see above")


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


def say_results(results: Sequence[Result], *, trained: bool) -> None:
    """Print the results of a store, and on standard error what its audit found."""
    for result in results:
        if trained:
            say_tuned(result)
        else:
            say_result(result, several=len(results) > 1)
    echo(f"  {results[0].audit['line']}", err=True)


def refuse(trained: bool) -> None:
    """Raise UsageError where an option was given that goes with the other kind of head."""
    ctx = click.get_current_context()
    solved_only = {"strengths", "neighbours", "temperature", "folds", "shots", "control"}
    solved_only |= {"engine", "address", "num_cpus_per_worker", "num_gpus_per_worker"}
    trained_only = {*LOOP, *DEIT, "no_augment", "tensorboard"}
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

    with engine_of(given) as cluster, team_of(cluster) as team:
        fit = team.fit_heads if team else fit_heads
        settings = probing_of(given, protocol=given["protocol"], head=given["head"], fit=fit)
        if team and settings.filled().head != "linear":
            raise click.UsageError("--engine ray fits linear heads: leave it out for others")

        def probe_one(store: Path, by: tuple[str, ...]) -> list[Result]:
            how: dict[str, Any] = {"settings": replace(settings, by=by), **provenance()}
            with bar(f"{store.parent.name} x {store.stem}", "heads") as show:
                return probe_all(store, out=out, progress=passes(show), **how)

        yield probe_one


def team_of(cluster: Cluster | None) -> AbstractContextManager[RowWorkers | None]:
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
    if head == "knn":
        raise click.UsageError("--protocol study has a linear or a deit head, not knn")
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


def say_group(metric: str, group: dict[str, Any], *, subjects: bool) -> None:
    """Print the metric of one group."""
    low, high = group["ci_low"], group["ci_high"]
    score = "not defined"
    if group["value"] is not None:
        score = f"{group['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
    echo(
        f"  {group['column']} {group['group']}: {metric} {score}, n = {group['n']}"
        + (f", {group['subjects']} subjects" if subjects else "")
        + (" (few)" if group["small"] else "")
    )


def say_result(result: Result, *, several: bool) -> None:
    """Print a result in one line, and on standard error what must be known of it."""
    cell = [result.feature] if several else []
    cell += [f"{result.shots} shots, seed {result.seed}"] if result.shots else []
    chosen = f"C = {result.C:.3g}" if result.C else ""
    for name, key in (("k", "chosen"), ("l2", "l2")):
        chosen = f"{name} = {result.folds[key]:g}" if key in result.folds else chosen
    echo(
        f"{' '.join([f'{result.dataset} x {result.backbone}', *cell])}: "
        f"{result.metric} {result.value:.3f} [{result.ci_low:.3f}, {result.ci_high:.3f}] "
        f"on {result.n_test} test images, {chosen}"
    )
    if control := result.control:
        echo(
            f"  with shuffled labels: {control['value']:.3f} "
            f"[{control['ci_low']:.3f}, {control['ci_high']:.3f}]"
        )
    if result.few:
        echo(f"  {result.few}", err=True)
    if result.ci_low == result.ci_high:
        echo(f"  {result.notes[-1]}", err=True)
    for group in result.subgroups:
        say_group(result.metric, group, subjects=result.subjects_known)
    if result.weights == "random":
        echo("  the backbone's weights are random: the score says nothing about it", err=True)
    if not result.converged:
        echo("  not every head converged: see the result's notes and folds", err=True)


def passes(show: Callable[[int, int, str], None]) -> Callable[[int, int, int], None]:
    """Return a progress function that says how far the slowest head of the batch is."""
    return lambda done, of, n: show(done, of, f"{n} passes over the data")


@click.command()
@click.argument("head", type=FILE)
@click.argument("source", metavar="STORE|DATASET")
@click.option("-o", "out", type=FILE, help="A CSV file; default standard output.")
@click.option("--weights", metavar="FILE", help="Of the backbone, where they came from a file.")
@click.option(
    "--features",
    "stores",
    type=FILE,
    default="features",
    show_default=True,
    help="Where the store of a DATASET's features goes.",
)
@device_option
@source_options
def predict(
    head: Path, source: str, out: Path | None, weights: str | None, stores: Path, **given: Any
) -> None:
    """Apply a saved HEAD to every image and write class probabilities as CSV.

    An image that can't be read, or whose features in the store are damaged, has a row too, with
    the reason in place of an answer; of the second kind the exit code is 1.
    HEAD is a heads.json, or the run.json of a training run. A store must come
    from the backbone, with the weights, that it was fitted on; a data set is
    extracted first, prepared as for the head.

    \b
    medprobe predict results/sample/efficientnet_lite0/*/heads.json \\
        features/sample/efficientnet_lite0.h5 -o said.csv
    """
    from features.datasets import open_dataset
    from features.devices import resolve_device
    from probe.predict import predict as run
    from probe.predict import predict_images

    if Path(source).is_file():
        found = run(head, Path(source))
    else:
        manifest = open_dataset(source, replace(options_of(given), labelled=False))
        with bar(f"{manifest.dataset}: features", "images") as show:
            found = predict_images(
                head,
                manifest,
                features=stores,
                weights=weights,
                device=resolve_device(given["device"]),
                progress=images_per_second(show),
            )
    if out is None:
        click.echo(found.table.encode("utf-8", "surrogateescape"), nl=False)
    else:
        write_whole(out, found.table.encode("utf-8", "surrogateescape"))
        echo(f"{out}: {found.images} images", err=True)
    if found.damaged or len(found.without) == found.images:
        raise Damaged(found.line())
    if found.without:
        echo(f"Warning: {found.line()}", err=True)


@click.command()
@click.argument("results", nargs=-1, required=True, type=FILE)
@click.option(
    "--resamples",
    type=click.IntRange(min=100),
    default=2000,
    show_default=True,
    help="Of the paired bootstrap and the permutation test, which takes more where p is small.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For them.")
@click.option("--metric", help="Only results by this metric.")
@json_option
def compare(
    results: tuple[Path, ...], resamples: int, seed: int, metric: str | None, json_: bool
) -> None:
    """Say whether the models of RESULTS differ: in pairs on each data set, by ranks over all.

    The p of a pair is of a permutation test by subject, or of DeLong's for the AUROC of two classes
    and independent images, and Holm's for the number of pairs of a data set. The best model of a
    data set is also held against the rest with an allowance for having searched for it.

    \b
    medprobe compare results
    """
    from probe.compare import compare_results

    found = compare_results(results, n=resamples, seed=seed, by=metric)
    if json_:
        return as_json(found.to_json())
    for note in found.notes:
        echo(note, err=True)
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
        echo()
        as_table(rows)
        floors = [pair.difference.resolution for pair in found.pairs if pair.difference]
        if max(floors, default=0.0) > 0:
            echo(f"p by permutation can be as small as {max(floors):.2g}")
    for best in found.best:
        echo(f"\n{best.sentence}")
    if found.ranks and len(found.datasets) > 1:
        echo(f"\nmean ranks over {len(found.datasets)} data sets (1 is best)")
        as_table([(m, f"{r:.2f}") for m, r in zip(found.models, found.ranks.mean, strict=True)])
        if found.ranks.p is None:
            echo(f"no test: {found.ranks.why_not}")
        else:
            echo(
                f"Friedman's p = {found.ranks.p:.4f}; ranks {found.ranks.critical:.2f} apart "
                "differ (Nemenyi, 5 %)"
            )
    return None


@click.command()
@click.argument("results", nargs=-1, type=FILE)
@click.option(
    "-o", "out", type=FILE, default="report", show_default=True, help="Where the report goes."
)
@click.option(
    "--compare", nargs=2, type=FILE, metavar="A B", help="Two results folders, side by side."
)
@click.option(
    "--images/--no-images",
    default=None,
    help="Small copies of images, of DICOM too; or neither pixels nor paths nor ids of images and "
    "subjects. By default copies of all but DICOM.",
)
@click.option("--fetch", is_flag=True, help="Small copies of images at URLs too.")
@click.option("--analysis", type=FILE, help="A folder of `medprobe analyze`: its cka*.csv.")
def report(
    results: tuple[Path, ...],
    out: Path,
    compare: tuple[Path, Path] | None,
    images: bool | None,
    fetch: bool,
    analysis: Path | None,
) -> None:
    """Write one HTML page, figures and tables of RESULTS (folders, or results.jsonl files).

    \b
    medprobe report --compare results/before results/after
    medprobe report results
    """
    from probe.report import Options, write_report

    if not results and not compare:
        raise click.UsageError("nothing to report: name a results folder, or --compare A B")
    options = Options(
        compare or None, analysis, private=images is False, dicom=images is True, fetch=fetch
    )
    echo(write_report(results, out, options))


COMMANDS = (probe, finetune, run, predict, compare, analyze, report)  # in order of use
