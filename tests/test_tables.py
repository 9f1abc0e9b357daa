"""Tables as people have them: separators, formats, spellings; judged by pandas.read_csv."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas._libs.parsers import STR_NA_VALUES

from features.datasets import Options, open_dataset
from features.datasets.cells import MISSING
from features.datasets.naming import table_name
from features.datasets.reading import find_separator, read_table
from features.errors import DatasetError

LABELS = ["a", "b"] * 10
FRAME = pd.DataFrame(
    {
        "path": [f"img {i}, left.png" for i in range(20)],
        "label": LABELS,
        "subject": [f"{i:03d}" for i in range(20)],
        "sex": ["F", "M", "F", None] * 5,
    }
)


def table(folder, text, name="table.csv"):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"csv:{file}"


def labelled(folder, labels, options=None, header="path,label"):
    lines = [f'{i}.png,"{label}"' for i, label in enumerate(labels)]
    return open_dataset(table(folder, "\n".join([header, *lines])), options)


def of_each(manifest):
    """Return each image's class, None where it has none."""
    return [manifest.classes[k] if k >= 0 else None for k in manifest.label.tolist()]


# --- what is one label --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["0", "0.0", "1", "1.0", " 1 ", "01", "1e0"], ("0", "1")),
        (["-0.0", "0", "0.50", ".5", "+2"], ("0", "0.5", "2")),
        (["True", "true", "TRUE", "False ", "FALSE"], ("False", "True")),
        (
            ["lung", "lung ", "\u00a0lung", "lung\u200b", "rib  cage", "rib\tcage"],
            ("lung", "rib cage"),
        ),
        (["Sjögren", unicodedata.normalize("NFD", "Sjögren"), "no"], ("Sjögren", "no")),
        (["0", "0.0", "unknown", "1.0"], ("0", "1", "unknown")),
        (["01", "1E2", "x", "2.50"], ("01", "1E2", "2.50", "x")),  # codes, among words
    ],
)
def test_what_is_one_value_is_one_class_however_it_is_written(tmp_path, labels, classes):
    with_split = [f'{i}.png,"{label}",{s}' for i, (label, s) in enumerate(
        [(label, s) for label in labels for s in ("train", "test")]
    )]  # fmt: skip
    text = "\n".join(["path,label,split", *with_split])
    assert open_dataset(table(tmp_path, text)).classes == classes


NUMBERS = st.one_of(
    st.integers(-3, 3).map(str),
    st.sampled_from(["0.0", "1.0", "01", "1e0", "2.50", "2.5", ".5", "0.5", "-0", "+1", "3."]),
)


@settings(max_examples=100, deadline=None)
@given(
    cells=st.lists(st.one_of(NUMBERS, st.sampled_from(sorted(STR_NA_VALUES))), min_size=4),
    blanks=st.lists(st.sampled_from(["", " ", "  "]), min_size=4),
)
@pytest.mark.filterwarnings("ignore:.*counts as no label")
def test_columns_of_numbers_have_the_classes_and_gaps_that_pandas_finds(
    tmp_path_factory, cells, blanks
):
    cells = ["7", "7", "8", "8", *cells]
    text = "path,label,split\n" + "".join(
        f"{i}.png,{cell}{blanks[i % len(blanks)]},{('train', 'test')[i % 2]}\n"
        for i, cell in enumerate(cells)
    )
    ours = of_each(open_dataset(table(tmp_path_factory.mktemp("t"), text)))
    stripped = "\n".join(",".join(c.strip() for c in r.split(",")) for r in text.splitlines())
    theirs = pd.read_csv(io.StringIO(stripped))["label"].tolist()
    assert [None if k is None else float(k) for k in ours] == [
        None if pd.isna(k) else float(k) for k in theirs
    ]
    assert len(set(ours) - {None}) == len(set(pd.Series(theirs).dropna()))


def test_missing_words_are_those_of_pandas_and_are_said(tmp_path):
    assert MISSING == STR_NA_VALUES
    with pytest.warns(UserWarning, match=r"column label: NaN \(2\), NA \(1\) counts as no label"):
        manifest = labelled(tmp_path, [*LABELS, "NaN", "", "NA", "NaN "])
    assert manifest.classes == ("a", "b")
    assert manifest.label[-4:].tolist() == [-1] * 4
    kept = labelled(tmp_path, [*LABELS, *["NA", ""] * 3], Options(keep_na=True))
    assert kept.classes == ("NA", "a", "b")
    assert kept.label[-2:].tolist() == [0, -1]


