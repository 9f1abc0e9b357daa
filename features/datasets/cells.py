"""What a cell of a table says, whatever program wrote it.

One value is often spelled in several ways: 1 and 1.0 by pandas, TRUE by Excel, a blank at the end
by a person. A label that is spelled in two ways would be two classes; here it becomes one. What
counts as missing is what pandas.read_csv takes for missing.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from decimal import Decimal

# pandas 3, pandas._libs.parsers.STR_NA_VALUES
PANDAS = (
    ",#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,"
    "nan,null"
)
MISSING = frozenset(PANDAS.split(","))
BETWEEN = ("|", ";", ",", "/")  # what findings of a cell are often separated by
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))  # of no width; byte order
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?", re.ASCII)
WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0+", re.ASCII)  # pandas' 1 beside a gap
TRUTH = {word: name for name in ("True", "False") for word in (name, name.lower(), name.upper())}


def clean(cell: str) -> str:
    """Return a cell in Unicode's composed form, without blanks at its ends and in runs."""
    if cell.isascii() and cell.isalnum():
        return cell
    return " ".join(unicodedata.normalize("NFC", cell).translate(INVISIBLE).split())


def is_number(value: str) -> bool:
    """Say whether pandas.read_csv takes a cell for a number."""
    return bool(NUMBER.fullmatch(value))


def spellings(values: Iterable[str]) -> dict[str, str]:
    """Return what each distinct cleaned value of a column is called.

    In a column of numbers equal ones are one value (01, 1.0 and 1e0 are 1); among other words only
    a whole number with zeros behind its point is (1.0), since 01 and 1E2 may be codes. True, true
    and TRUE are one everywhere. Words that differ in case are not: see `apart`.
    """
    distinct = set(values)
    numbers = all(map(is_number, distinct))
    return {value: _plain(value) if numbers else _word(value) for value in distinct}


def apart(values: Iterable[str]) -> list[list[str]]:
    """Return groups of values that differ only in case, or in how a number is written."""
    groups = defaultdict(set)
    for value in set(values):
        groups[(_plain(value) if is_number(value) else value).casefold()].add(value)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _plain(number: str) -> str:
    """Return a number without zeros that say nothing: 0.50 is 0.5, 1e2 is 100, -0.0 is 0."""
    value = Decimal(number)
    if value == value.to_integral_value():
        return str(int(value))
    return format(value, "f").rstrip("0")


def _word(value: str) -> str:
    whole = WHOLE.fullmatch(value)
    if whole:
        return "0" if whole[1] == "-0" else whole[1]
    return TRUTH.get(value, value)


def likely_separator(cells: Iterable[str]) -> str:
    """Return what seems to stand between the findings of a cell; "" where cells are one each.

    It does where a cell's parts are seen in other cells too: in "a|b" and "a", not in "lesion,
    left" alone. Every part must be, but for |, which names seldom have.
    """
    distinct = {clean(cell) for cell in cells}
    for sep in BETWEEN:
        parts = {cell: {clean(part) for part in cell.split(sep)} - {""} for cell in distinct}
        times = Counter(part for some in parts.values() for part in some)
        several = [some for some in parts.values() if len(some) > 1]
        often = any if sep == "|" else all
        if any(often(times[part] > 1 for part in some) for some in several):
            return sep
    return ""
