"""Images left out by what a column says of them: `--exclude COLUMN=VALUE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import NO_SPLIT, SPLITS, Manifest


def column_of(manifest: Manifest, name: str) -> NDArray[np.str_]:
    """Return a column (N,) of a manifest, subjects too. Raises ProbeError where it has none."""
    if name == "subject":
        return np.asarray(manifest.subject)
    if name not in manifest.columns:
        known = ", ".join(manifest.columns) or "none"
        raise ProbeError(
            f"{manifest.dataset} has no column {name!r}: found {known}; columns come with the data "
            "set, see docs/datasets.md"
        )
    return np.asarray(manifest.columns[name])


def without(manifest: Manifest, exclude: Sequence[str]) -> Manifest:
    """Return a manifest in which images that have one of COLUMN=VALUE are in no part of the split.

    An empty VALUE leaves out those of which the column says nothing. Raises ProbeError for a column
    or a value that isn't there.
    """
    split = manifest.split
    for one in exclude:
        name, _, value = one.partition("=")
        column = column_of(manifest, name)
        there = column == value
        if not there.any() and value:
            values = sorted(set(column.tolist()) - {""})
            more = ", ..." if len(values) > 10 else ""
            raise ProbeError(
                f"{manifest.dataset}: no image has {name} {value!r}, found "
                f"{', '.join(values[:10]) or 'none'}{more}"
            )
        split = np.where(there, NO_SPLIT, split)
    return replace(manifest, split=split) if len(exclude) else manifest


def excluded(manifest: Manifest, exclude: Sequence[str]) -> list[str]:
    """Say of each COLUMN=VALUE how many images it leaves out of a manifest."""
    used = np.isin(manifest.split, SPLITS)
    said = []
    for one in exclude:
        name, _, value = one.partition("=")
        n = int((used & (column_of(manifest, name) == value)).sum())
        what = f"{name} {value}" if value else f"no {name}"
        said.append(f"left out: {n} image{'s' * (n != 1)} of {what}")
    return said
