"""Shortcuts: a column that features tell and the label goes with is found, an innocent one not.

Judged by scipy, by scikit-learn on the same folds, and by simulation.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from reporting import Page, said
from scipy.stats import chi2_contingency
from scipy.stats.contingency import association
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from cli import cli
from features.errors import ProbeError
from probe.confounders import load
from probe.confounding import STRENGTHS, confounders
from probe.report import write_report
from probe.score.association import balancing, cramers_v, permutation_p
from probe.splits import outer
from probe.strata import values_of

rng = np.random.default_rng(11)
N, D = 240, 12
SUBJECT = np.repeat(np.arange(N // 2), 2).astype(str)


def made(folder, *, signal, goes_with, columns=None, y=None):
    """A store whose features tell the column "site", and the label by `signal` beside it.

    The label is the site in a share of images, goes_with, and chance in the others.
    """
    site = rng.integers(0, 2, N // 2).repeat(2)
    chance = rng.integers(0, 2, N // 2).repeat(2)
    copied = (rng.random(N // 2) < goes_with).repeat(2)
    label = np.where(copied, site, chance) if y is None else y
    X = rng.standard_normal((N, D)).astype(np.float32)
    X[:, 0] += 4 * site
    X[:, 1] += signal * (label if label.ndim == 1 else label[:, 0])
    coin = rng.integers(0, 2, N // 2).repeat(2)
    known = {"site": np.array(["A", "B"])[site], "coin": np.array(["x", "y"])[coin]}
    split = np.where(np.arange(N) // 2 % 4 == 0, "test", "train")
    manifest = make_manifest(label, subject=SUBJECT, split=split)
    manifest = replace(manifest, columns=known | (columns or {}))
    return make_store(folder / "made" / "b.h5", X, manifest), X, label, site, manifest


def test_cramer_s_v_is_corrected_as_bergsma_has_it():
    a = rng.integers(0, 3, 200)
    b = np.where(rng.random(200) < 0.3, a, rng.integers(0, 4, 200))
    table = np.zeros((3, 4), dtype=int)
    np.add.at(table, (a, b), 1)
    plain = association(table, method="cramer")
    phi2 = plain**2 * 2
    assert phi2 == pytest.approx(chi2_contingency(table, correction=False).statistic / 200)
    r, k = 3 - 4 / 199, 4 - 9 / 199
    wanted = np.sqrt(max(0, phi2 - 6 / 199) / (min(r, k) - 1))
    assert cramers_v(a, b) == pytest.approx(wanted, rel=1e-12)
    assert cramers_v(a, a) == pytest.approx(1)
    assert np.isnan(cramers_v(a, np.zeros_like(a)))
    drawn = [cramers_v(rng.integers(0, 5, 60), rng.integers(0, 5, 60)) ** 2 for _ in range(200)]
    assert np.mean(drawn) < 0.02  # the plain V^2 is about .07 there


def test_the_permutation_test_is_scipy_s_chi_square_where_images_are_independent():
    a = rng.integers(0, 3, 400)
    b = np.where(rng.random(400) < 0.1, a, rng.integers(0, 3, 400))
    table = np.zeros((3, 3), dtype=int)
    np.add.at(table, (a, b), 1)
    wanted = chi2_contingency(table, correction=False).pvalue
    found = permutation_p(a, b, np.arange(400).astype(str), n=20_000, rng=rng)
    assert found == pytest.approx(wanted, rel=0.6, abs=2e-4)


def test_subjects_are_exchanged_whole_so_that_copies_of_an_image_add_nothing():
    """Of 30 subjects with ten images each, chance is called significant in 5 % and not in 60 %."""
    each, subject = 10, np.repeat(np.arange(30), 10).astype(str)
    p, naive = [], []
    for _ in range(200):
        a, b = rng.integers(0, 2, 30).repeat(each), rng.integers(0, 2, 30).repeat(each)
        p.append(permutation_p(a, b, subject, n=199, rng=rng))
        table = np.zeros((2, 2), dtype=int)
        np.add.at(table, (a, b), 1)
        naive.append(chi2_contingency(table, correction=False).pvalue)
    assert np.mean(np.array(p) <= 0.05) < 0.1
    assert np.mean(np.array(naive) <= 0.05) > 0.4
    same = rng.integers(0, 2, 30).repeat(each)
    assert permutation_p(same, same, subject, n=199, rng=rng) == 1 / 200


def test_balancing_weights_make_label_and_column_independent():
    a = rng.integers(0, 3, 300)
    b = np.where(rng.random(300) < 0.6, a, rng.integers(0, 3, 300))
    w = balancing(a, b)
    table = np.zeros((3, 3))
    np.add.at(table, (a, b), w)
    assert chi2_contingency(table, correction=False).statistic == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(table.sum(1), np.bincount(a))
    np.testing.assert_allclose(table.sum(0), np.bincount(b))


def test_a_column_that_carries_the_whole_signal_is_found_and_an_innocent_one_is_not(tmp_path):
    store, *_ = made(tmp_path, signal=0, goes_with=0.7)
    site, coin = confounders(store, ["site", "coin"], bootstrap=400)
    assert site.told["value"] > 0.98 and coin.told["ci_low"] < 0.5 < coin.told["ci_high"]
    assert site.flagged and not coin.flagged
    assert site.strongest[1]["v"] > 0.5 > 0.2 > coin.strongest[1]["v"]
    assert site.label["ci_low"] > 0.7 and site.alone["ci_low"] > 0.7
    for group in site.strata:
        assert group["ci_low"] < 0.5 < group["ci_high"], group
    assert site.only_shortcut and not coin.only_shortcut
    assert site.balanced["value"] < site.label["value"] - 0.15
    line = site.line()
    assert line.startswith("the label goes with site (Cramer's V .")
    assert "within no site is the score clear of chance" in line
    assert coin.line().startswith("no sign that the label goes with coin")


def test_a_signal_beside_the_column_is_there_within_it_and_after_balancing(tmp_path):
    store, *_ = made(tmp_path, signal=2, goes_with=0.4)
    [site] = confounders(store, ["site"], bootstrap=400)
    assert site.flagged and not site.only_shortcut
    assert all(group["ci_low"] > 0.7 for group in site.strata)
    assert site.balanced["ci_low"] > 0.7
    assert 20 < site.effective < N


def test_the_scores_are_scikit_learn_s_on_the_same_folds(tmp_path):
    """Of the column alone whatever C, as a one-hot of two values ranks the same; and balanced."""
    store, X, y, site, manifest = made(tmp_path, signal=1, goes_with=0.5)
    [found] = confounders(store, ["site"], bootstrap=200)
    part = outer(manifest, np.arange(N), k=5, seed=0).part
    onehot = OneHotEncoder(sparse_output=False).fit_transform(site[:, None])
    alone, within = [], {0: [], 1: []}
    for f in range(5):
        train, test = part != f, part == f
        p = LogisticRegression().fit(onehot[train], y[train]).predict_proba(onehot[test])[:, 1]
        alone.append(roc_auc_score(y[test], p))
    assert found.alone["value"] == pytest.approx(np.mean(alone), abs=1e-12)
    assert found.values == {"A": int((site == 0).sum()), "B": int((site == 1).sum())}
    # A grid of C about the best is near what cross-validation takes: within is not far off.
    for f in range(5):
        train, test = part != f, part == f
        p = LogisticRegression(C=0.1).fit(X[train], y[train]).predict_proba(X[test])[:, 1]
        for s, values in within.items():
            rows = site[test] == s
            values.append(roc_auc_score(y[test][rows], p[rows]))
    for s, group in enumerate(found.strata):
        assert group["value"] == pytest.approx(np.mean(within[s]), abs=0.06)
    assert 0.1 in STRENGTHS


def test_balanced_heads_are_scikit_learn_s_with_the_weights(tmp_path, monkeypatch):
    from probe import confounding

    monkeypatch.setattr(confounding, "STRENGTHS", (0.1,))
    store, X, y, site, manifest = made(tmp_path, signal=1, goes_with=0.5)
    [found] = confounders(store, ["site"], bootstrap=200)
    part = outer(manifest, np.arange(N), k=5, seed=0).part
    areas = []
    for f in range(5):
        train, test = part != f, part == f
        pair = np.stack([y, site])[:, train]
        w = np.empty(train.sum())
        for a in (0, 1):
            for b in (0, 1):
                there = (pair[0] == a) & (pair[1] == b)
                w[there] = (pair[0] == a).mean() * (pair[1] == b).mean() / there.mean()
        model = LogisticRegression(C=0.1, tol=1e-10).fit(X[train], y[train], sample_weight=w)
        areas.append(roc_auc_score(y[test], model.decision_function(X[test])))
    assert found.balanced["value"] == pytest.approx(np.mean(areas), abs=1e-9)


def test_label_and_column_that_are_one_can_t_be_parted(tmp_path):
    store, *_ = made(tmp_path, signal=0, goes_with=1)
    [site] = confounders(store, ["site"], bootstrap=200)
    assert site.flagged and site.balanced is None
    assert "label and column can't be parted" in site.line()
    assert all(group["value"] is None for group in site.strata)


def test_findings_are_each_held_against_the_column(tmp_path):
    site_y = rng.integers(0, 2, (N // 2, 3)).repeat(2, axis=0)
    store, X, y, site, manifest = made(tmp_path, signal=2, goes_with=0, y=site_y)
    mixed = np.where(rng.random((N // 2, 1)).repeat(2, axis=0) < 0.7, site[:, None], y)[:, 0]
    y = np.stack([y[:, 0], mixed, y[:, 2]], axis=1)
    again = replace(manifest, label=y.astype(np.int32))
    store = make_store(tmp_path / "again" / "b.h5", X, again)
    [found] = confounders(store, ["site"], bootstrap=200)
    assert found.strongest[0] == "class 1" and found.flagged
    assert found.line().startswith("class 1 goes with site (Cramer's V .")
    assert set(found.association) == {"class 0", "class 1", "class 2"}
    assert found.balanced is not None and found.balanced_why == ""


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["x"] * N, "every image has the same value, x"),
        (["", "x"] * (N // 2), "every image that has a value has the same one, x"),
        ([""] * N, "no image has a value of it"),
        (SUBJECT.tolist(), "numbers"),
        ([f"p{s}" for s in SUBJECT], "each of its 120 values is of one subject"),
        ([f"v{i % 60}" for i in range(N)], "none has 10 subjects or more"),
        ([f"v{int(s) % 7}" for s in SUBJECT], "7"),
    ],
)
def test_a_column_that_can_t_be_looked_at_is_said(values, words):
    found = values_of(np.array(values), SUBJECT)
    if words == "numbers":
        assert not found.why and found.quartiles and len(found.names) == 4
    elif words == "7":
        assert not found.why and not found.quartiles and len(found.names) == 7
    else:
        assert words in found.why, found.why


def test_too_many_values_rare_ones_and_missing_ones(tmp_path):
    many = np.array([f"v{i % 24:02}" for i in range(24 * 12)])
    subject = np.arange(len(many)).astype(str)
    assert "24 values, more than 20" in values_of(many, subject).why
    some = np.array(["", "a", "b", "b"] * 60, dtype="<U4")
    some[:4] = "rare"
    found = values_of(some, np.arange(240).astype(str))
    assert found.names == ("a", "b")
    assert int((~found.known).sum()) == 59 + 4
    column = np.where(rng.random(N) < 0.3, "", np.array(["a", "b"])[rng.integers(0, 2, N)])
    store, *_ = made(tmp_path, signal=1, goes_with=0, columns={"half": column})
    [half] = confounders(store, ["half"], bootstrap=200)
    assert half.left_out == int((column == "").sum()) and half.n == N - half.left_out
    assert half.told["ci_low"] < 0.5 < half.told["ci_high"]
    with pytest.raises(ProbeError, match="no column 'view': found"):
        confounders(store, ["view"])


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_the_command_says_it_keeps_it_and_the_report_says_it_beside_the_headline(tmp_path):
    store, *_ = made(tmp_path, signal=0, goes_with=0.7, columns={"one": np.array(["x"] * N)})
    out = tmp_path / "out"
    words = ("audit", store, "--predict", "site", "--predict", "coin", "--predict", "one")
    plain = call("audit", store, "--json")
    done = call(*words, "-o", out)
    assert "Shortcut? the label goes with site (Cramer's V" in done.output, done.output
    assert "no sign that the label goes with coin" in done.output
    assert "one can't be looked at: every image has the same value, x." in done.output
    assert done.exit_code == plain.exit_code == 0  # a shortcut is a suspicion, not a leak
    document = json.loads(call(*words, "-o", out, "--json").stdout)
    assert [one["flagged"] for one in document["confounders"]] == [True, False, False]
    assert {*json.loads(plain.stdout)} == {*document} - {"confounders"}
    kept = load(out)
    assert [one.column for one in kept] == ["site", "coin", "one"]  # of two runs, the later
    assert (out / "confounders.jsonl").read_text().count("\n") == 6
    assert call("probe", store, "-o", out, "--C", "1", "--metric", "auroc").exit_code == 0
    page = Page(write_report([out], tmp_path / "report"))
    [caution] = page.find("p", "shortcut")
    assert "shortcut?" in said(caution) and "the label goes with site" in said(caution)
    assert "within no site is the score clear of chance" in said(caution)
    text = (tmp_path / "report" / "results.md").read_text()
    assert "the label goes with site" in text
    tables = [p.name for p in (tmp_path / "report" / "tables").glob("*shortcuts*")]
    assert tables
    refused = call("audit", f"csv:{tmp_path / 'x.csv'}", "--predict", "site")
    assert refused.exit_code == 2 and "give the store" in refused.output
    assert call("audit", store, "--predict", "view", "-o", out).exit_code == 2


def test_a_damaged_line_is_said_in_words(tmp_path):
    (tmp_path / "confounders.jsonl").write_text('{"column": "site"}\n')
    with pytest.raises(ProbeError, match="line 1 is not a confounder: it has no backbone"):
        load(tmp_path)
