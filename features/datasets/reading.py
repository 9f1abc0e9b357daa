"""A table's file to columns of text: CSV and its kin by the csv module, the others by pandas.

Separators are comma, semicolon and tab, found by the header and the first rows. A compressed file
is read as it is; Parquet and Excel need pandas (medprobe[tables]).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from features.datasets.cells import clean
from features.errors import DatasetError
from features.urls import Location

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
SNIFFED = 1 << 16  # characters that tell the separator
REPEATED = 1000  # distinct cells of a column up to which equal ones share their memory
EXTRA = "pip install 'medprobe[tables]'"
PARQUET, EXCEL = (".parquet", ".pq"), (".xlsx", ".xlsm", ".xls")


@dataclass(frozen=True)
class Table:
    """Columns of N cells: their names cleaned, cells as they are. `where` names it in errors."""

    where: str
    header: tuple[str, ...]
    columns: tuple[list[str], ...]
    lines: Sequence[int]  # (N,) where each row begins, from 1, in the file or on the sheet
    unit: str = "line"

    def __len__(self) -> int:
        """Return N."""
        return len(self.lines)

    def at(self, row: int) -> str:
        """Return where a row stands, for errors."""
        return f"{self.where}, {self.unit} {self.lines[row]}"

    def cells(self, name: str) -> list[str]:
        """Return the cells of a column (N,). Raises DatasetError where two have this name."""
        places = [k for k, other in enumerate(self.header) if other == name]
        if len(places) > 1:
            found = " and ".join(str(k + 1) for k in places)
            raise DatasetError(
                f"{self.where} has {len(places)} columns {name!r} (columns {found}): "
                "want one; rename or remove the others"
            )
        return self.columns[places[0]]


def read_table(file: Location, where: str, expected: Sequence[str] = ()) -> Table:
    """Return what is in a file.

    expected: names of columns, of which the separator that is right will show some. Raises
    DatasetError for a file that can't be read, and for a row with more or fewer cells than the
    header.
    """
    if not file.is_file():
        raise DatasetError(f"{where}: there is no such file")
    suffix = PurePosixPath(file.name).suffix.lower()
    try:
        if suffix in (*PARQUET, *EXCEL):
            return _by_pandas(file, where, suffix)
        return _delimited(file, where, suffix, expected)
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{where} is not a UTF-8 table: {error}. Save it as UTF-8 (Excel: CSV UTF-8)"
        ) from None
    except DatasetError:
        raise
    except Exception as error:  # what damaged archives raise is of many kinds
        if suffix not in OPENERS and not isinstance(error, OSError):
            raise
        raise DatasetError(f"{where} can't be read: {error}") from None


# --- text ---------------------------------------------------------------------------------------


def _delimited(file: Location, where: str, suffix: str, expected: Sequence[str]) -> Table:
    with _text(file, where, suffix) as stream:
        head = stream.read(SNIFFED)
    first = head.partition("\n")[0].strip()
    told = first[4:] if first[:4].lower() == "sep=" and first[4:] in SEPARATORS else ""
    if first.startswith("#"):
        found = find_separator(first, expected)
        names = {name.strip(" #").casefold() for name in first.split(found)}
        if not names & {name.casefold() for name in expected}:
            raise DatasetError(
                f"{where} begins with a comment, {first[:40]!r}: want the header in its first "
                "line; remove what stands above it"
            )
    tab_first = suffix in (".tsv", ".tab")
    separator = told or find_separator(head, expected, tab_first=tab_first)
    with _text(file, where, suffix) as stream:
        if told:
            stream.readline()
        reader = csv.reader(stream, delimiter=separator, skipinitialspace=True, strict=True)
        try:
            return _rows(reader, where, separator, 1 if told else 0)
        except csv.Error as error:
            raise DatasetError(
                f"{where}, line {reader.line_num + bool(told)}: {error}. A cell with quotes in it "
                'is written "so ""quoted"" here"'
            ) from None


def _rows(reader: Any, where: str, separator: str, before: int) -> Table:
    """Read all rows into columns. `before` lines of the file were read already."""
    header: tuple[str, ...] = ()
    columns: tuple[list[str], ...] = ()
    shared: list[dict[str, str]] = []
    lines: list[int] = []
    line = before + 1
    for row in reader:
        start, line = line, before + reader.line_num + 1
        if not any(cell and not cell.isspace() for cell in row):
            continue  # an empty line, or one of separators alone, as spreadsheets leave them
        if not header:
            header = tuple(map(clean, row))
            columns, shared = tuple([] for _ in row), [{} for _ in row]
            continue
        if len(row) != len(header):
            raise DatasetError(
                f"{where}, line {start}: found {len(row)} cells, want {len(header)} as in the "
                f"header; a cell with a {SEPARATORS[separator]} or a line break in it stands in "
                "quotes"
            )
        for cell, column, seen in zip(row, columns, shared, strict=True):
            keep = seen.setdefault if len(seen) < REPEATED else seen.get
            column.append(keep(cell, cell))
        lines.append(start)
    if not header:
        raise DatasetError(f"{where} is empty: want a header and one row per image")
    return Table(where, header, columns, lines)


def find_separator(head: str, expected: Sequence[str] = (), *, tab_first: bool = False) -> str:
    """Return the separator of a table that begins so.

    It is the one by which the header has several cells, most of the expected names, and most rows
    as many cells as the header. Separators in quotes don't count.
    """
    wanted = {name.casefold() for name in expected}
    whole = head if len(head) < SNIFFED else head[: head.rfind("\n") + 1]

    def fit(separator: str) -> tuple[bool, int, float, int]:
        try:
            rows = list(csv.reader(io.StringIO(whole), delimiter=separator, skipinitialspace=True))
        except csv.Error:
            return False, 0, 0.0, 0
        rows = [row for row in rows if any(row)] or [[]]
        names = {clean(name).casefold() for name in rows[0]}
        same = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        return len(rows[0]) > 1, len(names & wanted), same, len(rows[0])

    order = sorted(SEPARATORS, key=lambda s: s != "\t") if tab_first else list(SEPARATORS)
    return max(order, key=fit)


@contextmanager
def _text(file: Location, where: str, suffix: str) -> Iterator[io.TextIOWrapper]:
    """Open a table's text, whatever it is compressed by; UTF-16 where it begins so."""
    with ExitStack() as stack:
        binary: Any = stack.enter_context(file.open("rb"))
        if suffix in OPENERS:
            binary = stack.enter_context(OPENERS[suffix](binary, where))
        start = binary.read(2)
        encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        yield io.TextIOWrapper(io.BufferedReader(_Again(start, binary)), encoding, newline="")


