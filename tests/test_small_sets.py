"""No small set ends a run: whatever the rows and labels, every head is fitted, or said not to be.

A head is judged by numpy in float64: its objective is no more than that of the best head without
features, which every solver can reach.
"""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning

from probe import heads as module
from probe.heads import fit_heads
from probe.solve import fit

PATH = 10 ** np.linspace(-6, 5, 45)
ROWS = "normal", "copied", "constant", "one-hot", "counts", "far", "huge and tiny", "one subspace"


def rows_of(rng, kind, N, D):
    X = rng.standard_normal((N, D)) * np.arange(1, D + 1) ** -rng.uniform(0, 1.5)
    if kind == "copied":
        X = X[rng.integers(0, max(2, N // 4), N)]
    if kind == "constant":
        X[:, rng.random(D) < 0.9] = 3
    if kind == "one-hot":
        X = np.eye(D)[rng.integers(0, min(D, 12), N)]
    if kind == "counts":
        X = rng.poisson(0.2, (N, D)).astype(float)
    if kind == "far":
        X += 10 ** rng.uniform(2, 6) * rng.standard_normal(D)
    if kind == "huge and tiny":
        X *= 10 ** rng.uniform(-6, 6, D)
    if kind == "one subspace":
        X = rng.standard_normal((N, 3)) @ rng.standard_normal((3, D))
    return X


def labels_of(rng, X, K, several):
    """Class indices, or label columns with gaps; some rare, some of one image, some absent."""
    Z = (X - X.mean(0)) / X.std(0).clip(1e-30)
    noise = rng.choice([0.0, 0.3, 3.0]) * rng.standard_normal((len(X), K))
    scores = Z[:, rng.integers(0, X.shape[1], K)] + noise
    if several:
        ranks = scores.argsort(0).argsort(0) / len(X)
        y = (ranks > rng.choice([0.5, 0.9, 1.0], K)).astype(float)
        y[rng.random(y.shape) < rng.choice([0, 0.2])] = np.nan
        y[0] = 0
        return y
    y = (scores + 3 * np.log(rng.dirichlet(np.ones(K)) + 1e-9)).argmax(1)
    y[rng.integers(0, len(y))] = K - 1
    return y


def drawn(seed, rows):
    """A problem: rows (N, D), labels, number of classes or None, folds' weights, strengths."""
    rng = np.random.default_rng([7, seed])
    N, D, K = int(rng.integers(20, 401)), int(2 ** rng.uniform(6, 11)), int(rng.integers(2, 11))
    several = rng.random() < 0.3
    X = rows_of(rng, rows, N, D).astype(np.float32)
    y = labels_of(rng, X.astype(float), K, several)
    weights = np.ones((1, N), dtype=np.float32)
    if rng.random() < 0.6:
        folds = rng.integers(0, 3, N)
        weights = np.stack([weights[0], *((folds != f).astype(np.float32) for f in range(3))])
        weights[:, 0] = 1  # one known row at least
    C = PATH[:: int(rng.choice([1, 4, 11]))] if rng.random() < 0.7 else 10 ** rng.uniform(-7, 8, 2)
    return X, y, None if several else K, weights, np.sort(C)


def objective(X, y, w, coef, intercept, C):
    """scikit-learn's objective over C and the sum of weights, of classes or of one label."""
    logits = X @ coef.T + intercept
    if len(coef) == 1:
        loss = np.logaddexp(0, np.where(y == 1, -1, 1) * logits[:, 0])
    else:
        loss = -log_softmax(logits, axis=1)[np.arange(len(y)), y]
    return (w * loss).sum() / w.sum() + (coef**2).sum() / (2 * C * w.sum())


def without_features(y, w, K):
    """The least loss of intercepts alone."""
    share = np.bincount(y.astype(int), w, K) / w.sum()
    return -(share[share > 0] * np.log(share[share > 0])).sum()


def check(seed, rows):
    X, y, K, weights, C = drawn(seed, rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fit_heads(
            torch.from_numpy(X),
            torch.from_numpy(y),
            C=C.tolist(),
            n_classes=K,
            weights=torch.from_numpy(weights),
        )
    assert {w.category for w in caught} <= {ConvergenceWarning}
    assert bool(caught) == (not found.converged.all())
    assert found.coef.isfinite().all()
    assert found.intercept.isfinite().all()
    assert not found.gap.isnan().any()
    assert (found.gap[found.converged] <= 1e-6).all()
    X = X.astype(np.float64)
    for j, g in np.ndindex(len(C), len(weights)):
        for label in range(found.coef.shape[2]):
            mine = y if K else y[:, label]
            known = ~np.isnan(mine) & (weights[g] > 0)
            head = found.coef[j, g, label].double().numpy(), found.intercept[j, g, label].numpy()
            value = objective(X[known], mine[known], weights[g][known], *head, C[j])
            most = without_features(mine[known], weights[g][known], K or 2)
            assert value <= most + 1e-5 * max(most, 1e-3), (seed, C[j], g, label)
    return int((~found.converged).sum()), found.converged.numel()


@pytest.fixture(params=["float32", "bfloat16"])
def products(request, monkeypatch):
    """What the Hessian's products are made at, whatever the processor and however few the rows."""
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: request.param == "bfloat16")
    monkeypatch.setattr(fit, "BF16_MIN_NUMBERS", 0)
    monkeypatch.setattr(fit, "BF16_MIN_PRODUCTS", 10**6)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("products")
def test_a_small_set_is_fitted(rows):
    check(0, rows)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.usefixtures("products", "threads")
def test_no_small_set_of_many_ends_a_run(rows):
    unconverged, heads = np.sum([check(seed, rows) for seed in range(1, 17)], axis=0)
    assert unconverged <= 0.02 * heads
