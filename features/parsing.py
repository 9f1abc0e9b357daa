"""Values as they are written on a command line, turned into what they mean."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from features.manifest import Manifest

OF_FOLDERS = ("timm:local-dir:", "openclip:local-dir:", "hf:")  # what may be followed by a folder


def weights_of(
    names: Sequence[str], given: Sequence[str]
) -> tuple[list[str], dict[str, str | None]]:
    """Return the backbones of -m NAME or NAME=FILE, and the weights of each; None is published.

    `given` is --weights: [NAME=]FILE, or random, of all that have none of their own.
    """
    weights_by_name: dict[str, str | None] = {}
    spelled: dict[str, str] = {}  # names as they are given, and as they are taken
    for name, _, weights in (text.partition("=") for text in names):
        spelled[name] = _plain(name)
        _take(weights_by_name, spelled[name], _path(weights) or None)
    some = list(weights_by_name)
    spelled |= {name: name for name in some}
    for text in given:
        named = max((name for name in spelled if text.startswith(f"{name}=")), key=len, default="")
        if named:
            _take(weights_by_name, spelled[named], _path(text.removeprefix(f"{named}=")))
    for text in given:
        if any(text.startswith(f"{name}=") for name in spelled):
            continue
        text = _path(text)
        if text != "random" and len(some) > 1:
            raise click.BadParameter(
                f"{text!r} goes with one backbone: write BACKBONE={text}, BACKBONE one of "
                f"{', '.join(some)}",
                param_hint="--weights",
            )
        for name in some:
            if len(some) == 1 or weights_by_name[name] is None:
                _take(weights_by_name, name, text)
    return some, weights_by_name


def _plain(name: str) -> str:
    """Return a backbone's name with a folder in it spelled one way; a store is called by it."""
    prefix = next((one for one in OF_FOLDERS if name.startswith(one)), None)
    return name if prefix is None else prefix + _path(name.removeprefix(prefix))


def _path(text: str) -> str:
    """Return a path without needless slashes and dots, ~ being the home folder; else the text.

    A relative path stays so, and `..`, which may follow a link.
    """
    with suppress(RuntimeError, OSError):  # no such user, a name that is too long
        path = Path(text).expanduser() if text.startswith("~") else Path(text)
        return str(path) if text and (path.is_dir() or text.startswith("~")) else text
    return text


def _take(weights_by_name: dict[str, str | None], name: str, weights: str | None) -> None:
    if (before := weights_by_name.get(name)) and weights and before != weights:
        raise click.BadParameter(
            f"{name} is given {before} and {weights}: want one, or another -o for each",
            param_hint="--weights",
        )
    weights_by_name[name] = weights or before


def parse_names(text: str | None, option: str) -> tuple[str, ...]:
    """Return names with commas between them; one with a comma in it stands in double quotes."""
    if text is None:
        return ()
    names = [name.strip() for row in csv.reader([text], skipinitialspace=True) for name in row]
    if all(names) and names:
        return tuple(names)
    raise click.BadParameter(f"{text!r}: want names with commas between them", param_hint=option)


def parse_fold(text: str | None) -> tuple[int, int] | None:
    """Return I and K of --test-fold."""
    if text is None:
        return None
    i, _, k = text.partition("/")
    if i.isdecimal() and k.isdecimal() and 1 <= int(i) <= int(k) and int(k) > 1:
        return int(i), int(k)
    raise click.BadParameter(f"{text!r}: want I/K such as 1/5", param_hint="--test-fold")


def parse_fit(text: str) -> tuple[str, int | None] | None:
    """Return the fit of --fit and the side before the crop, if it is said; None is the model's."""
    from features.images import FITS

    if text == "model":
        return None
    fit, colon, side = text.partition(":")
    if fit in FITS and (not colon or (side.isdecimal() and int(side) > 0)):
        return fit, int(side) if colon else None
    raise click.BadParameter(
        f"{text!r}: want model, crop, squash or pad, with a side in pixels if that matters, "
        "such as squash:256",
        param_hint="--fit",
    )


def parse_batch_size(text: str) -> int | None:
    """Return the number of --batch-size, or None for auto."""
    if text == "auto":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise click.BadParameter(f"{text!r}: want a number, or auto", param_hint="--batch-size")


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
