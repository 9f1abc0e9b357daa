"""The report's page and files, judged by html.parser, ElementTree, pandas and scikit-learn."""

# ruff: noqa: RUF001 (a minus and a multiplication sign are meant)

import csv
import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from pylatexenc.latexwalker import LatexEnvironmentNode, LatexWalker
from reporting import GRADES, HOSTILE, SVG, Page, add, said
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from features.errors import ProbeError
from probe.draw.tables import Scored, Table, interval, p_value, power, score
from probe.report import Options, make, write_report
from probe.results import Predictions


def chart(page, end):
    """Return the only chart of a page whose name ends so."""
    (found,) = [c for name, c in page.data["charts"].items() if name.endswith(end)]
    return found


def test_the_confusion_matrix_is_scikit_learns(tmp_path):
    labels, p = add(tmp_path)
    page = Page(write_report([tmp_path], tmp_path / "report"))

    expected = confusion_matrix(labels, p.argmax(1), labels=range(5))
    shown = chart(page, "-confusion")
    np.testing.assert_array_equal(np.array(shown["texts"], dtype=int), expected)
    assert shown["x"]["names"] == shown["y"]["names"] == GRADES

    # The picture says the same, read line by line, and so does the table beside it.
    (path,) = (tmp_path / "report" / "figures").glob("*-confusion.svg")
    texts = [t for t in ElementTree.parse(path).iter(f"{SVG}text") if (t.text or "").isdigit()]
    texts.sort(key=lambda t: float(t.get("y")))
    lines = [sorted(texts[i : i + 5], key=lambda t: float(t.get("x"))) for i in range(0, 25, 5)]
    np.testing.assert_array_equal([[int(t.text) for t in line] for line in lines], expected)
    table = pd.read_csv(path.with_suffix(".csv")).pivot(index="label", columns="predicted")
    np.testing.assert_array_equal(table["value"].loc[GRADES, GRADES], expected)


def test_auroc_per_finding_is_scikit_learns_and_one_sided_findings_have_none(tmp_path):
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
        ap = average_precision_score(labels[known, k], p[known, k])
        counts = [str(int((labels[:, k] == value).sum())) for value in (1, 0)]
        expected = [score(auroc), score(ap), *counts, str(int((~known).sum()))]
        assert shown[findings[k]] == expected
    assert shown["Hernia"][0] == shown["Fracture"][0] == score(None)
    names = {row.split(" (")[0] for row in chart(page, "-findings")["rows"]}
    assert names == {"Edema", "Mass"}


def test_the_curves_are_scikit_learns_within_their_bands(tmp_path):
    labels, p = add(tmp_path, N=200, classes=["no", "yes"])
    report = make([tmp_path], Options())
    roc, pr = (
        next(c for c in report.charts() if c.name.endswith(end)).series for end in ("-roc", "-pr")
    )
    assert len(roc) == len(pr) == 1  # of two classes the second
    assert roc[0].name == f"yes (AUROC {score(roc_auc_score(labels, p[:, 1]))})"
    assert pr[0].name == f"yes (AP {score(average_precision_score(labels, p[:, 1]))})"

    fpr, tpr, _ = roc_curve(labels, p[:, 1], drop_intermediate=False)
    at = np.array(roc[0].x)
    np.testing.assert_allclose(roc[0].y, np.interp(at, fpr, tpr), atol=1e-6)
    precision, recall, _ = precision_recall_curve(labels, p[:, 1])
    best = [precision[np.flatnonzero(recall >= r - 1e-6)[-1]] for r in at[1:]]
    np.testing.assert_allclose(pr[0].y[1:], best, atol=1e-6)
    for s in (*roc, *pr):
        low, y, high = (np.array(v) for v in (s.low, s.y, s.high))
        inside = (low <= y + 1e-9) & (y <= high + 1e-9)
        assert inside.mean() > 0.9 and (high - low).max() > 0.05


