"""Probing: C chosen on folds only, tested once, every number traceable; judged by scikit-learn."""

import json

import numpy as np
import pytest
from conftest import make_manifest, make_store
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss

from features.errors import ProbeError
from features.store import FeatureStore
from probe import results
from probe.predict import predict
from probe.splits import folds
from probe.sweep import ProbeOptions, probe

rng = np.random.default_rng(0)
N = 300
X = rng.standard_normal((N, 12)).astype(np.float32)
Y = (X[:, :3] + 1.5 * rng.standard_normal((N, 3))).argmax(1)
C = (0.001, 0.01, 0.1, 1.0, 10.0)


def test_the_chosen_C_and_the_score_are_what_scikit_learn_finds_on_the_same_folds(tmp_path):
    manifest = make_manifest(Y)
    path = make_store(tmp_path / "made" / "b.h5", X, manifest)
    result = probe(path, out=tmp_path / "out", settings=ProbeOptions(C=C, folds=4, seed=3))
    train = np.flatnonzero(manifest.split == "train")
    held_out = folds(manifest, train, k=4, seed=3).held_out
    scores = np.empty((len(C), 4))
    for j, c in enumerate(C):
        for f, out in enumerate(held_out):
            model = LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(
                X[train[~out]], Y[train[~out]]
            )
            scores[j, f] = model.score(X[train[out]], Y[train[out]])
    np.testing.assert_allclose(result.folds["scores"], scores, atol=1e-12)
    assert C[scores.mean(1).argmax()] == result.C
    model = LogisticRegression(C=result.C, tol=1e-8, max_iter=5000).fit(X[train], Y[train])
    test = manifest.split == "test"
    assert result.value == accuracy_score(Y[test], model.predict(X[test]))
    assert result.ci_low < result.value < result.ci_high
    assert (result.n_train, result.n_test, result.converged) == (225, 75, True)


def test_of_strengths_that_are_as_good_the_one_of_the_least_log_loss_is_taken(tmp_path):
    """As good is what one held-out image would change; scikit-learn's numbers, our rule."""
    easy = X.copy()
    easy[np.arange(N), Y] += 6
    manifest = make_manifest(Y)
    path = make_store(tmp_path / "made" / "b.h5", easy, manifest)
    result = probe(path, out=tmp_path / "out", settings=ProbeOptions(C=C, folds=4, tol=1e-9))
    train = np.flatnonzero(manifest.split == "train")
    right, loss = np.empty((2, len(C), 4))
    for f, out in enumerate(folds(manifest, train, k=4, seed=0).held_out):
        for j, c in enumerate(C):
            model = LogisticRegression(C=c, tol=1e-10, max_iter=5000)
            p = model.fit(easy[train[~out]], Y[train[~out]]).predict_proba(easy[train[out]])
            right[j, f] = accuracy_score(Y[train[out]], p.argmax(1))
            loss[j, f] = log_loss(Y[train[out]], p)
    near = np.flatnonzero(right.mean(1) >= right.mean(1).max() - 1 / len(train) - 1e-12)
    assert len(near) > 1
    assert C[near[loss.mean(1)[near].argmin()]] == result.C
    assert C[near[0]] < result.C  # the first of equals says far too little


def test_the_test_split_can_t_influence_the_choice(tmp_path):
    manifest = make_manifest(Y)
    spoilt = X.copy()
    spoilt[manifest.split == "test"] = 1e6 * rng.standard_normal((75, 12))
    clean = probe(make_store(tmp_path / "a" / "b.h5", X, manifest), out=tmp_path / "out")
    other = probe(make_store(tmp_path / "c" / "b.h5", spoilt, manifest), out=tmp_path / "other")
    assert clean.folds == other.folds
    assert clean.C == other.C
    heads = [
        (tmp_path / o / r.heads).with_suffix(".safetensors").read_bytes()
        for o, r in (("out", clean), ("other", other))
    ]
    assert heads[0] == heads[1]


def test_a_given_val_split_chooses_and_then_trains(tmp_path):
    split = np.array(["train", "val", "test"])[np.arange(N) % 3]
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y, split=split))
    result = probe(path, out=tmp_path / "out", settings=ProbeOptions(C=C))
    train, val = split == "train", split == "val"
    scores = [
        LogisticRegression(C=c, tol=1e-8, max_iter=5000)
        .fit(X[train], Y[train])
        .score(X[val], Y[val])
        for c in C
    ]
    assert result.folds["kind"] == "the val split"
    np.testing.assert_allclose(np.ravel(result.folds["scores"]), scores, atol=1e-12)
    assert result.n_train == 200


def test_bad_images_are_left_out_and_counted(tmp_path):
    bad = {1: "file is empty", 4: "file not found", 9: "x"}
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y), bad=bad)
    result = probe(path, out=tmp_path / "out", settings=ProbeOptions(C=C))
    assert (result.n_bad, result.n_train, result.n_test) == (3, 223, 74)
    ids = results.read_predictions(tmp_path / "out" / result.predictions).ids
    assert "00004.png" not in ids


@pytest.mark.parametrize("uncertain", ["zeros", "ones", "ignore"])
def test_uncertain_findings_count_as_asked(tmp_path, uncertain):
    states = np.where(rng.random((N, 2)) < 0.5, 1, 0)
    states[rng.random((N, 2)) < 0.3] = -1
    manifest = make_manifest(states)
    path = make_store(tmp_path / "made" / "b.h5", X, manifest)
    result = probe(path, out=tmp_path / "out", settings=ProbeOptions(C=(1.0,), uncertain=uncertain))
    said = results.read_predictions(tmp_path / "out" / result.predictions)
    train, test = manifest.split == "train", manifest.split == "test"
    for k in range(2):
        y = states[:, k].astype(float)
        y[y == -1] = {"zeros": 0, "ones": 1, "ignore": np.nan}[uncertain]
        known = train & ~np.isnan(y)
        model = LogisticRegression(C=1.0, tol=1e-9, max_iter=5000).fit(X[known], y[known])
        np.testing.assert_allclose(
            said.probabilities[:, k], model.predict_proba(X[test])[:, 1], atol=1e-3
        )
        np.testing.assert_array_equal(said.labels[:, k], y[test])


