"""What is called converged is: judged by Newton's method in float64 (newton.py).

Short lists of large C on columns of few values are the hard case: every step of Newton's method
leaves more than a third of the gap, and conjugate gradients see the flattest directions last.
"""

import numpy as np
import pytest
import torch
from newton import optimum, value

from probe.heads import fit_heads

KINDS = "one-hot", "relu", "counts", "copied columns", "unit length", "categories"
STRENGTHS = [5e4], [1e-2, 1, 1e5], [1e-6, 3e4], [1.0, 1e3, 1e6], np.logspace(-4, 4, 10), [1e-4, 1e8]
# Once called converged at gaps from 1.1e-5 to 6.1e-5.
KNOWN = 14, 60, 204, 350, 354, 422, 428, 531, 684, 747, 752, 758, 867, 956, 978


def drawn(seed):
    rng = np.random.default_rng([31337, seed])
    N, D = int(rng.integers(60, 260)), int(rng.integers(4, 40))
    kind, K = KINDS[seed % 6], (2, 2, 3)[seed // 6 % 3]
    if kind == "one-hot":
        X = (rng.random((N, D)) < rng.uniform(0.02, 0.2)) * 1.0
    if kind == "relu":
        X = np.maximum(rng.normal(size=(N, D)) - 1.2, 0)
    if kind == "counts":
        X = rng.poisson(0.2, (N, D)) * 1.0
    if kind == "copied columns":
        X = (rng.random((N, D)) < 0.1) * 1.0
        X = np.c_[X, X[:, : D // 2]]
    if kind == "unit length":
        X = np.maximum(rng.normal(size=(N, D)) - 0.8, 0) + 1e-3
        X /= np.linalg.norm(X, axis=1, keepdims=True)
    if kind == "categories":
        X = np.concatenate([np.eye(8)[rng.integers(0, 8, N)] for _ in range(3)], 1)
    X = X.astype(np.float32)
    scores = X @ rng.normal(size=(X.shape[1], K)) * 2
    y = (scores + rng.gumbel(size=(N, K)) * rng.choice([0.5, 1, 2])).argmax(1)
    y[:K] = np.arange(K)
    return X, y, K, [*STRENGTHS[seed // 18 % len(STRENGTHS)]]


def gaps(seed, tol):
    """The gap of every head that is called converged, and how many are not."""
    X, y, K, C = drawn(seed)
    heads = fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=C, n_classes=K, tol=tol)
    found, X = [], X.astype(np.float64)
    for j, c in enumerate(C):
        if heads.converged[j, 0, 0]:
            best, known_to = optimum(X, y, c, K)
            size = max(best, 1e-3)
            assert known_to < 1e-12 * size
            coef, intercept = heads.coef[j, 0, 0].double(), heads.intercept[j, 0, 0].double()
            found.append((value(X, y, coef.numpy(), intercept.numpy(), c) - best) / size)
    return found, int((~heads.converged).sum())


@pytest.mark.parametrize(("tol", "most"), [(1e-6, 1e-5), (1e-9, 2e-9)])
def test_no_head_is_called_converged_that_is_not(tol, most):
    for seed in (*KNOWN, *range(1000, 1018)):
        found, unconverged = gaps(seed, tol)
        assert max(found) < most, seed
        assert not unconverged, seed


@pytest.mark.slow
@pytest.mark.parametrize(("tol", "most"), [(1e-6, 1e-5), (1e-9, 2e-9)])
def test_no_head_of_two_thousand_is_called_converged_that_is_not(tol, most):
    found, unconverged = zip(*(gaps(seed, tol) for seed in range(1, 850)), strict=True)
    gap = np.concatenate(found)
    assert gap.max() < most
    assert sum(unconverged) <= 0.01 * len(gap)
