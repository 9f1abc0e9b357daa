"""Recalibration, calibration slope and intercept, prediction sets: judged by scikit-learn."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, log_loss

from cli import cli
from features.errors import ProbeError
from probe.predict import predict
from probe.results import load, read_predictions
from probe.score import conformal, log_odds
from probe.score.calibration import intercept_of, slope_of
from probe.score.decisions import THRESHOLDS, net_benefit
from probe.score.intervals import intervals
from probe.score.metrics import Metric
from probe.score.recalibration import Recalibration, fit
from probe.sweep import ProbeOptions, probe

rng = np.random.default_rng(11)
N = 400
U = rng.normal(size=N)
TRUTH = (rng.uniform(size=N) < expit(0.6 * U - 0.5)).astype(int)
Z = np.stack([-U, U], axis=1)


def test_slope_and_intercept_are_those_of_logistic_regression_under_any_weights():
    weights = rng.exponential(size=(3, N))
    slopes = slope_of(TRUTH.astype(float), U)(weights)
    for w, slope in zip(weights, slopes, strict=True):
        model = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
        assert slope == pytest.approx(model.fit(U[:, None], TRUTH, w).coef_[0, 0], abs=1e-6)
    large = intercept_of(TRUTH.astype(float), U)(weights)
    for w, b in zip(weights, large, strict=True):
        # b solves the score equation: the mean probability is the mean of the labels.
        assert np.average(expit(U + b), weights=w) == pytest.approx(np.average(TRUTH, weights=w))
    assert np.isnan(slope_of((U > 0).astype(float), U)(weights)).all()  # nothing is steep enough


@pytest.mark.parametrize("scale", [0.001, 0.0105, 0.1, 8.0])
def test_a_slope_and_its_interval_don_t_depend_on_how_sure_the_head_is(scale):
    """Heads that hardly dare and heads that are far too sure: log-odds times anything."""
    truth, subject = TRUTH.astype(float), np.arange(N).astype(str)
    slope = Metric("calibration_slope", "slope", slope_of, "multiclass", higher=False)
    found = [
        intervals([slope], truth, U * k, subject, n=200, rng=np.random.default_rng(0))[slope.name]
        for k in (1.0, scale)
    ]
    for end in ("value", "ci_low", "ci_high"):
        assert found[1][end] * scale == pytest.approx(found[0][end], rel=1e-4)
    model = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(U[:, None], TRUTH)
    assert found[1]["value"] * scale == pytest.approx(model.coef_[0, 0], rel=1e-5)


def test_an_interval_of_no_defined_draw_is_none():
    def scorer(y, p):
        """Defined where all count alike, as in the score itself, and in no resample."""
        return lambda w: np.where(np.ptp(w, axis=1) == 0, 0.5, np.nan)

    odd = Metric("odd", "odd", scorer, "multiclass")
    how = {"n": 100, "rng": np.random.default_rng(0)}
    found = intervals([odd], TRUTH.astype(float), U, np.arange(N).astype(str), **how)["odd"]
    assert found == {"value": 0.5, "ci_low": None, "ci_high": None}


def test_a_temperature_is_that_of_the_least_log_loss():
    y = rng.integers(0, 4, N)
    logits = 3 * (rng.normal(size=(N, 4)) + np.eye(4)[y])
    import torch

    z = log_odds.of_logits(torch.from_numpy(logits), "softmax").numpy()
    found = fit("temperature", y, z)
    best = minimize_scalar(
        lambda t: log_loss(y, softmax(logits / t, axis=1)), bounds=(0.1, 30), method="bounded"
    )
    assert found.temperature == pytest.approx(best.x, rel=1e-4)
    p = log_odds.probabilities(found(z, classes=True))
    np.testing.assert_allclose(p, softmax(logits / found.temperature, axis=1), atol=1e-12)
    assert (p.argmax(1) == logits.argmax(1)).all()
    again = Recalibration.from_json(json.loads(json.dumps(found.to_json())))
    np.testing.assert_array_equal(again(z, classes=True), found(z, classes=True))


def test_platt_s_line_and_isotonic_steps_are_scikit_learn_s():
    line = fit("platt", TRUTH, Z)
    wanted = _SigmoidCalibration().fit(U, TRUTH)
    p = log_odds.probabilities(line(Z, classes=True))
    np.testing.assert_allclose(p[:, 1], wanted.predict(U), atol=1e-4)
    np.testing.assert_allclose(p.sum(1), 1)
    steps = fit("isotonic", TRUTH, Z)
    wanted = IsotonicRegression(out_of_bounds="clip").fit(U, TRUTH)
    fresh = rng.normal(size=100) * 2
    p = log_odds.probabilities(steps(np.stack([-fresh, fresh], axis=1), classes=True))[:, 1]
    clipped = np.clip(wanted.predict(fresh), 1 / (N + 2), 1 - 1 / (N + 2))
    np.testing.assert_allclose(p, clipped, atol=2e-3)


def test_findings_are_recalibrated_one_by_one_and_unknown_labels_are_left_out():
    y = np.stack([TRUTH, rng.integers(0, 2, N)], axis=1).astype(float)
    z = np.stack([U, rng.normal(size=N)], axis=1)
    y[:50, 0] = np.nan
    lines = fit("platt", y, z).lines
    for k, (a, b) in enumerate(lines):
        known = ~np.isnan(y[:, k])
        wanted = _SigmoidCalibration().fit(z[known, k], y[known, k])
        assert (a, b) == pytest.approx((-wanted.a_, -wanted.b_), abs=1e-3)
    assert fit("temperature", y, z).temperature > 0


def test_methods_that_don_t_fit_are_refused():
    y, z = rng.integers(0, 3, N), rng.normal(size=(N, 3))
    with pytest.raises(ProbeError, match="take temperature"):
        fit("platt", y, z)
    with pytest.raises(ProbeError, match="nothing was held out"):
        fit("temperature", y[:0], z[:0])


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_sets_hold_the_label_as_often_as_is_wanted_with_subjects(level):
    """Of fresh subjects; their images share how hard they are."""
    held = []
    for seed in range(60):
        own = np.random.default_rng(seed)
        count = own.integers(1, 9, 2 * 80)
        subject = np.repeat(np.arange(160), count)
        hard = own.exponential(size=160)[subject]
        y = own.integers(0, 5, len(subject))
        p = softmax(own.normal(size=(len(y), 5)) * hard[:, None] + 2 * np.eye(5)[y], axis=1)
        first = subject < 80
        t = conformal.threshold(p[first], y[first], subject[first], level=level)
        sets = conformal.sets(p[~first], t)[np.arange((~first).sum()), y[~first]]
        share = np.bincount(subject[~first] - 80, sets) / np.bincount(subject[~first] - 80)
        held.append(share.mean())  # each subject counts once
    assert level - 0.01 < np.mean(held) < level + 0.035


@pytest.mark.parametrize("how", ["mean", "max"])
def test_sets_of_patients_have_a_limit_that_was_chosen_on_patients(tmp_path, how):
    """Six noisy images of a patient say together more than one: an image's limit is too low."""
    own, S, per = np.random.default_rng(4), 400, 6
    y = own.integers(0, 2, S).repeat(per)
    hard = 0.5 * own.normal(size=(S, 3)).repeat(per, 0)
    X = hard + own.normal(size=(S * per, 3)) + np.where(y, 0.5, -0.5)[:, None]
    subject = np.arange(S).repeat(per).astype(str)
    store = make_store(tmp_path / "made" / "b.h5", X, make_manifest(y, subject=subject))
    options = ProbeOptions(C=(0.01,), folds=5, outer=5, bootstrap=100, conformal=0.8, aggregate=how)
    found = probe(store, out=tmp_path / "out", settings=options).conformal
    assert abs(found["coverage"]["value"] - 0.8) < 3 * np.sqrt(0.8 * 0.2 / S)


