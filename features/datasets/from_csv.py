"""`csv:FILE`: a table with one row per image, as text (CSV, TSV), Parquet or Excel.

FILE may be a URL. Columns: path (relative to the table, or a URL), label or label_* ; subject and
split if there are any. One label column makes a multiclass task, or with `--label-sep` a multilabel
one. Several columns label_<finding> make a multilabel task, with 1, 0, -1 (uncertain) or nothing in
each cell.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features.datasets.build import Listing, build, index_classes
from features.datasets.cells import MISSING, apart, clean
from features.datasets.grouping import groups, warn_of_subjects
from features.datasets.labels import one_class, split_cells, states
from features.datasets.naming import table_name
from features.datasets.options import Options
from features.datasets.reading import Table, read_table
from features.errors import DatasetError
from features.manifest import Manifest
from features.presence import exist
from features.urls import Location, Url

FINDING = "label_"
# What label_... is of a label, and no finding: label_id, label_name.
FACTS = {
    *("by", "code", "comment", "date", "file", "id", "ids", "idx", "index", "key", "name", "names"),
    *("no", "note", "notes", "nr", "num", "number", "path", "source", "text", "uid", "url", "uuid"),
}
OFTEN = {  # what columns are called often
    "path": ("path", "file", "image", "img", "dicom"),
    "label": ("label", "class", "target", "diagnosis", "grade", "finding", "category"),
}
OTHERS = ("|", ":", "^", "~", " ")  # separators that are not read
SHOWN = 12  # columns that an error names


def read(file: Location, options: Options) -> Manifest:
    """Return the manifest of a table.

    Raises DatasetError for unknown columns, empty cells, wrong labels.
    """
    where = f"csv:{file}"
    given = (options.path_col, options.label_col, options.subject_col, options.split_col)
    table = read_table(file, where, given)
    root = file.resolve().parent
    path_col = _find(table, options.path_col, "--path-col")
    label, classes, used, label_from = _labels(table, options)
    subject_col = _optional(table, options.subject_col, "--subject-col", "subject")
    split_col = _optional(table, options.split_col, "--split-col", "split")
    used |= {path_col, subject_col, split_col}
    others = [name for name in table.header if name and name not in used]
    if not options.labelled:  # to be predicted: nobody's images are kept together
        subject_col = split_col = None
    subjects = _subjects(table, subject_col, options) if subject_col else None
    if subjects is None and options.labelled and not options.subject_from_dicom:
        warn_of_subjects(table, others)
    return build(
        Listing(
            dataset=table_name(file),
            root=root,
            paths=_paths(table, path_col, root),
            label=label,
            classes=classes,
            subjects=subjects,
            splits=_splits(table, split_col) if split_col else None,
            where=where,
            columns=groups(table, others),
            label_from=label_from,
            order_from="names",
        ),
        options,
    )


# --- which column -------------------------------------------------------------------------------


def _find(table: Table, name: str, option: str) -> str:
    """Return a column's name as the table has it. Raises DatasetError where there is none.

    One that differs in case is taken where it is the only one, and said.
    """
    if name in table.header:
        return name
    alike = _alike(table, name)
    if len(alike) == 1:
        return _read_as(table, name, alike[0])
    header = [other for other in table.header if other]
    more = f" and {len(header) - SHOWN} more" if header[SHOWN:] else ""
    shown = ", ".join(header[:SHOWN]) + more
    if len(header) == 1 and (mark := _separator(header[0], given=name)):
        raise DatasetError(
            f"{table.where} has one column, {header[0]!r}: its cells seem to have {mark!r} between "
            "them; want a comma, semicolon or tab"
        )
    close = alike or _close(name.casefold(), header)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise DatasetError(
        f"{table.where} has no column {name!r}: found {shown}{hint}; "
        f"name the right one with {option}"
    )


def _optional(table: Table, name: str, option: str, default: str) -> str | None:
    """Return a column's name, or None where it is the default's and the table has none such."""
    if name == default and name not in table.header and not _alike(table, name):
        return None
    return _find(table, name, option)


def _alike(table: Table, name: str) -> list[str]:
    return [other for other in table.header if other.casefold() == name.casefold()]


def _close(name: str, names: Sequence[str]) -> list[str]:
    """Return names that may be meant: by their words, else by their letters."""
    words = OFTEN.get(name, ())
    meant = [other for other in names if any(word in other.casefold() for word in words)]
    return meant[:3] or difflib.get_close_matches(name, names, 2)


def _separator(header: str, *, given: str) -> str | None:
    """Return what stands between the names of a header that was read as one, if anything does."""
    for mark in OTHERS:
        parts = {part.strip(" '\"").casefold() for part in header.split(mark)}
        known = [bool(parts & {*words}) for words in OFTEN.values()]
        if len(parts) == 1:
            continue
        if all(known) or (mark != " " and (any(known) or given.casefold() in parts)):
            return mark
    return None


def _read_as(table: Table, name: str, column: str) -> str:
    warnings.warn(f"{table.where}: column {column} is taken for {name}", stacklevel=4)
    return column


def _labels(
    table: Table, options: Options
) -> tuple[NDArray[np.int32], tuple[str, ...], set[str | None], str]:
    """Return labels (N,) or (N, L), classes, the columns they are from, and these columns' name."""
    name = options.label_col
    if name not in table.header and name == "label":
        findings = [n for n in table.header if n.startswith(FINDING)] or [
            n for n in table.header if n.casefold().startswith(FINDING)
        ]
        facts = [n for n in findings if n[len(FINDING) :].strip().casefold() in FACTS]
        findings = [n for n in findings if n not in facts]
        if facts and findings:
            warnings.warn(
                f"{table.where}: {', '.join(facts)} {'is' if len(facts) == 1 else 'are'} not taken "
                f"for a finding beside {', '.join(findings[:3])}",
                stacklevel=3,
            )
        if findings:
            label = states({n: table.cells(n) for n in findings}, table.at)
            return label, tuple(n[len(FINDING) :] for n in findings), {*findings}, f"{FINDING}*"
    if not options.labelled and not (name in table.header or len(_alike(table, name)) == 1):
        return *index_classes([""] * len(table)), set(), ""
    column = _find(table, name, "--label-col")
    cells, what = table.cells(column), f"{table.where}: column {column}"
    if options.label_sep is not None:
        labels = split_cells(cells, options.label_sep, what, keep_na=options.keep_na)
    else:
        labels = one_class(cells, what, keep_na=options.keep_na, wanted=options.labelled)
    return *labels, {column}, column


