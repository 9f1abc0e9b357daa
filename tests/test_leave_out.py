"""`--leave-out COLUMN`, `--exclude COLUMN=VALUE`, `--test-on STORE`; judged by scikit-learn."""

import csv
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FINGERPRINT, make_manifest, make_store
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import LeaveOneGroupOut

from cli import cli
from features.errors import ProbeError
from features.store import FeatureStore
from probe.compare import compare_results
from probe.identity import is_of
from probe.report import Options, html, make
from probe.results import load, read_predictions
from probe.splits import dealt
from probe.sweep import ProbeOptions, probe, probe_all

rng = np.random.default_rng(8)
N = 180
SUBJECT = np.repeat(np.arange(N // 2), 2).astype(str)
SITE = np.array(["east", "north", "west"])[np.arange(N) // 2 % 3]
X = rng.standard_normal((N, 6)).astype(np.float32)
Y = (X[:, 0] + rng.standard_normal(N) > 0).astype(int)
C = (0.01, 1.0)


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def made(path, *, site=SITE, subject=SUBJECT, y=Y, dataset="made", x=X, **changes):
    manifest = make_manifest(y, subject=subject, dataset=dataset)
    manifest = replace(manifest, columns={"site": site}, **changes)
    fingerprint = FINGERPRINT | {"manifest": {"images": dataset}}
    return manifest, make_store(path, x, manifest, fingerprint=fingerprint)


def test_each_site_is_tested_by_a_head_of_the_others_as_scikit_learn_s_leave_one_group_out(
    tmp_path,
):
    _, store = made(tmp_path / "b.h5")
    settings = ProbeOptions(C=C, folds=3, leave_out="site", metric="auroc", tol=1e-9, seed=1)
    result = probe(store, out=tmp_path / "out", settings=settings)
    said = read_predictions(tmp_path / "out" / result.predictions)
    areas = []
    for f, (train, test) in enumerate(LeaveOneGroupOut().split(X, Y, SITE)):
        inner = dealt(SUBJECT[train], Y[train], k=3, seed=1, by="subject").held_out
        cv = [(np.flatnonzero(~held), np.flatnonzero(held)) for held in inner]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegressionCV(Cs=C, cv=cv, scoring="roc_auc", tol=1e-10, max_iter=9999)
            model.fit(X[train].astype(float), Y[train])
        assert result.outer["C"][f] == pytest.approx(model.C_[0])
        p = model.predict_proba(X[test].astype(float))
        np.testing.assert_allclose(said.probabilities[test], p, atol=1e-4)
        assert (said.fold[test] == f).all()
        areas.append(roc_auc_score(Y[test], said.probabilities[test, 1]))
    assert result.value == pytest.approx(np.mean(areas), abs=1e-12)
    assert result.outer["values"] == ["east", "north", "west"]
    assert result.outer["scores"] == pytest.approx(areas, abs=1e-12)
    groups = {g["group"]: g["value"] for g in result.subgroups if g["column"] == "site"}
    assert groups == pytest.approx(dict(zip(["east", "north", "west"], areas, strict=True)))
    assert result.outer["kind"] == "each of 3 values of site left out in turn"


def test_a_subject_of_two_sites_never_trains_the_head_that_tests_it(tmp_path):
    """Labels that follow from the subject alone: a head that saw it would know them."""
    site = np.array(["east", "west"])[np.arange(N) % 2]  # each subject has an image in both
    few = SUBJECT.astype(int) < 60
    site = np.where(few, site, np.array(["east", "west"])[np.arange(N) // 2 % 2])
    y = rng.permutation(N // 2).repeat(2) % 2
    codes = 3 * rng.standard_normal((N // 2, 120)).repeat(2, axis=0).astype(np.float32)
    _, store = made(tmp_path / "b.h5", site=site, y=y, x=codes)
    settings = ProbeOptions(C=(1e3,), folds=2, leave_out="site", tol=1e-9)
    result = probe(store, out=tmp_path / "out", settings=settings)
    said = read_predictions(tmp_path / "out" / result.predictions)
    assert any(
        note.startswith("60 subjects lie in several values of site") for note in result.notes
    )
    for f, name in enumerate(["east", "west"]):
        test = site == name
        train = ~np.isin(SUBJECT, SUBJECT[test])
        assert 0 < train.sum() < (~test).sum()
        model = LogisticRegression(C=1e3, tol=1e-10, max_iter=9999)
        model.fit(codes[train].astype(float), y[train])
        p = model.predict_proba(codes[test].astype(float))
        np.testing.assert_allclose(said.probabilities[test], p, atol=1e-4)
        assert (said.fold[test] == f).all()
    whole = LogisticRegression(C=1e3, max_iter=9999).fit(codes, y)
    assert accuracy_score(y, whole.predict(codes)) == 1 > result.ci_high
    both = np.array(["east", "west"])[np.arange(N) % 2]
    _, store = made(tmp_path / "c.h5", site=both)
    with pytest.raises(ProbeError, match="without east and its subjects' other images nothing"):
        probe(store, out=tmp_path / "out", settings=settings)


def test_excluded_images_neither_train_nor_test(tmp_path):
    _, store = made(tmp_path / "b.h5")
    settings = ProbeOptions(C=C, folds=3, exclude=("site=west",))
    result = probe(store, out=tmp_path / "out", settings=settings)
    kept = SITE != "west"
    manifest, other = made(tmp_path / "other.h5", split=np.where(kept, replace_split(), "none"))
    same = probe(other, out=tmp_path / "other", settings=ProbeOptions(C=C, folds=3))
    assert (result.n_train, result.n_test) == (same.n_train, same.n_test)
    assert result.n_train + result.n_test == kept.sum()
    mine = read_predictions(tmp_path / "out" / result.predictions)
    theirs = read_predictions(tmp_path / "other" / same.predictions)
    assert mine.ids == theirs.ids and np.array_equal(mine.log_odds, theirs.log_odds)
    assert result.split_digest == same.split_digest
    assert "left out: 60 images of site west" in result.notes
    plain = probe(store, out=tmp_path / "out", settings=ProbeOptions(C=C, folds=3))
    assert plain.identity.model != result.identity.model and len(load(tmp_path / "out")) == 2
    with FeatureStore.open(store) as opened:  # the report finds its store as it was
        assert is_of(opened, opened.manifest(), result.identity)
        assert not is_of(opened, manifest, plain.identity)
    for settings, words in (
        ({"exclude": ("site=south",)}, "no image has site 'south', found east, north, west"),
        ({"exclude": ("view=PA",)}, "has no column 'view': found site"),
        ({"leave_out": "view"}, "has no column 'view': found site"),
        ({"leave_out": "site", "outer": 3}, "leave --outer out"),
        ({"leave_out": "site", "exclude": ("site=east", "site=west")}, "site has one value"),
    ):
        with pytest.raises(ProbeError, match=words):
            probe_all(store, out=tmp_path / "out", settings=ProbeOptions(C=C, **settings))


def replace_split():
    return make_manifest(Y).split


def test_images_without_a_site_are_left_out_where_sites_are(tmp_path):
    site = SITE.copy()
    site[:10] = ""
    _, store = made(tmp_path / "b.h5", site=site)
    result = probe(
        store, out=tmp_path / "out", settings=ProbeOptions(C=C, folds=3, leave_out="site")
    )
    assert result.n_test == N - 10 == result.n_train
    assert "left out: 10 images of no site" in result.notes


def test_each_pair_of_stores_is_a_row_and_the_page_has_the_matrix(tmp_path):
    stores = []
    for k, name in enumerate(("A", "B", "C")):
        x = X + 0.3 * k * rng.standard_normal(X.shape).astype(np.float32)
        subject = np.char.add(name, SUBJECT)
        stores.append(made(tmp_path / name / "made.h5", dataset=name, x=x, subject=subject)[1])
    out = tmp_path / "out"
    more = [word for store in stores for word in ("--test-on", store)]
    done = call(
        "probe", *stores, *more, "-o", out, "--C", "0.1,1", "--folds", 3, "--metric", "auroc"
    )
    assert done.exit_code == 0, done.output
    rows = load(out)
    pairs = {(r.trained_on or r.dataset, r.dataset): r for r in rows}
    assert len(rows) == len(pairs) == 9
    for (trained, tested), r in pairs.items():
        said = read_predictions(out / r.predictions)
        assert r.value == pytest.approx(
            roc_auc_score(said.labels, said.probabilities[:, 1]), abs=1e-12
        )
        assert r.n_test == (N if trained != tested else N // 4)
        assert "drop" in r.external or trained == tested
    assert f"B x made, trained on A: auroc {pairs['A', 'B'].value:.3f}" in done.output
    report = make([out], Options())
    [matrix] = report.elsewhere
    lines = list(csv.reader(matrix.csv().splitlines()))
    assert [line[0] for line in lines] == ["trained on", "A", "B", "C"]
    where = {name: k for k, name in enumerate(lines[0])}
    for (trained, tested), r in pairs.items():
        [line] = [line for line in lines if line[0] == trained]
        value, low = (float(line[where[f"on {tested}{end}"]]) for end in ("", " ci_low"))
        assert (value, low) == pytest.approx((r.value, r.ci_low))
    page = html(report, Options())
    assert "Tested elsewhere" in page and "trained on A" in page
    noisy = FINGERPRINT | {"backbone": FINGERPRINT["backbone"] | {"name": "noisy"}}
    for name in "ABC":  # a second backbone, so that there is something to rank on the own sets
        manifest, _ = made(tmp_path / "x.h5", dataset=name, subject=np.char.add(name, SUBJECT))
        path = tmp_path / name / "noisy.h5"
        x = X + rng.standard_normal(X.shape)
        make_store(path, x, manifest, fingerprint=noisy | {"manifest": {"images": name}})
        probe(path, out=out, settings=ProbeOptions(C=(0.1, 1.0), folds=3, metric="auroc"))
        (tmp_path / "x.h5").unlink()
    both = compare_results([out], n=100)
    assert both.ranked == ["made", "noisy"] and len(both.datasets) == len(both.ranks.mean) + 1 == 3
    assert len(both.models) == 5
    again = json.loads(
        call("probe", *stores[:1], "--test-on", stores[1], "-o", out, "--json").stdout
    )
    assert [r["trained_on"] for r in again] == ["", "A"]
    other = FINGERPRINT | {"backbone": FINGERPRINT["backbone"] | {"name": "other"}}
    unlike = make_store(tmp_path / "d.h5", X, make_manifest(Y), fingerprint=other)
    refused = call("probe", stores[0], "--test-on", unlike, "-o", out)
    assert refused.exit_code == 2 and "no store of --test-on is of made" in refused.output
    refused = call("probe", stores[0], "--class", "a=b", "-o", out)
    assert refused.exit_code == 2 and "--class is of --test-on" in refused.output
    refused = call("probe", stores[0], "--head", "knn", "--test-on", stores[1], "-o", out)
    assert refused.exit_code == 2 and "has no saved head to test elsewhere" in refused.output