class _Again(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, start: bytes, rest: Any) -> None:
        self._start, self._rest = start, rest

    def readable(self) -> bool:
        """Say so."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what comes next."""
        data = self._start or self._rest.read(len(buffer))
        found, self._start = data[: len(buffer)], data[len(buffer) :] if self._start else b""
        buffer[: len(found)] = found
        return len(found)


def _zip(raw: Any, where: str) -> Any:
    archive = zipfile.ZipFile(raw)
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise DatasetError(
            f"{where} holds {len(names)} files ({', '.join(names[:3])}): want one table; unpack it"
        )
    return archive.open(names[0])


def _zst(raw: Any, where: str) -> Any:
    try:
        zstandard = import_module("zstandard")
    except ImportError:
        raise DatasetError(f"{where}: .zst is read by zstandard: {EXTRA}") from None
    return zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)


OPENERS: dict[str, Callable[[Any, str], Any]] = {
    ".gz": lambda raw, _: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw, _: bz2.BZ2File(raw),
    ".xz": lambda raw, _: lzma.LZMAFile(raw),  # noqa: SIM115
    ".zip": _zip,
    ".zst": _zst,
}


# --- by pandas ----------------------------------------------------------------------------------


def _by_pandas(file: Location, where: str, suffix: str) -> Table:
    """Return the first sheet of a workbook, or a Parquet file. Cells become text as in CSV."""
    kind = "Parquet" if suffix in PARQUET else "Excel"
    needs = {".xls": "xlrd"}.get(suffix, "pyarrow" if kind == "Parquet" else "openpyxl")
    try:
        pandas = import_module("pandas")
        import_module(needs)
    except ImportError as error:
        remedy = "pip install xlrd, or save it as .xlsx" if needs == "xlrd" else EXTRA
        raise DatasetError(
            f"{where}: {kind} is read by pandas and {needs}, and {error.name} is not here: {remedy}"
        ) from None
    with file.open("rb") as stream:
        data = io.BytesIO(stream.read())
    try:
        frame = (_parquet if kind == "Parquet" else _excel)(pandas, data, where)
    except Exception as error:  # what a damaged file raises is of many kinds
        raise DatasetError(f"{where} can't be read as {kind}: {error}") from None
    header = tuple(clean(_plain(pandas, name)) for name in frame.columns)
    columns = [
        [_plain(pandas, value) for value in frame.iloc[:, k].tolist()] for k in range(len(header))
    ]
    full = [k for k, row in enumerate(zip(*columns, strict=True)) if any(row)]
    first = 2 if kind == "Excel" else 1
    return Table(
        where,
        header,
        tuple([column[k] for k in full] for column in columns),
        [k + first for k in full],
        "row",
    )


def _excel(pandas: Any, data: io.BytesIO, where: str) -> Any:
    with pandas.ExcelFile(data) as book:
        if len(book.sheet_names) > 1:
            warnings.warn(
                f"{where} has {len(book.sheet_names)} sheets: the first, {book.sheet_names[0]}, "
                "is read",
                stacklevel=2,
            )
        frame = pandas.read_excel(book, header=None, dtype=object, na_filter=False)
    if frame.empty:
        return frame
    frame.columns = frame.iloc[0]
    return frame.iloc[1:]


def _parquet(pandas: Any, data: io.BytesIO, where: str) -> Any:
    frame = pandas.read_parquet(data, dtype_backend="numpy_nullable")  # 1 beside a gap stays 1
    return frame if frame.index.names == [None] else frame.reset_index()


def _plain(pandas: Any, value: Any) -> str:
    """Return a cell as text: nothing for a missing one, several values with | between them."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple, np.ndarray)):
        return "|".join(_plain(pandas, one) for one in value)
    if pandas.isna(value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