def test_a_difference_in_case_alone_is_said_and_kept(tmp_path):
    with pytest.warns(UserWarning, match='classes CXR and cxr differ .*--merge "CXR=CXR\\+cxr"'):
        manifest = labelled(tmp_path, ["CXR", "cxr", "MR"] * 4)
    assert manifest.classes == ("CXR", "MR", "cxr")
    merged = labelled(tmp_path, ["CXR", "cxr", "MR"] * 4, Options(merge=("CXR=CXR+cxr",)))
    assert merged.classes == ("CXR", "MR")


def test_cells_of_several_labels_are_spelled_alike_and_nothing_is_no_finding(tmp_path):
    cells = ["1|2.0", " 2 |", "", "None", "1.0", "2|3"]
    with pytest.warns(UserWarning, match=r"None \(2\) counts as no label"):
        manifest = labelled(tmp_path, cells * 2, Options(label_sep="|"))
    assert manifest.classes == ("1", "2", "3")
    assert manifest.label[:6].tolist() == [
        *([1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 1])
    ]


def test_findings_may_be_numbers_truths_or_missing_words(tmp_path):
    lines = ["1.png,1,True", "2.png,0.0,FALSE", "3.png,-1.0,nan", "4.png,NA, 1 ", "5.png,1,0"]
    text = "\n".join(["path,label_a, label_b", *lines])
    manifest = open_dataset(table(tmp_path, text))
    assert manifest.classes == ("a", "b")
    assert manifest.label.tolist() == [[1, 1], [0, 0], [-1, -2], [-2, 1], [1, 0]]


def test_subjects_are_names_and_not_numbers(tmp_path):
    lines = [f"{i}.png,{'ab'[i % 2]},{s}" for i, s in enumerate(["007", "7", "8 ", "8"] * 3)]
    text = "\n".join(["path,label,subject", *lines])
    with pytest.warns(UserWarning, match="column subject has subjects that may be one.*: 007, 7"):
        manifest = open_dataset(table(tmp_path, text))
    assert set(manifest.subject) == {"007", "7", "8"}
    with pytest.raises(DatasetError, match=r"line 2: the cell 'subject' is NA, which counts as em"):
        open_dataset(table(tmp_path, text.replace("007", "NA")))
    kept = open_dataset(table(tmp_path, text.replace("007", "NA")), Options(keep_na=True))
    assert set(kept.subject) == {"NA", "7", "8"}


def test_splits_and_groups_written_by_pandas_are_read_as_it_meant_them(tmp_path):
    lines = [f"{i}.png,{'ab'[i % 2]},nan,{g}" for i, g in enumerate(["1", "1.0", "NaN", "2"] * 5)]
    manifest = open_dataset(table(tmp_path, "\n".join(["path,label,split,stage", *lines])))
    assert manifest.split_from.startswith("drawn")
    assert manifest.columns["stage"][:4].tolist() == ["1", "1", "", "2"]


def with_column(folder, name, values, options=None):
    lines = [f"{i}.png,{'ab'[i % 2]},{value}" for i, value in enumerate(values)]
    return open_dataset(table(folder, "\n".join([f"path,label,{name}", *lines])), options)


@pytest.mark.parametrize(
    "name", ["patient", "Patient_ID", "patientid", "PatientID", "subject_id", "case id", "MRN"]
)
def test_a_column_that_looks_like_subjects_is_said_and_not_kept(tmp_path, name):
    people = [f"p{i // 5}" for i in range(40)]
    with pytest.warns(UserWarning, match=f"column {name} looks like subjects: give --subject-col"):
        manifest = with_column(tmp_path, name, people)
    assert not manifest.has_subjects and not manifest.columns
    assert set(with_column(tmp_path, name, people, Options(subject_col=name)).subject) == {*people}
    with_column(tmp_path, name, range(40))  # no two images are of one
    with_column(tmp_path, name, [""] * 40)


