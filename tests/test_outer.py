"""Nested cross-validation: every image tested once by a head that never saw its subject.

Judged by scikit-learn's LogisticRegressionCV on the same folds, and by its metrics.
"""

import csv
import warnings
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FINGERPRINT, make_manifest, make_store
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from cli import cli
from features.backbones import load_backbone
from features.errors import ProbeError
from features.store import FeatureStore
from probe.compare import compare_results
from probe.predict import predict
from probe.results import load, read_predictions
from probe.splits import dealt, outer
from probe.sweep import ProbeOptions, probe, probe_all
from probe.train.finetune import TrainSettings, train_on_store
from probe.train.training import Training

rng = np.random.default_rng(5)
N = 160
SUBJECT = np.repeat(np.arange(N // 2), 2).astype(str)
X = rng.standard_normal((N, 8)).astype(np.float32)
Y3 = (X[:, :3] + rng.standard_normal((N, 3))).argmax(1)
Y2 = (X[:, 0] + rng.standard_normal(N) > 0).astype(int)
C = (0.001, 0.03, 1.0, 30.0)


def made(folder, y, x=X):
    manifest = make_manifest(y, subject=SUBJECT)
    return manifest, make_store(folder / "made" / "b.h5", x, manifest)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("y", [Y2, Y3])
def test_the_same_C_and_probabilities_as_scikit_learn_in_every_outer_fold(tmp_path, y):
    manifest, store = made(tmp_path, y)
    result = probe(
        store, out=tmp_path / "out", settings=ProbeOptions(C=C, folds=3, outer=4, seed=2, tol=1e-9)
    )
    rows = np.arange(N)
    part = outer(manifest, rows, k=4, seed=2).part
    said = read_predictions(tmp_path / "out" / result.predictions)
    for f in range(4):
        train = rows[part != f]
        inner = dealt(SUBJECT[train], y[train], k=3, seed=2, by="subject").held_out
        cv = [(np.flatnonzero(~held), np.flatnonzero(held)) for held in inner]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegressionCV(
                Cs=C, cv=cv, scoring="accuracy", tol=1e-10, max_iter=10_000
            ).fit(X[train], y[train])
        assert result.outer["C"][f] == pytest.approx(model.C_[0])
        np.testing.assert_allclose(
            said.probabilities[part == f], model.predict_proba(X[part == f]), atol=1e-4
        )
    np.testing.assert_array_equal(said.fold, part)
    assert said.ids == manifest.id.tolist()
    assert result.value == accuracy_score(y, said.probabilities.argmax(1))
    assert result.outer["n"] == np.bincount(part).tolist()
    each = [accuracy_score(y[part == f], said.probabilities[part == f].argmax(1)) for f in range(4)]
    assert result.outer["scores"] == each
    assert (result.n_train, result.n_test) == (N, N)


def test_no_subject_is_tested_by_a_head_that_saw_it_and_the_kept_head_has_all(tmp_path):
    """Labels that follow from the subject alone can't be learnt from other subjects."""
    y = rng.permutation(np.arange(N // 2) % 2).repeat(2)
    codes = rng.standard_normal((N // 2, 200)).repeat(2, axis=0).astype(np.float32)
    _, store = made(tmp_path, y, codes)
    settings = ProbeOptions(C=(1e4,), folds=3, outer=5)
    result = probe(store, out=tmp_path / "out", settings=settings)
    assert result.ci_low < 0.5 < result.ci_high
    kept = predict(tmp_path / "out" / result.heads, store).table
    called = [row["predicted"] for row in csv.DictReader(kept.splitlines())]
    truth = [row["label"] for row in table(tmp_path / "out" / result.predictions)]
    assert called == truth  # trained on all, it knows each subject
    model = LogisticRegression(C=1e4, tol=1e-10, max_iter=10_000).fit(codes, y)
    assert (model.predict(codes) == y).all()


def test_identical_images_of_two_subjects_are_in_one_fold():
    manifest = make_manifest(Y2, subject=SUBJECT)
    plain = outer(manifest, np.arange(N), k=5, seed=0).part
    a, b, c = (np.flatnonzero(plain == f)[0] for f in (0, 1, 2))
    hashes = [f"{i:064x}" for i in range(N)]
    hashes[b] = hashes[a]
    hashes[c ^ 1] = hashes[b ^ 1]  # the other image of each subject
    part = outer(manifest, np.arange(N), k=5, seed=0, hashes=hashes).part
    assert len({part[i] for i in (a, a ^ 1, b, b ^ 1, c, c ^ 1)}) == 1
    for subject in np.unique(SUBJECT):
        assert len(set(part[subject == SUBJECT])) == 1
    apart = outer(manifest, np.arange(N), k=5, seed=0, hashes=[""] * N).part
    np.testing.assert_array_equal(apart, plain)


def test_rankings_are_averaged_over_folds_and_decisions_are_pooled(tmp_path):
    _, store = made(tmp_path, Y2)
    settings = ProbeOptions(C=C, folds=3, outer=4, metric="auroc")
    result = probe(store, out=tmp_path / "out", settings=settings)
    said = read_predictions(tmp_path / "out" / result.predictions)
    p = said.probabilities[:, 1]
    folds = [said.fold == f for f in range(4)]
    areas = [roc_auc_score(Y2[rows], p[rows]) for rows in folds]
    assert result.value == pytest.approx(np.mean(areas), abs=1e-12)
    assert result.outer["scores"] == pytest.approx(areas, abs=1e-12)
    ap = np.mean([average_precision_score(Y2[rows], p[rows]) for rows in folds])
    assert result.metrics["average_precision"]["value"] == pytest.approx(ap, abs=1e-12)
    assert result.outputs["class 1"]["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert result.metrics["accuracy"]["value"] == accuracy_score(Y2, p > 0.5)
    # A fold whose scores are shifted keeps its order, and so does the score.
    shifted = said.log_odds + 100.0 * said.fold[:, None]
    assert roc_auc_score(Y2, shifted[:, 1]) < 0.7 < result.value


def test_findings_are_ranked_within_folds_too(tmp_path):
    y = np.stack([Y2, rng.permutation(Y2)], axis=1)
    _, store = made(tmp_path, y)
    result = probe(store, out=tmp_path / "out", settings=ProbeOptions(C=C, folds=3, outer=4))
    said = read_predictions(tmp_path / "out" / result.predictions)
    areas = [
        [roc_auc_score(y[rows, k], said.probabilities[rows, k]) for k in range(2)]
        for rows in (said.fold == f for f in range(4))
    ]
    assert result.value == pytest.approx(np.mean(areas), abs=1e-12)
    assert [o["auroc"] for o in result.outputs.values()] == pytest.approx(np.mean(areas, axis=0))


def test_each_subject_left_out_in_turn(tmp_path):
    manifest, store = made(tmp_path, Y2)
    settings = ProbeOptions(C=(0.1,), folds=2, outer="subject", metric="auroc", tol=1e-9)
    result = probe(store, out=tmp_path / "out", settings=settings)
    said = read_predictions(tmp_path / "out" / result.predictions)
    for subject in ("3", "77"):
        left_out = manifest.subject == subject
        model = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000)
        model.fit(X[~left_out].astype(float), Y2[~left_out])
        wanted = model.predict_proba(X[left_out].astype(float))
        np.testing.assert_allclose(said.probabilities[left_out], wanted, atol=1e-5)
    assert said.fold is None  # one subject is no ranking: all are ranked together, and that is said
    assert result.value == pytest.approx(roc_auc_score(Y2, said.probabilities[:, 1]), abs=1e-12)
    assert any("ranked together" in note for note in result.notes)


def test_repeats_are_seeds_and_compare_pairs_them(tmp_path):
    _, store = made(tmp_path, Y2)
    noisy = X + 2 * rng.standard_normal(X.shape).astype(np.float32)
    noisier = FINGERPRINT | {"backbone": FINGERPRINT["backbone"] | {"name": "noisy"}}
    manifest = make_manifest(Y2, subject=SUBJECT)
    other = make_store(tmp_path / "made" / "c.h5", noisy, manifest, fingerprint=noisier)
    settings = ProbeOptions(C=C, folds=3, outer=4, repeats=3, metric="auroc", bootstrap=200)
    for path in (store, other):
        found = probe_all(path, out=tmp_path / "out", settings=settings)
        assert [r.seed for r in found] == [0, 1, 2]
        assert len({r.identity.data for r in found}) == 1
        assert len({r.identity.model for r in found}) == 1
    probe(store, out=tmp_path / "out", settings=ProbeOptions(C=C, metric="auroc"))
    both = compare_results([tmp_path / "out"], n=200)
    on = {s.dataset for s in both.scores}
    assert len(on) == 2  # the test split is other data than all images in folds
    nested = [s for s in both.scores if len(s.seeds) == 3]
    assert len(nested) == 2 and all("outer folds" in s.dataset for s in nested)
    [pair] = [p for p in both.pairs if p.difference and p.dataset == nested[0].dataset]
    values = {s.model: s.value for s in nested}
    assert pair.difference.value == pytest.approx(values[pair.a] - values[pair.b])
    assert pair.difference.p < 0.05


def test_thresholds_are_chosen_inside_each_outer_fold(tmp_path):
    """Sensitivity is that of calls by thresholds which the tested images had no part in."""
    _, store = made(tmp_path, Y2)
    result = probe(store, out=tmp_path / "out", settings=ProbeOptions(C=(1.0,), folds=3, outer=4))
    known = result.thresholds["outputs"]["class 1"]
    noise = rng.standard_normal(X.shape).astype(np.float32)
    _, store = made(tmp_path / "noise", Y2, noise)
    result = probe(store, out=tmp_path / "out2", settings=ProbeOptions(C=(1.0,), folds=3, outer=4))
    chance = result.thresholds["outputs"]["class 1"]
    assert known["sensitivity"]["value"] + known["specificity"]["value"] > 1.3
    assert abs(chance["sensitivity"]["value"] + chance["specificity"]["value"] - 1) < 0.2
    assert known["positives"] + known["negatives"] == N


def test_what_can_t_be_done_is_said(tmp_path):
    manifest = make_manifest(Y2)  # subjects are images
    store = make_store(tmp_path / "made" / "b.h5", X, manifest)
    for settings, words in (
        ({"outer": 4, "shots": (1,)}, "--shots draws training images, and --outer trains on all"),
        ({"repeats": 2}, "give --outer too"),
        ({"outer": 500}, "500 outer folds of 160"),
    ):
        with pytest.raises(ProbeError, match=words):
            probe_all(store, out=tmp_path / "out", settings=ProbeOptions(C=C, **settings))
    for word in ("1", "x", "-3", "2.5"):
        done = CliRunner().invoke(cli, ["probe", str(store), "--outer", word])
        assert done.exit_code == 2 and "--outer" in done.output


def test_a_small_store_is_told_of_it_and_the_command_says_how_images_were_tested(tmp_path):
    _, store = made(tmp_path, Y2)
    out = ["-o", str(tmp_path / "out"), "--C", "0.1,1"]
    manifest = make_manifest(Y2, subject=SUBJECT)
    drawn = make_store(
        tmp_path / "d.h5", X, replace(manifest, split_from="drawn by subject, stratified")
    )
    hint = "--outer 5 would test each of the 160 images"
    plain = CliRunner().invoke(cli, ["probe", str(drawn), "-o", str(tmp_path / "plain")])
    assert plain.exit_code == 0 and hint in plain.stderr
    done = CliRunner().invoke(cli, ["probe", str(store), *out, "--outer", "4"])
    assert done.exit_code == 0, done.output
    assert hint not in done.output
    assert "on 160 images, each tested once (4 stratified outer folds by subject" in done.output
    [result] = load(tmp_path / "out")
    assert result.labelled_by == "" and result.identity.settings["outer"] == 4
    with FeatureStore.open(store) as opened:
        assert len(opened.manifest()) == result.n_test


def test_training_in_outer_folds_is_training_on_each_fold_by_itself(tmp_path):
    manifest, store = made(tmp_path, Y2)
    settings = TrainSettings(
        outer=3, bootstrap=200, training=Training(epochs=3, batch_size=32, seed=1)
    )
    result = train_on_store(store, out=tmp_path / "out", settings=settings)
    said = read_predictions(tmp_path / "out" / result.predictions)
    dealt_ = outer(manifest, np.arange(N), k=3, seed=1)
    np.testing.assert_array_equal(said.fold, dealt_.part)
    assert (result.n_test, result.heads, len(result.outer["epoch"])) == (N, "", 3)
    assert result.value == accuracy_score(Y2, said.probabilities.argmax(1))
    for f in range(3):
        train = np.flatnonzero(dealt_.part != f)
        val = dealt(SUBJECT[train], Y2[train], k=5, seed=1, by="subject").held_out[0]
        split = np.full(N, "test ")
        split[train] = "train"
        split[train[val]] = "val"
        alone = make_manifest(Y2, subject=SUBJECT, split=np.char.strip(split))
        path = make_store(tmp_path / f"{f}" / "b.h5", X, alone)
        one = train_on_store(
            path, out=tmp_path / "alone", settings=replace(settings, outer=None, bootstrap=50)
        )
        own = read_predictions(tmp_path / "alone" / one.predictions)
        np.testing.assert_array_equal(own.log_odds, said.log_odds[dealt_.part == f])
    # Given again, every fold goes on from its checkpoint, and nothing is trained anew.
    epochs = []
    again = train_on_store(store, out=tmp_path / "out", settings=settings, say=epochs.append)
    assert not epochs and again.metrics == result.metrics
    assert len(load(tmp_path / "out")) == 1


def test_a_backbone_is_trained_anew_in_every_outer_fold(image_folder, tmp_path):
    out = ["-o", str(tmp_path / "out"), "--features", str(tmp_path / "f"), "--json"]
    words = ["finetune", f"folder:{image_folder}", "-m", "timm:test_vit", "--weights", "random"]
    words += ["--epochs", "2", "--outer", "2", "--init", "random", *out]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    [result] = load(tmp_path / "out")
    said = read_predictions(tmp_path / "out" / result.predictions)
    assert result.n_test == 40 and set(said.fold) == {0, 1}
    runs = sorted((tmp_path / "out").rglob("best.safetensors"))
    a, b = (load_file(path) for path in runs)
    start = load_backbone("timm:test_vit", "random").module.state_dict()
    name = next(k for k in a if k.endswith("norm.weight"))
    own = start[name.removeprefix("trunk.")]
    # Each went as far from the start as two epochs go, and not one from where the other ended.
    far = [float((x[name] - own).abs().max()) for x in (a, b)]
    assert max(far) < 1.5 * min(far)