def test_too_few_subjects_give_sets_of_all_classes():
    p = softmax(rng.normal(size=(6, 3)), axis=1)
    t = conformal.threshold(p, np.zeros(6, dtype=int), np.arange(6), level=0.9)
    assert t == 0 and conformal.sets(p, t).all()


def test_net_benefit_counts_what_a_confusion_matrix_does():
    """Vickers & Elkin 2006; dcurves 1.1.7 gives the same to 1e-12 (it needs an old pandas)."""
    p = expit(0.6 * U - 0.5)
    for scores in (p, np.ones(N)):
        found = net_benefit(TRUTH.astype(float), scores)
        for t, benefit in zip(THRESHOLDS, found, strict=True):
            (_, false), (_, hits) = confusion_matrix(TRUTH, scores >= t, labels=[0, 1])
            assert benefit == pytest.approx(hits / N - false / N * t / (1 - t), abs=1e-12)


def overconfident(folder, **settings):
    """A store whose weakest penalty is far too sure."""
    own = np.random.default_rng(3)
    X = own.normal(size=(600, 40)).astype(np.float32)
    y = (X[:, 0] + own.normal(size=600) > 0).astype(int)
    store = make_store(folder / "made" / "b.h5", X, make_manifest(y))
    options = ProbeOptions(C=(1e4,), bootstrap=300, **settings)
    return store, probe(store, out=folder / "out", settings=options), y