@pytest.mark.parametrize(
    "name",
    [
        "name",
        "pname",
        "patient_name",
        "PatientName",
        "last name",
        "dob",
        "patient_dob",
        "BirthYear",
        "birth_date",
        "date",
        "StudyDate",
        "studydate",
        "visit_date",
        "scan_datetime",
    ],
)
def test_columns_called_as_persons_or_dates_are_not_kept(tmp_path, name):
    assert not with_column(tmp_path, name, ["x", "y"] * 20).columns


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        (["2020-01-31", "2021-02-28"], False),
        (["2020-01-31T10:00:00", ""], False),
        (["20200131", "19990101"], False),
        (["Doe^Jane", "Roe^Max^^Dr"], False),
        (["20209931", "20200131"], True),  # a number
        (["2020", "2021"], True),
        (["x^2", "y"], True),
        (["F", "M"], True),
    ],
)
def test_columns_full_of_dates_or_persons_are_not_kept(tmp_path, values, kept):
    assert set(with_column(tmp_path, "what", values * 20).columns) == ({"what"} if kept else set())


@pytest.mark.parametrize("name", ["device_name", "candidate", "adobe", "update", "surface", "site"])
def test_other_names_are_of_groups(tmp_path, name):
    assert set(with_column(tmp_path, name, ["x", "y"] * 20).columns) == {name}


@pytest.mark.parametrize("name", ["study", "Lesion_ID", "eye", "StudyInstanceUID", "exam no"])
def test_a_column_of_units_is_kept_with_any_number_of_values(tmp_path, name):
    for values in ([f"{i // 2:03}" for i in range(300)], list(map(str, range(40))), ["7"] * 40):
        kept = with_column(tmp_path, name, values).columns
        assert kept[name.lower()].tolist() == values
    assert not with_column(tmp_path, name, ["", "NA"] * 20).columns


def test_of_columns_that_differ_in_case_the_first_is_kept_and_said(tmp_path):
    lines = [f"{i}.png,{'ab'[i % 2]},{'MF'[i % 2]},{'xyz'[i % 3]}" for i in range(40)]
    text = "\n".join(["path,label,Sex,sex", *lines])
    with pytest.warns(UserWarning, match="columns Sex and sex have one name here: Sex is kept"):
        manifest = open_dataset(table(tmp_path, text))
    assert manifest.columns["sex"].tolist() == ["M", "F"] * 20


# --- what is no label ---------------------------------------------------------------------------


def test_a_measurement_a_text_and_a_name_are_no_classes(tmp_path, shared_data):
    rng = np.random.default_rng(0)
    for labels, words in (
        (rng.normal(50, 9, 400).round(1), "different numbers from .* a measurement"),
        (rng.permutation(4000)[:100], "different numbers from .* in 100 rows: a measurement"),
        ([f"seen on {i}" for i in range(60)], "60 different texts in 60 rows: names or free text"),
    ):
        with pytest.raises(DatasetError, match=f"column label holds .*{words}.*--label-col"):
            labelled(tmp_path, labels)
    nih = f"csv:{shared_data / 'nih_cxr14_dev' / 'manifest.csv'}"
    with pytest.raises(DatasetError, match="age holds .* numbers from .* 694 rows: a measurement"):
        open_dataset(nih, Options(label_col="age"))
    with pytest.warns(UserWarning, match="holds 30 different numbers .* If it is a measurement, "):
        labelled(tmp_path, list(range(30)) * 5)
    with pytest.raises(DatasetError, match="column path holds 694 different texts in 694 rows"):
        open_dataset(nih, Options(label_col="path"))


def test_many_classes_with_names_or_numbers_are_classes(tmp_path):
    assert len(labelled(tmp_path, list(range(100)) * 25).classes) == 100
    assert len(labelled(tmp_path, [f"bird {k}" for k in range(100)] * 4).classes) == 100
    assert len(labelled(tmp_path, ["0.5", "1.5", "2.5"] * 8).classes) == 3


