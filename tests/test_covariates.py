"""Heads of columns, of the image, and of both: scikit-learn's on the same folds and matrices."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_manifest, make_store
from reporting import Page, said
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from cli import cli
from features.errors import ProbeError
from features.store import FeatureStore
from probe import covariates
from probe.data import load
from probe.pairing import paired_test
from probe.report import write_report
from probe.results import load as results_of
from probe.results import read_predictions
from probe.score import metrics
from probe.splits import dealt, outer
from probe.sweep import ProbeOptions, probe_all

rng = np.random.default_rng(3)
N, D = 200, 10
SUBJECT = np.repeat(np.arange(N // 2), 2).astype(str)
C = (0.001, 0.03, 1.0, 30.0)
STRENGTHS = tuple(10.0 ** np.arange(-6, 6, 2))
NAMES = ("age", "sex", "site")


def columns():
    age = rng.normal(60, 12, N // 2).round(1).repeat(2).astype(str).astype("<U8")
    sex = rng.choice(["F", "M"], N // 2).repeat(2).astype("<U8")
    site = rng.choice(["a", "b", "c"], N // 2).repeat(2).astype("<U8")
    for values, share in ((age, 0.15), (sex, 0.1)):
        values[(rng.random(N // 2) < share).repeat(2)] = ""
    return {"age": age, "sex": sex, "site": site}


def made(folder, K=2, image=1.0):
    known = columns()
    years = np.where(known["age"] == "", "60", known["age"])
    risk = (years.astype(float) - 60) / 12 + (known["site"] == "b")
    X = 0.05 * rng.standard_normal((N, D)).astype(np.float32)
    score = risk + image * 20 * X[:, 0] + rng.logistic(0, 1, N)
    y = np.digitize(score, np.quantile(score, np.arange(1, K) / K))
    split = np.where(np.arange(N) // 2 % 4 == 0, "test", "train")
    manifest = replace(make_manifest(y, subject=SUBJECT, split=split), columns=known)
    return manifest, make_store(folder / "made" / "b.h5", X, manifest), X, y


def pipeline():
    """What scikit-learn's users write: numbers, texts, and where a value is missing."""
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    texts = make_pipeline(
        SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore")
    )
    missing = MissingIndicator(error_on_new=False)
    return ColumnTransformer(
        [("n", numbers, [0]), ("t", texts, [1, 2]), ("m", missing, [0, 1, 2])],
        sparse_threshold=0,
    )


def raw(manifest):
    """The table as numbers, texts by their place."""
    table = np.full((N, 3), np.nan)
    for k, name in enumerate(NAMES):
        values = manifest.columns[name]
        known = values != ""
        found = sorted(set(values[known].tolist()))
        table[known, k] = (
            values[known].astype(float) if name == "age" else np.searchsorted(found, values[known])
        )
    return table


def matrix(table, X, train):
    """Columns and features as a head is to read them, coded and scaled by the training rows."""
    coder = pipeline().fit(table[train])
    scale = np.sqrt(X[train].astype(float).var(0).sum()) if X is not None else 1.0
    block = coder.transform(table) * scale
    return block if X is None else np.hstack([block, X])


def objective(coef, intercept, Z, y, strength):
    p = Z @ coef + intercept
    return strength * np.logaddexp(0, np.where(y == 1, -p, p)).sum() + 0.5 * coef @ coef


@pytest.mark.parametrize("image", [False, True])
def test_each_head_is_at_scikit_learn_s_optimum_on_the_same_matrix(tmp_path, image):
    manifest, store, X, y = made(tmp_path)
    strengths = (1e-4, 1e-2, 1.0, 100.0)
    with FeatureStore.open(store) as opened:
        data = load(opened, manifest, "final/mean", "zeros", outer=True)
        given = covariates.covariates(manifest, NAMES, data.rows)
        rows = covariates.with_columns(data.features, given, image=image)
        train = np.flatnonzero(np.arange(N) % 5 != 0)
        how = {"fit": covariates.fit_heads, "n_classes": 2, "C": strengths, "tol": 1e-8}
        coding, heads = covariates.fitted(rows.take(train), y[train], **how)
        Z = matrix(raw(manifest), X if image else None, train)
        coded = torch.cat([coding(part) for part in rows.chunks()]).numpy()
    np.testing.assert_allclose(coded, Z, rtol=1e-5, atol=1e-6)
    for j, strength in enumerate(strengths):
        model = LogisticRegression(C=strength, tol=1e-12, max_iter=100_000).fit(Z[train], y[train])
        wanted = objective(model.coef_[0], model.intercept_[0], Z[train], y[train], strength)
        head = heads.head(("0", "1"), j)
        ours = objective(
            head.coef[0].double().numpy(), float(head.intercept[0]), Z[train], y[train], strength
        )
        assert abs(ours - wanted) <= 1e-5 * wanted