def test_a_curve_without_a_band_says_why(tmp_path):
    y = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    subjects = ["a", "b", "c", "d", "e", "e", "f", "g", "h", "i"]  # class one: one subject
    z = np.random.default_rng(0).dirichlet(np.ones(3), len(y))
    z[y == 2, 2] += 5  # told apart without an error: every resample is the same curve
    p = z / z.sum(1, keepdims=True)
    tiny = Predictions([str(i) for i in range(10)], subjects, y, p, ["zero", "one", "two"])
    few = {"few": "few test subjects: 9 in all; no interval is sure", "n_subjects_test": 9}
    add(tmp_path, predictions=tiny, classes=tiny.classes, **few)
    charts = {c.title: c for c in make([tmp_path], Options()).charts()}
    roc = charts["ROC"]
    bands = {s.name.split(" (")[0]: len(s.low) for s in roc.series}
    assert bands["zero"] and not (bands["one"] or bands["two"] or bands["mean of all"])
    assert "from resampling subjects. With few subjects it is not reliable." in roc.caption
    assert "No band for one: one test subject with it." in roc.caption
    assert "No band for two: all resamples give the same curve." in roc.caption
    page = Page(write_report([tmp_path], tmp_path / "report"))
    assert "No band for one: one test subject with it." in said(page.root)

    add(tmp_path / "images", subjects_known=False)
    (roc,) = [c for c in make([tmp_path / "images"], Options()).charts() if c.title == "ROC"]
    assert roc.caption.startswith("The band is 95 %, pointwise, from resampling images.")


def test_groups_say_what_their_means_are_without_and_images_where_no_subjects_are_known(tmp_path):
    group = {"column": "sex", "n": 9, "subjects": 9, "value": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    group |= {"small": False}
    known = [
        group | {"group": "F", "left_out": []},
        group | {"group": "M", "left_out": ["Hernia", "Mass"]},
    ]
    old = [group | {"group": "F"}]
    findings = {"classes": ["Hernia", "Mass"], "many": True, "metric": "auroc"}
    for k, (groups, caption) in enumerate((
        (known, "By group: by sex, each mean is over what the group has, so that groups can't be"),
        (old, "that the group has, which may not be the same in each, so that groups can't"),
    )):  # fmt: skip
        folder = tmp_path / str(k)
        add(folder, subgroups=groups, subjects_known=k == 0, **findings)
        page = Page(write_report([folder], folder / "report"))
        assert caption in said(page.root)
        rows = page.rows("groups")
        expected = [".500 [.400, .600]"]
        if k:
            assert rows == [["sex F", "9", *expected]]
        else:
            assert rows == [
                ["sex F", "9", "9", *expected, ""],
                ["sex M", "9", "9", *expected, "Hernia, Mass"],
            ]
        (table,) = (folder / "report" / "tables").glob("*-groups.md")
        assert "held against each other" in table.read_text()


def test_hostile_names_stay_text_everywhere(tmp_path):
    first = {"dataset": HOSTILE[0], "backbone": HOSTILE[1], "notes": [HOSTILE[2]]}
    add(tmp_path, classes=HOSTILE, **first, store="it's here.h5", n_bad=2, command=HOSTILE[5])
    second = {"dataset": HOSTILE[5], "backbone": HOSTILE[6], "scenario": HOSTILE[4]}
    second |= {"metric": HOSTILE[0], "metrics": {HOSTILE[1]: {}}, "versions": {"<b>": "<i>"}}
    add(tmp_path, classes=HOSTILE, many=True, **second)
    page = Page(write_report([tmp_path], tmp_path / "report"))

    scripts = [(e.get("id"), e.get("type")) for e in page.root.iter("script")]
    kinds = [("data", "application/json"), ("plotly", "text/plain"), (None, None)]
    assert scripts == kinds  # data, data, and the page's own
    for element in page.root.iter():
        if element.tag == "img":  # a still, of our own making
            assert element.get("src").startswith(("data:image/svg+xml;base64,", "data:image/png;"))
            assert set(element.attrib) == {"class", "alt", "src"}
        assert element.tag not in ("i", "iframe", "object", "foreignobject", "form", "base")
        assert not [name for name in element.attrib if name.startswith("on")]
    text = "".join(page.root.itertext())
    for name in HOSTILE:
        shown = name.replace("\x07", "\ufffd").replace("\u202e", "\ufffd")
        assert shown in text or shown in json.dumps(page.data, ensure_ascii=False)
    assert "medprobe inspect 'it'\"'\"'s here.h5'" in text
    assert "\u202e" not in text + json.dumps(page.data, ensure_ascii=False)

    for path in (tmp_path / "report" / "figures").glob("*.svg"):
        svg = ElementTree.parse(path)  # well-formed, so nothing broke out
        assert not [e for e in svg.iter() if e.tag in (f"{SVG}script", f"{SVG}foreignObject")]
    words = [e.text for e in svg.iter(f"{SVG}text")]
    assert any(word and "$x_1$" in word for word in words)  # not set as mathematics

    for path in (tmp_path / "report").rglob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                formulas = [c for c in row if c[:1] in ("=", "+", "@", "\t", "-")]
                assert all(re.fullmatch(r"-[\d.e-]+", c) for c in formulas)
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
    assert len(set(ids)) == len(ids)
    for element in page.root.iter():
        for name, value in element.attrib.items():
            assert name not in ("srcset", "action", "data", "poster")
            if name == "src":
                assert element.tag == "img" and value.startswith("data:image/")
                continue
            if name == "href" and value != "data:,":
                assert value.removeprefix("#") in ids and value.startswith("#")
            value = re.sub(r"'sha256-[^']*'", "", value)  # base64 may have // by chance
            assert "//" not in value and "url(" not in value
    style = "".join(said(e) for e in page.root.iter("style"))
    assert "url(" not in style and "@import" not in style
    (policy,) = [e.get("content") for e in page.root.iter("meta") if e.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split(";")[1]
    plots = page.find("div", "plot")
    assert len(plots) == len(page.data["charts"]) == 17
    assert all(e.get("aria-label", "").rstrip().endswith(".") for e in plots)


def test_the_same_results_give_the_same_bytes_by_any_matplotlibrc_and_any_processes(
    tmp_path, monkeypatch
):
    add(tmp_path, classes=HOSTILE)
    add(tmp_path, backbone="dino", classes=["Edema", "Mass"], many=True)
    write_report([tmp_path], tmp_path / "one")
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "xtick.major.size": 9}):
        write_report([tmp_path / "results.jsonl", tmp_path], tmp_path / "two")
        assert matplotlib.rcParams["font.size"] == 20
    monkeypatch.setattr("probe.report.FEW", 0)
    monkeypatch.setattr("probe.report.files.FEW", 0)
    write_report([tmp_path], tmp_path / "three")

    def files(out):
        return {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}

    one, two, three = (files(tmp_path / name) for name in ("one", "two", "three"))
    kinds = {p.suffix for p in one if p.parts[0] == "figures"}
    assert kinds == {".svg", ".png", ".csv"}
    assert {p.suffix for p in one if p.parts[0] == "tables"} == {".csv", ".md", ".tex"}
    assert one == two == three


