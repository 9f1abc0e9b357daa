"""The default interval: judged by Jeffreys, DeLong and simulation, where Efron's are too short."""

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit, logit

from probe.score import metrics
from probe.score.delong import delong
from probe.score.intervals import fewest, influences, intervals, stretch
from probe.score.resampling import anchored, bayesian, bayesian_weights

ACCURACY, BALANCED, AUROC, AP, LOSS = (
    metrics.find(name, "multiclass")
    for name in ("accuracy", "balanced_accuracy", "auroc", "average_precision", "log_loss")
)


def two_classes(rng, truth, skill=1.0):
    q = expit(skill * (2 * truth - 1) + rng.normal(size=len(truth)))
    return np.stack([1 - q, q], axis=1)


def ends(metric, y, p, subject, *, n=2000, seed=0, method="bayesian"):
    rng = np.random.default_rng(seed)
    found = intervals([metric], y, p, subject, n=n, rng=rng, method=method)[metric.name]
    return found["ci_low"], found["ci_high"]


@pytest.mark.parametrize("right", [200, 197, 180, 120])
def test_of_independent_images_accuracy_has_about_jeffreys_interval(right):
    y = np.arange(200) % 2
    called = np.where(np.arange(200) < right, y, 1 - y)
    low, high = ends(ACCURACY, y, np.eye(2)[called], np.arange(200), n=20000)
    wanted = scipy.stats.beta(right + 0.5, 200 - right + 0.5).ppf([0.025, 0.975])
    if right == 200:  # Clopper and Pearson's
        wanted = (0.025 ** (1 / 200), 1)
    assert (low, high) == pytest.approx(wanted, abs=0.008)


def test_of_independent_images_auroc_has_about_delong_s_interval():
    rng = np.random.default_rng(1)
    truth = np.arange(400) % 4 == 0
    p = two_classes(rng, truth * 1)
    area, covariance = delong(truth, p[None, :, 1])
    error = np.sqrt(covariance[0, 0]) / (area[0] * (1 - area[0]))  # on the logit scale
    wanted = expit(logit(area[0]) + np.array([-1.96, 1.96]) * error)
    assert ends(AUROC, truth * 1, p, np.arange(400), n=20000) == pytest.approx(wanted, abs=0.008)


# Coverage of 200 test sets: 95 % less two and a half standard errors of what is wanted at least,
# 92 %, is 87 %. Efron's percentiles cover 72 to 80 %, and stay below that.
LEAST = 0.92 - 2.5 * np.sqrt(0.92 * 0.08 / 200)


@pytest.mark.parametrize(
    ("metric", "subjects", "each", "share", "truth"),
    [(AUROC, 10, 4, 0.5, 0.884), (BALANCED, 75, 1, 0.04, 0.801)],
)
def test_few_subjects_and_rare_classes_are_covered(metric, subjects, each, share, truth):
    covered = {"bayesian": [], "percentile": []}
    for seed in range(200):
        rng = np.random.default_rng([3, seed])
        while True:
            y = np.repeat((rng.random(subjects) < share) * 1, each)
            if 2 * each <= y.sum() <= len(y) - 2 * each:
                break
        noise = 0.8 * np.repeat(rng.normal(size=subjects), each) + 0.6 * rng.normal(size=len(y))
        q = expit(0.84 * (2 * y - 1) + noise)
        p, subject = np.stack([1 - q, q], axis=1), np.repeat(np.arange(subjects), each)
        for method, hits in covered.items():
            low, high = ends(metric, y, p, subject, n=300, seed=seed, method=method)
            hits.append(low is not None and low <= truth <= high)
    share = {method: np.mean(hits) for method, hits in covered.items()}
    assert share["bayesian"] >= LEAST > share["percentile"]


def test_a_rare_class_makes_the_interval_longer_not_one_sided():
    y = np.r_[np.zeros(72, int), 1, 1, 1]
    p = np.eye(2)[np.r_[np.zeros(72, int), 1, 0, 0]]  # one of three is found: .667
    low, high = ends(BALANCED, y, p, np.arange(75))
    assert low < 0.57 and 0.8 < high < 0.97
    one = np.r_[np.zeros(74, int), 1]
    low, high = ends(AUROC, one, np.eye(2)[one] + 0.0, np.arange(75))
    assert low < 0.9 and high == 1


