"""Several findings of an image: what a mean is over, by group too, and what each finding scores."""

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from reporting import Page
from reporting import said as text_of
from sklearn.metrics import roc_auc_score

from cli import cli
from probe.report import write_report
from probe.results import load, read_predictions
from probe.score import groups as apart
from probe.score.metrics import evaluate_log_odds, find


def test_a_group_that_shares_no_finding_with_another_is_scored_on_its_own_and_said(tmp_path):
    rng = np.random.default_rng(1)
    y = (rng.random((60, 2)) < 0.5).astype(float)
    site = np.repeat(["a", "b", "c"], 20)
    y[site == "a", 0] = y[site == "b", 1] = y[site == "c"] = 0
    z = rng.normal(size=(60, 2))
    ids = np.arange(60).astype(str)
    how = {"n": 100, "seed": 0, "method": "bayesian"}
    groups = apart.subgroups(y, z, ids, {"site": site}, find("auroc", "multilabel"), "xy", **how)
    a, b, c = groups
    assert a["value"] == pytest.approx(roc_auc_score(y[:20, 1], z[:20, 1]))
    assert b["value"] == pytest.approx(roc_auc_score(y[20:40, 0], z[20:40, 0]))
    assert c["value"] is None
    said = apart.uneven(groups)
    assert said.endswith("can't be held against each other: a without x; b without y")
    y[site == "a"] = (rng.random((20, 2)) < 0.5).astype(float)  # what c lacks counts for nobody
    a, b, c = apart.subgroups(y, z, ids, {"site": site}, find("auroc", "multilabel"), "xy", **how)
    assert a["left_out"] == b["left_out"] == ["y"]
    assert a["value"] == pytest.approx(roc_auc_score(y[:20, 0], z[:20, 0]))


@pytest.mark.parametrize("metric", ["auroc", "average_precision", "sensitivity_at_90"])
def test_groups_are_scored_on_the_classes_that_all_of_them_have(metric):
    rng = np.random.default_rng(2)
    sex = np.array(["F", "M"] * 60)
    y = rng.integers(0, 4, 120)
    y[(sex == "M") & (y == 2)] = 1
    z = rng.normal(size=(120, 4)) + 2 * np.eye(4)[y]
    ids = np.arange(120).astype(str)
    how = {"n": 100, "seed": 0, "method": "bayesian"}
    one = find(metric, "multiclass")
    for group in apart.subgroups(y, z, ids, {"sex": sex}, one, "abcd", **how):
        rows = sex == group["group"]
        each = [
            evaluate_log_odds(
                find(metric, "multilabel"), (y[rows] == k).astype(float)[:, None], z[rows][:, [k]]
            )[0]
            for k in (0, 1, 3)
        ]
        assert group["left_out"] == ["c"]
        assert group["value"] == pytest.approx(np.mean(each))
        assert group["ci_low"] < group["value"] < group["ci_high"]


def test_what_a_mean_is_over_is_said_in_the_line_the_notes_and_the_report(tmp_path):
    rng = np.random.default_rng(0)
    N, names = 240, ["Edema", "Hernia", "Mass", "No Finding"]
    y = (rng.random((N, 4)) < 0.3).astype(int)
    y[:, 1] = 0
    y[[1, 2, 3, 5], 1] = 1  # of training images only
    y[:, 3] = ~y[:, :3].any(1)
    X = (rng.standard_normal((N, 6)) + y @ rng.standard_normal((4, 6))).astype(np.float32)
    store = make_store(tmp_path / "s" / "b.h5", X, make_manifest(y, classes=names))
    words = ["probe", store, "-o", tmp_path / "out", "--C", "1", "--bootstrap", "200"]
    done = CliRunner().invoke(cli, list(map(str, words)))
    mean = "mean of 3 of 4 findings, without Hernia (no test image has it)"
    assert f"  auroc is the {mean}\n" in done.stdout
    [result] = load(tmp_path / "out")
    said = read_predictions(tmp_path / "out" / result.predictions)
    each = {k: roc_auc_score(said.labels[:, k], said.log_odds[:, k]) for k in (0, 2, 3)}
    assert result.value == pytest.approx(np.mean([*each.values()]))
    without = f"without it auroc is {np.mean([each[0], each[2]]):.3f}, the mean of 2"
    note = f"No Finding counts as a finding in the mean; {without}"
    assert note in result.notes and f"  {note}\n" in done.stderr
    for k, area in each.items():
        one = result.outputs[names[k]]
        assert one["auroc"] == pytest.approx(area) and one["ci_low"] < area < one["ci_high"]
    page = Page(write_report([tmp_path / "out"], tmp_path / "report"))
    text = text_of(page.root)
    assert text.count("(mean of 3 of 4 findings) on 60 test images") == 1
    assert f", {mean}" in text and note in text
    rows = {row[0]: row[1] for row in page.rows("findings")}
    assert "[" not in rows["Hernia"] and "[" in rows["Edema"]
    few = [row[0] for row in page.rows("thresholds")]
    assert "Hernia (few)" in few and "Edema" in few
