"""Scores rank what heads say, not what is left of it near 0 and 1: mpmath, scikit-learn judge."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_manifest, make_store
from mpmath import mp, mpf
from safetensors.numpy import load_file
from scipy.special import expit, logit, logsumexp
from sklearn.metrics import average_precision_score, roc_auc_score

from probe import results
from probe.report.curves import bands
from probe.report.panels import examples
from probe.score import log_odds
from probe.score.predictions import LabelledPredictions, aggregate
from probe.score.thresholds import choose_threshold
from probe.solve.knn import vote
from probe.sweep import ProbeOptions, probe

mp.dps = 60
rng = np.random.default_rng(0)


def exact(p):
    return float(mp.log(p) - mp.log(1 - p))


@pytest.mark.parametrize("K", [2, 3, 7])
@pytest.mark.parametrize("size", [0.1, 10, 1000])
def test_log_odds_are_those_of_the_logits_to_the_last_digits(K, size):
    logits = size * rng.standard_normal((40, K))
    ours = log_odds.of_logits(torch.from_numpy(logits), "softmax").numpy()
    for row, found in zip(logits, ours, strict=True):
        each = [mp.exp(mpf(v)) for v in row]
        wanted = [
            float(mp.log(e) - mp.log(mp.fsum(each[:k] + each[k + 1 :]))) for k, e in enumerate(each)
        ]
        np.testing.assert_allclose(found, wanted, rtol=1e-13, atol=1e-14 * max(1, size))


def test_logits_without_end_have_log_odds_without_end():
    logits = torch.tensor([[torch.inf, 0.0, 1.0], [-torch.inf, 0.0, 0.0], [-torch.inf] * 2 + [3.0]])
    found = log_odds.of_logits(logits[1:], "softmax").numpy()
    np.testing.assert_array_equal(found[0], [-np.inf, 0, 0])
    np.testing.assert_array_equal(found[1], [-np.inf, -np.inf, np.inf])


@pytest.mark.parametrize("how", ["mean", "max"])
def test_units_are_joined_without_rounding_to_0_or_1(how):
    unit = np.repeat(np.arange(10), 3)
    logits = 20 * rng.standard_normal((30, 3)) + 80 * np.eye(3)[unit % 3]
    z = log_odds.of_logits(torch.from_numpy(logits), "softmax").numpy()
    said = LabelledPredictions(np.arange(30), unit, np.zeros(30, int), z, {})
    joined = aggregate(said, unit, how)
    assert (joined.p == 1).any()  # here a probability would have been rounded
    for k in range(10):
        each = [[1 / (1 + mp.exp(-mpf(v))) for v in row] for row in z[unit == k]]
        if how == "mean":
            p = [mp.fsum(column) / 3 for column in zip(*each, strict=True)]
        else:
            most = [max(column) for column in zip(*each, strict=True)]
            p = [v / mp.fsum(most) for v in most]
        np.testing.assert_allclose(joined.z[k], [exact(v) for v in p], rtol=1e-11, atol=1e-11)


def test_infinite_log_odds_are_joined():
    z = np.array([[np.inf], [np.inf], [-np.inf], [-np.inf], [np.inf], [-np.inf]])
    found = log_odds.mean(z, np.repeat(np.arange(3), 2), 3)
    np.testing.assert_array_equal(found, [[np.inf], [-np.inf], [0]])


def test_votes_keep_what_speaks_against_a_class():
    """Similarities so far apart that a float32 share of the votes is 1."""
    angle = np.array([0, 0.1, 0.9, 1.0])
    train = np.c_[np.cos(angle), np.sin(angle)]
    test = np.c_[np.cos(angle - 0.2), np.sin(angle - 0.2)][:2]
    y = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    z = vote(
        [torch.from_numpy(train)],
        torch.from_numpy(y),
        torch.from_numpy(test),
        k=[4],
        temperature=0.01,
    )
    weight = np.exp((test @ train.T - 1) / 0.01)
    wanted = np.log(weight @ y) - np.log(weight @ (1 - y))
    assert (np.float32(expit(wanted)) == 1).any()
    np.testing.assert_allclose(z[0], wanted, rtol=1e-9)


def test_thresholds_are_chosen_among_log_odds():
    truth = np.array([0, 0, 0, 1, 1, 1, 1])
    z = np.array([-3, 38, 40, 41, 42, np.inf, np.inf])
    assert len(np.unique(expit(z))) < len(np.unique(z))
    assert choose_threshold(truth.astype(float), z, "youden") == 41
    assert choose_threshold(truth.astype(float), z, "f1") == 41


def separable(kind, n=2400, D=600):
    """Features that a head at C = 1e5 is far too sure about, and labels that they don't settle."""
    X = rng.standard_normal((n, D)).astype(np.float32)
    K = {"binary": 2, "classes": 3, "findings": 2}[kind]
    score = X[:, : 30 * K].reshape(n, 30, K).sum(1) + 4 * rng.standard_normal((n, K))
    y = (score > 0).astype(int) if kind == "findings" else score.argmax(1)
    split = np.where(np.arange(n) < 300, "train", "test")
    return X, y, make_manifest(y, split=split)


