"""What a data set is called: its folder among stores and results.

A table is named by its file, or where that says nothing (labels.csv) by its folder and its file, so
that two tables in one folder are two data sets.
"""

from __future__ import annotations

import re

from features.errors import DatasetError
from features.urls import Location

# What a table may be called whatever is in it.
GENERIC = (
    "all|annotation|annotations|class|classes|csv|data|dataset|datasets|dev|entries|file|"
    "files|ground|groundtruth|image|images|img|imgs|index|info|label|labelled|labels|list|"
    "main|manifest|meta|metadata|of|path|paths|sample|samples|set|sheet|split|splits|table|"
    "tables|target|targets|test|testing|train|training|truth|v|val|valid|validation"
)
TABLES = re.compile(
    r"(\.(csv|tsv|tab|txt|xlsx?|xlsm|parquet|pq|gz|bz2|xz|zip|zst))+$", re.IGNORECASE
)


def table_name(file: Location) -> str:
    """Return the name of a table's data set: xrays of xrays.csv.gz, ward-labels of ward/labels.csv.

    The folder is added where the file's name is of words and numbers that fit any table.
    """
    path = file.resolve()
    stem = TABLES.sub("", path.name) or path.name
    folder = re.sub(r"[:/\\]", "", path.parent.name)
    words = re.findall(r"[^\W\d_]+", stem.lower())
    return stem if set(words) - set(GENERIC.split("|")) or not folder else f"{folder}-{stem}"


def check_name(name: str) -> str:
    """Return a name that was given. Raises DatasetError for one that can't be a folder's."""
    if not name.strip() or name.startswith(".") or re.search(r"[/\\\x00-\x1f]", name):
        raise DatasetError(
            f"{name!r} can't be a data set's name: its stores and results go into a folder called "
            "so. Want letters, digits, -, _ and ."
        )
    return name