@pytest.mark.parametrize("outer", [None, 4])
@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_recalibrated_heads_say_what_they_mean_and_predict_says_the_same(tmp_path, method, outer):
    store, result, _ = overconfident(tmp_path, calibrate=method, outer=outer, conformal=0.9)
    found = result.calibration
    was, now = (found[when]["calibration_slope"]["value"] for when in ("before", "after"))
    assert was < 0.75 and abs(now - 1) < abs(was - 1)
    for name in ("log_loss", "ece"):
        assert found["after"][name]["value"] < found["before"][name]["value"]
        assert found["after"][name] == pytest.approx(result.metrics[name], rel=0.3)
    said = read_predictions(tmp_path / "out" / result.predictions)
    assert result.metrics["log_loss"]["value"] == pytest.approx(
        log_loss(said.labels, said.probabilities)
    )
    assert 0.75 < result.conformal["coverage"]["value"] <= 1
    assert result.identity.settings["calibrate"] == method
    table = predict(tmp_path / "out" / result.heads, store).table
    if outer is None:  # the head that was tested is the one that is kept
        rows = [int(i[:5]) for i in said.ids]
        named = list(csv.DictReader(table.splitlines()))
        again = np.array([float(named[r]["p:class 1"]) for r in rows])
        np.testing.assert_allclose(again, said.probabilities[:, 1], rtol=1e-9)


def test_a_head_that_is_penalised_away_has_a_result_that_can_be_read(tmp_path):
    """Its log-odds hardly differ: a slope of a thousand millions is none."""
    own = np.random.default_rng(3)
    y = own.integers(0, 2, 60)
    X = (1e-3 * (own.normal(size=(60, 4)) + y[:, None])).astype(np.float32)
    store = make_store(tmp_path / "made" / "b.h5", X, make_manifest(y))
    probe(store, out=tmp_path / "out", settings=ProbeOptions(C=(1e-6,), bootstrap=200))
    [result] = load(tmp_path / "out")
    slope = result.calibration["scores"]["calibration_slope"]
    assert slope == {"value": None, "ci_low": None, "ci_high": None}


def test_the_command_says_it_and_refuses_what_it_can_t(tmp_path):
    store, _, _ = overconfident(tmp_path)
    words = ["probe", str(store), "-o", str(tmp_path / "cli"), "--C", "1e4", "--bootstrap", "200"]
    done = CliRunner().invoke(cli, [*words, "--calibrate", "temperature", "--conformal", ".9"])
    assert done.exit_code == 0, done.output
    assert "recalibrated by temperature" in done.output and "sets for 90%" in done.output
    [result] = load(tmp_path / "cli")
    assert result.calibration["temperature"] > 1.3
    for value in ("1", "0.2", "90"):
        done = CliRunner().invoke(cli, [*words, "--conformal", value])
        assert done.exit_code == 2
