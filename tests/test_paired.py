"""Two models on the same images: size, power and what p must not depend on; scipy, simulation."""

import numpy as np
import pytest
from scipy.special import expit, logit

from probe.pairing import paired_test
from probe.results import Predictions
from probe.score import metrics
from probe.score.delong import delong
from probe.score.paired import SEEN, _p, compare, delong_test
from probe.score.ranks import holm

AUROC, AP, ACCURACY, KAPPA = (
    metrics.find(name, "multiclass")
    for name in ("auroc", "average_precision", "accuracy", "quadratic_kappa")
)


def two_models(rng, subjects, skills, shifts=(0, 0), each=3):
    """Return subject, labels and the answers of two models that share part of what they see."""
    y = np.repeat(rng.integers(0, 2, subjects), each)
    common = np.repeat(rng.normal(size=subjects), each) * 0.7
    p = []
    for skill, shift in zip(skills, shifts, strict=True):
        own = np.repeat(rng.normal(size=subjects), each) * 0.5 + rng.normal(size=len(y)) * 0.5
        q = expit(skill * (2 * y - 1) + common + own + shift)
        p.append(np.stack([1 - q, q], axis=1))
    return np.repeat(np.arange(subjects), each), y, p


def outcome(metric, y, a, b, subject, *, n=400, seed=0, **how):
    return compare(metric, y, a, b, subject, n=n, rng=np.random.default_rng(seed), **how)


@pytest.mark.parametrize("metric", [AUROC, AP])
def test_the_test_of_a_ranking_does_not_depend_on_either_model_s_calibration(metric):
    subject, y, (a, b) = two_models(np.random.default_rng(0), 40, (1.2, 0.8))
    plain = outcome(metric, y, a, b, subject)
    for other in (logit(b) - 4, 6 * logit(b), b**9):
        assert outcome(metric, y, a, other, subject) == plain


@pytest.mark.parametrize("metric", [AUROC, ACCURACY])
def test_seeds_count_by_their_mean_and_move_together(metric):
    """Equal seeds are one seed; of unlike ones the difference is that of the means."""
    subject, y, (a, b) = two_models(np.random.default_rng(5), 30, (1.2, 0.8))
    _, _, (c, d) = two_models(np.random.default_rng(5), 30, (0.4, 0.2))
    plain, same = outcome(metric, y, a, b, subject), outcome(metric, y, [a, a], [b] * 3, subject)
    for field in ("value", "ci_low", "ci_high", "p"):
        assert getattr(same, field) == pytest.approx(getattr(plain, field)), field
    found = outcome(metric, y, [a, c, d], [b, c], subject)
    score = [metrics.evaluate(metric, y, p)[0] for p in (a, b, c, d)]
    assert found.value == pytest.approx(np.mean(score[:1] + score[2:]) - np.mean(score[1:3]))
    swapped = outcome(metric, y, [b, c], [a, c, d], subject)
    assert swapped.value == pytest.approx(-found.value) and swapped.p == pytest.approx(found.p)


@pytest.mark.parametrize("metric", [ACCURACY, KAPPA])
def test_the_test_of_decisions_depends_on_decisions_only(metric):
    subject, y, (a, b) = two_models(np.random.default_rng(1), 40, (1.2, 0.8))
    surer = np.where(b > 0.5, 0.5 + 0.5 * (2 * b - 1) ** 3, 0.5 - 0.5 * (1 - 2 * b) ** 3)
    assert (surer.argmax(1) == b.argmax(1)).all()
    assert outcome(metric, y, a, surer, subject) == outcome(metric, y, a, b, subject)


def test_size_and_power_of_auroc_hold_at_unequal_scales():
    sims = 150
    error = np.sqrt(0.05 * 0.95 / sims)
    rates = {}
    for skills in ((1.0, 1.0), (1.3, 0.8)):
        found = []
        for seed in range(sims):
            rng = np.random.default_rng([9, seed])
            subject, y, (a, b) = two_models(rng, 40, skills, (0, -4))
            one = outcome(AUROC, y, a, b, subject, n=200, seed=seed)
            found.append((one.p <= 0.05, not one.ci_low <= 0 <= one.ci_high))
        rates[skills] = np.mean(found, axis=0)
    assert (rates[1.0, 1.0] <= 0.05 + 2.5 * error).all()
    p, interval = rates[1.3, 0.8]
    # The two agree on most test sets; half of that variance is left in their difference at most.
    assert p > 0.5 and abs(p - interval) <= 0.05 + 2.5 * np.sqrt(0.25 / sims / 2)