def test_results_csv_keeps_every_digit_and_results_jsonl_is_one_line_of_pandas(tmp_path):
    add(tmp_path, value=-0.1 / 3, notes=["first", "second"], missing=True)
    write_report([tmp_path], tmp_path / "report")
    row = pd.read_csv(tmp_path / "report" / "results.csv").iloc[0]
    assert row["value"] == -0.1 / 3 and row["C"] == 0.01
    assert row["accuracy"] == 0.5 and np.isnan(row["accuracy_ci_high"])
    assert row["notes"] == "first; second" and row["split_digest"] == "5p117"
    assert json.loads(row["versions"]) == {"numpy": "2.0"}
    lines = pd.read_json(tmp_path / "results.jsonl", lines=True, precise_float=True)
    assert lines["value"].tolist() == [-0.1 / 3]


def test_a_table_is_the_same_as_csv_markdown_and_latex(tmp_path):
    rows = [["a_b & <c>", Scored(0.5, 0.25, None, "best"), 3], ["|50 %| {x}", None, 4]]
    table = Table("t", "Caption_1", ["model", "kappa", "n"], rows)
    path = tmp_path / "t.csv"
    path.write_text(table.csv())
    found = pd.read_csv(path)
    assert list(found) == ["model", "kappa", "kappa ci_low", "kappa ci_high", "kappa mark", "n"]
    assert found["model"].tolist() == ["a_b & <c>", "|50 %| {x}"]
    assert found["kappa"].tolist()[0] == 0.5 and found["n"].tolist() == [3, 4]

    nodes, _, _ = LatexWalker(table.latex()).get_latex_nodes()
    (outer,) = [n for n in nodes if isinstance(n, LatexEnvironmentNode)]
    (inner,) = [n for n in outer.nodelist if isinstance(n, LatexEnvironmentNode)]
    body = inner.latex_verbatim()
    assert inner.environmentname == "tabular" and r"\toprule" in body
    assert r"a\_b \& \textless{}c\textgreater{} & \textbf{.500} & 3 \\" in body
    assert all(len(re.findall(r"(?<!\\)&", line)) == 2 for line in body.splitlines() if "&" in line)
    lines = table.markdown().splitlines()
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")} == {5}
    assert "**.500**" in table.markdown()


