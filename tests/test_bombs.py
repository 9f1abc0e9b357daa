"""Small files that say they are large: refused in one line, before they take the memory."""

import bz2
import gzip
import io
import lzma
import resource
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from features.datasets import bounds, open_dataset
from features.datasets.reading import read_table
from features.errors import DatasetError, ProbeError
from probe.train import checkpoints

MOST = 1_200_000_000  # bytes that a bomb may make the process take, beyond what it has
TEXT, CELLS = 100_000_000, 2_000_000  # in place of bounds.py's, for bombs that are soon made
ENDS = "holds more than 100 MB of text: split the table"
HEADER = b"path,label\n"


def packed(how, parts):
    """What a compressor makes of many parts, without holding them."""
    return b"".join([*map(how.compress, parts), how.flush()])


def zipped(*members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, parts in members:
            with archive.open(name, "w", force_zip64=True) as file:
                for part in parts:
                    file.write(part)
    return data.getvalue()


def text():
    """A table of 110 MB, in parts: few rows, which are sooner read."""
    yield HEADER
    for _ in range(1100):
        yield b'a.png,"' + b"x" * 99_990 + b'"\n'


SHEET = (
    '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
    '<dimension ref="A1:B2"/><sheetData>%s</sheetData></worksheet>'
)
CELL = '<c r="%s" t="inlineStr"><is><t>x</t></is></c>'


def workbook(tmp_path, *, rows="", more=()):
    """An xlsx file by openpyxl, whose sheet is then replaced, and which gets more files."""
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["path", "label"])
    book.save(tmp_path / "plain.xlsx")
    members = []
    with zipfile.ZipFile(tmp_path / "plain.xlsx") as plain:
        for name in plain.namelist():
            parts = [plain.read(name)]
            if name == "xl/worksheets/sheet1.xml" and rows:
                parts = [(SHEET % rows).encode()]
            members.append((name, parts))
    return zipped(*members, *more)


def cells(row, *places):
    return f'<row r="{row}">{"".join(CELL % place for place in places)}</row>'


FAR = cells(1, "A1", "XFD1") + "".join(cells(r, f"A{r}") for r in range(2, 5000))
BOMBS = {
    "t.csv.gz": (lambda _: packed(zlib.compressobj(9, wbits=31), text()), ENDS),
    "t.csv.bz2": (lambda _: packed(bz2.BZ2Compressor(), text()), ENDS),
    "t.csv.xz": (lambda _: packed(lzma.LZMACompressor(preset=0), text()), ENDS),
    "t.csv.zip": (lambda _: zipped(("t.csv", text())), ENDS),
    "line.csv.gz": (
        lambda _: gzip.compress(HEADER + b"a,b," * (1 << 23), 1),
        "a line of more than 16,777,216 characters",
    ),
    "columns.csv.gz": (lambda _: gzip.compress(b"a," * 20_000 + b"b\n"), "has 20,001 columns"),
    "cells.csv.gz": (
        lambda _: gzip.compress(b"," .join(b"%d" % k for k in range(2000)) + b"\n"
                                + (b"x," * 1999 + b"x\n") * 3000, 1),
        "has more than 2,000,000 cells",
    ),
    "shared.xlsx": (
        lambda folder: workbook(folder, more=[("xl/x.xml", [b"<si/>" * 200_000] * 250)]),
        "MB of XML: want 200 at most; save it as CSV",
    ),
    "far.xlsx": (lambda folder: workbook(folder, rows=FAR), "has more than 2,000,000 cells"),
    "deep.xlsx": (
        lambda folder: workbook(folder, rows=cells(1, "A1") + cells(10**9, f"A{10**9}")),
        "has rows beyond 1,048,576",
    ),
}  # fmt: skip


CALL = """
import resource, sys
from pathlib import Path
import openpyxl, pandas, pyarrow.parquet  # what they take is none of the bomb's
from features.datasets import bounds
from features.datasets.reading import read_table
from features.errors import DatasetError
bounds.TEXT, bounds.CELLS = map(int, sys.argv[3:])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
try:
    print(len(read_table(Path(sys.argv[1]), "csv:t")))
except DatasetError as error:
    print(error)
"""


