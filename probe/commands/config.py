"""The TOML file of `medprobe run`: options by their long names, and tables of data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from probe.commands.arguments import (
    is_number,
)

if TYPE_CHECKING:
    pass


def read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the options of a TOML file as defaults: what the command line says counts more.

    A key is an option's long name. Of an option that may be repeated, and of one that takes a list
    with commas, the value may be a list. A dataset may be a table: `source`, and options that hold
    for it alone.
    """
    import tomllib

    if path is None:
        return
    if is_number(str(path)) and not path.is_file():
        raise click.UsageError(
            f"{path} is no TOML file: a list has commas and no spaces, such as --C 0.1,{path},10"
        )
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path} is no TOML file ({error})") from None
    datasets = found.get("dataset", [])
    datasets = datasets if isinstance(datasets, list) else [datasets]
    found["dataset"] = sources = []
    for dataset in datasets:
        own = dict(dataset) if isinstance(dataset, dict) else {"source": dataset}
        sources.append(str(own.pop("source", "")))
        ctx.meta.setdefault(tables_of(sources[-1]), []).append(_options(ctx, path, own))
    ctx.default_map = _options(ctx, path, found)


def tables_of(source: str) -> str:
    """Return the key of a click context's meta under which a data set's own tables are."""
    return f"{__name__}.{source}"


def _options(ctx: click.Context, path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Return values by the names of parameters."""
    import difflib

    known = {
        name.lstrip("-"): parameter
        for parameter in ctx.command.params
        for name in parameter.opts
        if name.startswith("--")
    }
    given = {}
    for key, value in found.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}" if close else f"want one of {', '.join(known)}"
            raise click.BadParameter(f"{path}: unknown key {key!r}: {hint}")
        option = known[key]
        if isinstance(value, dict):
            raise click.BadParameter(f"{path}: {key} is a table: want a value or a list")
        if getattr(option, "multiple", False):
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            value = ",".join(f'"{v}"' if "," in str(v) else str(v) for v in value)
        assert option.name
        given[option.name] = value
    return given
