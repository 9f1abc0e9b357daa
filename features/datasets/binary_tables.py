"""Excel and Parquet to columns of text, as the same table would be in CSV.

What a file declares is checked against bounds.py before it is read, and its content as it comes: a
workbook's sheet row by row, a Parquet file batch by batch, its texts as a dictionary and places in
it, for a few bytes can repeat one text a billion times.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from features.datasets.bounds import HINT, check_cells, check_text
from features.datasets.cells import clean
from features.errors import DatasetError

EXTRA = "pip install 'medprobe[tables]'"
PARQUET, EXCEL = (".parquet", ".pq"), (".xlsx", ".xlsm", ".xls")
WORKBOOK = 200_000_000  # bytes of XML: reading takes some ten times as much
ROWS = 1 << 20  # of a sheet, as in Excel
BATCH = 1 << 17  # rows of a Parquet file that are read at once

Read = tuple[tuple[str, ...], tuple[list[str], ...], list[int]]


def read_binary(data: io.BytesIO, where: str, suffix: str) -> Read:
    """Return header, columns of N cells, and where each row stands, of a file's first sheet.

    Raises DatasetError for a file that can't be read, or holds more than a table may.
    """
    file_type = "Parquet" if suffix in PARQUET else "Excel"
    needs = {".xls": "xlrd"}.get(suffix, "pyarrow" if file_type == "Parquet" else "openpyxl")
    try:
        pandas = import_module("pandas")
        import_module(needs)
    except ImportError as error:
        remedy = "pip install xlrd, or save it as .xlsx" if needs == "xlrd" else EXTRA
        raise DatasetError(
            f"{where}: {file_type} is read by pandas and {needs}, and {error.name} is not here: "
            f"{remedy}"
        ) from None
    try:
        if suffix in PARQUET:
            return _of_frame(pandas, _parquet(pandas, data, where), first=1)
        if suffix == ".xls":
            return _of_frame(pandas, _xls(pandas, data, where), first=2)
        return _sheet(pandas, data, where)
    except DatasetError:
        raise
    except Exception as error:  # what a damaged file raises is of many kinds
        reason = " ".join(str(error).split())
        raise DatasetError(f"{where} can't be read as {file_type}: {reason}") from None


def _of_frame(pandas: Any, frame: Any, first: int) -> Read:
    header = tuple(clean(_plain(pandas, name)) for name in frame.columns)
    columns = [_cells(pandas, frame.iloc[:, k]) for k in range(len(header))]
    full = [k for k, row in enumerate(zip(*columns, strict=True)) if any(row)]
    return header, tuple([column[k] for k in full] for column in columns), [k + first for k in full]


def _cells(pandas: Any, column: Any) -> list[str]:
    """Return a column as text; of a dictionary's, equal cells share their memory."""
    if not isinstance(column.dtype, pandas.CategoricalDtype):
        return [_plain(pandas, value) for value in column.tolist()]
    known = [_plain(pandas, value) for value in column.cat.categories.tolist()]
    return ["" if code < 0 else known[code] for code in column.cat.codes.tolist()]


def _sheet(pandas: Any, data: io.BytesIO, where: str) -> Read:
    """Read the first sheet of a workbook; its header is the first row that isn't empty."""
    with zipfile.ZipFile(data) as archive:
        declared = sum(part.file_size for part in archive.infolist())  # no more is ever inflated
    if declared > WORKBOOK:
        raise DatasetError(
            f"{where} holds {declared / 1e6:,.0f} MB of XML: want {WORKBOOK / 1e6:,.0f} at most; "
            "save it as CSV"
        )
    book = import_module("openpyxl").load_workbook(
        data, read_only=True, data_only=True, keep_links=False
    )
    _say_sheets(book.sheetnames, where)
    sheet = book[book.sheetnames[0]]
    sheet.reset_dimensions()  # it may say anything
    rows, begins, width = [], [], 0
    for number, row in enumerate(sheet.rows, 1):
        if number > ROWS:
            raise DatasetError(f"{where} has rows beyond {ROWS:,}, the last of Excel: {HINT}")
        cells = ["" if cell.data_type == "e" else _plain(pandas, cell.value) for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        if not cells:
            continue
        width = max(width, len(cells))
        rows.append(cells)
        begins.append(number)
        check_cells(len(rows), width, where)
    padded = [cells + [""] * (width - len(cells)) for cells in rows]
    header = tuple(map(clean, padded[0])) if padded else ()
    columns = tuple(map(list, zip(*padded[1:], strict=True))) or tuple([] for _ in header)
    return header, columns, begins[1:]


def _xls(pandas: Any, data: io.BytesIO, where: str) -> Any:
    """Return the first sheet of a workbook before 2007: never more than 65,536 x 256 cells."""
    with pandas.ExcelFile(data) as book:
        _say_sheets(book.sheet_names, where)
        frame = pandas.read_excel(book, header=None, dtype=object, na_filter=False)
    if frame.empty:
        return frame
    frame.columns = frame.iloc[0]
    return frame.iloc[1:]


def _say_sheets(names: Sequence[str], where: str) -> None:
    if len(names) > 1:
        warnings.warn(
            f"{where} has {len(names)} sheets: the first, {names[0]}, is read", stacklevel=2
        )


def _parquet(pandas: Any, data: io.BytesIO, where: str) -> Any:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    about = parquet.ParquetFile(data).metadata
    check_cells(about.num_rows, about.num_columns, where)
    groups = [about.row_group(k) for k in range(about.num_row_groups)]
    chunks = [group.column(k) for group in groups for k in range(about.num_columns)]
    check_cells(sum(chunk.num_values for chunk in chunks), 1, where)
    leaves = [about.schema.column(k) for k in range(about.num_columns)]
    declared = sum(chunk.total_uncompressed_size for chunk in chunks)
    check_text(max(declared, *(about.num_rows * leaf.length for leaf in leaves), 0), where)
    texts = [
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and not leaf.max_repetition_level
    ]
    file = parquet.ParquetFile(data, read_dictionary=texts)
    batches, size = [], 0
    for batch in file.iter_batches(batch_size=BATCH, use_threads=False):
        kept = 0
        for column in batch.columns:
            coded = isinstance(column, arrow.DictionaryArray)
            size += (column.indices if coded else column).nbytes
            kept += column.dictionary.nbytes if coded else 0
        check_text(size + kept, where)
        batches.append(batch)
    schema = batches[0].schema if batches else file.schema_arrow
    table = arrow.Table.from_batches(batches, schema)
    table = table.replace_schema_metadata(file.schema_arrow.metadata)
    nullable = {name: getattr(arrow, name.lower())() for name in NULLABLE}
    kinds = {nullable[name]: getattr(pandas, f"{name}Dtype")() for name in NULLABLE}
    frame = table.to_pandas(types_mapper=kinds.get)  # 1 beside a gap stays 1
    return frame if frame.index.names == [None] else frame.reset_index()


NULLABLE = ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float32",
            "Float64")  # fmt: skip


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