def said_of(path):
    """What reading a table says, in a process that may take MOST and no more."""
    run = subprocess.run(
        [sys.executable, "-c", CALL, path, str(MOST), str(TEXT), str(CELLS)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("name", BOMBS)
def test_a_table_that_inflates_is_refused_before_it_takes_the_memory(tmp_path, name):
    make, words = BOMBS[name]
    for library in ("openpyxl", "pandas", "pyarrow"):
        pytest.importorskip(library)
    (tmp_path / name).write_bytes(make(tmp_path))
    assert (tmp_path / name).stat().st_size < 8_000_000
    said = said_of(tmp_path / name)
    assert words in said
    assert said.startswith("csv:t ")
    assert said.count("\n") == 1


def parquet_bombs():
    """A text of 1 MB that 100,000 rows repeat; as many rows as a header can hold; large pages."""
    arrow = pytest.importorskip("pyarrow")
    codes = np.zeros(100_000, dtype=np.int32)
    long = arrow.DictionaryArray.from_arrays(codes, arrow.array(["x" * 1_000_000]))
    yield arrow.table({"path": [f"{k}.png" for k in range(100_000)], "label": long}), None
    many = arrow.array(np.zeros(3_000_000, dtype=np.int8))
    yield arrow.table({"label": many}), "has more than 2,000,000 cells"
    lists = arrow.array([[0] * 1_000_000] * 3, type=arrow.list_(arrow.int8()))
    yield arrow.table({"label": lists}), "has more than 2,000,000 cells"
    fixed = arrow.DictionaryArray.from_arrays(
        np.zeros(200_000, dtype=np.int32), arrow.array([b"x" * 1000], arrow.binary(1000))
    )
    yield arrow.table({"label": fixed}), "more than 100 MB of text"


def test_a_parquet_file_that_repeats_itself_takes_no_more_memory_than_a_table_may(tmp_path):
    pytest.importorskip("pandas")
    parquet = pytest.importorskip("pyarrow.parquet")
    for k, (table, words) in enumerate(parquet_bombs()):
        file = tmp_path / f"{k}.parquet"
        parquet.write_table(table, file, compression="zstd", store_schema=False)
        assert file.stat().st_size < 8_000_000
        said = said_of(file)
        assert (words in said) if words else said == "100000\n", (k, said)


def test_a_table_within_the_limits_is_read_to_the_last_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "CELLS", 4000)
    text = b"path,label\n" + b"".join(b"%d.png,%d\n" % (k, k % 2) for k in range(2000))
    monkeypatch.setattr(bounds, "TEXT", len(text))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text))
    assert len(read_table(tmp_path / "t.csv.gz", "csv:t")) == 2000
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text + b"\n"))
    with pytest.raises(DatasetError, match="more than 0 MB of text"):
        read_table(tmp_path / "t.csv.gz", "csv:t")


def test_a_long_path_among_many_takes_no_gigabytes(tmp_path):
    rows = [f"{k}.png,{k % 2}" for k in range(9000)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", "x" * 130_000 + ",0", *rows]))
    with pytest.raises(DatasetError, match="the longest path has 130,000 characters"):
        open_dataset(f"csv:{tmp_path / 't.csv'}")


def test_a_checkpoint_that_inflates_is_refused_before_it_does(tmp_path):
    state = {"a": torch.zeros(30_000_000)}
    kept = {
        "epoch": 0,
        "history": [{"epoch": 0, "train_loss": 1.0, "value": 0.5, "seconds": 1.0}],
        "identity": {},
    }
    save_file({"w": torch.zeros(2)}, tmp_path / "last-0000.safetensors")
    checkpoints.write_json(tmp_path / checkpoints.STATE, kept)
    torch.save(state, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as old:
        data = zipped(*((name, [old.read(name)]) for name in old.namelist()))
    (tmp_path / "last-0000.optimizer").write_bytes(data)
    assert len(data) < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProbeError) as error:
        checkpoints.load(tmp_path)
    assert "take 120.0 MB of memory by what they declare" in str(error.value)
    assert "move it away to start anew" in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
