"""Which further columns of a table are kept with the images, and which look like subjects.

Kept are columns that divide the images into groups, and those that name what images belong to (a
study, a lesion, an eye). Who a person is and when something was are not kept.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from datetime import date

from features.datasets.cells import MISSING, clean, spellings
from features.datasets.reading import Table

GROUPS = 100
UNIT = re.compile(  # what images of a subject are scored by: --unit
    r"(study|lesion|eye|series|exam|examination|visit|accession)(instance)?(id|uid|no|number|key)?"
)
SUBJECT = re.compile(
    r"(patient|subject|participant|person|case|mrn|pid)(id|no|nr|number|key|code|identifier)?s?"
)
PERSON = re.compile(
    r"(p|pat|patients?|subject|participant|person|doctors?|physicians?|operators?|first|last|full|"
    r"given|family|middle|maiden|sur|fore)?names?|.*birth.*|(.*[^a-z])?dob|address|email|phone|ssn"
)
WHEN = re.compile(r"(study|series|acquisition|content|scan|exam|visit|death)?(date|datetime)")
INNER = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where StudyDate has two words
DAY = re.compile(r"(\d{4}-\d\d-\d\d|(?:19|20)\d{6})(?:[T ].*)?", re.ASCII)  # ISO, and as in DICOM
PERSON_NAME = re.compile(r"[^\W\d]+\^[^\d]*")  # Doe^Jane, as in DICOM


def groups(table: Table, names: Sequence[str]) -> dict[str, list[str]]:
    """Return the columns of a table that are kept, for metrics by group and by unit.

    Others (free text: more than GROUPS values, or fewer than two images per value; persons and
    dates, by their name or by what stands in them) stay in the table, as do several columns of one
    name. Of names that differ in case only the first is kept, and a warning says so.
    """
    columns: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for name in names:
        if names.count(name) > 1 or personal(name):
            continue
        values = _unit(table.cells(name)) if is_unit(name) else _group(table.cells(name))
        if values is None:
            continue
        key = name.lower().replace("/", "-")
        if key in first:
            warnings.warn(
                f"{table.where}: columns {first[key]} and {name} have one name here: "
                f"{first[key]} is kept; rename the other to keep both",
                stacklevel=3,
            )
            continue
        first[key], columns[key] = name, values
    return columns


def warn_of_subjects(table: Table, names: Iterable[str]) -> None:
    """Warn where a column looks like subjects, some with several images, and isn't taken so."""
    for name in names:
        if not SUBJECT.fullmatch(_squeezed(name)) or table.header.count(name) > 1:
            continue
        cells = [value for value in map(clean, table.cells(name)) if value not in MISSING]
        if 1 < len(set(cells)) < len(cells):
            warnings.warn(
                f"{table.where}: column {name} looks like subjects: give --subject-col {name}, or "
                "images of one are dealt to several parts and count as independent",
                stacklevel=3,
            )
            return


def personal(name: str) -> bool:
    """Say whether a column's name is one of persons or dates: PatientName, dob, study_date."""
    words = INNER.sub("_", name).casefold()
    squeezed = _squeezed(name)
    return bool(
        SUBJECT.fullmatch(squeezed)
        or PERSON.fullmatch(squeezed)
        or PERSON.fullmatch(words)
        or WHEN.fullmatch(squeezed)
        or {"date", "datetime", "timestamp"} & set(re.split(r"[\W_]+", words))
    )


def is_unit(name: str) -> bool:
    """Say whether a column names what images belong to: study, lesion_id, StudyInstanceUID."""
    return bool(UNIT.fullmatch(_squeezed(name)))


def _squeezed(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _unit(cells: Sequence[str]) -> list[str] | None:
    """Return the values of a unit, as names: 007 and 7 are two; None for a column left empty."""
    cleaned = {cell: clean(cell) for cell in set(cells)}
    values = ["" if cleaned[cell] in MISSING else cleaned[cell] for cell in cells]
    return values if any(values) else None


def _group(cells: Sequence[str]) -> list[str] | None:
    """Return the values of a column that divides the images into groups, else None."""
    cleaned = {cell: clean(cell) for cell in set(cells)}
    called = spellings(value for value in cleaned.values() if value not in MISSING)
    if len(called) > GROUPS or all(map(_is_day, called)) or all(map(_is_person, called)):
        return None
    values = [called.get(cleaned[cell], "") for cell in cells]
    return values if 2 <= len(set(values)) <= min(GROUPS, len(values) // 2) else None


def _is_day(value: str) -> bool:
    match = DAY.fullmatch(value)
    if not match:
        return False
    try:
        date.fromisoformat(match[1])
    except ValueError:
        return False
    return True


def _is_person(value: str) -> bool:
    return bool(PERSON_NAME.fullmatch(value))
