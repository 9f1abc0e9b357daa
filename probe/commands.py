"""The commands that make, use and show results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from features.console import FILE, as_json, as_table, bar, device_option, json_option, provenance
from probe.finetune_command import finetune, say, say_tuned

if TYPE_CHECKING:
    from probe.results import Result


@click.command()
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
@click.option(
    "--head",
    type=click.Choice(["linear", "knn", "deit"]),
    help="Default the protocol's; deit trains an appended DeiT on the store's tokens.",
)
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
@click.option("--epochs", type=click.IntRange(min=1), default=100, help="deit: how many.")
@click.option(
    "--head-size",
    type=click.Choice(["deit-tiny", "deit-small", "deit-base"]),
    default="deit-base",
    help="deit: which; default deit-base.",
)
@click.option(
    "--head-weights", metavar="FILE|random", help="deit: default ImageNet's, from the hub."
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
    deit = {name: given.pop(name) for name in ("epochs", "head_size", "head_weights")}
    if given["head"] == "deit":
        return probe_by_deit(stores, out, given | deit, json_)
    settings = Settings(
        C=parse_strengths(strengths),
        k=parse_counts(neighbours, "--k"),
        shots=parse_shots(shots),
        **given,
    )
    found = []
    for store in stores:
        with bar(f"{store.parent.name} x {store.stem}", "heads") as show:
            results = run(
                store,
                out=out,
                settings=settings,
                **provenance(),
                progress=passes(show),
            )
        found += results
        if not json_:
            for result in results:
                say_result(result, several=len(results) > 1)
            click.echo(f"  {results[0].audit['line']}", err=True)
    if json_:
        as_json([asdict(result) for result in found])
    return None


def probe_by_deit(stores: tuple[Path, ...], out: Path, given: dict[str, Any], json_: bool) -> None:
    """Train an appended DeiT on the tokens of each store, and print the results."""
    from probe.finetune import Settings, train_on_tokens
    from probe.training import Training

    names = ["head_size", "head_weights", "metric", "uncertain", "strict_splits", "by", "unit"]
    names += ["aggregate", "threshold", "interval", "bootstrap", "seed"]
    found = []
    for seed in range(given["seed"], given["seed"] + (given["seeds"] or 1)):
        training = Training(epochs=given["epochs"], device=given["device"], seed=seed)
        settings = Settings(**{n: given[n] for n in names}, head="deit", training=training)
        for store in stores:
            result = train_on_tokens(
                store,
                feature=given["feature"] or "final/tokens",
                out=out,
                settings=settings,
                say=say,
                about=provenance(),
            )
            found.append(result)
            if not json_:
                say_tuned(result)
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


@click.command()
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


@click.command()
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
@click.option("--analysis", type=FILE, help="A folder of `medprobe analyze`: its cka*.csv.")
def report(
    results: tuple[Path, ...],
    out: Path,
    compare: tuple[Path, Path] | None,
    images: bool | None,
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
    options = Options(compare or None, analysis, private=images is False, dicom=images is True)
    click.echo(write_report(results, out, options))


COMMANDS = (probe, finetune, predict, compare, report)  # in order of use
