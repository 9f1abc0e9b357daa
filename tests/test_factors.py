"""Factorisations are judged by numpy, and by what a fit makes of it when they fail."""

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.linear_model import LogisticRegression

from probe.heads import fit_heads
from probe.solve import factors, least_squares
from probe.solve.objective import Point
from probe.solve.solver import minimise


def definite(n, seed=0):
    A = np.random.default_rng(seed).standard_normal((n, 2 * n))
    return torch.from_numpy(A @ A.T / n)


def test_what_can_be_factorised_is():
    A = definite(6)
    np.testing.assert_allclose(factors.cholesky(A), np.linalg.cholesky(A), rtol=1e-12)
    np.testing.assert_allclose(factors.inverse(A), np.linalg.inv(A), rtol=1e-10)
    B = torch.ones(6, 2).double()
    np.testing.assert_allclose(factors.solve(A, B), np.linalg.solve(A, B), rtol=1e-10)
    values, vectors = factors.eigh(torch.stack([A, 2 * A]))
    np.testing.assert_allclose(values[1], np.linalg.eigvalsh(2 * A), rtol=1e-12)
    np.testing.assert_allclose((vectors * values[:, None]) @ vectors.mT, np.stack([A, 2 * A]))


def test_a_matrix_that_rounding_left_indefinite_is_factorised_nearly():
    A = definite(6)
    A[5], A[:, 5] = A[4], A[:, 4]
    A[5, 5] = A[4, 4] * (1 - 1e-13)
    assert np.linalg.eigvalsh(A).min() < 0
    L = factors.cholesky(A)
    np.testing.assert_allclose(L @ L.T, A, rtol=1e-9)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_or_far_from_definite_has_no_factor(wrong):
    A = definite(4)
    assert factors.cholesky(-A) is None
    assert factors.inverse(A - 100 * torch.eye(4)) is None
    A[2, 2] = wrong
    assert factors.cholesky(A) is None
    assert factors.inverse(A) is None
    whole = definite(4)
    values, vectors = factors.eigh(torch.stack([A, whole]))
    assert values[0].isnan().all()
    assert torch.equal(vectors[0], torch.eye(4).double())
    np.testing.assert_allclose(values[1], np.linalg.eigvalsh(whole), rtol=1e-12)
    assert not factors.pinv(A).any()


def test_the_pseudo_inverse_is_that_of_numpy():
    A = definite(5)[:, :2]
    A = A @ A.T
    np.testing.assert_allclose(factors.pinv(A), np.linalg.pinv(A, hermitian=True), atol=1e-10)
    B = torch.ones(5, 1).double()
    np.testing.assert_allclose(A @ factors.solve(A, A @ B), A @ B, atol=1e-6 * A.abs().max())


def fails(*_, **__):
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def test_other_drivers_take_over(monkeypatch):
    A = torch.stack([definite(5, 1), definite(5, 2)])
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = factors.eigh(A)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(A), rtol=1e-12)
    np.testing.assert_allclose((vectors * values[:, None]) @ vectors.mT, A, atol=1e-12)


def test_memory_that_is_out_is_told(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.linalg, "eigh", full)
    with pytest.raises(torch.OutOfMemoryError):
        factors.eigh(definite(3))


@pytest.mark.parametrize("shape", [(200, 8, 2), (200, 8, 4), (60, 90, 3)])
def test_heads_are_fitted_where_every_factorisation_fails(monkeypatch, shape):
    N, D, K = shape
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N, D))
    y = (X[:, :K] + rng.standard_normal((N, K))).argmax(1)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(X, y)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *_, **__: (np.full(1, np.nan), np.eye(1)))
    heads = fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=[1e-3, 1.0], tol=1e-8)
    assert heads.converged.all()
    p = heads.head("abcd"[:K], 1).predict_proba(torch.from_numpy(X))
    np.testing.assert_allclose(p, theirs.predict_proba(X), atol=1e-4)


def test_a_loss_that_is_not_a_number_is_said_and_not_passed_on(monkeypatch):
    X, y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2
    from probe.solve import path

    class Broken:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def select(self, heads):
            return Broken(self.inner.select(heads))

        def __call__(self, theta):
            point = self.inner(theta)
            return Point(point.value, torch.full_like(point.gradient, torch.nan), point.curvature)

    seen = []

    def broken(objective, start, *given):
        seen.append((start.theta, minimise(Broken(objective), start, *given)))
        return seen[-1][1]

    monkeypatch.setattr(path, "minimise", broken)
    with pytest.warns(Warning, match="1 of 1 heads did not reach"):
        heads = fit_heads(X, y, C=[1.0])
    assert not heads.converged.any()
    assert heads.gap.isinf().all()
    assert heads.coef.isfinite().all()
    for theta, found in seen:
        assert torch.equal(found.theta, theta)


def test_least_squares_of_copied_features_are_those_of_one():
    rng = np.random.default_rng(0)
    X, y = torch.from_numpy(rng.standard_normal((40, 3))), torch.arange(40) % 2
    one, _ = least_squares.fit(X, y, 2, l2=1e-14)
    both, _ = least_squares.fit(torch.cat([X, X], 1), y, 2, l2=1e-14)
    np.testing.assert_allclose(both[:, :3] + both[:, 3:], one, rtol=1e-4, atol=1e-6)
