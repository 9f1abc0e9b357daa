"""The report, judged by html.parser, ElementTree, csv and scikit-learn."""

# ruff: noqa: RUF001 (a minus and a multiplication sign are meant)

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, TreeBuilder

import matplotlib
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from features.errors import ProbeError
from probe.report import write_report
from probe.results import Predictions, Result, append, write_predictions
from probe.tables import interval, power, score

SVG = "{http://www.w3.org/2000/svg}"
GRADES = ["no DR", "mild", "moderate", "severe", "proliferative"]
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "</style><svg onload=alert(3)>",
    "שלום עולם",
    "\U0001f480 $x_1$ {{ 7 * 7 }}",
    "=HYPERLINK(1)",
    "a|b`c`_d_ & \\e",
    "bell\x07 turn\u202egnp.exe",
    "x" * 200,
]


def add(folder, *, classes=GRADES, many=False, N=60, seed=0, missing=False, **changes):
    """Append a result with predictions to `folder`; return (labels, probabilities)."""
    rng = np.random.default_rng(seed)
    K = len(classes)
    if many:
        labels = (rng.random((N, K)) < 0.3).astype(float)
        labels[rng.random((N, K)) < 0.1] = np.nan
        p = np.clip(np.nan_to_num(labels) * 0.2 + rng.random((N, K)) * 0.7, 0, 1)
    else:
        labels = rng.integers(0, K, N)
        p = rng.dirichlet(np.ones(K), N)
    if "labels" in changes:
        labels = changes.pop("labels")(labels)
    p = np.round(p, 6)  # what predictions.csv keeps
    number = len(list(folder.glob("*.csv")))
    if not missing:
        ids = [f"{i}.png" for i in range(N)]
        write_predictions(folder / f"{number}.csv", Predictions(ids, ids, labels, p, classes))
    row = {
        "dataset": "idrid",
        "backbone": "dinov2",
        "weights": "published",
        "scenario": "frozen-linear",
        "head": "linear",
        "feature": "final/cls",
        "protocol": "paper",
        "metric": "quadratic_kappa",
        "value": 0.61234567,
        "ci_low": 0.512,
        "ci_high": 0.701,
        "metrics": {"accuracy": {"value": 0.5, "ci_low": 0.4, "ci_high": None}},
        "C": 0.01,
        "folds": {
            "kind": "5 folds",
            "C": [1e-4, 1e-2, 1.0, 1e2],
            "scores": [[0.1, 0.3], [0.5, 0.7], [None, 0.2], [0.3, 0.35]],
            "converged": [[True, True], [True, True], [False, True], [False, False]],
            "gap": [[0.0, 0.0]] * 4,
        },
        "task": "multilabel" if many else "multiclass",
        "classes": list(classes),
        "n_train": 413,
        "n_test": N,
        "n_bad": 0,
        "n_subjects_test": N,
        "seed": 0,
        "split_digest": "5p117",
        "store": "features/idrid/dinov2.h5",
        "store_fingerprint": "f1n6e7",
        "predictions": f"{number}.csv",
        "heads": "heads.safetensors",
        "converged": True,
        "seconds": 1.5,
        "command": "medprobe probe features/idrid/dinov2.h5",
        "versions": {"numpy": "2.0"},
        "created": "2026-11-24T00:00:00Z",
    }
    append(folder, Result(**(row | changes)))
    return labels, p


class Page(HTMLParser):
    """A page as an ElementTree; it fails where an element is closed that isn't open."""

    def __init__(self, path: Path):
        super().__init__()
        self.builder, self.open = TreeBuilder(), []
        self.text = path.read_text(encoding="utf-8")
        self.builder.start("page", {})
        self.feed(self.text)
        self.close()
        assert self.open == []
        self.root: Element = self.builder.end("page")

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.builder.start(tag, {name: value or "" for name, value in attrs})
        if tag in ("meta", "link"):
            self.builder.end(tag)
        else:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)

    def find(self, tag, name):
        """Return the elements of one tag that have the class `name`."""
        return [e for e in self.root.iter(tag) if name in e.get("class", "").split()]

    def rows(self, name):
        """Return the body of the first table of class `name` as lists of text."""
        body = self.find("table", name)[0].find("tbody")
        return [[said(cell) for cell in row] for row in body]


