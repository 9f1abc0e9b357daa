"""Every metric is scikit-learn's, under weights and ties; thresholds, bins and names."""

import tracemalloc

import numpy as np
import pytest
import sklearn.metrics as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import rankdata
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from features.errors import ProbeError
from probe.score import metrics
from probe.score.calibration import reliability
from probe.score.metric_names import ALIASES


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
        "kappa": lambda: theirs.cohen_kappa_score(y, said, sample_weight=w),
        "mcc": lambda: theirs.matthews_corrcoef(y, said, sample_weight=w),
        "f1": lambda: theirs.f1_score(
            y, said, average="macro" if K > 2 else "binary", sample_weight=w, zero_division=0
        ),
        "f1_macro": lambda: theirs.f1_score(
            y, said, average="macro", sample_weight=w, zero_division=0
        ),
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


@pytest.mark.parametrize("name", [name for name in ALIASES if name in theirs.get_scorer_names()])
@pytest.mark.parametrize("K", [2, 4])
def test_an_alias_is_the_number_of_scikit_learn_s_scorer_of_that_name(name, K):
    if K == 4 and name == "roc_auc":
        pytest.skip("scikit-learn's refuses more than two classes; ours is roc_auc_ovr")
    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 6))
    y = (X[:, :K] + rng.standard_normal((300, K))).argmax(1)
    model = LogisticRegression().fit(X[:200], y[:200])
    metric = metrics.find(name, "multiclass")
    ours = metrics.evaluate(metric, y[200:], model.predict_proba(X[200:]))[0]
    signed = -ours if name.startswith("neg_") else ours
    assert metric.higher != name.startswith("neg_")
    assert signed == pytest.approx(theirs.get_scorer(name)(model, X[200:], y[200:]), rel=1e-12)


@pytest.mark.parametrize("name", ["roc_auc", "roc_auc_ovr", "average_precision", "f1_macro"])
def test_an_alias_for_findings_is_scikit_learn_s_mean_over_them(name):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 6))
    y = (X[:, :3] + rng.standard_normal((300, 3)) > 0).astype(int)
    model = OneVsRestClassifier(LogisticRegression()).fit(X[:200], y[:200])
    metric = metrics.find(name, "multilabel")
    ours = metrics.evaluate(metric, y[200:].astype(float), model.predict_proba(X[200:]))[0]
    assert ours == pytest.approx(theirs.get_scorer(name)(model, X[200:], y[200:]), rel=1e-12)


def test_every_alias_means_a_metric_and_hides_none():
    names = {metric.name for metric in metrics.of_task("multiclass")}
    assert set(ALIASES.values()) <= names and not set(ALIASES) & names
    for said, meant in {"AUC": "auroc", "ROC-AUC": "auroc", "QWK": "quadratic_kappa"}.items():
        assert metrics.find(said, "multiclass").name == meant
    assert metrics.find("kappa", "multiclass").name == "kappa"  # not the quadratic one


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("aurocc", "multiclass", "did you mean auroc or auroc_ovo? Others: accuracy, average"),
        ("acuracy", "multiclass", "did you mean accuracy"),
        ("neg_logloss", "multiclass", "did you mean log_loss"),
        ("zzz", "multilabel", "want one of auroc, average_precision, brier, ece, f1, log_loss"),
    ],
)
def test_an_unknown_metric_is_answered_by_the_nearest_names_first(name, task, words):
    with pytest.raises(ProbeError) as caught:
        metrics.find(name, task)
    said = str(caught.value)
    assert said.startswith(f"no metric {name!r} for a {task} task: {words}")
    others = said.split("Others: " if "Others: " in said else "one of ")[1].split(", ")
    assert others == sorted(others)
    assert all(said.count(m.name) for m in metrics.of_task(task))


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("K", [2, 4])
def test_agreement_is_exact_where_one_class_only_is_there_or_called(K):
    """Weights whose sums round: what is 0 / 0 must not be made of rounding errors."""
    w = np.random.default_rng(0).random((5, 30))
    for there, called in ((1, 1), (1, 0), (0, 1)):
        y, p = np.full(30, there), np.eye(K)[np.full(30, called)]
        for name in ("kappa", "quadratic_kappa"):
            found = metrics.evaluate(metrics.find(name, "multiclass"), y, p, w)
            if there == called:
                assert np.isnan(found).all()
            else:
                np.testing.assert_allclose(found, 0, atol=1e-12)
        found = metrics.evaluate(metrics.find("mcc", "multiclass"), y, p, w)
        np.testing.assert_array_equal(found, theirs.matthews_corrcoef(y, p.argmax(1)))


RANKING = [metric for metric in metrics.METRICS.values() if metric.ranking]


@pytest.mark.parametrize("metric", metrics.METRICS.values(), ids=lambda m: f"{m.task}-{m.name}")
def test_ranking_says_which_metrics_see_only_the_order_of_each_class_s_scores(metric):
    y, p, weights = data(3, 4)
    y = y if metric.task == "multiclass" else np.eye(4)[y]
    ranks = rankdata(p, axis=0)
    same = np.allclose(
        metrics.evaluate(metric, y, p, weights),
        metrics.evaluate(metric, y, ranks / ranks.max() * [0.3, 1, 0.2, 0.7], weights),
        rtol=1e-12,
    )
    assert same == metric.ranking


@pytest.mark.parametrize("metric", RANKING, ids=lambda m: f"{m.task}-{m.name}")
def test_infinite_log_odds_tie_as_probabilities_of_0_and_1_do(metric):
    y, p, weights = data(5, 3)
    y = y if metric.task == "multiclass" else np.eye(3)[y]
    p = np.where(p > 0.5, 1, np.where(p < 0.2, 0, p))
    np.testing.assert_array_equal(
        metrics.evaluate(metric, y, logit(p), weights), metrics.evaluate(metric, y, p, weights)
    )


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_small_blocks_and_orders_that_are_not_kept_change_nothing(monkeypatch, task):
    y, p, weights = data(11, 5)
    y = y if task == "multiclass" else np.eye(5)[y]
    whole = [metrics.evaluate(metric, y, p, weights) for metric in metrics.of_task(task)]
    for name, value in {"BLOCK": 1, "KEPT": 0, "COLUMNS": 2, "ROWS": 7}.items():
        monkeypatch.setattr(metrics, name, value)
    found = [metrics.evaluate(metric, y, p, weights) for metric in metrics.of_task(task)]
    np.testing.assert_allclose(found, whole, rtol=1e-14)


@pytest.mark.parametrize("metric", metrics.of_task("multiclass"), ids=lambda m: m.name)
def test_memory_is_linear_in_images_and_classes(metric):
    """3,000 images of 800 classes, most wrong: nearly as many pairs (label, called) as images."""
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 800, 3000), rng.random((3000, 800), np.float32)
    tracemalloc.start()
    metrics.evaluate(metric, y, p)
    metrics.evaluate(metric, y, p, np.ones((3, 3000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * p.nbytes  # 29 MB; images x pairs are 72, classes x classes 5 a weighting


def test_a_metric_without_positives_is_undefined_and_not_half():
    y, p = np.zeros((10, 1)), np.linspace(0, 1, 10)[:, None]
    assert np.isnan(metrics.evaluate(metrics.find("auroc", "multilabel"), y, p)).all()


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
