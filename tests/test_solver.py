"""The solver without rows: quadratics judged by numpy, and a function whose minimum is known."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.solve.gap import FLOOR
from probe.solve.objective import Point
from probe.solve.solver import SolverSettings, Start, minimise

LEAST = 1.0  # the smallest value of every objective here
D = 12


class Coordinates:
    """The basis is that of theta itself, and no direction changes nothing."""

    bf16 = None

    def to_basis(self, gradients):
        return gradients

    def from_basis(self, steps):
        return steps

    def centred(self, theta):
        return theta


@dataclass(frozen=True)
class Quadratic(Coordinates):
    """(theta - t)' A (theta - t) / 2 + LEAST, A (H, D, D), t (H, 1, D)."""

    A: torch.Tensor
    t: torch.Tensor
    l2: torch.Tensor

    def select(self, heads):
        return replace(self, A=self.A[heads], t=self.t[heads], l2=self.l2[heads])

    def __call__(self, theta):
        gradient = (theta - self.t) @ self.A
        value = 0.5 * ((theta - self.t) * gradient).sum((1, 2)) + LEAST
        return Point(value, gradient, theta.clone())

    def hessian_product(self, point, V):
        return V @ self.A


@dataclass(frozen=True)
class OfRows(Quadratic):
    """A = Z'Z + l2, whose products may be with Z (H, N, D) at bfloat16 in the place of Z."""

    Z: torch.Tensor
    rounded: bool = False

    @classmethod
    def drawn(cls, seed, decades, turned, H=4, N=20):
        rng = np.random.default_rng(seed)
        falling = 10 ** (-decades / 2 * np.arange(D) / (D - 1))
        # Turned, rows have numbers of one size, and so errors of rounding. In a direction of hardly
        # any curvature these are as large as in the others, and hide what is to gain there.
        Q = np.linalg.qr(rng.standard_normal((H, D, D)))[0] if turned else np.eye(D)
        Z = torch.from_numpy(rng.standard_normal((H, N, D)) * falling @ Q)
        l2 = torch.full((H,), 10.0 ** (-decades - 1)).double()
        A = Z.mT @ Z + l2[:, None, None] * torch.eye(D)
        t = rng.standard_normal((H, 1, D)) / falling @ Q  # as much to gain in every direction
        return cls(A, torch.from_numpy(t), l2, Z)

    def select(self, heads):
        return replace(super().select(heads), Z=self.Z[heads])

    @property
    def bf16(self):
        return replace(self, rounded=True)

    def hessian_product(self, point, V):
        if not self.rounded:
            return super().hessian_product(point, V)
        Z = self.Z.bfloat16().double()
        return V @ Z.mT @ Z + self.l2[:, None, None] * V


@dataclass(frozen=True)
class Noisy(Quadratic):
    """A quadratic whose gradients are off by something else at every call, as rounding has it."""

    rng: np.random.Generator

    def __call__(self, theta):
        point = super().__call__(theta)
        noise = 1e-6 * torch.from_numpy(self.rng.standard_normal(tuple(theta.shape)))
        return replace(point, gradient=point.gradient + noise)


@dataclass(frozen=True)
class Cosh(Coordinates):
    """sum_d s_d (cosh(theta_d - t_d) - 1) + LEAST: steep far away, where no quadratic fits it."""

    s: torch.Tensor
    t: torch.Tensor
    l2: torch.Tensor

    def select(self, heads):
        return replace(self, s=self.s[heads], t=self.t[heads], l2=self.l2[heads])

    def __call__(self, theta):
        x = theta - self.t
        value = (self.s * (x.cosh() - 1)).sum((1, 2)) + LEAST
        return Point(value, self.s * x.sinh(), self.s * x.cosh())

    def hessian_product(self, point, V):
        return point.curvature * V


@dataclass(frozen=True)
class Scaling:
    """A preconditioner that divides by a diagonal (H, 1, D)."""

    diagonal: torch.Tensor
    max_curvature: torch.Tensor
    head_inverses = {}  # noqa: RUF012

    def __call__(self, G):
        return G / self.diagonal

    def select(self, heads):
        return Scaling(self.diagonal[heads], self.max_curvature[heads])


def plain(objective, point, cg_iterations, kept):
    return Scaling(torch.ones_like(point.gradient), torch.zeros_like(point.value))