def said(element):
    return " ".join("".join(element.itertext()).split())


def test_the_confusion_matrix_is_scikit_learns(tmp_path):
    labels, p = add(tmp_path)
    page = Page(write_report([tmp_path], tmp_path / "report"))

    expected = confusion_matrix(labels, p.argmax(1), labels=range(5))
    shown = page.rows("confusion")
    assert [row[0] for row in shown] == GRADES
    np.testing.assert_array_equal(np.array([row[1:-1] for row in shown], dtype=int), expected)

    # The picture says the same, read line by line.
    (path,) = (tmp_path / "report" / "figures").glob("*-confusion.svg")
    texts = [t for t in ElementTree.parse(path).iter(f"{SVG}text") if (t.text or "").isdigit()]
    texts.sort(key=lambda t: float(t.get("y")))
    lines = [sorted(texts[i : i + 5], key=lambda t: float(t.get("x"))) for i in range(0, 25, 5)]
    np.testing.assert_array_equal([[int(t.text) for t in line] for line in lines], expected)


def test_auroc_per_finding_is_scikit_learns_and_one_sided_findings_are_named(tmp_path):
    findings = ["Edema", "Hernia", "Mass", "Fracture"]

    def one_sided(labels):
        labels[:, 1], labels[:, 3] = 0, np.where(np.isnan(labels[:, 3]), np.nan, 1)
        return labels

    labels, p = add(tmp_path, classes=findings, many=True, labels=one_sided)
    page = Page(write_report([tmp_path], tmp_path / "report"))

    shown = {row[0]: row[1:] for row in page.rows("findings")}
    assert set(shown) == set(findings)
    for k in (0, 2):
        known = ~np.isnan(labels[:, k])
        auroc = roc_auc_score(labels[known, k], p[known, k])
        counts = [str(int((labels[:, k] == value).sum())) for value in (1, 0)]
        assert shown[findings[k]] == [f"{auroc:.3f}"[1:], *counts, str(int((~known).sum()))]
    assert shown["Hernia"][0] == shown["Fracture"][0] == score(None)
    assert "one class of them: Hernia, Fracture." in said(page.root)


