"""`csv:FILE`: a table with one row per image.

FILE may be a URL. Columns: path (relative to the table, or a URL), label or label_* ; subject and
split if there are any. One label column makes a multiclass task, or with `--label-sep` a multilabel
one. Several columns label_<finding> make a multilabel task, with 1, 0, -1 (uncertain) or nothing in
each cell.
"""

from __future__ import annotations

import csv

import numpy as np
from numpy.typing import NDArray

from features.datasets.drawing import build, index_classes
from features.datasets.options import Options
from features.errors import DatasetError
from features.manifest import ABSENT, NOT_STATED, PRESENT, UNCERTAIN, Manifest, natural_order
from features.urls import Location

STATES = {"1": PRESENT, "0": ABSENT, "-1": UNCERTAIN, "": NOT_STATED}
GROUPS = 100
STATES |= {f"{k}.0": v for k, v in STATES.items() if k}


def read(file: Location, options: Options) -> Manifest:
    """Return the manifest of a table.

    Raises DatasetError for unknown columns, empty cells, wrong labels.
    """
    if not file.is_file():
        raise DatasetError(f"csv:{file}: there is no such file")
    where = f"csv:{file}"
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
            header = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{where} is not a UTF-8 table: {error}") from None

    def column(name: str, option: str) -> list[str]:
        if name not in header:
            raise DatasetError(
                f"{where} has no column {name!r}: found {', '.join(header)}; "
                f"name the right one with {option}"
            )
        return [(row[name] or "").strip() for row in rows]

    def optional(name: str, option: str, default: str) -> list[str] | None:
        if name not in header and name == default:
            return None
        values = column(name, option)
        return values if any(values) else None  # a column left empty is a column not given

    paths = column(options.path_col, "--path-col")
    for number, path in enumerate(paths, 2):
        if not path:
            raise DatasetError(f"{where}, line {number}: the cell {options.path_col!r} is empty")
    several = [name for name in header if name.startswith("label_")]
    if options.label_col not in header and options.label_col == "label" and several:
        label, classes = _states({name: column(name, "--label-col") for name in several}, where)
    elif options.label_col not in header and not options.labelled:
        label, classes = index_classes([""] * len(rows))
    elif options.label_sep:
        label, classes = _split_cells(column(options.label_col, "--label-col"), options.label_sep)
    else:
        label, classes = index_classes(column(options.label_col, "--label-col"))
    subjects = optional(options.subject_col, "--subject-col", "subject")
    if subjects is not None and not all(subjects):
        number = subjects.index("") + 2
        raise DatasetError(
            f"{where}, line {number}: the cell {options.subject_col!r} is empty; "
            "a subject is needed in every row, or in none"
        )
    return build(
        dataset=file.resolve().parent.name or file.stem,
        root=file.resolve().parent,
        paths=paths,
        label=label,
        classes=classes,
        subjects=subjects,
        splits=optional(options.split_col, "--split-col", "split"),
        options=options,
        where=where,
        columns=_groups(rows, [name for name in header if name not in _used(options, several)]),
    )


def _used(options: Options, findings: list[str]) -> set[str]:
    own = {options.path_col, options.label_col, options.subject_col, options.split_col}
    return own | set(findings)


def _groups(rows: list[dict[str, str]], names: list[str]) -> dict[str, list[str]]:
    """Return the columns that divide the images into groups, for metrics by group.

    Others (free text, names, dates: more than GROUPS values, or fewer than two images per value)
    stay in the table.
    """
    found = {}
    for name in names:
        values = [(row[name] or "").strip() for row in rows]
        if 2 <= len(set(values)) <= min(GROUPS, len(values) // 2):
            found[name.lower().replace("/", "-")] = values
    return found


def _states(columns: dict[str, list[str]], where: str) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    for name, cells in columns.items():
        for number, cell in enumerate(cells, 2):
            if cell not in STATES:
                raise DatasetError(
                    f"{where}, line {number}: {name} is {cell!r}: "
                    "want 1, 0, -1 (uncertain) or nothing"
                )
    states = [[STATES[cell] for cell in cells] for cells in columns.values()]
    return np.array(states, dtype=np.int32).T, tuple(
        name.removeprefix("label_") for name in columns
    )


def _split_cells(cells: list[str], sep: str) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    found = [{part.strip() for part in cell.split(sep)} - {""} for cell in cells]
    classes = natural_order([name for names in found for name in names])
    rows = [[PRESENT if name in names else ABSENT for name in classes] for names in found]
    return np.array(rows, dtype=np.int32).reshape(len(cells), len(classes)), tuple(classes)