@pytest.mark.parametrize("K", [2, 3])
def test_three_results_are_scikit_learn_s_nested_cross_validation(tmp_path, K):
    manifest, store, X, y = made(tmp_path, K)
    found = probe_all(
        store,
        out=tmp_path / "out",
        settings=ProbeOptions(C=C, folds=3, outer=4, tol=1e-9, bootstrap=200),
        columns=NAMES,
    )
    assert [r.identity.inputs for r in found] == [
        "age, sex, site alone",
        "image",
        "image + age, sex, site",
    ]
    part, table = outer(manifest, np.arange(N), k=4, seed=0).part, raw(manifest)
    X = X.astype(float)  # scikit-learn stops early in float32
    for result, Xs, coded in ((found[0], None, True), (found[1], X, False), (found[2], X, True)):
        kept = read_predictions(tmp_path / "out" / result.predictions)
        assert kept.ids == manifest.id.tolist()
        np.testing.assert_array_equal(kept.fold, part)
        for f in range(4):
            train = np.flatnonzero(part != f)
            inner = dealt(SUBJECT[train], y[train], k=3, seed=0, by="subject").held_out
            scores, losses = np.zeros(len(C)), np.zeros(len(C))
            for held in inner:
                Z = matrix(table, Xs, train[~held]) if coded else X
                for j, strength in enumerate(C):
                    model = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000)
                    model.fit(Z[train[~held]], y[train[~held]])
                    scores[j] += model.score(Z[train[held]], y[train[held]]) / 3
                    p = model.predict_proba(Z[train[held]])
                    losses[j] += log_loss(y[train[held]], p, labels=range(K)) / 3
            # As good to within a held-out image: the one of the least log-loss (docs/protocols.md).
            near = scores >= scores.max() - 1 / len(train) - 1e-12
            best = C[int(np.argmin(np.where(near, losses, np.inf)))]
            assert result.outer["C"][f] == pytest.approx(best)
            Z = matrix(table, Xs, train) if coded else X
            model = LogisticRegression(C=best, tol=1e-10, max_iter=100_000)
            p = model.fit(Z[train], y[train]).predict_proba(Z[part == f])
            np.testing.assert_allclose(kept.probabilities[part == f], p, atol=1e-4)


def test_the_gain_is_the_paired_test_of_both_against_columns_alone(tmp_path):
    _, store, *_ = made(tmp_path, image=2.0)
    options = ProbeOptions(C=C, folds=3, outer=4, metric="auroc", bootstrap=300)
    alone, image, both = probe_all(store, out=tmp_path / "o", settings=options, columns=NAMES)
    assert not alone.gain and not image.gain
    assert both.gain["value"] == pytest.approx(both.value - alone.value, abs=1e-12)
    assert both.gain["ci_low"] > 0 and both.gain["p"] < 0.01
    assert both.gain["alone"] == alone.value and both.gain["over"] == "age, sex, site"
    ours, theirs = (read_predictions(tmp_path / "o" / r.predictions) for r in (both, alone))
    metric = metrics.find("auroc", "multiclass")
    again = paired_test(metric, [ours], [theirs], n=300, seed=0)
    assert (again.value, again.ci_low, again.p) == tuple(
        both.gain[k] for k in ("value", "ci_low", "p")
    )


def test_an_image_of_noise_adds_nothing(tmp_path):
    _, store, *_ = made(tmp_path, image=0.0)
    options = ProbeOptions(C=C, folds=3, outer=4, metric="auroc", bootstrap=300)
    alone, _, both = probe_all(store, out=tmp_path / "o", settings=options, columns=NAMES)
    assert alone.ci_low > 0.55
    assert both.gain["ci_low"] < 0.02 and both.value > alone.value - 0.06


