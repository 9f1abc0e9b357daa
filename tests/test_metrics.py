"""Every metric is scikit-learn's, under weights and ties; intervals are a plain bootstrap's."""

import numpy as np
import pytest
import sklearn.metrics as theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from probe import metrics
from probe.statistics import bootstrap_weights, interval


def data(seed, K, n=60):
    """Labels, probabilities with many ties, and weights, some of them zero."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    y[: 2 * K] = np.tile(np.arange(K), 2)
    scores = rng.integers(1, 5, (n, K)).astype(float) + 2 * (np.arange(K) == y[:, None])
    weights = rng.integers(0, 3, (4, n)).astype(float)
    weights[:, : 2 * K] += 1
    return y, scores / scores.sum(1, keepdims=True), weights


def reference(name, y, p, w):
    said, K = p.argmax(1), p.shape[1]
    one_hot = np.eye(K)[y]
    each = range(K) if K > 2 else [1]
    return {
        "accuracy": lambda: theirs.accuracy_score(y, said, sample_weight=w),
        "balanced_accuracy": lambda: theirs.balanced_accuracy_score(y, said, sample_weight=w),
        "quadratic_kappa": lambda: theirs.cohen_kappa_score(
            y, said, weights="quadratic", sample_weight=w
        ),
        "f1": lambda: theirs.f1_score(y, said, average="macro", sample_weight=w, zero_division=0),
        "log_loss": lambda: theirs.log_loss(y, p, sample_weight=w, labels=range(K)),
        "auroc": lambda: np.mean(
            [theirs.roc_auc_score(one_hot[:, k], p[:, k], sample_weight=w) for k in each]
        ),
        "average_precision": lambda: np.mean(
            [theirs.average_precision_score(one_hot[:, k], p[:, k], sample_weight=w) for k in each]
        ),
    }[name]()


@pytest.mark.parametrize("metric", metrics.of_task("multiclass"), ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.integers(2, 5))
def test_multiclass_metrics_are_scikit_learn_s_under_any_weights(metric, seed, K):
    y, p, weights = data(seed, K)
    ours = metrics.evaluate(metric, y, p, weights)
    np.testing.assert_allclose(ours, [reference(metric.name, y, p, w) for w in weights], rtol=1e-12)


@pytest.mark.parametrize("metric", metrics.of_task("multilabel"), ids=lambda m: m.name)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_multilabel_metrics_are_the_mean_over_findings_of_scikit_learn_s(metric, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, (50, 4)).astype(float)
    y[:4], y[:, 3] = [[0] * 4, [1] * 4, [0] * 4, [1] * 4], 0  # the last finding has no positive
    y[rng.random(y.shape) < 0.2] = np.nan
    y[:2, :3] = [[0] * 3, [1] * 3]
    p = rng.integers(1, 10, y.shape) / 10
    score = {
        "auroc": theirs.roc_auc_score,
        "average_precision": theirs.average_precision_score,
        "log_loss": lambda t, q: theirs.log_loss(t, q, labels=[0, 1]),
    }[metric.name]
    findings = (
        4 if metric.name == "log_loss" else 3
    )  # what can't be ranked is left out, not scored 0.5
    wanted = np.mean(
        [score(y[k, i], p[k, i]) for i in range(findings) for k in [~np.isnan(y[:, i])]]
    )
    np.testing.assert_allclose(metrics.evaluate(metric, y, p), [wanted], rtol=1e-12)


def test_a_metric_without_positives_is_undefined_and_not_half():
    y, p = np.zeros((10, 1)), np.linspace(0, 1, 10)[:, None]
    assert np.isnan(metrics.evaluate(metrics.find("auroc", "multilabel"), y, p)).all()


def test_blocks_of_weightings_change_nothing(monkeypatch):
    y, p, weights = data(0, 3)
    metric = metrics.find("auroc", "multiclass")
    whole = metrics.evaluate(metric, y, p, weights)
    monkeypatch.setattr(metrics, "BLOCK", 1)
    np.testing.assert_array_equal(metrics.evaluate(metric, y, p, weights), whole)


def test_the_interval_is_that_of_resampling_subjects_with_all_their_images():
    rng = np.random.default_rng(0)
    subject = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    y, p, _ = data(1, 3, len(subject))
    metric = metrics.find("balanced_accuracy", "multiclass")
    low, high = interval(
        metric, y, p, bootstrap_weights(subject.astype(str), 4000, np.random.default_rng(1))
    )
    plain = []
    with np.errstate(all="ignore"):
        for _ in range(4000):
            rows = np.concatenate([np.flatnonzero(subject == s) for s in rng.choice(40, 40)])
            plain.append(
                theirs.recall_score(
                    y[rows], p[rows].argmax(1), average="macro", zero_division=np.nan
                )
            )
    assert (low, high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.012)


def test_resamples_keep_the_images_of_a_subject_together():
    subject = np.array(["a", "b", "a", "c", "b"])
    weights = bootstrap_weights(subject, 100, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
