"""The best of several: judged by simulation, order statistics and truncated normal variables."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from probe.score import metrics
from probe.score.intervals import intervals
from probe.score.winner import choose, winners_bias, winners_interval

ACCURACY = metrics.find("accuracy", "multiclass")
LOSS = metrics.find("log_loss", "multiclass")


def models(rng, skills, N=150):
    y, base = rng.integers(0, 2, N), rng.normal(size=N)
    q = [expit(s * (2 * y - 1) + 0.6 * base + 0.8 * rng.normal(size=N)) for s in skills]
    return y, [np.stack([1 - one, one], axis=1) for one in q]


def chosen(metric, y, p, *, n=500, **how):
    rng = np.random.default_rng(0)
    return choose(metric, y, [[one] for one in p], np.arange(len(y)), n=n, rng=rng, **how)


def test_among_equal_models_the_best_is_not_called_better_and_its_score_is_corrected():
    sims, wrong, own, corrected, naive, estimate = 80, [], [], [], [], []
    truth = norm.cdf(1)
    for seed in range(sims):
        y, p = models(np.random.default_rng([2, seed]), [1.0] * 10)
        found = chosen(ACCURACY, y, p, n=300)
        wrong.append(min(found.p) < 0.05)
        rng = np.random.default_rng(seed)
        plain = intervals([ACCURACY], y, p[found.index], np.arange(len(y)), n=300, rng=rng)
        low, high = plain["accuracy"]["ci_low"], plain["accuracy"]["ci_high"]
        own.append(low <= truth <= high)
        corrected.append(found.ci_low <= truth <= found.ci_high)
        naive.append(found.value - truth)
        estimate.append(found.estimate - truth)
    assert np.mean(wrong) <= 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / sims)
    assert np.mean(corrected) >= 0.95 - 2.5 * np.sqrt(0.05 * 0.95 / sims) > np.mean(own)
    error = np.std(estimate) / np.sqrt(sims)
    assert abs(np.mean(estimate)) < 2.5 * error + 0.005 < 0.02 < np.mean(naive)


def test_what_is_worse_is_called_so_and_what_is_the_same_is_not():
    y, p = models(np.random.default_rng(1), [1.6, 1.6, 0.4, 0.4], 300)
    found = chosen(ACCURACY, y, p)
    other = 1 - found.index
    assert found.p[2] == found.p[3] == found.resolution == pytest.approx(1 / 501)
    assert found.p[found.index] == 1 and found.p[other] > 0.05
    same = chosen(ACCURACY, y, [p[0], p[0], p[0]])
    assert same.p == [1, 1, 1] and same.ci_low < same.value <= same.ci_high
    less = chosen(LOSS, y, p)  # less is better
    losses = [metrics.evaluate(LOSS, y, one)[0] for one in p]
    assert less.index == int(np.argmin(losses)) and less.value == min(losses)
    assert less.ci_low < less.estimate < less.ci_high and less.estimate >= less.value


def test_a_model_of_several_seeds_is_scored_by_their_mean():
    y, p = models(np.random.default_rng(2), [1.0, 1.0, 0.5, 0.5])
    rng = np.random.default_rng(0)
    found = choose(ACCURACY, y, [p[:2], p[2:]], np.arange(len(y)), n=300, rng=rng)
    assert found.value == pytest.approx(
        np.mean([metrics.evaluate(ACCURACY, y, one)[0] for one in p[:2]])
    )


def test_the_bias_of_the_best_is_the_expectation_of_the_largest():
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(40_000, 10))
    noise -= noise.mean(0)
    assert winners_bias(np.zeros(10), noise) == pytest.approx(1.5388, abs=0.02)  # of ten normals
    assert winners_bias(np.r_[30.0, np.zeros(9)], noise) == pytest.approx(0, abs=0.02)
    assert winners_bias(np.zeros(1), noise[:, :1]) == pytest.approx(0, abs=1e-9)


def test_the_winner_s_interval_covers_a_true_normal_and_is_the_usual_one_without_rivals():
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(2000, 5))
    low, high = winners_interval(np.array([20.0, 0, 0, 0, 0]), noise - noise.mean(0), 0)
    assert (low, high) == pytest.approx((20 - 1.96, 20 + 1.96), abs=0.15)
    for mean in (np.zeros(5), np.linspace(0, 2, 5)):
        hits = []
        for _ in range(300):
            x = mean + rng.normal(size=5)
            best = int(x.argmax())
            low, high = winners_interval(x, noise - noise.mean(0), best)
            hits.append(low <= mean[best] <= high)
        error = np.sqrt(0.05 * 0.95 / 300)
        assert 0.95 - 2.5 * error <= np.mean(hits) <= 0.97 + 2.5 * error
