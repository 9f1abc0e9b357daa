"""Every metric is scikit-learn's, under weights and ties; thresholds, bins and names."""

import numpy as np
import pytest
import sklearn.metrics as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from probe import metrics
from probe.calibration import reliability


def data(seed, K, n=60):
    """Labels, probabilities with many ties, and weights, some of them zero."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    y[: 2 * K] = np.tile(np.arange(K), 2)
    scores = rng.integers(1, 5, (n, K)).astype(float) + 2 * (np.arange(K) == y[:, None])
    weights = rng.integers(0, 3, (4, n)).astype(float)
    weights[:, : 2 * K] += 1
    return y, scores / scores.sum(1, keepdims=True), weights


def calibration_error(confidence, right, w):
    """The expected calibration error from scikit-learn's calibration_curve; integer weights."""
    confidence, right = np.repeat(confidence, w.astype(int)), np.repeat(right, w.astype(int))
    frequency, mean = calibration_curve(right, confidence, n_bins=15)
    place = np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence)
    images = np.bincount(place, minlength=15)
    return abs(frequency - mean) @ images[images > 0] / len(confidence)


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
        "auroc_ovo": lambda: (
            theirs.roc_auc_score(y, p, multi_class="ovo")
            if K > 2
            else theirs.roc_auc_score(y, p[:, 1])
        ),
        "sensitivity_at_90": lambda: np.mean(
            [
                tpr[fpr <= 0.1 + 1e-12].max()
                for k in each
                for fpr, tpr, _ in [
                    theirs.roc_curve(
                        one_hot[:, k], p[:, k], sample_weight=w, drop_intermediate=False
                    )
                ]
            ]
        ),
        "brier": lambda: theirs.brier_score_loss(
            y, p if K > 2 else p[:, 1], sample_weight=w, labels=range(K)
        ),
        "ece": lambda: calibration_error(p.max(1), said == y, w),
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
    if metric.name == "auroc_ovo":
        weights[:] = 1  # scikit-learn's takes no weights
    ours = metrics.evaluate(metric, y, p, weights)
    np.testing.assert_allclose(
        ours, [reference(metric.name, y, p, w) for w in weights], rtol=1e-12, atol=1e-12
    )


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
        "brier": lambda t, q: theirs.brier_score_loss(t, q, pos_label=1),
        "f1": lambda t, q: theirs.f1_score(t, q >= 0.5, zero_division=0),
        "ece": lambda t, q: calibration_error(q, t, np.ones(len(t))),
        "sensitivity_at_90": lambda t, q: max(
            tpr
            for fpr, tpr, _ in zip(*theirs.roc_curve(t, q, drop_intermediate=False), strict=True)
            if fpr <= 0.1 + 1e-12
        ),
    }[metric.name]
    # What can't be ranked is left out, not scored 0.5.
    findings = 4 if metric.name in ("log_loss", "brier", "ece") else 3
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


def test_resampling_with_copies_gives_what_weights_give():
    """Every metric under integer weights is the metric of images repeated so often."""
    y, p, weights = data(7, 4)
    for metric in metrics.of_task("multiclass"):
        for w in weights:
            rows = np.repeat(np.arange(len(y)), w.astype(int))
            np.testing.assert_allclose(
                metrics.evaluate(metric, y, p, w[None]),
                metrics.evaluate(metric, y[rows], p[rows]),
                rtol=1e-12,
                atol=1e-12,
            )


def test_what_can_t_be_ranked_is_named_and_has_no_number():
    y = np.array([0, 0, 1, 1, 0])
    p = np.full((5, 3), 1 / 3) + [[0.1, 0, -0.1]] * 5
    classes = ("none", "mild", "severe")
    assert metrics.unranked(y, classes) == ["severe"]
    found = metrics.per_output(y, p, classes)
    assert found["severe"]["auroc"] is None
    assert found["mild"] == {
        "auroc": 0.5,
        "average_precision": 0.4,
        "positives": 2,
        "negatives": 3,
    }


def test_reliability_bins_are_scikit_learn_s():
    rng = np.random.default_rng(0)
    q = rng.random(500)
    y = (rng.random(500) < q).astype(float)
    bins = reliability(y[:, None], q[:, None])
    frequency, mean = calibration_curve(y, q, n_bins=15)
    np.testing.assert_allclose([b["frequency"] for b in bins], frequency)
    np.testing.assert_allclose([b["confidence"] for b in bins], mean)
    assert sum(b["images"] for b in bins) == 500