@pytest.mark.parametrize("metric", [AUROC, AP])
def test_the_interval_of_a_ranking_is_that_of_any_scores_in_the_same_order(metric):
    rng = np.random.default_rng(4)
    y = rng.integers(0, 3, 60)
    p = rng.dirichlet(np.ones(3), 60)
    for scores in (logit(p), p**3, 1e6 * p - 5):
        assert ends(metric, y, scores, np.arange(60)) == ends(metric, y, p, np.arange(60))


def test_every_metric_has_an_interval_around_its_value_within_its_bounds():
    rng = np.random.default_rng(5)
    for task, K in (("multiclass", 3), ("multilabel", 4)):
        subject = np.repeat(np.arange(12), 3)
        if task == "multiclass":
            y, p = rng.integers(0, 2, 36), rng.dirichlet(np.ones(K), 36)  # the third is not there
        else:
            y = (rng.random((36, K)) < 0.3).astype(float)
            y[:, 3], y[:9, 0] = 1, np.nan  # one finding is in every image
            p = rng.random((36, K))
        wanted = metrics.of_task(task)
        rng_ = np.random.default_rng(0)
        for name, found in intervals(wanted, y, p, subject, n=300, rng=rng_).items():
            low, high = found["ci_low"], found["ci_high"]
            assert low <= found["value"] <= high and low < high, name
            agreements = dict.fromkeys(("kappa", "quadratic_kappa", "mcc"), (-1, 1))
            least, most = (agreements | {"log_loss": (0, 99)}).get(name, (0, 2))
            assert least <= low and high <= most


def test_weights_of_the_bayesian_bootstrap_are_rubin_s_and_keep_subjects_together():
    subject = np.array(["a", "b", "a", "c", "b"])
    weights = bayesian_weights(subject, 4000, np.random.default_rng(0))
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    shares = weights[:, [0, 1, 3]] / weights[:, [0, 1, 3]].sum(1, keepdims=True)
    first = scipy.stats.kstest(shares[:, 0], scipy.stats.beta(1, 2).cdf)  # of Dirichlet(1, 1, 1)
    assert first.pvalue > 0.01


def test_the_same_seed_gives_the_same_draws_whatever_the_threads(monkeypatch):
    import probe.score.resampling as here

    rng = np.random.default_rng(6)
    y, images = np.arange(60) % 2, np.arange(60)
    scorers = [anchored(AUROC, y, two_classes(rng, y), images) for _ in range(2)]
    monkeypatch.setattr(here, "BLOCK", 600)  # ten resamples per block
    many = bayesian(scorers, images, n=95, rng=np.random.default_rng(2))
    monkeypatch.setattr(here.os, "cpu_count", lambda: 1)
    np.testing.assert_array_equal(
        bayesian(scorers, images, n=95, rng=np.random.default_rng(2)), many
    )


def test_degrees_of_freedom_are_those_of_the_subjects_that_decide():
    rng = np.random.default_rng(7)

    def factor(freedom):
        return scipy.stats.t.ppf(0.975, freedom) / scipy.stats.norm.ppf(0.975)

    y = np.arange(500) % 2
    assert stretch(None, y) == 1
    assert stretch(np.tile([1.0, -1.0], 10), y) == pytest.approx(factor(18))  # twenty alike
    few = np.r_[rng.normal(size=4) * 50, rng.normal(size=196)]
    assert factor(9) < stretch(few, y) <= factor(3)
    assert stretch(np.zeros(8), y) == pytest.approx(factor(6))
    five = np.arange(500) % 5
    assert stretch(np.tile([1.0, -1.0], 15), five) == pytest.approx(factor(10))
    one = anchored(ACCURACY, y, np.eye(2)[y], np.arange(500))
    assert influences(one, y, np.arange(500)) is None
    assert fewest(np.array([0, 0, 1, 1]), np.array(["a", "b", "c", "c"])) == 1


def test_the_influence_of_a_subject_is_what_the_score_moves_by_with_it_twice():
    y = np.arange(40) % 2
    p = two_classes(np.random.default_rng(8), y)
    subject = np.arange(40) // 2
    one = anchored(LOSS, y, p, subject)  # no anchors: sklearn's loss of copies is its judge
    from sklearn.metrics import log_loss

    wanted = []
    for s in range(20):
        rows = np.r_[np.arange(40), np.flatnonzero(subject == s)]
        wanted.append(log_loss(y[rows], p[rows]) - log_loss(y, p))
    np.testing.assert_allclose(influences(one, y, subject), wanted, atol=1e-9)
