"""A head tested on other data than its own, judged by scikit-learn and by simulation."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import FINGERPRINT, make_manifest, make_store
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    recall_score,
    roc_auc_score,
)

from cli import cli
from features.errors import ProbeError
from probe.compare import compare_results
from probe.elsewhere import ExternalOptions
from probe.external import test
from probe.predict import predict
from probe.results import load, read_predictions
from probe.score.difference import independent_difference
from probe.score.in_the_large import in_the_large, recalibrated
from probe.score.intervals import intervals
from probe.score.metrics import METRICS
from probe.sweep import ProbeOptions, probe

QUICK = ProbeOptions(C=(0.01, 1.0), folds=3, bootstrap=200)
B_MADE = FINGERPRINT | {"manifest": {"images": 1}}


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def hospital(path, y, classes, *, seed, shift=0.0, names=None, dataset, subject=None, **more):
    """A store of images whose features say their class; names: those of its own, in its order."""
    rng = np.random.default_rng(seed)
    signal = y[:, None] == np.arange(len(classes)) if y.ndim == 1 else y
    X = 1.3 * signal @ np.eye(signal.shape[1], 6) + rng.standard_normal((len(y), 6)) + shift
    if names and y.ndim == 1:
        y = np.array([list(names).index(classes[k]) if k < len(classes) else k for k in y])
    manifest = make_manifest(
        *(y,),
        classes=names or classes,
        dataset=dataset,
        ids=[f"{dataset}/{i}.png" for i in range(len(y))],
        subject=subject,
    )
    manifest = replace(manifest, **more)
    return make_store(path, X, manifest, fingerprint=B_MADE), X, manifest


@pytest.fixture
def two(tmp_path):
    """A head of hospital A, and a store of hospital B, sicker, whose classes stand otherwise."""
    rng = np.random.default_rng(1)
    y, z = (rng.random(240) < 0.3).astype(int), (rng.random(160) < 0.5).astype(int)
    a, X, mine = hospital(
        tmp_path / "a.h5",
        *(y, ["benign", "malignant"]),
        seed=2,
        dataset="A",
        subject=[f"a{i // 2}" for i in range(240)],
    )
    b, Z, theirs = hospital(
        tmp_path / "b.h5",
        *(z, ["benign", "malignant"]),
        names=["malignant", "benign"],
        seed=3,
        shift=0.4,
        dataset="B",
        subject=[f"b{i // 2}" for i in range(160)],
    )
    home = probe(a, out=tmp_path / "out", settings=QUICK)
    return tmp_path / "out" / home.heads, home, b, Z, z, X, y, mine, theirs


def test_scores_of_a_frozen_head_are_scikit_learn_s(two, tmp_path):
    head, home, b, Z, z, X, y, mine, _ = two
    result = test(head, b, out=tmp_path / "out")
    train = mine.split != "test"
    model = LogisticRegression(C=home.C, tol=1e-12, max_iter=10_000).fit(X[train], y[train])
    said = read_predictions(tmp_path / "out" / result.predictions)
    p = said.probabilities[:, 1]
    np.testing.assert_allclose(p, model.predict_proba(Z)[:, 1], atol=1e-4)
    assert said.labels.tolist() == z.tolist() and list(said.classes) == ["benign", "malignant"]
    called = said.probabilities.argmax(1)
    for name, theirs in {
        "accuracy": accuracy_score(z, called),
        "balanced_accuracy": balanced_accuracy_score(z, called),
        "auroc": roc_auc_score(z, p),
        "average_precision": average_precision_score(z, p),
        "f1": f1_score(z, called),
        "mcc": matthews_corrcoef(z, called),
        "kappa": cohen_kappa_score(z, called),
        "brier": brier_score_loss(z, p),
        "log_loss": log_loss(z, said.probabilities),
    }.items():
        assert result.metrics[name]["value"] == pytest.approx(theirs, abs=1e-12), name
    frozen = home.thresholds["outputs"]["malignant"]["threshold"]
    at = result.thresholds["outputs"]["malignant"]
    assert at["threshold"] == frozen
    for side, rate in ((1, "sensitivity"), (0, "specificity")):
        theirs = recall_score(z, p >= frozen, pos_label=side)
        assert at[rate]["value"] == pytest.approx(theirs, abs=1e-12)
    assert (result.dataset, result.trained_on, result.n_test) == ("B", "A", 160)
    assert result.n_subjects_test == 80 and result.n_train == home.n_train
    drop = result.external["drop"]["accuracy"]
    at_home = read_predictions(tmp_path / "out" / home.predictions)
    before = accuracy_score(at_home.labels, at_home.probabilities.argmax(1))
    assert drop["value"] == pytest.approx(before - accuracy_score(z, called), abs=1e-12)
    assert drop["home"] == home.value
    assert drop["ci_low"] < drop["value"] < drop["ci_high"]


def test_findings_are_matched_by_name_and_what_is_not_common_is_named(tmp_path):
    rng = np.random.default_rng(4)
    y = (rng.random((240, 3)) < 0.4).astype(int)
    z = (rng.random((200, 3)) < 0.4).astype(int)
    a, _, _ = hospital(tmp_path / "a.h5", y, ["Edema", "Mass", "Rib"], seed=5, dataset="A")
    b, _, _ = hospital(tmp_path / "b.h5", z, ["Mass", "Edema", "Scar"], seed=6, dataset="B")
    home = probe(a, out=tmp_path / "out", settings=QUICK)
    result = test(tmp_path / "out" / home.heads, b, out=tmp_path / "out")
    assert result.classes == ["Edema", "Mass"]
    assert result.external["absent"] == ["Rib"]
    assert result.external["unknown"] == {"Scar": int(z[:, 2].sum())}
    said = read_predictions(tmp_path / "out" / result.predictions)
    np.testing.assert_array_equal(said.labels, z[:, [1, 0]])
    areas = [roc_auc_score(said.labels[:, k], said.probabilities[:, k]) for k in range(2)]
    assert result.value == pytest.approx(np.mean(areas), abs=1e-12)
    at_home = read_predictions(tmp_path / "out" / home.predictions)
    common = [roc_auc_score(at_home.labels[:, k], at_home.probabilities[:, k]) for k in range(2)]
    drop = result.external["drop"]["auroc"]  # over the same findings on both sides
    assert drop["home"] == pytest.approx(np.mean(common), abs=1e-12) != home.value
    assert any("doesn't know Scar" in note for note in result.notes)
    assert set(result.thresholds["outputs"]) == {"Edema", "Mass"}


def test_images_of_classes_that_the_head_does_not_know_are_left_out_and_counted(tmp_path):
    rng = np.random.default_rng(7)
    y, z = rng.integers(0, 3, 240), rng.integers(0, 4, 160)
    a, _, _ = hospital(tmp_path / "a.h5", y, ["mild", "none", "severe"], seed=8, dataset="A")
    names = ["mild", "none", "grave", "other"]
    b, _, _ = hospital(tmp_path / "b.h5", z, names, seed=9, dataset="B")
    head = tmp_path / "out" / probe(a, out=tmp_path / "out", settings=QUICK).heads
    result = test(head, b, out=tmp_path / "out")
    counts = np.bincount(z)
    assert result.n_test == counts[0] + counts[1]
    assert result.external["unknown"] == {"grave": counts[2], "other": counts[3]}
    assert result.external["absent"] == ["severe"]
    settings = ExternalOptions(names={"grave": "severe"})
    result = test(head, b, out=tmp_path / "out", settings=settings)
    said = read_predictions(tmp_path / "out" / result.predictions)
    assert result.n_test == counts[:3].sum()
    assert np.bincount(said.labels).tolist() == counts[:3].tolist()
    wanted = roc_auc_score(said.labels, said.probabilities, multi_class="ovr")
    assert result.metrics["auroc"]["value"] == pytest.approx(wanted, abs=1e-12)
    stranger, _, _ = hospital(tmp_path / "c.h5", y, ["x", "y", "z"], seed=8, dataset="C")
    with pytest.raises(ProbeError, match=r"classes x, y, z, and the head mild, none, severe"):
        test(head, stranger, out=tmp_path / "out")
    with pytest.raises(ProbeError, match="no class 'w', found x, y, z"):
        test(head, stranger, out=tmp_path / "o", settings=ExternalOptions(names={"w": "mild"}))


def test_calibration_in_the_large_maximises_the_likelihood(tmp_path):
    rng = np.random.default_rng(10)
    z = 2 * rng.standard_normal(400)
    y = (rng.random(400) < expit(0.7 * z - 1.2)).astype(int)
    subject = np.arange(400) // 2
    [(name, said)] = in_the_large(y, np.stack([-z, z], 1), subject, ["no", "yes"]).items()
    best = minimize(lambda a: -(log_expit(z + a) * y + log_expit(-z - a) * (1 - y)).sum(), [0.0])
    assert name == "yes" and said["intercept"]["value"] == pytest.approx(best.x[0], abs=1e-5)
    assert said["ratio"]["value"] == pytest.approx(y.mean() / expit(z).mean(), abs=1e-12)
    assert said["ratio"]["ci_high"] < 1 and said["intercept"]["ci_high"] < 0
    moved = recalibrated(y, np.stack([-z, z], 1))
    assert expit(moved[:, 1]).mean() == pytest.approx(y.mean(), abs=1e-9)
    assert roc_auc_score(y, moved[:, 1]) == roc_auc_score(y, z)
    logits = rng.standard_normal((600, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = rng.choice([0, 1, 3], 600, p=[0.7, 0.2, 0.1])
    q = expit(recalibrated(labels, logit(p)))
    np.testing.assert_allclose(q.sum(1), 1)
    np.testing.assert_allclose(q.mean(0), np.bincount(labels, minlength=4) / 600, atol=1e-6)
    there = [0, 1, 3]  # ratios of p change by one factor for each class
    for j, k in ((0, 1), (1, 3)):
        factor = (q[:, j] / q[:, k]) / (p[:, j] / p[:, k])
        np.testing.assert_allclose(factor, factor[0])
    assert log_loss(labels, q[:, there]) < log_loss(
        labels, p[:, there] / p[:, there].sum(1)[:, None]
    )
    one_sided = in_the_large(np.zeros(20, int), np.stack([-z, z], 1)[:20], subject[:20], "ab")["b"]
    assert one_sided["intercept"]["value"] is None and one_sided["ratio"]["value"] == 0


@pytest.mark.parametrize(("name", "n"), [("accuracy", 40), ("auroc", 60)])
def test_the_drop_s_interval_covers_it(name, n):
    """Two hospitals of few subjects, with two images each; the true scores by many images."""
    rng = np.random.default_rng(11)
    metric = METRICS["multiclass", name]

    def drawn(subjects, quality):
        y = (rng.random(subjects) < 0.4).astype(int).repeat(2)
        own = rng.standard_normal(subjects).repeat(2)
        z = quality * (2 * y - 1) + 0.7 * own + 0.7 * rng.standard_normal(2 * subjects)
        return y, np.stack([-z, z], 1), np.arange(subjects).repeat(2)

    def score(y, z):
        return roc_auc_score(y, z[:, 1]) if name == "auroc" else accuracy_score(y, z.argmax(1))

    truth = [score(*drawn(200_000, q)[:2]) for q in (1.2, 0.6)]
    hits, runs = 0, 150
    for k in range(runs):
        both = []
        for subjects, quality in ((n, 1.2), (2 * n, 0.6)):
            y, z, subject = drawn(subjects, quality)
            p = z if metric.ranking else expit(z)
            own = np.random.default_rng(k)
            both.append(intervals([metric], y, p, subject, n=200, rng=own)[name])
        drop = independent_difference(*both)
        hits += drop["ci_low"] <= truth[0] - truth[1] <= drop["ci_high"]
    assert hits / runs > 0.95 - 3 * np.sqrt(0.05 * 0.95 / runs)


def test_shared_subjects_and_files_are_said_and_left_out_where_asked(tmp_path):
    rng = np.random.default_rng(12)
    y, z = rng.integers(0, 2, 120), rng.integers(0, 2, 200)
    a, _, _ = hospital(
        tmp_path / "a.h5", y, ["n", "p"], seed=1, dataset="A", subject=[f"s{i}" for i in range(120)]
    )
    subject = [f"s{i}" if i < 10 else f"t{i}" for i in range(200)]
    b, _, theirs = hospital(
        tmp_path / "b.h5", z, ["n", "p"], seed=2, dataset="B", subject=subject
    )  # made stores have the hash i in row i: the first 120 files are A's
    home = probe(a, out=tmp_path / "out", settings=QUICK)
    head = tmp_path / "out" / home.heads
    result = test(head, b, out=tmp_path / "out")
    trained = np.arange(200) % 4 != 0
    shared = result.external["shared"]
    assert shared["trained_on"] == {
        "subjects": int(trained[:10].sum()),
        "images_of_subjects": int(trained[:10].sum()),
        "files": int(trained[:120].sum()),
    }
    assert shared["tested_on"]["files"] == 30 and result.n_test == 200
    assert result.audit["leaks"] == 7 + 90
    assert "7 subjects (7 images) and 90 identical files" in result.audit["line"]
    settings = ExternalOptions(leave_shared_out=True)
    apart = test(head, b, out=tmp_path / "out", settings=settings)
    kept = ~(trained & (np.arange(200) < 120))
    said = read_predictions(tmp_path / "out" / apart.predictions)
    assert said.ids == theirs.id[kept].tolist() and apart.audit["leaks"] == 0
    a.rename(tmp_path / "moved.h5")
    lost = test(head, b, out=tmp_path / "out")
    assert lost.audit == {} and any("name it by --home" in note for note in lost.notes)
    found = test(
        head, b, out=tmp_path / "out", settings=ExternalOptions(home=tmp_path / "moved.h5")
    )
    assert found.external["shared"] == shared
    with pytest.raises(ProbeError, match="what is shared with training isn't known"):
        test(head, b, out=tmp_path / "out", settings=settings)


def test_the_test_split_alone_is_paired_with_the_data_s_own_head(two, tmp_path):
    head, _, _, _, z, _, _, _, _ = two
    b, Z, theirs = hospital(
        tmp_path / "b2.h5", z, ["benign", "malignant"], seed=3, shift=0.4, dataset="B"
    )
    own = probe(b, out=tmp_path / "out", settings=QUICK)
    nested = probe(b, out=tmp_path / "out", settings=replace(QUICK, outer=4))
    part = test(head, b, out=tmp_path / "out", settings=ExternalOptions(part="test"))
    whole = test(head, b, out=tmp_path / "out")
    assert part.n_test == own.n_test == (theirs.split == "test").sum()
    assert whole.n_test == nested.n_test == len(Z)
    both = compare_results([tmp_path / "out"], n=200)
    pairs = {
        (p.dataset.partition(" (")[2][:3], p.difference is not None)
        for p in both.pairs
        if "trained on A" in p.a + p.b
    }
    assert pairs == {("spl", True), ("all", True)}
    assert {m for m in both.models if "trained on" in m} == {"made · trained on A"}


def test_the_command_reads_a_table_and_says_what_counts(two, tmp_path, image_folder):
    head, _, b, _, _, _, _, _, _ = two
    done = call("test", tmp_path / "out", b, "-o", tmp_path / "out", "--bootstrap", 200)
    assert done.exit_code == 0, done.output
    for words in (
        "B x made, trained on A: accuracy",
        "drop from A:",
        "malignant at the head's threshold",
        "expected: ratio",
        "calibration intercept",
        "by intercepts fitted here: log_loss",
        "all labelled images, whatever part of a split",
    ):
        assert words in done.output, words
    found = json.loads(call("test", head, b, "-o", tmp_path / "out", "--json").stdout)
    assert found["external"]["part"] == "all" and len(load(tmp_path / "out")) == 2
    assert call("test", head, b, "--class", "x").exit_code == 2


def test_a_table_of_another_hospital_is_extracted_and_scored(tmp_path, image_folder):
    """From images to a score: folder A is probed, the table B has the test images only."""
    done = call(
        "extract", f"folder:{image_folder}", "-m", "efficientnet_lite0", "-o", tmp_path / "a"
    )
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    [store] = (tmp_path / "a").rglob("*.h5")
    assert call("probe", store, "-o", out, "--C", "0.1,1", "--folds", 2).exit_code == 0
    table = tmp_path / "B.csv"
    rows = [[p.name, p.parent.name] for p in sorted(image_folder.rglob("*.*"))[::2]]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    for name, _ in rows:
        [found] = image_folder.rglob(name)
        (tmp_path / name).write_bytes(found.read_bytes())
    done = call("test", out, f"csv:{table}", "-o", out, "--features", tmp_path / "features")
    assert done.exit_code == 0, done.output
    result = load(out)[-1]
    assert (result.dataset, result.n_test, result.trained_on) == ("B", len(rows), "images")
    said = read_predictions(out / result.predictions)
    truth = dict(rows)
    assert [said.classes[k] for k in said.labels] == [truth[name] for name in said.ids]
    assert result.value == accuracy_score(said.labels, said.probabilities.argmax(1))
    assert "identical files" in result.audit["line"]  # they are the same files
    rows[0][1] = "dog" if rows[0][1] == "cat" else "cat"  # a label of the table, not of the store
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    done = call("test", out, f"csv:{table}", "-o", out, "--features", tmp_path / "features")
    assert done.exit_code == 0, done.output
    again = read_predictions(out / load(out)[-1].predictions)
    assert sum(a != b for a, b in zip(again.labels, said.labels, strict=True)) == 1


@pytest.mark.parametrize("kind", ["nested", "trained", "copied"])
def test_every_kind_of_head_says_what_predict_says(two, tmp_path, kind):
    head, home, b, _, z, _, _, _, _ = two
    out = tmp_path / "other"
    words = {"nested": ("--outer", 3, "--C", "0.1"), "trained": ("--protocol", "study")}
    if kind == "copied":
        out.mkdir()
        for name in ("heads.json", "heads.safetensors"):
            (out / name).write_bytes(head.with_name(name).read_bytes())
        head = out / "heads.json"
    else:
        quick = ("--epochs", 2, "--warmup", 0) if kind == "trained" else ("--folds", 2)
        done = call("probe", tmp_path / "a.h5", *words[kind], *quick, "-o", out)
        assert done.exit_code == 0, done.output
        [home] = load(out)
        head = out / home.heads
    result = test(head, b, out=tmp_path / "tested")
    said = read_predictions(tmp_path / "tested" / result.predictions)
    table = predict(head, b).table.splitlines()
    theirs = [float(row["p:malignant"]) for row in csv.DictReader(table)]
    assert said.probabilities[:, 1].tolist() == theirs
    assert result.value == pytest.approx(accuracy_score(z, said.probabilities.argmax(1)))
    if kind == "copied":
        assert result.external["drop_method"].startswith("none: the head lies in no folder")
        assert (result.protocol, result.trained_on) == ("unknown", "A")
    else:
        assert result.external["drop"]["accuracy"]["home"] == pytest.approx(home.value, abs=1e-12)
        assert (result.scenario, result.head) == (home.scenario, home.head)


def test_uncertain_labels_count_as_they_did_at_home(tmp_path):
    rng = np.random.default_rng(13)
    y = rng.choice([1, 0, -1, -2], (240, 2), p=[0.3, 0.4, 0.2, 0.1])
    X = 1.3 * (y == 1) @ np.eye(2, 6) + rng.standard_normal((240, 6))
    stores = []
    for name, rows in (("A", slice(0, 160)), ("B", slice(160, 240))):
        ids = [f"{name}{i}" for i in range(240)][rows]
        manifest = make_manifest(y[rows], classes=["Edema", "Mass"], dataset=name, ids=ids)
        stores.append(make_store(tmp_path / f"{name}.h5", X[rows], manifest))
    ones = replace(QUICK, uncertain="ones")
    home = probe(stores[0], out=tmp_path / "out", settings=ones)
    result = test(tmp_path / "out" / home.heads, stores[1], out=tmp_path / "out")
    said = read_predictions(tmp_path / "out" / result.predictions)
    stated = (y[160:] != -2).any(1)
    np.testing.assert_array_equal(said.labels, np.isin(y[160:], [1, -1])[stated])
    settings = ExternalOptions(uncertain="ignore")
    result = test(tmp_path / "out" / home.heads, stores[1], out=tmp_path / "out", settings=settings)
    said = read_predictions(tmp_path / "out" / result.predictions)
    np.testing.assert_array_equal(np.isnan(said.labels), (y[160:] < 0)[stated])


def test_intervals_of_calibration_in_the_large_cover_it():
    """Subjects of two images each, sicker by -.5 than the head says."""
    rng = np.random.default_rng(14)
    many = 2 * rng.standard_normal(200_000) - 1
    truth = expit(many - 0.5).mean() / expit(many).mean()
    S, runs, hits = 60, 400, np.zeros(2)
    for _ in range(runs):
        z = 1.4 * rng.standard_normal(S).repeat(2) + 1.5 * rng.standard_normal(2 * S) - 1
        z *= 2 / np.hypot(1.4, 1.5)
        z += 2 / np.hypot(1.4, 1.5) - 1
        y = (rng.random(2 * S) < expit(z - 0.5)).astype(int)
        said = in_the_large(y, np.stack([-z, z], 1), np.arange(S).repeat(2), "ab")["b"]
        for k, (name, value) in enumerate((("intercept", -0.5), ("ratio", truth))):
            hits[k] += said[name]["ci_low"] <= value <= said[name]["ci_high"]
    assert (abs(hits / runs - 0.95) < 3.5 * np.sqrt(0.05 * 0.95 / runs)).all()


def test_data_of_one_class_are_scored_by_what_is_defined(two, tmp_path):
    head, _, _, Z, z, _, _, _, _ = two
    healthy = np.flatnonzero(z == 0)
    manifest = make_manifest(z[healthy], classes=["benign"], dataset="healthy")
    store = make_store(tmp_path / "h.h5", Z[healthy], manifest)
    result = test(head, store, out=tmp_path / "out")
    said = read_predictions(tmp_path / "out" / result.predictions)
    assert result.value == (said.probabilities.argmax(1) == 0).mean()
    assert result.external["absent"] == ["malignant"]
    assert result.metrics["auroc"]["value"] is None
    assert result.external["drop"]["auroc"] == {
        "home": pytest.approx(result.external["drop"]["auroc"]["home"]),
        **dict.fromkeys(("here", "value", "ci_low", "ci_high")),
    }
    assert result.thresholds["outputs"]["malignant"]["sensitivity"]["value"] is None
    assert result.external["calibration"]["malignant"]["intercept"]["value"] is None
    done = call("test", head, store, "-o", tmp_path / "out", "--metric", "auroc")
    assert done.exit_code == 2 and "auroc is not defined" in done.output


@pytest.mark.parametrize("outer", [None, 4, "subject"])
def test_the_score_at_home_has_the_interval_of_its_own_result(tmp_path, two, outer):
    """Folds make it longer, also where all subjects are ranked together."""
    a, b = (tmp_path / name for name in ("a.h5", "b.h5"))
    home = probe(a, out=tmp_path / "o", settings=replace(QUICK, outer=outer))
    here = test(
        tmp_path / "o" / home.heads, b, out=tmp_path / "o", settings=ExternalOptions(bootstrap=200)
    )
    for name, drop in here.external["drop"].items():
        wanted = independent_difference(home.metrics[name], here.metrics[name])
        for key, value in wanted.items():
            assert drop[key] == pytest.approx(value, abs=1e-9), (name, key)