def quadratic(seed, H=3, decades=2.0):
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((H, D, D)))[0]
    spectrum = 10 ** rng.uniform(-decades, 0, (H, D))
    A = torch.from_numpy((Q * spectrum[:, None]) @ Q.swapaxes(1, 2))
    t = torch.from_numpy(rng.standard_normal((H, 1, D)))
    return Quadratic((A + A.mT) / 2, t, torch.from_numpy(spectrum.min(1)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_quadratic_is_minimised_to_the_tolerance(seed):
    objective = quadratic(seed)
    found = minimise(objective, Start(torch.zeros(3, 1, D).double()), plain, SolverSettings(1e-9))
    assert found.converged.all()
    gap = (objective(found.theta).value - LEAST) / max(LEAST, FLOOR)
    assert (gap <= 1e-9).all()
    assert (gap <= found.gap + 1e-15).all()


def test_a_quadratic_with_its_inverse_takes_one_product_a_step():
    objective = quadratic(0)
    scaled = replace(objective, A=torch.diag_embed(torch.linalg.eigvalsh(objective.A)))

    def exact(objective, point, cg_iterations, kept):
        diagonal = objective.A.diagonal(dim1=1, dim2=2)[:, None]
        return Scaling(diagonal, torch.zeros_like(point.value))

    start = Start(torch.zeros(3, 1, D).double())
    found = minimise(scaled, start, exact, SolverSettings(1e-9))
    assert found.converged.all()
    assert found.cg_iterations.max() <= 2  # the second sees that the first left nothing
    torch.testing.assert_close(found.theta, objective.t, atol=1e-9, rtol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), far=st.floats(0, 12))
def test_a_known_minimum_is_found_from_far_away(seed, far):
    rng = np.random.default_rng(seed)
    s = torch.from_numpy(10 ** rng.uniform(-2, 0, (4, 2, D)))
    t = torch.from_numpy(far * rng.standard_normal((4, 2, D)))
    objective = Cosh(s, t, s.amin((1, 2)))
    start = Start(torch.zeros(4, 2, D).double())
    found = minimise(objective, start, plain, SolverSettings(1e-8))
    assert found.converged.all()
    gap = objective(found.theta).value - LEAST
    assert (gap <= 1e-8).all()
    assert (objective(found.theta).gradient.square().sum((1, 2)) <= 4 * 1e-8).all()


def test_heads_that_are_solved_together_are_those_solved_alone():
    objective = quadratic(1, H=5)
    start = torch.zeros(5, 1, D).double()
    together = minimise(objective, Start(start), plain, SolverSettings(1e-10))
    for h in range(5):
        one = torch.tensor([h])
        alone = minimise(objective.select(one), Start(start[one]), plain, SolverSettings(1e-10))
        torch.testing.assert_close(together.theta[one], alone.theta, atol=1e-4, rtol=1e-4)
        assert together.passes[h] == alone.passes[0]


@pytest.mark.parametrize(
    ("decades", "turned"), [(1.0, False), (8.0, False), (1.0, True), (4.0, True), (5.0, True)]
)
@pytest.mark.parametrize("seed", range(5))
def test_products_at_bfloat16_lead_to_the_exact_optimum(decades, turned, seed):
    objective = OfRows.drawn(seed, decades, turned)

    def diagonal(objective, point, cg_iterations, kept):
        most = torch.linalg.eigvalsh(objective.A).amax(1)
        return Scaling(objective.A.diagonal(dim1=1, dim2=2)[:, None], most)

    start = Start(torch.zeros(4, 1, D).double())
    found = minimise(objective, start, diagonal, SolverSettings(1e-8))
    gap = objective(found.theta).value - LEAST
    assert found.converged.all()
    assert (gap <= 1e-8).all()


def test_too_few_steps_are_said_to_be_too_few():
    rng = np.random.default_rng(3)
    t = torch.from_numpy(8 * rng.standard_normal((2, 1, D)))
    objective = Cosh(torch.ones(2, 1, D).double(), t, torch.ones(2).double())
    start = Start(torch.zeros(2, 1, D).double())
    found = minimise(objective, start, plain, SolverSettings(1e-8, max_newton=1))
    assert not found.converged.any()
    assert (found.gap > 1e-8).all()
    assert (objective(found.theta).value < objective(start.theta).value).all()


def test_a_head_that_only_moves_within_rounding_is_given_up_soon():
    exact = quadratic(2, decades=1.0)
    objective = Noisy(exact.A, exact.t, exact.l2, np.random.default_rng(0))

    def doubtful(objective, point, cg_iterations, kept):
        """A preconditioner that makes much of the noise, so that no head is called done."""
        unsafe = torch.full_like(point.value, 1e9)  # so that every step is evaluated
        return Scaling(torch.full_like(point.gradient, 1e-6), unsafe)

    start = Start(torch.zeros(3, 1, D).double())
    found = minimise(objective, start, doubtful, SolverSettings(1e-8, max_stalled=3))
    assert not found.converged.any()
    assert (found.gap > 1e-8).all()
    assert (exact(found.theta).value - LEAST < 1e-6).all()
    assert (found.passes < 15 * D).all()  # a hundred steps would take ten times as many
