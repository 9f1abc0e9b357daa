"""From the cells of label columns to numbers: one class, or the states of several findings.

Words of pandas for a missing value are no class; what is one value is one class, however it is
spelled (cells.py); a column of measurements or of texts is refused.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from features.datasets.build import index_classes
from features.datasets.cells import MISSING, clean, is_number, likely_separator, spellings
from features.errors import DatasetError
from features.manifest import ABSENT, NOT_STATED, PRESENT, UNCERTAIN, natural_order

STATES = {"1": PRESENT, "0": ABSENT, "-1": UNCERTAIN, "": NOT_STATED}
STATES |= {"True": PRESENT, "False": ABSENT}
MANY = 20  # values: of more, few images each, one asks whether they are classes
EACH = 20  # images of a value, below which numbers are more likely measured than counted out

Labels = tuple[NDArray[np.int32], tuple[str, ...]]


def one_class(
    cells: Sequence[str], what: str, *, keep_na: bool = False, wanted: bool = True
) -> Labels:
    """Return class indices (N,) and classes of one column. `what` names it in messages.

    keep_na: NA, None and their like are classes. Raises DatasetError for measurements and texts
    where labels are wanted.
    """
    names = _names([clean(cell) for cell in cells], what, keep_na=keep_na)
    if wanted:
        _refuse_measurements(names, what)
        if sep := likely_separator(names):
            example = next(name for name in names if sep in name)
            warnings.warn(
                f"{what} holds cells such as {example!r}, each combination a class of its own; if "
                f'these are several findings of an image, give --label-sep "{sep}"',
                stacklevel=4,
            )
    return index_classes(names)


def split_cells(cells: Sequence[str], sep: str, what: str, *, keep_na: bool = False) -> Labels:
    """Return states (N, L) and findings of cells that hold several labels; none is all absent.

    Raises DatasetError where another separator than `sep` is in the cells.
    """
    check_separator(cells, sep, what)
    parts = [[clean(part) for part in cell.split(sep)] for cell in cells]
    names = iter(_names([part for row in parts for part in row], what, keep_na=keep_na))
    labels = [{next(names) for _ in row} - {""} for row in parts]
    classes = natural_order([name for some in labels for name in some])
    rows = [[PRESENT if name in some else ABSENT for name in classes] for some in labels]
    return np.array(rows, dtype=np.int32).reshape(len(cells), len(classes)), tuple(classes)


def check_separator(cells: Sequence[str], sep: str, what: str) -> None:
    """Raise DatasetError where a separator is in no cell and another one is; warn where none is."""
    if not sep:
        raise DatasetError(f"{what}: --label-sep is empty: want a character such as |")
    if any(sep in cell for cell in cells):
        return
    if other := likely_separator(cells):
        example = next(cell for cell in cells if other in cell)
        raise DatasetError(
            f"{what}: --label-sep {sep!r} is in no cell, and cells such as {example!r} have "
            f'{other!r}: want --label-sep "{other}"'
        )
    shown = ", ".join(repr(cell) for cell in dict.fromkeys(cells) if cell)[:60]
    warnings.warn(
        f"{what}: --label-sep {sep!r} is in no cell ({shown}, ...): each image has one finding at "
        "most. For classes that exclude each other leave --label-sep out",
        stacklevel=5,
    )


def states(columns: Mapping[str, Sequence[str]], at: Callable[[int], str]) -> NDArray[np.int32]:
    """Return the states (N, L) of L findings, one column each: 1, 0, -1, true, false or nothing.

    Raises DatasetError for another word; at(row) says where it stands.
    """
    columns_of_states = []
    for name, cells in columns.items():
        state_of = {cell: state(cell) for cell in set(cells)}
        wrong = next((i for i, cell in enumerate(cells) if state_of[cell] is None), None)
        if wrong is not None:
            raise DatasetError(
                f"{at(wrong)}: {name} is {clean(cells[wrong])!r}: "
                "want 1, 0, -1 (uncertain) or nothing"
            )
        columns_of_states.append([state_of[cell] for cell in cells])
    return np.array(columns_of_states, dtype=np.int32).T


def state(cell: str) -> int | None:
    """Return what a cell says of a finding, or None where it says neither."""
    value = clean(cell)
    if value in MISSING:
        return NOT_STATED
    return STATES.get(spellings([value])[value])


def _names(values: Sequence[str], what: str, *, keep_na: bool) -> list[str]:
    """Return what each value is called, "" where it is missing; say which words are."""
    missing = {""} if keep_na else MISSING
    words = Counter(value for value in values if value and value in missing)
    if words:
        counts = ", ".join(f"{word} ({n})" for word, n in words.most_common())
        warnings.warn(
            f"{what}: {counts} counts as no label, as in pandas; --keep-na makes it a class",
            stacklevel=4,
        )
    called = spellings(value for value in values if value not in missing)
    return [called.get(value, "") for value in values]


def _quoted(sep: str) -> str:
    return f' "{sep}"' if sep else ""


def _refuse_measurements(names: Sequence[str], what: str) -> None:
    """Raise DatasetError for what are no classes: numbers that were measured, texts, names.

    Whole numbers of few images each may be either, and are warned about.
    """
    counts = Counter(name for name in names if name)
    n = sum(counts.values())
    if len(counts) <= MANY:
        return
    numbers = sorted(map(float, counts)) if all(map(is_number, counts)) else []
    unique = n < 2 * len(counts)  # most values have one image
    few = n < EACH * len(counts)
    if numbers:
        found = (
            f"{what} holds {len(counts)} different numbers from {numbers[0]:g} to {numbers[-1]:g} "
            f"in {n} rows"
        )
        if any(value % 1 for value in numbers) or (few and 1 in counts.values()):
            raise DatasetError(
                f"{found}: a measurement, and Medprobe classifies. Make a column of a few classes "
                "of it (below 40, 40 to 60, ...), or name another with --label-col"
            )
        if few:
            warnings.warn(
                f"{found}. If it is a measurement, make a column of a few classes of it, or name "
                "another with --label-col",
                stacklevel=4,
            )
    elif unique:
        raise DatasetError(
            f"{what} holds {len(counts)} different texts in {n} rows: names or free text, not "
            "classes. Name the label's column with --label-col; several labels of one image in a "
            f"cell want --label-sep{_quoted(likely_separator(counts))}"
        )