def test_columns_keep_their_say_whatever_the_scale_and_the_number_of_features(tmp_path):
    """With 500 features of noise, at any scale, age is not lost; penalised alike it would be."""
    known = columns()
    age = np.where(known["age"] == "", "60", known["age"]).astype(float)
    y = (age + 8 * rng.logistic(0, 1, N) > 60).astype(int)
    train = np.arange(N) // 2 % 4 != 0
    for scale in (1e-3, 1.0, 1e3):
        X = (scale * rng.standard_normal((N, 500))).astype(np.float32)
        split = np.where(train, "train", "test")
        manifest = replace(make_manifest(y, subject=SUBJECT, split=split), columns=known)
        store = make_store(tmp_path / f"{scale}" / "b.h5", X, manifest)
        options = ProbeOptions(C=STRENGTHS, metric="auroc", bootstrap=100)
        alone, _, both = probe_all(
            store, out=tmp_path / f"o{scale}", settings=options, columns=["age"]
        )
        assert both.value > alone.value - 0.08, scale
    naive = np.hstack([StandardScaler().fit_transform(age[:, None]), X / scale])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what later versions of scikit-learn call arguments
        model = LogisticRegressionCV(Cs=STRENGTHS, cv=5, scoring="roc_auc", max_iter=10_000)
        model.fit(naive[train], y[train])
    assert roc_auc_score(y[~train], model.decision_function(naive[~train])) < alone.value - 0.1


def test_the_plain_split_and_shots_and_findings_work_too(tmp_path):
    manifest, _, X, y = made(tmp_path)
    many = replace(manifest, label=np.stack([y, rng.permutation(y)], 1).astype(np.int32))
    for name, one in (("one", manifest), ("many", replace(many, classes=("f", "g")))):
        store = make_store(tmp_path / name / "b.h5", X, one)
        options = ProbeOptions(C=C, folds=3, bootstrap=100)
        found = probe_all(store, out=tmp_path / name, settings=options, columns=NAMES)
        assert len({r.n_test for r in found}) == len({r.split_digest for r in found}) == 1
        assert len({r.identity.digest for r in found}) == len({r.predictions for r in found}) == 3
        assert found[0].backbone == "columns" and found[2].backbone == "made"
        assert (
            found[1].identity == probe_all(store, out=tmp_path / name, settings=options)[0].identity
        )
    options = ProbeOptions(C=C, folds=3, shots=(4,), seeds=2, bootstrap=100)
    found = probe_all(store.parent.parent / "one" / "b.h5", out=tmp_path / "s", settings=options,
                      columns=["sex"])  # fmt: skip
    assert [(r.seed, r.identity.inputs) for r in found if r.gain] == [
        (0, "image + sex"),
        (1, "image + sex"),
    ]


def test_missing_values_unseen_ones_and_features_left_in_the_file(tmp_path, monkeypatch):
    manifest, store, X, _ = made(tmp_path)
    site = manifest.columns["site"].copy()
    site[manifest.split == "test"] = "z"  # no training image has it
    odd = replace(manifest, columns=dict(manifest.columns) | {"site": site})
    store = make_store(tmp_path / "odd" / "b.h5", X, odd)
    options = ProbeOptions(C=C, folds=3, bootstrap=100)
    inside = probe_all(store, out=tmp_path / "in", settings=options, columns=NAMES)
    from probe import data

    monkeypatch.setattr(data, "available", lambda *_: 1000)
    outside = probe_all(store, out=tmp_path / "out", settings=options, columns=NAMES)
    for a, b in zip(inside, outside, strict=True):
        ours, theirs = (
            read_predictions(tmp_path / folder / r.predictions).probabilities
            for folder, r in (("in", a), ("out", b))
        )
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_times_and_dates_tell_as_much_as_what_they_stand_for(tmp_path):
    """Seconds since 1970 have ten digits, float32 has seven."""
    minutes, y = np.arange(N) // 2 * 1.0, np.arange(N) // 2 % 2
    risk = minutes + 40 * y
    scores = []
    for start in (0, 1_700_000_000):
        known = {"time": (start + risk).astype(str)}
        manifest = replace(make_manifest(y, subject=SUBJECT), columns=known)
        store = make_store(tmp_path / str(start) / "b.h5", np.zeros((N, 2)), manifest)
        how = {"out": tmp_path / f"o{start}", "columns": ("time",)}
        options = ProbeOptions(C=(1.0,), folds=3, outer=4, metric="auroc", bootstrap=100)
        alone = probe_all(store, settings=options, **how)[0]
        scores.append(read_predictions(how["out"] / alone.predictions).probabilities)
    assert scores[0].std() > 0.05
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)