def test_hostile_names_stay_text_everywhere(tmp_path):
    first = {"dataset": HOSTILE[0], "backbone": HOSTILE[1], "notes": [HOSTILE[2]]}
    add(tmp_path, classes=HOSTILE, **first, store="it's here.h5", n_bad=2, command=HOSTILE[5])
    second = {"dataset": HOSTILE[5], "backbone": HOSTILE[6], "scenario": HOSTILE[4]}
    second |= {"metric": HOSTILE[0], "metrics": {HOSTILE[1]: {}}, "versions": {"<b>": "<i>"}}
    add(tmp_path, classes=HOSTILE, many=True, **second)
    index = write_report([tmp_path], tmp_path / "report")
    page = Page(index)

    for element in page.root.iter():
        assert element.tag not in ("script", "img", "b", "i", "iframe", "object", "foreignobject")
        assert not [name for name in element.attrib if name.startswith("on")]
    text = "".join(page.root.itertext())
    for name in HOSTILE:
        shown = name.replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
        assert shown in text
    assert "medprobe inspect 'it'\"'\"'s here.h5'" in text

    for path in (tmp_path / "report" / "figures").glob("*.svg"):
        svg = ElementTree.parse(path)  # well-formed, so nothing broke out
        assert not [e for e in svg.iter() if e.tag in (f"{SVG}script", f"{SVG}image")]
    words = [e.text for e in svg.iter(f"{SVG}text")]
    assert any(word and "$x_1$" in word for word in words)  # not set as mathematics

    with (tmp_path / "report" / "results.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            assert not [cell for cell in row if cell[:1] in ("=", "+", "@", "\t", "-")]
    lines = (tmp_path / "report" / "results.md").read_text(encoding="utf-8").splitlines()
    cells = {len(re.split(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert cells == {18, 9}  # no cell of the two tables broke in two
    assert not [line for line in lines if "<" in line]


def test_the_page_reaches_for_nothing_outside_itself(tmp_path):
    add(tmp_path)
    add(tmp_path, backbone="clip", seed=1)
    add(tmp_path, backbone="dino", classes=["Edema", "Mass"], many=True)
    page = Page(write_report([tmp_path], tmp_path / "report"))

    ids = [e.get("id") for e in page.root.iter() if e.get("id")]
    assert len(set(ids)) == len(ids)  # also across figures
    for element in page.root.iter():
        for name, value in element.attrib.items():
            assert name not in ("src", "srcset", "action", "data", "poster")
            if name in ("href", "xlink:href") and value != "data:,":
                assert value.removeprefix("#") in ids and value.startswith("#")
            for target in re.findall(r"url\((.*?)\)", value):
                assert target.removeprefix("#") in ids and target.startswith("#")
            assert "//" not in value or name.startswith("xmlns")
    style = "".join(said(e) for e in page.root.iter("style"))
    assert "url(" not in style and "@import" not in style
    pictures = [e for e in page.root.iter("svg") if e.get("role") == "img"]
    assert len(pictures) == 6 and all(e.get("aria-label", "").endswith(".") for e in pictures)


def test_the_same_results_give_the_same_bytes_whatever_matplotlibrc_says(tmp_path):
    add(tmp_path, classes=HOSTILE)
    add(tmp_path, backbone="dino", classes=["Edema", "Mass"], many=True)
    write_report([tmp_path], tmp_path / "one")
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "xtick.major.size": 9}):
        write_report([tmp_path / "results.jsonl", tmp_path], tmp_path / "two")
        assert matplotlib.rcParams["font.size"] == 20

    def files(out):
        return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == 3 + 2 * 4
    assert one == two


def test_results_csv_keeps_every_digit(tmp_path):
    add(tmp_path, value=-0.1 / 3, notes=["first", "second"])
    write_report([tmp_path], tmp_path / "report")
    with (tmp_path / "report" / "results.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert float(row["value"]) == -0.1 / 3 and float(row["C"]) == 0.01
    assert float(row["accuracy"]) == 0.5 and row["accuracy_ci_high"] == ""
    assert row["notes"] == "first; second" and row["split_digest"] == "5p117"
    assert json.loads(row["versions"]) == {"numpy": "2.0"}


def test_the_headline_names_the_best_and_doubtful_rows_wear_marks(tmp_path):
    add(tmp_path, notes=["not medical: handwritten digits"])
    add(tmp_path, backbone="sam", value=0.4, weights="random")
    add(tmp_path, backbone="blip", value=0.3, converged=False, split_digest="0743r", N=50)
    page = Page(write_report([tmp_path], tmp_path / "report"))

    (headline,) = page.find("p", "headline")
    assert said(headline) == (
        "On idrid, dinov2 (frozen-linear) reaches a quadratic kappa of .612 [.512, .701] "
        "on 60 test images."
    )
    aside = said(page.find("p", "aside")[0])
    assert "highest of 3 results" in aside and "2 different splits" in aside
    assert "not medical: handwritten digits" in aside

    rows = page.find("table", "results")[0].find("tbody")
    tags = [[said(e) for e in row.iter("span") if e.get("class") == "tag"] for row in rows]
    assert tags == [[], ["random"], ["no"]]
    keys = [said(e) for e in page.find("p", "key")]
    assert "never trained" in keys[0] and "before it reached its tolerance" in keys[1]


def test_a_sole_random_result_is_never_praised_without_saying_so(tmp_path):
    add(tmp_path, weights="random", converged=False, N=1)
    (headline,) = Page(write_report([tmp_path], tmp_path / "report")).find("p", "headline")
    assert said(headline).endswith(
        "on 1 test image; its weights are random; its fit did not converge."
    )


def test_the_curve_is_the_mean_of_the_defined_folds(tmp_path):
    add(tmp_path)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    (path,) = (tmp_path / "report" / "figures").glob("*-C.svg")
    svg = ElementTree.parse(path)

    blue = [e for e in svg.iter(f"{SVG}path") if "stroke: #0072b2" in e.get("style", "")]
    lines = [np.array(re.findall(r"[\d.]+", e.get("d")), dtype=float).reshape(-1, 2) for e in blue]
    (line,) = [xy for xy in lines if len(xy) == 4]
    mean = np.nanmean([[0.1, 0.3], [0.5, 0.7], [np.nan, 0.2], [0.3, 0.35]], axis=1)
    for drawn, value in zip(line.T, ([-4, -2, 0, 2], mean), strict=True):  # an axis is affine
        np.testing.assert_allclose(np.polyval(np.polyfit(value, drawn, 1), value), drawn, atol=0.01)
    uses = [e for e in svg.iter(f"{SVG}use") if "stroke: #d55e00" in e.get("style", "")]
    crosses = [e for e in uses if float(e.get("y")) > 40]  # below the legend
    assert len(crosses) == 2  # three fits are loose, the score of one is undefined
    assert "3 of 8 fits did not converge" in said(page.root)


def test_thirty_classes_are_drawn_without_numbers(tmp_path):
    labels, p = add(tmp_path, classes=[f"class {chr(65 + i)}" for i in range(30)], N=400)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    (path,) = (tmp_path / "report" / "figures").glob("*-confusion.svg")
    assert not [e for e in ElementTree.parse(path).iter(f"{SVG}text") if (e.text or "").isdigit()]
    counts = confusion_matrix(labels, p.argmax(1), labels=range(30))
    np.fill_diagonal(counts, 0)
    assert int(page.rows("mistakes")[0][2]) == counts.max()


def test_what_is_missing_is_said_and_a_new_report_leaves_no_old_figures(tmp_path):
    add(tmp_path / "a")
    out = tmp_path / "report"
    write_report([tmp_path / "a"], out)
    (out / "figures" / "mine.svg").write_text("kept")

    add(tmp_path / "b", missing=True, folds={}, ci_low=0.6)
    page = Page(write_report([tmp_path / "b"], out))
    assert "0.csv holds no predictions (No such file or directory)" in said(page.root)
    assert "no scores of folds are recorded" in said(page.root)
    assert [path.name for path in (out / "figures").iterdir()] == ["mine.svg"]

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.jsonl").write_text("")
    with pytest.raises(ProbeError, match=r"no results in .*c: run `medprobe probe"):
        write_report([tmp_path / "c"], out)


def test_numbers_read_as_in_print():
    assert [score(v) for v in (0.6124, -0.0342, 1.0, 0.9996, -0.0001, 1.13, None)] == [
        ".612", "−.034", "1.000", "1.000", ".000", "1.130", "–",
    ]  # fmt: skip
    assert interval(0.5, None) == "" and interval(-0.1, 1) == "[−.100, 1.000]"
    strengths = [1e-6, 1e-3, 0.01, 0.1, 1, 10, 1e5, 10**-0.5, 10**-5.5, 999.99999]
    assert [power(C) for C in strengths] == [
        "10⁻⁶", "10⁻³", "0.01", "0.1", "1", "10", "10⁵", "0.316", "3.16 × 10⁻⁶", "10³",
    ]  # fmt: skip


def test_a_report_needs_neither_torch_nor_a_store():
    code = (
        "import sys, probe.report; print(*{'torch', 'h5py', 'matplotlib.pyplot'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
