"""The objective's derivatives are judged by finite differences, its weights by leaving rows out."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.solve.head_set import HeadSet
from probe.solve.inverse_choice import build_preconditioner
from probe.solve.losses import Sigmoid, Softmax
from probe.solve.objective import LocalObjective
from probe.solve.rows import LocalRows, bases_of
from probe.solve.sources import InMemory

N, D, K = 30, 4, 3


def objective_of(X, y, weights, l2, kind):
    """An objective of one group of heads per row of weights (G, N), as sums, not means."""
    row_class = y if kind == "softmax" else None
    rows = LocalRows.from_source(InMemory(X), row_class, torch.device("cpu"))
    rows = replace(rows, kept=torch.cat([X[rows.order], torch.ones(len(X), 1).double()], 1))
    rows = rows.to(torch.float64)
    weights = weights[:, rows.order]
    bases, basis = bases_of(rows, weights)
    G = len(weights)
    loss = Softmax()
    if kind == "sigmoid":
        loss = Sigmoid(y[rows.order].T, torch.arange(G) % y.shape[1])
    heads = HeadSet(
        loss=loss,
        weights=weights,
        l2=torch.full((G,), l2, dtype=torch.float64),
        group=torch.arange(G),
        bases=bases,
        basis=basis,
    )
    return LocalObjective(heads, rows)


def data(seed, kind, n=N):
    rng = np.random.default_rng(seed)
    X = torch.from_numpy(rng.standard_normal((n, D)))
    y = rng.integers(0, K, n) if kind == "softmax" else rng.integers(0, 2, (n, 2)).astype(float)
    return X, torch.from_numpy(y), rng


def problem(seed, kind, groups=2):
    X, y, rng = data(seed, kind)
    weights = torch.from_numpy(rng.integers(0, 3, (groups, N)).astype(float) + 0.1)
    weights /= weights.sum(1, keepdim=True)
    theta = torch.from_numpy(rng.standard_normal((groups, K if kind == "softmax" else 1, D + 1)))
    return objective_of(X, y, weights, 0.1, kind), theta


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_gradient_and_hessian_product_agree_with_finite_differences(kind, seed):
    objective, theta = problem(seed, kind)
    direction = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal(theta.shape))
    step = 1e-5
    ahead, behind = objective(theta + step * direction), objective(theta - step * direction)
    here = objective(theta)
    slope = (here.gradient * direction).sum((1, 2))
    torch.testing.assert_close(
        (ahead.value - behind.value) / (2 * step), slope, rtol=1e-6, atol=1e-8
    )
    turned = objective.hessian_product(here, direction)
    torch.testing.assert_close(
        (ahead.gradient - behind.gradient) / (2 * step), turned, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_hard_head_of_few_parameters_is_solved_by_its_own_hessian(kind):
    objective, theta = problem(0, kind, groups=3)
    here = objective(3 * theta)
    cg_iterations = torch.tensor([100, 0, 100])
    precondition = build_preconditioner(objective, here, cg_iterations, {})
    assert sorted(precondition.head_inverses) == [0, 2]
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal(theta.shape))
    if kind == "softmax":  # what moves all classes together is not solved for
        direction -= direction.mean(1, keepdim=True)
    product = objective.hessian_product(here, direction)
    plain = build_preconditioner(objective, here, torch.zeros(3), {})
    off, without = (
        (objective.from_basis(P(objective.to_basis(product))) - direction).flatten(1).norm(dim=1)
        for P in (precondition, plain)
    )
    # A head of one output takes the last percent of its curvature's rows as one.
    assert (off[[0, 2]] < (1e-9 if kind == "softmax" else 0.1) * without[[0, 2]]).all()
    assert off[1] == without[1]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_value_is_that_of_torch(kind):
    objective, theta = problem(3, kind)
    rows = objective.rows
    logits = torch.einsum("nd,hkd->hnk", rows.kept, theta)
    if kind == "softmax":
        ce = torch.nn.functional.cross_entropy
        loss = torch.stack([ce(one, rows.row_class, reduction="none") for one in logits])
    else:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits[..., 0],
            objective.heads.loss.labels[objective.heads.loss.column],
            reduction="none",
        )
    penalty = objective.l2 / 2 * theta[..., :-1].square().sum((1, 2))
    torch.testing.assert_close(
        objective(theta).value, (loss * objective.heads.weights).sum(1) + penalty
    )


KINDS = pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
MANY = settings(max_examples=15, deadline=None)


def same(one, other, theta):
    """Two objectives have the same value, gradient and curvature at theta."""
    a, b = one(theta), other(theta)
    torch.testing.assert_close(a.value, b.value)
    torch.testing.assert_close(a.gradient, b.gradient)
    torch.testing.assert_close(one.hessian_product(a, theta), other.hessian_product(b, theta))


@KINDS
@MANY
@given(seed=st.integers(0, 10**6))
def test_the_order_of_rows_changes_nothing(kind, seed):
    X, y, rng = data(seed, kind)
    w = torch.from_numpy(rng.random((2, N)))
    theta = torch.from_numpy(rng.standard_normal((2, K if kind == "softmax" else 1, D + 1)))
    turn = torch.from_numpy(rng.permutation(N))
    other = objective_of(X[turn], y[turn], w[:, turn], 0.1, kind)
    same(objective_of(X, y, w, 0.1, kind), other, theta)


@KINDS
@MANY
@given(seed=st.integers(0, 10**6), step=st.integers(1, N), chunk=st.integers(1, N))
def test_blocks_and_chunks_change_nothing(kind, seed, step, chunk):
    objective, theta = problem(seed, kind)
    cut = objective.rows

    class Small(LocalRows):
        def chunks(self):
            for start in range(0, N, chunk):
                yield start, self.kept[start : start + chunk]

        def blocks(self, _):
            return super().blocks(step)

    small = Small(**{f.name: getattr(cut, f.name) for f in fields(LocalRows)})
    same(objective, replace(objective, rows=small), theta)


@KINDS
@MANY
@given(seed=st.integers(0, 10**6))
def test_a_weight_of_zero_is_removal_and_of_two_is_duplication(kind, seed):
    X, y, rng = data(seed, kind)
    theta = torch.from_numpy(rng.standard_normal((2, K if kind == "softmax" else 1, D + 1)))
    counts = torch.from_numpy(rng.integers(0, 3, N))
    again = torch.repeat_interleave(torch.arange(N), counts)
    whole = objective_of(X, y, counts.double().expand(2, N).clone(), 0.1, kind)
    listed = objective_of(X[again], y[again], torch.ones(2, len(again)).double(), 0.1, kind)
    same(whole, listed, theta)


@KINDS
@MANY
@given(seed=st.integers(0, 10**6))
def test_the_intercept_is_an_appended_column_without_penalty(kind, seed):
    X, y, rng = data(seed, kind)
    w = torch.from_numpy(rng.random((2, N)))
    shape = (2, K if kind == "softmax" else 1, D + 1)
    theta = torch.from_numpy(rng.standard_normal(shape))
    objective = objective_of(X, y, w, 0.1, kind)
    # Another column of ones, and the intercept at zero: only its penalty differs.
    moved = torch.cat([theta[..., :-1], theta[..., -1:], torch.zeros(*shape[:2], 1).double()], 2)
    wider = objective_of(torch.cat([X, torch.ones(N, 1).double()], 1), y, w, 0.1, kind)
    a, b = objective(theta), wider(moved)
    penalty = 0.1 / 2 * theta[..., -1].square().sum(1)
    torch.testing.assert_close(a.value, b.value - penalty)
    torch.testing.assert_close(a.gradient[..., -1], b.gradient[..., -1])
    torch.testing.assert_close(a.gradient[..., -1], b.gradient[..., -2] - 0.1 * theta[..., -1])


def test_a_loss_far_below_float32s_rounding_of_its_logits_keeps_its_digits():
    _, y, _ = data(0, "softmax")
    easy = torch.nn.functional.one_hot(y, D).double() * 20
    objective = objective_of(easy, y, torch.full((1, N), 1 / N).double(), 0.0, "softmax")
    theta = torch.eye(K, D + 1)[None]
    objective = replace(
        objective,
        rows=objective.rows.to(torch.float32),
        heads=replace(
            objective.heads, weights=objective.heads.weights.float(), l2=objective.l2.float()
        ),
    )
    exact = np.log1p((K - 1) * np.exp(-20.0))
    assert objective(theta).value.item() == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_products_at_bfloat16_are_those_of_a_matrix_near_the_hessian(kind):
    objective, theta = problem(5, kind, groups=1)
    rounded = replace(objective, bf16_rows=objective.rows.in_bf16(objective.heads.bases[0].B))
    here = objective(theta)
    rng = np.random.default_rng(2)
    u, v = (
        torch.from_numpy(rng.standard_normal(theta.shape)).bfloat16().double() for _ in range(2)
    )
    found = rounded.bf16.hessian_product(here, v)
    exact = objective.to_basis(objective.hessian_product(here, objective.from_basis(v)))
    assert 1e-5 < (found - exact).norm() / exact.norm() < 2**-7
    mirrored = (rounded.bf16.hessian_product(here, u) * v).sum()
    torch.testing.assert_close((found * u).sum(), mirrored, rtol=0, atol=2**-7 * mirrored.norm())


def test_the_basis_diagonalises_the_weighted_gram_matrix():
    objective, _ = problem(5, "softmax")
    Z = objective.rows.kept
    for w, i in zip(objective.heads.weights, objective.heads.basis.tolist(), strict=True):
        basis = objective.heads.bases[i]
        gram = basis.B.T @ (Z.T * w / w.sum()) @ Z @ basis.B
        torch.testing.assert_close(gram, torch.diag(basis.spectrum), atol=1e-12, rtol=1e-9)
