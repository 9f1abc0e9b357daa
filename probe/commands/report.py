"""The command that writes the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from features.console import (
    FILE,
    echo,
)

if TYPE_CHECKING:
    from probe.results import Result

    Probe = Callable[[Path, tuple[str, ...]], list[Result]]  # store, columns to score by


@click.command()
@click.argument("results", nargs=-1, type=FILE)
@click.option(
    "-o",
    "out",
    type=FILE,
    default="report",
    show_default=True,
    help="The folder that the report is written to.",
)
@click.option(
    "--compare", nargs=2, type=FILE, metavar="A B", help="Show two results folders side by side."
)
@click.option(
    "--images/--no-images",
    default=None,
    help="Show small copies of images, of DICOM too; or show neither pixels nor paths "
    "nor ids of images and subjects. By default there are copies of all but DICOM.",
)
@click.option("--fetch", is_flag=True, help="Show small copies of images at URLs too.")
@click.option(
    "--analysis", type=FILE, help="The folder of `medprobe analyze`, whose cka*.csv are shown."
)
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
