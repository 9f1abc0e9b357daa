"""A table's file to columns of text: CSV and its kin by the csv module, the others by pandas.

Separators are comma, semicolon and tab, found by the header and the first rows. A compressed file
is read as it is; Parquet and Excel need pandas (medprobe[tables]), see binary_tables.py. How much a
table may hold, bounds.py says.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any

from features.datasets.binary_tables import EXCEL, EXTRA, PARQUET, read_binary
from features.datasets.bounds import TEXT, Counted, check_cells, check_text, lines
from features.datasets.cells import clean
from features.errors import DatasetError
from features.urls import Location

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
SNIFFED = 1 << 16  # characters that tell the separator
STEP = 1000  # rows after which cells are counted
REPEATED = 1000  # distinct cells of a column up to which equal ones share their memory


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
        columns = [k for k, other in enumerate(self.header) if other == name]
        if len(columns) > 1:
            numbers = " and ".join(str(k + 1) for k in columns)
            raise DatasetError(
                f"{self.where} has {len(columns)} columns {name!r} (columns {numbers}): "
                "want one; rename or remove the others"
            )
        return self.columns[columns[0]]


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
            with file.open("rb") as stream:
                data = stream.read(TEXT + 1)
            check_text(len(data), where, "")
            return Table(where, *read_binary(io.BytesIO(data), where, suffix), unit="row")
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
    declared = first[4:] if first[:4].lower() == "sep=" and first[4:] in SEPARATORS else ""
    if first.startswith("#"):
        separator = find_separator(first, expected)
        names = {name.strip(" #").casefold() for name in first.split(separator)}
        if not names & {name.casefold() for name in expected}:
            raise DatasetError(
                f"{where} begins with a comment, {first[:40]!r}: want the header in its first "
                "line; remove what stands above it"
            )
    tab_first = suffix in (".tsv", ".tab")
    separator = declared or find_separator(head, expected, tab_first=tab_first)
    with _text(file, where, suffix) as stream:
        if declared:
            stream.readline()
        text = lines(stream, where)
        reader = csv.reader(text, delimiter=separator, skipinitialspace=True, strict=True)
        try:
            return _rows(reader, where, separator, 1 if declared else 0)
        except csv.Error as error:
            raise DatasetError(
                f"{where}, line {reader.line_num + bool(declared)}: {error}. A cell with quotes in "
                'it is written "so ""quoted"" here"'
            ) from None


def _rows(reader: Any, where: str, separator: str, before: int) -> Table:
    """Read all rows into columns. `before` lines of the file were read already."""
    header: tuple[str, ...] = ()
    columns: tuple[list[str], ...] = ()
    shared: list[dict[str, str]] = []
    begins: list[int] = []
    line = before + 1
    for row in reader:
        start, line = line, before + reader.line_num + 1
        if not any(cell and not cell.isspace() for cell in row):
            continue  # an empty line, or one of separators alone, as spreadsheets leave them
        if not header:
            check_cells(1, len(row), where)
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
        begins.append(start)
        if not len(begins) % STEP:
            check_cells(len(begins), len(header), where)
    if not header:
        raise DatasetError(f"{where} is empty: want a header and one row per image")
    return Table(where, header, columns, begins)


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
        counted = io.BufferedReader(Counted(start, binary.read, where))
        yield io.TextIOWrapper(counted, encoding, newline="")


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
