"""What the readers of published data sets share: finding their files, reading their tables."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

from features.errors import DatasetError, MissingImagesError


def need(folder: Path, names: Sequence[str], dataset: str, source: str) -> Path:
    """Return the first of several names that is in a folder.

    Raises DatasetError that says which file is missing and where it is to be had.
    """
    if not folder.is_dir():
        raise DatasetError(f"{dataset}:{folder}: there is no such folder; the data is at {source}")
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DatasetError(
        f"{dataset}:{folder} has no {' or '.join(names)}: unpack it there; it is at {source}"
    )


def read_rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return a table's rows, cells stripped. Raises DatasetError where a column is missing."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [{k: (v or "").strip() for k, v in row.items() if k} for row in reader]
            header = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file} is not a UTF-8 table: {error}") from None
    missing = [name for name in columns if name not in header]
    if missing:
        raise DatasetError(f"{file} has no column {', '.join(missing)}: found {', '.join(header)}")
    return rows


def some_there(root: Path, paths: Sequence[str], where: str, source: str) -> None:
    """Raise MissingImagesError if none of them exists; single missing ones are for extraction."""
    if not any((root / path).exists() for path in paths):
        raise MissingImagesError(
            f"{where}: none of its {len(paths)} images is there, such as "
            f"{root.resolve() / paths[0]}: unpack them; they are at {source}"
        )


def shuffled_split(n: int, held_out: float) -> list[str]:
    """Return the study's split of n rows: shuffled with seed 42, val and test each half of the end.

    joanaapa/Foundation-Medical, defaults/bases.py, get_validation_ids.
    """
    order = list(range(n))
    random.Random(42).shuffle(order)  # Python's own, to be equal to the study's
    out = int(n * held_out)
    split = ["train"] * n
    for rank, row in enumerate(order[:out]):
        split[row] = "val" if rank < out // 2 else "test"
    return split