def test_p_that_is_drawn_until_it_is_known_stays_valid():
    ps = []
    for seed in range(1000):
        rng = np.random.default_rng([4, seed])
        normal = lambda size, own: own.normal(size=size)  # noqa: E731
        ps.append(_p(normal, rng.normal(), np.arange(30), 300, 3000, rng)[0])
    for level in (0.005, 0.02, 0.05, 0.2, 0.5):
        error = np.sqrt(level * (1 - level) / len(ps))
        assert np.mean(np.array(ps) <= level) <= level + 3 * error
    assert np.mean(np.array(ps) <= 0.05) >= 0.05 - 3 * np.sqrt(0.05 * 0.95 / 1000)  # nor careful


def test_more_is_drawn_where_p_is_small_so_that_holm_can_find_anything():
    subject, y, (a, b) = two_models(np.random.default_rng(2), 60, (3.0, 0.2))
    few = outcome(ACCURACY, y, a, b, subject, n=200)
    assert few.p == few.resolution == pytest.approx(1 / 201)
    many = outcome(ACCURACY, y, a, b, subject, n=200, pairs=105)
    assert many.p == many.resolution == pytest.approx(1 / 10501)
    assert min(holm([many.p] * 105)) < 0.05 < min(holm([few.p] * 105))
    calls = []

    def differences(size, rng):
        calls.append(size)
        return rng.normal(size=size)

    p, _, _ = _p(differences, 0.1, np.arange(30), 2000, 10000, np.random.default_rng(0))
    assert sum(calls) <= 200 and p == pytest.approx(0.92, abs=0.1)  # where it doesn't decide
    calls.clear()
    p, _, _ = _p(differences, 3.0, np.arange(30), 2000, 100_000, np.random.default_rng(0))
    assert 2000 < sum(calls) < 100_000 and p == pytest.approx(0.0027, rel=3 / np.sqrt(SEEN))


def test_of_many_subjects_the_tail_is_normal():
    rng = np.random.default_rng(3)
    subject, y, (a, b) = two_models(rng, 1500, (1.0, 0.7), each=1)
    found = outcome(AUROC, y, a, b, subject, n=500, pairs=1000)
    areas, covariance = delong(y == 1, np.stack([a[:, 1], b[:, 1]]))
    assert found.test == "permutation by image, normal tail" and found.resolution == 0
    z = (areas[0] - areas[1]) / np.sqrt([1, -1] @ covariance @ [1, -1])
    assert z > 5 and np.log10(found.p) == pytest.approx(
        np.log10(delong_test(y == 1, a[:, 1], b[:, 1]).p), abs=0.15 * z
    )


def said(y, p):
    ids = [f"{i:03}" for i in range(len(y))]
    return Predictions(ids, ids, y, p, ["no", "yes"])


@pytest.mark.parametrize("positives", [1, 5])
def test_delong_makes_no_test_of_few_positives_and_permutation_does(positives):
    y = (np.arange(80) < positives) * 1
    rng = np.random.default_rng(positives)
    a, b = (np.stack([1 - q, q], axis=1) for q in expit(y + rng.normal(size=(2, 80))))
    assert delong_test(y == 1, a[:, 1], b[:, 1]) is None
    found = paired_test(AUROC, [said(y, a)], [said(y, b)], n=400, seed=0)
    assert found.test == "permutation by image"
    assert found.ci_low < found.value < found.ci_high


def test_delong_of_no_variance_is_no_test():
    y = np.arange(40) % 2
    a = np.stack([1 - y, y], axis=1) + 0.0
    b = a[:, ::-1]
    assert delong_test(y == 1, a[:, 1], a[:, 1]) is None  # the same
    assert delong_test(y == 1, a[:, 1], b[:, 1]) is None  # all right against all wrong
    same, apart = (paired_test(AUROC, [said(y, a)], [said(y, p)], n=400, seed=0) for p in (a, b))
    assert same.p == 1 and same.ci_low < 0 < same.ci_high
    assert apart.p < 0.01 and 0 < apart.ci_low < 1
    assert not np.isfinite(delong(y * 0 + (np.arange(40) == 0), a.T)[1]).any()  # one positive


def test_the_interval_without_a_discordant_image_has_a_width():
    y = np.arange(60) % 2
    p = np.eye(2)[y]
    found = outcome(ACCURACY, y, p, p, np.arange(60))
    # That a half per cent to five differ, 60 images can't exclude (rule of three: 5 %).
    assert -0.06 < found.ci_low < -0.003 and 0.003 < found.ci_high < 0.06