def test_a_number_that_is_no_measurement_is_named(tmp_path):
    values = np.arange(N).astype("<U8")
    for odd in ("1e300", "-1.7e308"):
        known = {"age": np.where(np.arange(N) == 3, odd, values)}
        manifest = replace(make_manifest(np.arange(N) % 2, subject=SUBJECT), columns=known)
        with pytest.raises(ProbeError, match=r"--with age: made has the value -?1(\.7)?e\+30"):
            covariates.covariates(manifest, ("age",), np.arange(N))


def test_columns_that_can_t_be_used_are_said(tmp_path):
    manifest, _, X, _ = made(tmp_path)
    more = {
        "same": np.array(["x"] * N),
        "none": np.array([""] * N),
        "name": np.array([f"p{i}" for i in range(N)]),
    }
    odd = replace(manifest, columns=dict(manifest.columns) | more)
    store = make_store(tmp_path / "odd" / "b.h5", X, odd)
    for name, words in (
        ("same", "--with same: made has the value x in every image"),
        ("none", "--with none: made has no value"),
        ("name", "--with name: 200 values, which are not numbers; want at most 20"),
        ("view", "no column 'view': found age"),
    ):
        with pytest.raises(ProbeError, match=words):
            probe_all(store, out=tmp_path / "o", settings=ProbeOptions(C=C), columns=[name])
    for settings in (
        {"head": "knn"},
        {"protocol": "bigvision-fewshot"},
        {"protocol": "uni-linear"},
    ):
        with pytest.raises(ProbeError, match="--with|give --C"):
            probe_all(store, out=tmp_path / "o", settings=ProbeOptions(**settings), columns=["age"])


def test_the_command_says_what_the_image_adds_and_so_does_the_report(tmp_path):
    _, store, *_ = made(tmp_path, image=2.0)
    out = tmp_path / "out"
    words = ["probe", str(store), "-o", str(out), "--with", "age,sex,site", "--outer", "4"]
    words += ["--folds", "3", "--C", "0.03,1", "--metric", "auroc"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "made x columns (age, sex, site alone): auroc" in done.stdout
    assert (
        "the image adds +." in done.stdout
        and "to the AUROC of age, sex, site alone, ." in done.stdout
    )
    document = json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)
    assert [bool(row["gain"]) for row in document] == [False, False, True]
    assert len(results_of(out)) == 3
    page = Page(write_report([out], tmp_path / "report"))
    assert any("the image adds +." in said(p) for p in page.find("p", "muted"))
    text = (tmp_path / "report" / "results.md").read_text()
    assert "the image adds +." in text
    for read in ("image + age, sex, site", "age, sex, site alone"):  # told wherever a model is
        assert any(read in said(one) for one in page.find("span", "part"))
    assert list((tmp_path / "report" / "tables").glob("000-gains.*"))
    for wrong in ("age,,sex", ","):
        bad = CliRunner().invoke(cli, ["probe", str(store), "--with", wrong])
        assert bad.exit_code == 2 and "--with" in bad.output


def test_the_head_of_the_image_is_tested_elsewhere_and_those_of_columns_are_not(tmp_path):
    manifest, store, X, _ = made(tmp_path)
    there = replace(manifest, dataset="there", id=np.array([f"there{i}" for i in range(N)]))
    other = make_store(tmp_path / "there" / "b.h5", X, there)
    words = ["probe", str(store), "-o", str(tmp_path / "out"), "--with", "age", "--C", "1"]
    done = CliRunner().invoke(cli, [*words, "--folds", "3", "--test-on", str(other)])
    assert done.exit_code == 0, done.output
    assert "heads of columns are not kept" in done.stderr
    tested = [r for r in results_of(tmp_path / "out") if r.identity.trained_on]
    assert [(r.dataset, r.identity.inputs) for r in tested] == [("there", "image")]