# --- separators, formats ------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "name", ["t.csv", "t.tsv", "t.csv.gz", "t.csv.bz2", "t.csv.xz", "t.csv.zip"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_tables_are_read_as_pandas_reads_them(tmp_path, separator, name, encoding):
    frame = FRAME.rename(columns={"label": " label ", "path": "path "})
    data = frame.to_csv(sep=separator, index=False).encode(encoding)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("t.csv", data)
    else:
        (tmp_path / name).write_bytes(pack.get(name[-4 if "bz2" in name else -3 :], bytes)(data))
    theirs = pd.read_csv(
        tmp_path / name, sep=separator, encoding=encoding, dtype=str, keep_default_na=False
    )
    found = read_table(tmp_path / name, "csv:t", ("path", "label"))
    assert found.header == ("path", "label", "subject", "sex")
    assert [list(column) for column in found.columns] == [
        theirs[name].tolist() for name in theirs.columns
    ]
    manifest = open_dataset(f"csv:{tmp_path / name}")
    assert (manifest.dataset, of_each(manifest)) == ("t", LABELS)
    assert manifest.subject[3] == "003"


def test_zstandard_is_read_and_named_where_it_is_missing(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(FRAME.to_csv(index=False).encode())
    place = table(tmp_path, data, "t.csv.zst")
    assert of_each(open_dataset(place)) == LABELS
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DatasetError, match=r"read by zstandard: pip install 'medprobe\[tables\]'"):
        open_dataset(place)


@pytest.mark.parametrize(("name", "library"), [("t.parquet", "pyarrow"), ("t.xlsx", "openpyxl")])
def test_parquet_and_excel_are_read_as_the_same_table_in_text(tmp_path, name, library, monkeypatch):
    pytest.importorskip(library)
    frame = FRAME.assign(grade=[1, 2, None, 3] * 5, ill=[True, False] * 10)
    if library == "pyarrow":
        frame.to_parquet(tmp_path / name)
    else:
        frame.to_excel(tmp_path / name, index=False)
    frame.assign(grade=frame["grade"].astype("Int64")).to_csv(tmp_path / "t.csv", index=False)
    binary, text = (read_table(tmp_path / n, "csv:t") for n in (name, "t.csv"))
    assert binary.header == text.header
    assert binary.columns == text.columns
    for label in ("label", "grade", "ill"):
        options = Options(label_col=label)
        a, b = (open_dataset(f"csv:{tmp_path / n}", options) for n in (name, "t.csv"))
        assert (a.classes, a.label.tolist()) == (b.classes, b.label.tolist())
        assert a.columns.keys() == b.columns.keys()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DatasetError, match=rf"{library}, and .*pip install 'medprobe\[tables\]'"):
        open_dataset(f"csv:{tmp_path / name}")
    monkeypatch.undo()
    (tmp_path / name).write_bytes(b"no such thing")
    with pytest.raises(DatasetError, match="can't be read as"):
        open_dataset(f"csv:{tmp_path / name}")


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("path,label\na.png,x;y\nb.png,z;y\n", ","),
        ('path,label\n"a;1.png",x\n"b;2;3.png",y\n', ","),
        ("path;label;size (w,h)\na.png;x;3,4\nb.png;y;5,6\n", ";"),
        ("path;label\na.png;0,5\nb.png;1,5\n", ";"),
        ("path\tlabel\ta,b\nx y.png\t1\t2,3\n", "\t"),
        ("path\na.png\nb.png\n", ","),
        ("path,label,notes\na.png,x\nb.png,y,1\n", ","),
        ("file;kind\na,b.png;x\nc,d.png;y\n", ";"),
    ],
)
def test_the_separator_is_the_one_that_makes_a_table(text, separator):
    assert find_separator(text, ("path", "label", "subject", "split")) == separator