def test_a_finding_that_training_never_shows_is_named_and_not_scored_a_half(tmp_path):
    states = (rng.random((N, 3)) < 0.5).astype(int)
    manifest = make_manifest(states)
    states[manifest.split == "train", 1] = 0
    manifest = make_manifest(states, classes=("Edema", "Hernia", "Mass"))
    path = make_store(tmp_path / "made" / "b.h5", X, manifest)
    result = probe(path, out=tmp_path / "out", settings=ProbeOptions(C=(1.0,)))
    assert result.outputs["Hernia"]["auroc"] is None
    both = [result.outputs[name]["auroc"] for name in ("Edema", "Mass")]
    assert result.value == pytest.approx(np.mean(both))
    assert "one side only in training, so not scored: Hernia" in result.notes


def test_every_number_leads_back(tmp_path):
    manifest = make_manifest(Y)
    path = make_store(tmp_path / "made" / "b.h5", X, manifest)
    result = probe(
        path,
        out=tmp_path / "out",
        settings=ProbeOptions(C=C),
        command="medprobe probe x",
        versions={"a": "1"},
    )
    with FeatureStore.open(path) as store:
        assert result.store_fingerprint == store.fingerprint_digest
    assert result.split_digest == manifest.split_digest()
    assert (result.command, result.versions) == ("medprobe probe x", {"a": "1"})
    line = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    contract = (
        "dataset backbone weights scenario head feature protocol metric value ci_low ci_high "
        "metrics C folds n_train n_test n_bad seed split_digest store_fingerprint converged "
        "seconds command versions"
    )
    assert set(contract.split()) <= set(line)
    assert results.load(tmp_path / "out") == [result]
    said = results.read_predictions(tmp_path / "out" / result.predictions)
    assert accuracy_score(said.labels, said.probabilities.argmax(1)) == result.value


def test_a_saved_head_predicts_what_was_reported_and_refuses_another_backbone(tmp_path):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))
    result = probe(path, out=tmp_path / "out", settings=ProbeOptions(C=C))
    table = [
        line.split(",")
        for line in predict(tmp_path / "out" / result.heads, path).table.splitlines()
    ]
    said = results.read_predictions(tmp_path / "out" / result.predictions)
    rows = {row[0]: [float(v) for v in row[2:-1]] for row in table[1:]}
    assert len(rows) == N
    found = np.array([rows[i] for i in said.ids])
    np.testing.assert_allclose(found, np.c_[said.probabilities, said.log_odds], rtol=1e-12)
    assert table[0][2:] == [*results.columns(said.classes), "reason"]
    other = {
        "backbone": {
            "name": "other",
            "architecture": "made",
            "weights": "file",
            "weights_digest": "1",
        }
    }
    elsewhere = make_store(tmp_path / "made" / "c.h5", X, make_manifest(Y), fingerprint=other)
    with pytest.raises(ProbeError, match="doesn't suit the head .*weights_digest: 1, want 0"):
        predict(tmp_path / "out" / result.heads, elsewhere)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "kapa"}, r"no metric 'kapa' for a multiclass task: did you mean kappa"),
        ({"protocol": "mine"}, "unknown protocol 'mine': want one of dinov2-logreg"),
        ({"folds": 400}, "400 folds of 225 training subjects: want 2 to 225"),
    ],
)
def test_what_can_t_be_probed_says_why(tmp_path, settings, words):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))
    with pytest.raises(ProbeError, match=words):
        probe(path, out=tmp_path / "out", settings=ProbeOptions(**settings))
    assert not (tmp_path / "out").exists()


def test_tokens_are_not_probed_by_a_linear_head(tmp_path):
    path = make_store(tmp_path / "made" / "b.h5", X.reshape(N, 3, 4), make_manifest(Y))
    with pytest.raises(ProbeError, match="final/mean is a matrix per image"):
        probe(path, out=tmp_path / "out")


def test_a_store_that_is_not_complete_is_not_probed(tmp_path):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))
    with FeatureStore.open(path, write=True) as store:
        store.forget(np.array([5]))
    with pytest.raises(ProbeError, match="is not complete: 1 of 300 images are still to be done"):
        probe(path, out=tmp_path / "out")


def test_predictions_survive_odd_names(tmp_path):
    odd = results.Predictions(
        ids=['a,"b".png', "\u2028line"],
        subjects=["p\n1", "=1+1"],
        labels=np.array([1, 0]),
        probabilities=np.array([[0.25, 0.75], [1, 0]]),
        classes=["<script>", "p:é🙂"],
    )
    results.write_predictions(tmp_path / "p.csv", odd)
    back = results.read_predictions(tmp_path / "p.csv")
    assert (list(back.ids), list(back.subjects), list(back.classes)) == (
        odd.ids,
        odd.subjects,
        odd.classes,
    )
    np.testing.assert_array_equal(back.probabilities, odd.probabilities)
    (tmp_path / "p.csv").write_text("id,subject\n")
    with pytest.raises(ProbeError, match="holds no predictions"):
        results.read_predictions(tmp_path / "p.csv")
