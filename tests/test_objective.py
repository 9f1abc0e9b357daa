"""The objective's derivatives are judged by finite differences, its weights by leaving rows out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.objective import Objective
from probe.preconditioner import Basis

N, D, K = 30, 4, 3


def problem(seed, kind, groups=2):
    rng = np.random.default_rng(seed)
    Z = torch.from_numpy(np.c_[rng.standard_normal((N, D)), np.ones(N)])
    weights = torch.from_numpy(rng.integers(0, 3, (N, groups)).astype(float) + 0.1)
    weights /= weights.sum(0)
    group = torch.arange(groups)
    common = {
        "Z": Z,
        "weights": weights,
        "bases": [Basis.of(Z, w) for w in weights.T],
        "l2": torch.tensor([0.1, 0.01])[:groups].double(),
        "group": group,
        "basis": group,
    }
    if kind == "softmax":
        y = torch.from_numpy(rng.integers(0, K, N))
        theta = torch.from_numpy(rng.standard_normal((groups, K, D + 1)))
        return Objective(y=y, **common), theta
    y = torch.from_numpy(rng.integers(0, 2, (N, 2)).astype(float))
    theta = torch.from_numpy(rng.standard_normal((groups, 1, D + 1)))
    return Objective(y=y, column=torch.tensor([1, 0])[:groups], **common), theta


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
def test_value_is_that_of_torch_and_blocks_change_nothing(kind, monkeypatch):
    objective, theta = problem(3, kind)
    whole = objective(theta)
    logits = torch.einsum("nd,hkd->hnk", objective.Z, theta)
    if kind == "softmax":
        loss = torch.stack(
            [
                torch.nn.functional.cross_entropy(one, objective.y, reduction="none")
                for one in logits
            ]
        )
    else:
        y = objective.y[:, objective.column].T
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits[..., 0], y, reduction="none"
        )
    penalty = objective.l2 / 2 * theta[..., :-1].square().sum((1, 2))
    torch.testing.assert_close(whole.value, (loss * objective.weights.T).sum(1) + penalty)
    monkeypatch.setattr(
        Objective, "blocks", lambda self, K: (slice(i, i + 7) for i in range(0, N, 7))
    )
    pieces = objective(theta)
    torch.testing.assert_close(pieces.gradient, whole.gradient)
    torch.testing.assert_close(
        objective.hessian_product(pieces, theta), objective.hessian_product(whole, theta)
    )


def test_a_loss_far_below_float32s_rounding_of_its_logits_keeps_its_digits():
    objective, theta = problem(0, "softmax", groups=1)
    y = objective.y
    Z = torch.nn.functional.one_hot(y, D + 1).double() * 20
    Z[:, -1] = 1
    easy = Objective(
        Z.float(),
        y,
        objective.weights.float(),
        objective.bases,
        torch.zeros(1),
        objective.group,
        objective.basis,
    )
    theta = torch.eye(K, D + 1)[None]
    exact = np.log1p((K - 1) * np.exp(-20.0))
    assert easy(theta).value.item() == pytest.approx(exact, rel=1e-5)


def test_the_basis_diagonalises_the_weighted_gram_matrix():
    objective, _ = problem(5, "softmax")
    for w, basis in zip(objective.weights.T, objective.bases, strict=True):
        gram = basis.B.T @ (objective.Z.T * w) @ objective.Z @ basis.B
        torch.testing.assert_close(gram, torch.diag(basis.spectrum), atol=1e-12, rtol=1e-9)