# --- what stands in it --------------------------------------------------------------------------


def _paths(table: Table, name: str, root: Location) -> list[str]:
    """Return where images lie. Those written as on Windows get slashes, unless a file is so called.

    Raises DatasetError for an empty cell.
    """
    paths = [cell.strip() for cell in table.cells(name)]
    if "" in paths:
        raise DatasetError(f"{table.at(paths.index(''))}: the cell {name!r} is empty")
    back = [i for i, path in enumerate(paths) if "\\" in path and "://" not in path]
    if os.sep == "\\" or not back:
        return paths
    if isinstance(root, Url):
        turned = back
    else:
        so_called = exist([str(root / paths[i]) for i in back])
        turned = [i for i, exists in zip(back, so_called, strict=True) if not exists]
    if turned:
        warnings.warn(
            f"{table.where}: {len(turned)} paths have back slashes, such as {paths[turned[0]]}: "
            "they are read as slashes",
            stacklevel=3,
        )
    for i in turned:
        paths[i] = paths[i].replace("\\", "/")
    return paths


def _subjects(table: Table, name: str, options: Options) -> list[str] | None:
    """Return who is on each image, or None for a column left empty.

    Names are not numbers: 007 and 7 are two. Raises DatasetError where some cells are empty.
    """
    subjects = [clean(cell) for cell in table.cells(name)]
    gone = {""} if options.keep_na else MISSING
    empty = [i for i, subject in enumerate(subjects) if subject in gone]
    if len(empty) == len(subjects):
        return None  # a column left empty is a column not given
    if empty:
        word = subjects[empty[0]]
        problem = f"is {word}, which counts as empty without --keep-na" if word else "is empty"
        raise DatasetError(
            f"{table.at(empty[0])}: the cell {name!r} {problem}; "
            "a subject is needed in every row, or in none"
        )
    if alike := apart(subjects):
        warnings.warn(
            f"{table.where}: column {name} has subjects that may be one, and count as several: "
            f"{', '.join(alike[0])}" + (f" and {len(alike) - 1} more such" if alike[1:] else ""),
            stacklevel=3,
        )
    return subjects


def _splits(table: Table, name: str) -> list[str] | None:
    """Return each image's split, or None for a column left empty. "None" is the split none."""
    splits = [clean(cell) for cell in table.cells(name)]
    splits = ["" if split in MISSING and split != "None" else split for split in splits]
    return splits if any(splits) else None
