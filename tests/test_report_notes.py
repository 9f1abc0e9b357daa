"""What the report remarks: ends of what was tried and of intervals; shots; colours of models."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from reporting import Page, add, said

from cli import cli
from probe.draw.tables import interval, score
from probe.report import Options, make, write_report
from probe.report.panels import at_an_end
from probe.results import load

FOLDS = {"kind": "5 folds", "converged": [], "scores": [[0.1], [0.2], [0.3]]}


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"C": 1e-3}, "C = 0.001 is the smallest that was tried"),
        ({"C": 1e5}, "C = 1e+05 is the largest that was tried: others, by --C, may score higher"),
        ({"C": 1.0}, ""),
        ({"head": "knn", "C": None, "k": 30}, "k = 30 is the largest that was tried"),
        ({"head": "knn", "C": None, "k": 30, "notes": ["k = 99 left out: 40 images vote"]}, ""),
        ({"head": "knn", "C": None, "k": 20}, ""),
    ],
)
def test_a_choice_at_an_end_of_what_was_tried_is_said(tmp_path, facts, words):
    facts = dict(facts)
    tried = {"k": [10, 20, 30], "chosen": facts.pop("k")} if "k" in facts else {}
    folds = FOLDS | (tried or {"C": [1e-3, 1.0, 1e5]})
    add(tmp_path, folds=folds, **facts)
    [result] = load(tmp_path)
    assert result.edge.startswith(words) and bool(result.edge) == bool(words)
    page = said(Page(write_report([tmp_path], tmp_path / "report")).root)
    assert ("was tried: others, by --" in page) == bool(words)


def test_probe_says_it_of_one_result_and_counts_them_of_many(tmp_path):
    y = np.arange(120) % 3
    X = np.random.default_rng(0).standard_normal((120, 4)) + 3 * np.eye(4)[y]
    store = make_store(tmp_path / "b.h5", X, make_manifest(y))
    how = ("-o", tmp_path / "out", "--C", "1e-9,1e-8", "--bootstrap", 100)
    said_ = call("probe", store, *how, "--folds", 3).stderr
    [result] = load(tmp_path / "out")
    assert result.edge and f"  {result.edge}\n" in said_
    many = call("probe", store, *how, "--shots", "4,8", "--seeds", 2).stderr
    assert "  4 of 4 results have the smallest or the largest C that was tried" in many


def test_the_mean_over_seeds_stands_with_its_own_interval(tmp_path):
    """It is the one that compare says, on the page, in the tables and in results.md."""
    y = np.arange(90) % 2
    X = np.random.default_rng(0).standard_normal((90, 4)) + y[:, None]
    store, out = make_store(tmp_path / "b.h5", X, make_manifest(y)), tmp_path / "out"
    call("probe", store, "-o", out, "--C", "1", "--outer", 3, "--repeats", 3, "--bootstrap", 100)
    first = load(out)[0]
    call("probe", store, "-o", out, "--protocol", "knn", "--outer", 3, "--bootstrap", 100)
    scores = json.loads(call("compare", out, "--json").stdout)["scores"]
    [told] = [s for s in scores if len(s["seeds"]) == 3]
    assert (told["ci_low"], told["ci_high"]) != (first.ci_low, first.ci_high)
    [column] = make([out], Options()).columns
    [found] = [s for s in column.standings if s.seeds == 3]
    assert (found.value, found.ci_low, found.ci_high) == (
        pytest.approx(told["value"]),
        pytest.approx(told["ci_low"]),
        pytest.approx(told["ci_high"]),
    )
    index = write_report([out], tmp_path / "report")
    assert column.best is found
    words = f"{score(told['value'])} {interval(told['ci_low'], told['ci_high'])}"
    assert words in said(Page(index).root)
    assert words in (tmp_path / "report" / "results.md").read_text()


def test_the_page_says_what_was_chosen_on_folds(tmp_path):
    kind = {"kind": "5 folds"}
    for k, (facts, words) in enumerate(
        (
            ({"folds": kind}, "C was chosen by 5 folds"),
            ({"folds": kind | {"epoch": 3}}, "The epoch was chosen by 5 folds"),
            ({"folds": kind, "head": "knn", "C": None}, "k was chosen by 5 folds"),
        )
    ):
        add(tmp_path / str(k), **facts)
        page = said(Page(write_report([tmp_path / str(k)], tmp_path / f"report{k}")).root)
        assert words in page and page.count("was chosen by 5 folds") == 1


def test_a_score_at_an_end_of_its_own_interval_is_explained(tmp_path):
    ends = {
        "accuracy": {"value": 0.5, "ci_low": 0.4, "ci_high": 0.6},
        "ece": {"value": 0.04, "ci_low": 0.04, "ci_high": 0.07},
        "f1": {"value": 0.2, "ci_low": 0.1, "ci_high": 0.2},
        "auroc": {"value": 1.0, "ci_low": 0.9, "ci_high": 1.0},
        "mcc": {"value": None, "ci_low": None, "ci_high": None},
    }
    add(tmp_path, metrics=ends)
    note = at_an_end(load(tmp_path)[0])
    assert note.startswith("calibration error and F1 are an end of their own intervals: ")
    assert note in said(Page(write_report([tmp_path], tmp_path / "report")).root)
    del ends["ece"], ends["f1"]
    add(tmp_path / "other", metrics=ends)
    assert at_an_end(load(tmp_path / "other")[0]) == ""


def test_the_chart_of_shots_ends_in_all_images(tmp_path):
    for k, (shots, value) in enumerate(((2, 0.3), (2, 0.5), (8, 0.6), (None, 0.7))):
        add(tmp_path, shots=shots, value=value, missing=True, n_train=500, metric="mcc")
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        lines[-1] = json.dumps(json.loads(lines[-1]) | {"seed": k if shots else 0})
        (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    report = make([tmp_path], Options())
    [chart] = [c for s in report.sections if s.key == "shots" for c in s.charts]
    [series] = chart.series
    assert list(series.x) == [2, 8, 100]
    assert series.y == pytest.approx([0.4, 0.6, 0.7])
    assert "The last point is of all training images" in chart.caption
    add(tmp_path / "whole", n_train=500)  # alone it makes no chart
    assert not [s for s in make([tmp_path / "whole"], Options()).sections if s.key == "shots"]


def test_a_model_has_one_colour_in_all_charts(tmp_path):
    """The best of one data set is not that of the other."""
    for name, swap in (("one", 1), ("two", -1)):
        for backbone, sign in (("dinov2", 1), ("sam", -1), ("deit", 0)):
            value, facts = 0.5 + 0.1 * swap * sign, {"dataset": name, "backbone": backbone}
            add(tmp_path, value=value, missing=True, **facts)
            for shots in (1, 4):
                low = value - 0.1 * (2 - shots / 4)
                add(tmp_path, value=low, shots=shots, missing=True, **facts)
    report = make([tmp_path], Options())
    colours = {}
    for section in report.sections:
        if section.key in ("strength", "shots"):
            for chart in section.charts:
                for series in chart.series:
                    colours.setdefault(series.name.split()[0], set()).add(series.colour)
    assert {name: len(found) for name, found in colours.items()} == dict.fromkeys(colours, 1)
    assert len(colours) == 3 and len(set.union(*colours.values())) == 3