@pytest.mark.parametrize("kind", ["binary", "classes", "findings"])
def test_ranks_are_those_of_float64_logits_from_the_head_to_the_file(tmp_path, kind):
    X, y, manifest = separable(kind)
    path = make_store(tmp_path / "made" / "b.h5", X * 30, manifest)
    settings = ProbeOptions(C=(1e5,), folds=2, metric="auroc", bootstrap=20)
    result = probe(path, out=tmp_path / "out", settings=settings)
    saved = load_file((tmp_path / "out" / result.heads).with_suffix(".safetensors"))
    test = manifest.split == "test"
    coef, intercept = saved["coef"].astype(float), saved["intercept"].astype(float)
    logits = (X[test] * np.float32(30)).astype(float) @ coef.T + intercept
    if kind == "classes":
        others = [logsumexp(np.delete(logits, k, axis=1), axis=1) for k in range(3)]
        logits = logits - np.stack(others, axis=1)
    truth = np.eye(3)[y[test]] if kind == "classes" else y[test].reshape(len(logits), -1)
    assert (np.float32(expit(logits)) == 1).mean() > 0.02  # what used to tie
    said = results.read_predictions(tmp_path / "out" / result.predictions)
    again = said.log_odds[:, 1:] if kind == "binary" else said.log_odds
    for name, score in {
        "auroc": roc_auc_score,
        "average_precision": average_precision_score,
    }.items():
        wanted = score(truth, logits)
        assert result.metrics[name]["value"] == pytest.approx(wanted, abs=1e-12)
        assert score(truth, again) == pytest.approx(wanted, abs=1e-12)
        column = next(iter(result.outputs.values()))[name]
        assert column == pytest.approx(score(truth[:, 0], logits[:, 0]), abs=1e-12)
    if kind == "classes":
        pairs = [(np.isin(y[test], (a, b)), a) for a, b in permutations(range(3), 2)]
        ovo = [roc_auc_score(y[test][rows] == a, logits[rows, a]) for rows, a in pairs]
        assert result.metrics["auroc_ovo"]["value"] == pytest.approx(np.mean(ovo), abs=1e-12)
    curve = bands(said)[0][0]
    assert curve.area == pytest.approx(result.value, abs=1e-12)
    if kind == "binary":
        found = next(iter(result.thresholds["outputs"].values()))
        hits = logits[truth == 1] >= found["log_odds"] * (1 - 1e-12)
        assert found["sensitivity"]["value"] == pytest.approx(hits.mean(), abs=1e-12)
    json.dumps(result.thresholds, allow_nan=False)


def test_the_surest_mistakes_are_told_apart_where_probabilities_are_1():
    z = np.array([[60.0, -60], [90, -90], [np.inf, -np.inf], [-50, 50]])
    said = results.Predictions(
        list("abcd"), list("abcd"), np.array([1, 1, 1, 1]), expit(z), ["x", "y"], z
    )
    assert [one.id for one in examples(said)[0]] == ["c", "b", "a"]


def test_predictions_come_back_as_they_were_and_old_files_are_read(tmp_path):
    z = np.array([[-1e-300, 1e-300], [45.123456789012345, -45.123456789012345], [np.inf, -np.inf]])
    said = results.Predictions(
        list("abc"), list("abc"), np.array([0, 1, 0]), expit(z), ["log_odds:a", "p:b"], z
    )
    results.write_predictions(tmp_path / "p.csv", said)
    back = results.read_predictions(tmp_path / "p.csv")
    np.testing.assert_array_equal(back.log_odds, z)
    np.testing.assert_array_equal(back.probabilities, expit(z))
    assert back.classes == ["log_odds:a", "p:b"]
    lines = [line.split(",")[:6] for line in Path(tmp_path / "p.csv").read_text().splitlines()]
    assert lines[0] == ["id", "subject", "label", "predicted", "p:log_odds:a", "p:p:b"]
    (tmp_path / "old.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    old = results.read_predictions(tmp_path / "old.csv")
    np.testing.assert_array_equal(old.log_odds, logit(expit(z)))
    np.testing.assert_array_equal(old.probabilities, back.probabilities)
