"""Which files of a manifest are there, before anything is computed. Files at URLs are not asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import MissingImagesError
from features.manifest import Manifest

THREADS = 32  # a network disk answers so many at once
BLOCK = 512  # files that a thread asks for in a row
FIRST = 64  # files asked before all are


@dataclass(frozen=True)
class Presence:
    """Of `images` files some are missing, such as `example`; those at URLs were not checked.

    folder: where paths of the manifest are looked for.
    """

    images: int
    missing: int
    not_checked: int
    folder: str
    example: str = ""

    @property
    def there(self) -> int:
        """How many were found."""
        return self.images - self.missing - self.not_checked

    def line(self) -> str:
        """Return one line: how many files are there, or how many are not and where."""
        if self.not_checked == self.images:
            return f"{self.images} files at URLs: not checked"
        asked = self.images - self.not_checked
        rest = f"; {self.not_checked} at URLs not checked" if self.not_checked else ""
        if not self.missing:
            return f"{asked} of {asked} files are there, in {self.folder}{rest}"
        return f"{missing_line(self.missing, asked, self.folder, self.example)}{rest}"

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return asdict(self) | {"there": self.there}


def missing_line(missing: int, of: int, folder: str, example: str) -> str:
    """Say how many files are missing, where they were looked for, and one of them."""
    are = "is" if missing == 1 else "are"
    return f"{missing} of {of} files {are} not there: looked for in {folder}, such as {example}"


def exist(files: Sequence[str]) -> NDArray[np.bool_]:
    """Say of each file (n,) whether it is one; a folder or a pipe is none."""
    blocks = [files[a : a + BLOCK] for a in range(0, len(files), BLOCK)]
    with ThreadPoolExecutor(THREADS) as threads:
        blocks_found = threads.map(lambda block: [os.path.isfile(f) for f in block], blocks)  # noqa: PTH113
        return np.array([one for block in blocks_found for one in block], dtype=bool)


def look(manifest: Manifest) -> Presence:
    """Ask for every file that is on a disk."""
    root, paths = manifest.root, manifest.path.tolist()
    local: list[str] = []
    if isinstance(root, Path):
        local = [os.path.join(root, path) for path in paths if "://" not in path]  # noqa: PTH118
    gone = np.flatnonzero(~exist(local))
    return Presence(
        images=len(paths),
        missing=len(gone),
        not_checked=len(paths) - len(local),
        folder=str(manifest.root),
        example=local[gone[0]] if len(gone) else "",
    )


def need_some(manifest: Manifest) -> None:
    """Raise MissingImagesError where none of a manifest's files is there."""
    for row in range(min(FIRST, len(manifest))):
        file = manifest.file(row)
        if not isinstance(file, Path) or file.is_file():
            return
    presence = look(manifest)
    if presence.missing == presence.images:
        raise MissingImagesError(nothing_there(manifest.dataset, presence))


def nothing_there(dataset: str, presence: Presence) -> str:
    """Say that no file is there, and what to do."""
    return (
        f"{dataset}: {presence.line()}. Paths are relative to the table: correct its column of "
        "paths, or put the table where they begin"
    )
