"""Texts in CSV files that a spreadsheet would run as formulas, made harmless and brought back.

Spreadsheets take a cell that begins with =, +, -, @, a tab or a carriage return for a formula, even
in quotes, and names of files and subjects are not ours. Such a text gets an apostrophe in front, as
OWASP advises (CSV Injection); so does one that begins with an apostrophe, so that each text is read
back as it was. Numbers are not texts: -1.5 stays as it is.
"""

from __future__ import annotations

from typing import Any

FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 (full-width ones count too)


def inert(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    risky = isinstance(value, str) and value.startswith((*FORMULA, "'"))
    return f"'{value}" if risky else value


def original(cell: str) -> str:
    """Return the text that `inert` was given."""
    return cell[1:] if cell.startswith("'") and cell[1:2] in ("'", *FORMULA) else cell