def test_what_is_missing_is_said_and_a_new_report_leaves_no_old_files(tmp_path):
    add(tmp_path / "a")
    out = tmp_path / "report"
    write_report([tmp_path / "a"], out)
    (out / "figures" / "mine.svg").write_text("kept")

    add(tmp_path / "b", missing=True, folds={}, ci_low=0.6)
    page = Page(write_report([tmp_path / "b"], out))
    assert "0.csv holds no predictions (No such file or directory)" in said(page.root)
    assert page.data["charts"] == {}
    assert [path.name for path in (out / "figures").iterdir()] == ["mine.svg"]
    assert not list((out / "tables").glob("*-mistakes.csv"))

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.jsonl").write_text("")
    with pytest.raises(ProbeError, match=r"no results in .*c: run `medprobe probe"):
        write_report([tmp_path / "c"], out)


def test_the_curve_is_the_mean_of_the_defined_folds(tmp_path):
    add(tmp_path)
    page = Page(write_report([tmp_path], tmp_path / "report"))
    (path,) = (tmp_path / "report" / "figures").glob("001-*-C.svg")
    svg = ElementTree.parse(path)

    blue = [e for e in svg.iter(f"{SVG}path") if "stroke: #0072b2" in e.get("style", "")]
    lines = [np.array(re.findall(r"[\d.]+", e.get("d")), dtype=float).reshape(-1, 2) for e in blue]
    (line,) = [xy for xy in lines if len(xy) == 4]
    mean = np.nanmean([[0.1, 0.3], [0.5, 0.7], [np.nan, 0.2], [0.3, 0.35]], axis=1)
    for drawn, value in zip(line.T, ([-4, -2, 0, 2], mean), strict=True):  # an axis is affine
        np.testing.assert_allclose(np.polyval(np.polyfit(value, drawn, 1), value), drawn, atol=0.01)
    uses = [e for e in svg.iter(f"{SVG}use") if "stroke: #d55e00" in e.get("style", "")]
    crosses = [e for e in uses if float(e.get("y")) > 40]  # below the legend
    assert len(crosses) == 2  # three fits did not converge, the score of one is undefined
    assert "3 of 8 fits did not converge" in said(page.root)
    shown = {s["name"]: s for s in chart(page, "linear-C")["series"]}
    np.testing.assert_allclose(shown["mean of 2 folds"]["y"], mean, rtol=1e-3)
    assert len(shown["not converged"]["x"]) == 2


def test_numbers_read_as_in_print():
    assert [score(v) for v in (0.6124, -0.0342, 1.0, 0.9996, -0.0001, 1.13, None)] == [
        ".612", "−.034", "1.000", "1.000", ".000", "1.130", "–",
    ]  # fmt: skip
    assert interval(0.5, None) == "" and interval(-0.1, 1) == "[−.100, 1.000]"
    strengths = [1e-6, 1e-3, 0.01, 0.1, 1, 10, 1e5, 10**-0.5, 10**-5.5, 999.99999]
    assert [power(C) for C in strengths] == [
        "10⁻⁶", "10⁻³", "0.01", "0.1", "1", "10", "10⁵", "0.316", "3.16 × 10⁻⁶", "10³",
    ]  # fmt: skip
    assert [p_value(p) for p in (1.0, 0.3, 0.296, 0.05, 0.0123, 0.0021, 0.0004, None)] == [
        "p = 1", "p = .3", "p = .3", "p = .05", "p = .012", "p = .0021", "p < .001", "",
    ]  # fmt: skip


def test_importing_the_report_needs_neither_torch_nor_a_store():
    code = (
        "import sys, probe.report; print(*{'torch', 'h5py', 'matplotlib.pyplot'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
