"""Intervals and comparisons are scipy's, a plain bootstrap's, or a published example's."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as theirs

from probe.score import metrics, ranks
from probe.score.delong import delong
from probe.score.intervals import intervals
from probe.score.paired import compare, delong_test
from probe.score.resampling import bootstrap, bootstrap_weights

ACCURACY = metrics.find("accuracy", "multiclass")
AUROC = metrics.find("auroc", "multiclass")


def answers(seed, n=60, K=3, skill=1.0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, K, n)
    scores = rng.random((n, K)) + skill * (np.arange(K) == y[:, None]) * rng.random((n, 1))
    return y, scores / scores.sum(1, keepdims=True)


def test_the_interval_is_that_of_resampling_subjects_with_all_their_images():
    rng = np.random.default_rng(0)
    subject = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    y, p = answers(1, len(subject))
    metric = metrics.find("balanced_accuracy", "multiclass")
    own = np.random.default_rng(1)
    found = intervals([metric], y, p, subject.astype(str), n=4000, rng=own, method="percentile")[
        "balanced_accuracy"
    ]
    plain = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(subject == s) for s in rng.choice(40, 40)])
        plain.append(
            theirs.recall_score(y[rows], p[rows].argmax(1), average="macro", zero_division=np.nan)
        )
    wanted = np.quantile(plain, [0.025, 0.975])
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(wanted, abs=0.015)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_are_scipy_s(method):
    y, p = answers(3, 80)
    hit = (p.argmax(1) == y).astype(float)
    images = np.arange(80).astype(str)
    ours = intervals(
        [ACCURACY], y, p, images, n=20000, rng=np.random.default_rng(0), method=method
    )["accuracy"]
    there = scipy.stats.bootstrap(
        (hit,), np.mean, n_resamples=20000, method=method, rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours["ci_low"], ours["ci_high"]) == pytest.approx(tuple(there), abs=0.013)


def test_bca_of_a_skewed_score_is_scipy_s():
    rng = np.random.default_rng(5)
    truth = np.r_[np.zeros(60), np.ones(25)].astype(int)
    q = np.clip(rng.normal(0.3 + 0.3 * truth, 0.15), 0.01, 0.99)
    p = np.stack([1 - q, q], axis=1)
    images = np.arange(85).astype(str)
    ours = intervals([AUROC], truth, p, images, n=4000, rng=rng, method="bca")["auroc"]

    def area(rows):
        return theirs.roc_auc_score(truth[rows], q[rows])

    there = scipy.stats.bootstrap(
        (np.arange(85),), area, vectorized=False, n_resamples=2000, method="bca", rng=rng
    ).confidence_interval
    assert (ours["ci_low"], ours["ci_high"]) == pytest.approx(tuple(there), abs=0.015)


def test_resamples_keep_the_images_of_a_subject_together():
    subject = np.array(["a", "b", "a", "c", "b"])
    weights = bootstrap_weights(subject, 100, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_the_same_seed_gives_the_same_resamples_whatever_the_threads(monkeypatch):
    y, p = answers(0)
    images = np.arange(60).astype(str)
    import probe.score.resampling as here

    monkeypatch.setattr(here, "BLOCK", 600)  # ten resamples per block
    many = bootstrap([AUROC], y, p, images, n=95, rng=np.random.default_rng(2))["auroc"]
    monkeypatch.setattr(here.os, "cpu_count", lambda: 1)
    one = bootstrap([AUROC], y, p, images, n=95, rng=np.random.default_rng(2))["auroc"]
    np.testing.assert_array_equal(one, many)
    assert len(set(one)) > 80


def test_delong_is_the_covariance_of_placements_and_near_the_bootstrap():
    rng = np.random.default_rng(0)
    truth = (rng.random(150) < 0.4).astype(float)
    scores = np.round(rng.normal(truth, 1.2, (3, 150)), 1)  # with ties
    areas, covariance = delong(truth, scores)
    for k in range(3):
        assert areas[k] == pytest.approx(theirs.roc_auc_score(truth, scores[k]), abs=1e-12)
    # By the definition of DeLong et al. 1988, with every pair of a positive and a negative.
    psi = (scores[:, truth == 1, None] > scores[:, None, truth == 0]) + 0.5 * (
        scores[:, truth == 1, None] == scores[:, None, truth == 0]
    )
    v10, v01 = psi.mean(2), psi.mean(1)
    wanted = np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]
    np.testing.assert_allclose(covariance, wanted, rtol=1e-10)
    found = delong_test(truth, scores[0], scores[1])
    y = truth.astype(int)
    a, b = (np.stack([-s, s], axis=1) for s in scores[:2])
    images = np.arange(150).astype(str)
    paired = compare(AUROC, y, a, b, images, n=4000, rng=rng)
    assert (found.ci_low, found.ci_high) == pytest.approx((paired.ci_low, paired.ci_high), abs=0.02)
    assert found.value == pytest.approx(paired.value, abs=1e-12)
    assert found.p == pytest.approx(paired.p, abs=0.06)


def test_the_paired_test_of_accuracies_is_scipy_s_permutation_test():
    y, a = answers(4, 90, skill=1.6)
    _, b = answers(4, 90, skill=1.1)
    hits = [(p.argmax(1) == y).astype(float) for p in (a, b)]
    found = compare(
        ACCURACY, y, a, b, np.arange(90).astype(str), n=9999, rng=np.random.default_rng(0)
    )
    there = scipy.stats.permutation_test(
        hits,
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(1),
    )
    assert found.value == pytest.approx(there.statistic)
    assert found.p == pytest.approx(there.pvalue, abs=0.02)
    assert found.ci_low < found.value < found.ci_high


def test_a_model_does_not_differ_from_itself():
    y, p = answers(0)
    found = compare(
        ACCURACY, y, p, p, np.arange(60).astype(str), n=200, rng=np.random.default_rng(0)
    )
    assert (found.value, found.p) == (0, 1)
    assert found.ci_low < 0 < found.ci_high  # that it is the same, 60 images can't tell
    assert delong_test((y == 0).astype(float), p[:, 0], p[:, 0]) is None


# Demsar 2006, table 6: AUC of C4.5, with m, with cf, with both; ties as he ranked them.
DEMSAR = np.array(
    [
        [0.763, 0.768, 0.771, 0.798],
        [0.599, 0.591, 0.590, 0.569],
        [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657],
        [0.882, 0.888, 0.886, 0.898],
        [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685],
        [0.583, 0.583, 0.563, 0.625],
        [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000],
        [0.940, 0.962, 0.965, 0.962],
        [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975],
        [0.957, 0.978, 0.946, 0.970],
    ]
)


def test_ranks_over_data_sets_are_demsar_s_published_example():
    found = ranks.ranks(DEMSAR)
    np.testing.assert_allclose(found.mean, [3.143, 2.000, 2.893, 1.964], atol=5e-4)
    # He reports chi2 = 9.28 without correction for ties, which makes F = 3.69 and p .020;
    # corrected for ties, as scipy does, chi2 is larger. The critical difference is 1.25.
    n, k = DEMSAR.shape
    chi2 = 12 * n / (k * (k + 1)) * ((np.square(found.mean)).sum() - k * (k + 1) ** 2 / 4)
    assert chi2 == pytest.approx(9.28, abs=0.01)
    corrected = scipy.stats.friedmanchisquare(*DEMSAR.T).statistic
    F = (n - 1) * corrected / (n * (k - 1) - corrected)
    assert found.p == pytest.approx(scipy.stats.f.sf(F, 3, 39))
    assert F > 3.69
    assert found.critical == pytest.approx(1.25, abs=0.005)


def test_models_that_are_the_same_do_not_differ_and_perfect_order_is_not_beyond_doubt():
    same = ranks.ranks(np.repeat(np.linspace(0.5, 0.9, 6)[:, None], 4, axis=1))
    assert (same.p, same.mean) == (1, [2.5] * 4)
    order = ranks.ranks(np.tile([4.0, 3.0, 2.0, 1.0], (6, 1)))
    assert order.p == pytest.approx((1 / 24) ** 5)  # the share of orders that agree so
    tied = ranks.ranks(np.tile([3.0, 2.0, 2.0], (5, 1)))
    assert tied.p == pytest.approx((1 / 3) ** 4)


def test_too_few_data_sets_give_ranks_but_no_test():
    found = ranks.ranks(DEMSAR[:4])
    assert (found.p, found.critical) == (None, None)
    assert found.why_not == "4 models on 4 data sets: want 3 on 5 for a test"
    assert ranks.wilcoxon_holm(DEMSAR[:5]) is None


def test_wilcoxon_with_holm_adjusts_scipy_s_p():
    rows = DEMSAR[[0, 2, 3, 4, 6, 8, 11, 13]]
    found = ranks.wilcoxon_holm(rows)
    raw = scipy.stats.wilcoxon(rows[:, 0], rows[:, 3]).pvalue
    assert raw <= found[0, 3] <= 6 * raw + 1e-12
    np.testing.assert_array_equal(found, found.T)
    # Holm 1979, by hand: 3 * .01, 2 * .03, and never below the one before.
    np.testing.assert_allclose(ranks.holm([0.03, 0.01, 0.04]), [0.06, 0.03, 0.06])
