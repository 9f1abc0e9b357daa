"""Shots, seeds, neighbours, layers and the control; judged by scikit-learn."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import FINGERPRINT, make_manifest, make_store
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from cli import cli
from features.errors import ProbeError
from features.store import FeatureStore
from probe import results, splits
from probe.solve.knn import vote
from probe.solve.least_squares import fit as least_squares
from probe.sweep import ProbeOptions, probe, probe_all

rng = np.random.default_rng(0)
N = 300
X = rng.standard_normal((N, 12)).astype(np.float32)
Y = (X[:, :3] + 1.5 * rng.standard_normal((N, 3))).argmax(1)
C = (0.01, 1.0)


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))


def neighbours(k, temperature):
    def weights(distance):  # cosine distance
        return np.exp(-distance / temperature)

    return KNeighborsClassifier(k, metric="cosine", weights=weights, algorithm="brute")


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_neighbours_vote_as_those_of_scikit_learn(chunk):
    train, test = X[:200], X[200:]
    votes = torch.from_numpy(np.eye(3)[Y[:200]])
    chunks = torch.from_numpy(train).split(chunk)
    z = vote(chunks, votes, torch.from_numpy(test), k=[1, 10, 200, 900], temperature=0.07)
    p = expit(z.numpy())
    for one, k in zip(p, (1, 10, 200, 200), strict=True):
        theirs = neighbours(k, 0.07).fit(train, Y[:200]).predict_proba(test)
        np.testing.assert_allclose(one, theirs, atol=1e-4)


def test_neighbours_of_findings_vote_where_they_know():
    findings = rng.integers(0, 2, (200, 2)).astype(float)
    findings[::3, 0] = np.nan
    z = vote(
        [torch.from_numpy(X[:200])],
        torch.from_numpy(findings),
        torch.from_numpy(X[200:]),
        k=[200],
        temperature=0.5,
    )[0]
    p = expit(z.numpy())
    for j in range(2):
        known = ~np.isnan(findings[:, j])
        model = neighbours(int(known.sum()), 0.5).fit(X[:200][known], findings[known, j])
        np.testing.assert_allclose(p[:, j], model.predict_proba(X[200:])[:, 1], atol=1e-5)


def test_the_number_of_neighbours_is_chosen_on_folds(store, tmp_path):
    settings = ProbeOptions(protocol="knn", k=(1, 5, 50), folds=4)
    result = probe(store, out=tmp_path / "out", settings=settings)
    manifest = make_manifest(Y)
    train = np.flatnonzero(manifest.split == "train")
    scores = np.empty((3, 4))
    for f, out in enumerate(splits.folds(manifest, train, k=4, seed=0).held_out):
        for j, k in enumerate((1, 5, 50)):
            model = neighbours(k, 0.07).fit(X[train[~out]], Y[train[~out]])
            scores[j, f] = model.score(X[train[out]], Y[train[out]])
    np.testing.assert_allclose(result.folds["scores"], scores)
    assert result.folds["chosen"] == (1, 5, 50)[scores.mean(1).argmax()]
    test = manifest.split == "test"
    model = neighbours(result.folds["chosen"], 0.07).fit(X[train], Y[train])
    assert result.value == pytest.approx(model.score(X[test], Y[test]))
    assert (result.head, result.C, result.heads) == ("knn", None, "")


def test_shots_and_seeds_are_draws_of_the_training_rows(store, tmp_path):
    settings = ProbeOptions(C=C, shots=(1, 8, None), seeds=3, tol=1e-10)
    found = probe_all(store, out=tmp_path / "out", settings=settings)
    assert [(r.shots, r.seed) for r in found] == [
        *((1, s) for s in range(3)),
        *((8, s) for s in range(3)),
        (None, 0),
    ]
    assert [r.n_train for r in found] == [3] * 3 + [24] * 3 + [225]
    manifest = make_manifest(Y)
    train = np.flatnonzero(manifest.split == "train")
    test = manifest.split == "test"
    exact = X.astype(float)  # in float32 scikit-learn is 1e-3 off, and an image is that near
    for result in found[:6]:
        rows = train[splits.few(Y[train], manifest.subject[train], result.shots, seed=result.seed)]
        assert np.bincount(Y[rows]).tolist() == [result.shots] * 3
        model = LogisticRegression(C=result.C, tol=1e-9, max_iter=5000).fit(exact[rows], Y[rows])
        assert result.value == accuracy_score(Y[test], model.predict(exact[test]))
    assert {r.C for r in found[:3]} == {1.0}  # one image per class: nothing to choose on
    assert results.load(tmp_path / "out") == found


def test_draws_are_nested_and_take_one_image_of_each_subject_before_a_second():
    for seed in range(60):
        r = np.random.default_rng(seed)
        subject = np.array([f"p{i}" for i in r.integers(0, 40, 200)])
        y = r.integers(0, 3, 200)
        draws = {
            n: set(splits.few(y, subject, n, seed=seed).tolist()) for n in (1, 2, 4, 8, 16, 30)
        }
        for fewer, more in itertools.pairwise(draws.values()):
            assert fewer < more
        for n, drawn in draws.items():
            for k in range(3):
                mine = np.array([i for i in drawn if y[i] == k])
                assert len(mine) == n
                has = Counter(subject[y == k].tolist())
                took = Counter(subject[mine].tolist())
                most = max(took.values())
                assert len(took) == min(n, len(has))  # as many subjects as there can be
                assert all(took[s] >= min(has[s], most - 1) for s in has)
    assert draws[4] != set(splits.few(y, subject, 4, seed=99).tolist())


def test_folds_of_a_few_keep_subjects_whole_and_hold_out_no_class_whole():
    for seed in range(40):
        r = np.random.default_rng(seed)
        y, subject = r.integers(0, 3, 120), np.array([f"p{i}" for i in r.integers(0, 25, 120)])
        manifest = make_manifest(y, subject=subject)
        rows = splits.few(y, subject, int(r.integers(1, 12)), seed=seed)
        held_out = splits.within(manifest, rows, k=5, seed=seed).held_out
        for held in held_out:
            assert not set(subject[rows[held]]) & set(subject[rows[~held]])
            assert set(y[rows[~held]]) == {0, 1, 2}
    one = make_manifest(np.repeat([0, 1], 4), subject=["a"] * 4 + ["b"] * 4)
    assert len(splits.within(one, np.arange(8), k=5, seed=0).held_out) == 0


def test_more_shots_than_images_are_refused(store, tmp_path):
    with pytest.raises(ProbeError, match="80 shots of class number"):
        probe_all(store, out=tmp_path / "out", settings=ProbeOptions(C=C, shots=(80,)))


def test_every_layer_is_probed_and_no_test_row_is_seen_before_the_test(tmp_path):
    manifest = make_manifest(Y)
    path = tmp_path / "made" / "b.h5"
    shapes = {"block00/mean": (12,), "final/mean": (12,), "final/tokens": (2, 12)}
    FeatureStore.create(
        path,
        manifest,
        shapes,
        fingerprint=FINGERPRINT,
        default_feature="final/mean",
        batch_size=N,
    )
    noise = rng.standard_normal(X.shape).astype(np.float32)
    source = {"hash": ["0" * 64] * N, "size": [1] * N, "mtime_ns": [1] * N}
    made = {"block00/mean": noise, "final/mean": X, "final/tokens": np.zeros((N, 2, 12))}
    with FeatureStore.open(path, write=True) as store:
        store.commit(np.arange(N), made, source, {})
    settings = ProbeOptions(C=C, feature="all", control="shuffle")
    first, last = probe_all(path, out=tmp_path / "out", settings=settings)
    assert (first.feature, last.feature) == ("block00/mean", "final/mean")
    assert last.value > first.ci_high
    # Labels without information: the most frequent class, within the interval.
    chance = np.bincount(Y[manifest.split == "test"]).max() / 75
    assert last.control["ci_low"] < chance < last.control["ci_high"] or (
        last.control["value"] < chance
    )
    assert last.value > last.control["ci_high"]


def test_the_command_takes_shots_neighbours_and_the_control(store, tmp_path):
    def call(*words):
        words = ["probe", str(store), "-o", str(tmp_path / "out"), *words]
        return CliRunner().invoke(cli, words)

    said = call("--shots", "2,all", "--seeds", "2", "--C", "1", "--control", "shuffle", "--json")
    assert [r["shots"] for r in json.loads(said.output)] == [2, 2, None]
    assert "k = 5" in call("--protocol", "knn", "--k", "5").output
    assert "want whole numbers from 1 on" in call("--shots", "0").output
    assert "want whole numbers from 1 on" in call("--k", "x").output
    assert "protocol mieb has a linear head, not knn" in (
        call("--protocol", "mieb", "--head", "knn").output
    )


@pytest.mark.parametrize("n", [8, 200])  # fewer and more images than features
def test_least_squares_is_ridge_regression_on_what_big_vision_makes_of_features(n):
    x, y = X[:n].astype(np.float64), Y[:n]
    coef, intercept = least_squares(torch.from_numpy(x), torch.from_numpy(y), 3, l2=1024.0)
    Z = np.hstack([(x - x.mean(0)) / (x.std(0) + 1e-5), np.full((n, 1), 100.0)])
    theirs = Ridge(alpha=1024.0, fit_intercept=False, solver="svd").fit(Z, 2 * np.eye(3)[y] - 1)
    new = X[200:].astype(np.float64)
    Z = np.hstack([(new - x.mean(0)) / (x.std(0) + 1e-5), np.full((100, 1), 100.0)])
    ours = new @ coef.numpy().T + intercept.numpy()
    np.testing.assert_allclose(ours, theirs.predict(Z), atol=1e-8)


def test_bigvision_s_protocol_gives_a_result_per_draw(store, tmp_path):
    found = probe_all(store, out=tmp_path, settings=ProbeOptions(protocol="bigvision-fewshot"))
    assert [(r.shots, r.seed) for r in found] == [(n, s) for n in (1, 5, 10, 25) for s in range(3)]
    assert all(r.C is None and r.folds["l2"] == 1024 for r in found)
    assert "only their order counts" in found[0].notes[0]
    said = results.read_predictions(tmp_path / found[-1].predictions)
    assert found[-1].value == accuracy_score(said.labels, said.probabilities.argmax(1))
    with pytest.raises(ProbeError, match="has its own penalty: leave --C out"):
        probe(store, out=tmp_path, settings=ProbeOptions(protocol="bigvision-fewshot", C=(1.0,)))


def test_uni_s_strength_follows_the_sizes_and_says_that_it_is_not_uni_s(store, tmp_path):
    result = probe(store, out=tmp_path, settings=ProbeOptions(protocol="uni-linear"))
    assert pytest.approx(100 / (12 * 3)) == result.C
    assert result.notes[0].startswith("not UNI's own probe")


def test_options_of_the_other_kind_of_head_are_refused(store, tmp_path):
    def tried(*options):
        command = ["probe", str(store), "-o", str(tmp_path), *options]
        return CliRunner().invoke(cli, command)

    for options, said in (
        (("--head", "deit", "--C", "1"), "--C goes with a head that is solved"),
        (("--protocol", "study", "--shots", "4"), "--shots goes with a head that is solved"),
        (("--epochs", "3"), "--epochs goes with a head that is trained"),
        (("--head-size", "deit-tiny"), "--head-size goes with a head that is trained"),
    ):
        done = tried(*options)
        assert done.exit_code == 2
        assert said in done.stderr
    done = tried("--protocol", "study", "--epochs", "2", "--seeds", "2", "--json")
    assert done.exit_code == 0, done.output
    assert [r["protocol"] for r in json.loads(done.stdout)] == ["study", "study"]
