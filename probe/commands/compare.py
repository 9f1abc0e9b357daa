"""The command that tests whether models differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from features.console import (
    FILE,
    as_json,
    as_table,
    echo,
    json_option,
)

if TYPE_CHECKING:
    from probe.results import Result

    Probe = Callable[[Path, tuple[str, ...]], list[Result]]  # store, columns to score by


@click.command()
@click.argument("results", nargs=-1, required=True, type=FILE)
@click.option(
    "--resamples",
    type=click.IntRange(min=100),
    default=2000,
    show_default=True,
    help="The number of resamples of the paired bootstrap, and of the permutation test, "
    "which takes more where p is small.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="The seed of the resamples.",
)
@click.option("--metric", help="Compare only results by this metric.")
@json_option
def compare(
    results: tuple[Path, ...], resamples: int, seed: int, metric: str | None, json_: bool
) -> None:
    """Say whether the models of RESULTS differ: in pairs on each data set, by ranks over all.

    A pair's p-value is of a permutation test by subject, or of DeLong's test for the AUROC of two
    classes and independent images. It is adjusted by Holm's method for the number of pairs of a
    data set. The best model of a data set is also compared with the rest by a test that corrects
    for having selected it.

    \b
    medprobe compare results
    """
    from probe.compare import compare_results

    comparison = compare_results(results, n=resamples, seed=seed, by=metric)
    if json_:
        return as_json(comparison.to_json())
    for note in comparison.notes:
        echo(note, err=True)
    rows: list[tuple[str, ...]] = [("dataset", "model", "metric", "value", "interval", "seeds")]
    for score in comparison.scores:
        spread = "" if score.deviation is None else f" (sd {score.deviation:.3f})"
        interval = f"[{score.ci_low:.3f}, {score.ci_high:.3f}]"
        seeds = str(len(score.seeds))
        value = f"{score.value:.3f}{spread}"
        rows.append((score.dataset, score.model, score.metric, value, interval, seeds))
    as_table(rows)
    rows = [("dataset", "a", "b", "a - b", "interval", "p", "Holm's p", "test")]
    for pair in comparison.pairs:
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
        floors = [pair.difference.resolution for pair in comparison.pairs if pair.difference]
        if max(floors, default=0.0) > 0:
            echo(f"p by permutation can be as small as {max(floors):.2g}")
    for best in comparison.best:
        echo(f"\n{best.sentence}")
    if (ranks := comparison.ranks) and len(comparison.datasets) > 1:
        echo(f"\nmean ranks over {len(comparison.datasets)} data sets (1 is best)")
        models = zip(comparison.ranked, ranks.mean, strict=True)
        as_table([(name, f"{rank:.2f}") for name, rank in models])
        if ranks.p is None:
            echo(f"no test: {ranks.why_not}")
        else:
            echo(
                f"Friedman's p = {ranks.p:.4f}; ranks {ranks.critical:.2f} apart "
                "differ (Nemenyi, 5 %)"
            )
    return None
