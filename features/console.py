"""What commands share: how they print, show progress, stop and fail, and the options many have."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


class Folder(click.Path):
    """A folder that is written to: on a disk."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Refuse a URL."""
        if "://" in str(value):
            self.fail(f"{value} is a URL: want a folder on a disk, local or shared", param, ctx)
        return super().convert(value, param, ctx)


FILE = click.Path(path_type=Path)
FOLDER = Folder(path_type=Path)
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "h5py", "pillow")


# Control characters but line breaks and tabs, marks of the reading direction, half characters.
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class Failure(click.ClickException):
    """An error of Medprobe as click prints it."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class FaultFound(Failure):
    """A fault that the work found."""

    exit_code = 1


def visible(text: str) -> str:
    """Return text whose control characters are written out: names are not ours to run.

    Terminals take some as commands (ESC), others turn the reading direction or break the line, and
    bytes that are not UTF-8 have none at all.
    """
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def echo(text: str | Path = "", *, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(visible(str(text)), err=err)


def as_json(value: Any) -> None:
    """Print one JSON document, in ASCII."""
    click.echo(json.dumps(value, indent=2, default=str))


def as_table(rows: Sequence[Sequence[Any]]) -> None:
    """Print rows in columns."""
    # By hand: rich's table without a box gives the same lines, but for blanks at their ends and the
    # width of Chinese characters, and takes 3.3 s for 20,000 rows where this takes 0.02 s.
    cells = [[visible(str(c)).replace("\n", "\\n") for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        echo("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())


def versions() -> dict[str, str]:
    """Return what ran: Python, Medprobe and the libraries that numbers depend on."""
    from importlib.metadata import version

    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: version(name) for name in ("medprobe", *LIBRARIES)}


def provenance() -> dict[str, Any]:
    """Return what a result says of how it came to be: the command, and what ran."""
    return {"command": "medprobe " + shlex.join(sys.argv[1:]), "versions": versions()}


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
        TextColumn(visible(title), markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[remark]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(title, total=None, remark="")

        def show(done: int, of: int, remark: str = "") -> None:
            progress.update(task, completed=done, total=of, remark=remark)

        yield show


def duration(seconds: float) -> str:
    """Return seconds as a person says them: 42 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a wish, the second into a stop; yields "stop?"."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)
        echo("Stopping after this batch; once more stops at once.", err=True)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


json_option = click.option(
    "--json",
    "json_",
    is_flag=True,
    help="Print one JSON document on standard output, and nothing else there.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="The device to compute on; auto takes a GPU where there is one.",
)