def test_excel_s_first_line_names_the_separator(tmp_path):
    lines = [f"{i}.png;{'ab'[i % 2]}" for i in range(20)]
    manifest = open_dataset(table(tmp_path, "\r\n".join(["sep=;", "path;label", *lines])))
    assert of_each(manifest) == LABELS
    with pytest.raises(DatasetError, match="line 4: found 1 cells, want 2"):
        open_dataset(table(tmp_path, "sep=;\npath;label\na.png;x\nb.png\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\na.png,x\nb.png,y,z\n", "table.csv, line 3: found 3 cells, want 2 as in the"),
        ("path,label\na.png,x\nb.png\n", "line 3: found 1 cells, want 2"),
        ('path,label,t\n"a\n.png",x,1\nb.png,y\n', "line 4: found 2 cells, want 3"),
        ('path,label\na.png,x\n"b.png,y\nc.png,z\n', "line 4: unexpected end of data"),
        ("path,label,label\na.png,x,y\n", r"has 2 columns 'label' \(columns 2 and 3\): want one"),
        ("", "is empty: want a header"),
        ("path,label\n", "holds no images"),
        (
            "Path,PATH,label\na,b,c\n",
            r"no column 'path': .*did you mean Path or PATH\?.*--path-col",
        ),
        ("image_id,label\na,x\n", r"did you mean image_id\?\); name the right one with --path-col"),
        ("path|label\na|x\n", r"one column, 'path.label': its cells seem to have '\|' betw"),
        ("path label\na x\n", "seem to have ' ' between them; want a comma, semicolon or tab"),
        ("my:path\na\n", "seem to have ':' between"),
        ("image path\na\n", r"found image path \(did you mean image path\?\); name the right one"),
        ("path,Diagnosis\na,x\n", r"no column 'label'.*did you mean Diagnosis\?.*--label-col"),
        (b"path,label\na.png,gr\xfcn\n", "is not a UTF-8 table.*Save it as UTF-8"),
    ],
)
def test_a_table_that_is_not_one_says_where_and_what(tmp_path, text, words):
    with pytest.raises(DatasetError, match=words):
        open_dataset(table(tmp_path, text))


def test_damaged_archives_are_an_error_in_words(tmp_path):
    data = gzip.compress(FRAME.to_csv(index=False).encode())
    for broken in (data[:40], b"no gzip", data[:60] + b"\xff" * 20 + data[80:]):
        with pytest.raises(DatasetError, match="can't be read: "):
            open_dataset(table(tmp_path, broken, "t.csv.gz"))


def test_a_column_that_differs_in_case_is_taken_and_said(tmp_path):
    text = FRAME.rename(columns=str.title).to_csv(index=False)
    with pytest.warns(UserWarning) as told:
        manifest = open_dataset(table(tmp_path, text))
    said = {str(one.message).split(": ")[1] for one in told}
    assert said == {f"column {name.title()} is taken for {name}" for name in FRAME.columns[:3]}
    assert (of_each(manifest), manifest.subject[2]) == (LABELS, "002")


def test_empty_lines_and_unused_columns_of_one_name_do_no_harm(tmp_path):
    text = "path,label,,x,x\n" + "".join(f"{i}.png,{'ab'[i % 2]},,1,2\n,,,,\n\n" for i in range(20))
    manifest = open_dataset(table(tmp_path, text))
    assert (len(manifest), dict(manifest.columns)) == (20, {})


def test_back_slashes_are_slashes_unless_a_file_is_so_called(tmp_path):
    (tmp_path / "in\\deed.png").touch()
    lines = ["in\\deed.png,a", *(f"img\\{i}.png,{'ab'[i % 2]}" for i in range(20))]
    with pytest.warns(UserWarning, match=r"20 paths have back slashes, such as img\\0.png"):
        manifest = open_dataset(table(tmp_path, "\n".join(["path,label", *lines])))
    assert manifest.path[:3].tolist() == ["in\\deed.png", "img/0.png", "img/1.png"]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("xrays.csv", "xrays"),
        ("xrays.csv.gz", "xrays"),
        ("labels.csv", "ward-labels"),
        ("train_labels_2.xlsx", "ward-train_labels_2"),
        ("2024-01-05.parquet", "ward-2024-01-05"),
        ("task2.csv", "task2"),
        ("Œdème.csv", "Œdème"),
    ],
)
def test_a_table_is_named_by_its_file_or_by_its_folder_too(tmp_path, file, name):
    assert table_name(tmp_path / "ward" / file) == name


def test_a_name_that_is_given_counts(tmp_path):
    place = table(tmp_path, FRAME.to_csv(index=False))
    assert open_dataset(place, Options(name="mine")).dataset == "mine"
    for wrong in ("../x", ".x", "a/b", " ", "a\\b", "a\nb"):
        with pytest.raises(DatasetError, match="can't be a data set's name"):
            open_dataset(place, Options(name=wrong))


def test_text_tables_need_no_pandas(tmp_path):
    place = table(tmp_path, FRAME.to_csv(index=False))
    code = (
        "import sys; from features.datasets import open_dataset\n"
        f"open_dataset({place!r})\nassert not {{'pandas', 'torch', 'fsspec'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
