"""Heads are judged by scikit-learn, and by a bound on the optimum that no solver enters.

For a convex f whose penalty is l2/2 |W|^2, f - min f <= |grad_W f|^2 / (2 l2) wherever the
intercept's gradient is zero (strong convexity in W after minimising over the intercept). The bound
is computed in float64 with numpy alone; where features are scaled so that it says little, the
Newton decrement with the whole Hessian takes its place.
"""

import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from features.errors import ProbeError
from probe import heads as module
from probe.heads import Head, fit_heads
from probe.solve import fit

PATH = 10 ** np.linspace(-6, 5, 45)  # dinov2-logreg
FLOOR = 1e-3


@pytest.fixture(params=["float32", "bfloat16"])
def products(request, monkeypatch):
    """What the Hessian's products are made at, whatever the processor and however few the rows."""
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: request.param == "bfloat16")
    monkeypatch.setattr(fit, "BF16_MIN_NUMBERS", 0)
    monkeypatch.setattr(fit, "BF16_MIN_PRODUCTS", 10**6)


def value_and_gradient(X, y, W, b, C):
    """scikit-learn's objective over C N, and its gradient by W and by b, in float64."""
    N, l2 = len(X), 1 / (C * len(X))
    logits = X @ W.T + b
    if len(W) == 1:
        s = 2.0 * y - 1
        loss, R = np.logaddexp(0, -s * logits[:, 0]), (-s * expit(-s * logits[:, 0]))[:, None]
    else:
        loss, R = -log_softmax(logits, axis=1)[np.arange(N), y], softmax(logits, axis=1)
        R[np.arange(N), y] -= 1
    return loss.mean() + l2 / 2 * (W**2).sum(), R.T @ X / N + l2 * W, R.mean(0)


def problem(name):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 20))
    noisy = (X[:, :4] + 2 * rng.standard_normal((400, 4))).argmax(1)
    scales = 10.0 ** rng.uniform(-4, 4, 20)
    constant = X.copy()
    constant[:, 3], constant[:, 4] = 7, constant[:, 5]
    rare = np.where(noisy == 3, 0, noisy)
    rare[:3] = 3
    wide = rng.standard_normal((120, 400))
    many = rng.standard_normal((4000, 300)) * np.arange(1, 301) ** -0.7
    classes = (many[:, :4] + rng.standard_normal((4000, 4))).argmax(1)
    classes[rng.permutation(4000)[:40]] = 4  # fewer images than features: separable in the end
    return {
        "multinomial": (X, noisy),
        "binary": (X, noisy % 2),
        "wide": (wide, rng.integers(0, 4, 120)),
        "separable": (X, X[:, :4].argmax(1)),
        "constant and duplicated features": (constant, noisy),
        "one class with 3 images": (X, rare),
        "scale 1e4": (X * 1e4, noisy),
        "scale 1e-4": (X * 1e-4, noisy),
        "mixed scales": (X * scales, noisy),
        "far from the origin": (X + 1000, noisy),
        "fifty rows": (X[:50], noisy[:50]),
        "a rare class that can be separated": (many, classes),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "multinomial",
        "binary",
        "wide",
        "separable",
        "constant and duplicated features",
        "one class with 3 images",
        "scale 1e4",
        "scale 1e-4",
        "mixed scales",
        "far from the origin",
        "fifty rows",
        "a rare class that can be separated",
    ],
)
@pytest.mark.usefixtures("products")
def test_every_strength_reaches_the_optimum(name):
    X, y = problem(name)
    X = X.astype(np.float32)
    check_gap(X, y)


@pytest.mark.usefixtures("products")
def test_every_strength_reaches_the_optimum_on_the_sample_s_pixels():
    digits = load_digits()
    check_gap(digits.data.astype(np.float32), digits.target)


def drawn(seed):
    """A problem of any size, spectrum and noise; some with bad scales, offsets, copied columns."""
    r = np.random.default_rng(seed)
    n, d, k = int(r.integers(200, 3000)), int(r.integers(5, 300)), int(r.integers(2, 7))
    X = r.standard_normal((n, d)) * np.arange(1, d + 1) ** -r.uniform(0, 1.5)
    if r.random() < 0.3:
        X = X * 10 ** r.uniform(-3, 3, d)
    if r.random() < 0.3:
        X = X + r.standard_normal(d) * 10 ** r.uniform(0, 3)
    half = d // 2
    if r.random() < 0.3:
        X[:, :half] = np.maximum(X[:, :half], 0)
    if r.random() < 0.2:
        X[:, half : 2 * half] = X[:, :half]
    features, noise = (X - X.mean(0)) / X.std(0).clip(1e-9), r.uniform(0, 3)
    scores = features[:, r.integers(0, d, k)] + noise * r.standard_normal((n, k))
    y = (scores + np.log(r.dirichlet(np.ones(k)))).argmax(1)
    return X.astype(np.float32), np.unique(y, return_inverse=True)[1]


@pytest.mark.usefixtures("products")
def test_no_head_is_called_done_because_it_fell_as_foretold_by_chance():
    check_gap(*drawn(35))


@pytest.mark.slow
@pytest.mark.usefixtures("products")
def test_heads_of_any_problem_are_as_near_as_they_say_or_say_that_they_are_not():
    far = []
    for seed in range(60):
        X, y = (torch.from_numpy(a) for a in drawn(seed))
        if len(y.unique()) == 1:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = fit_heads(X, y, C=PATH)
            best = fit_heads(X, y, C=PATH, tol=1e-11).value.flatten().numpy()
        for j, C in enumerate(PATH):
            W, b = found.coef[j, 0].flatten(0, 1), found.intercept[j, 0].flatten()
            exact = X.double().numpy(), y.numpy(), W.double().numpy(), b.double().numpy()
            gap = (value_and_gradient(*exact, C)[0] - best[j]) / max(best[j], FLOOR)
            if found.converged[j].all() and gap > 1e-5:
                far.append((seed, C, gap))
    assert not far


def newton_decrement(X, y, W, b, C):
    """g' H^-1 g with the whole Hessian, columns scaled alike: twice the gap, to second order."""
    N, l2 = len(X), 1 / (C * len(X))
    Z = np.c_[X, np.ones(N)]
    if len(W) == 1:
        p = expit(Z @ np.r_[W[0], b])
        H = (Z.T * (p * (1 - p))) @ Z / N
    else:
        P = softmax(Z @ np.c_[W, b].T, axis=1)
        V = np.einsum("nk,kl->nkl", P, np.eye(len(W))) - np.einsum("nk,nl->nkl", P, P)
        H = (
            np.einsum("nkl,nd,ne->kdle", V, Z, Z, optimize=True).reshape(Z.shape[1] * len(W), -1)
            / N
        )
    _, grad_W, grad_b = value_and_gradient(X, y, W, b, C)
    g = np.c_[grad_W, grad_b].ravel()
    H += np.diag(np.tile(np.r_[np.full(X.shape[1], l2), 0], len(W)))
    scale = 1 / np.sqrt(np.diag(H))
    return (g * scale) @ np.linalg.lstsq(H * np.outer(scale, scale), g * scale, rcond=1e-12)[0]


def check_gap(X, y):
    Xt, yt = torch.from_numpy(X), torch.from_numpy(y)
    heads = fit_heads(Xt, yt, C=PATH)
    exact = fit_heads(Xt, yt, C=PATH, tol=1e-13)
    assert heads.converged.all()
    X = X.astype(np.float64)

    def at(found, j):
        return found.coef[j, 0, ...].flatten(0, 1).double().numpy(), found.intercept[
            j, 0
        ].flatten().double().numpy()

    for j, C in enumerate(PATH):
        best, grad_W, grad_b = value_and_gradient(X, y, *at(exact, j), C)
        limit = 1e-5 * max(best, FLOOR)
        gap = value_and_gradient(X, y, *at(heads, j), C)[0] - best
        assert gap < limit, f"C = {C:.3g}: gap {gap:.2e}, limit {limit:.2e}"
        assert abs(grad_b).max() < 1e-6
        bound = (grad_W**2).sum() * C * len(X) / 2
        if bound > limit / 10:  # badly scaled features: the penalty alone bounds too loosely
            bound = newton_decrement(X, y, *at(exact, j), C)
        assert bound < limit / 10, f"C = {C:.3g}: the reference is only known to {bound:.2e}"


@pytest.mark.parametrize("name", ["multinomial", "binary", "wide", "one class with 3 images"])
def test_the_certificate_is_never_less_than_the_gap(name):
    X, y = problem(name)
    Xt, yt = torch.from_numpy(X), torch.from_numpy(y)
    C = [1e-4, 1e-1, 10.0]
    rough = fit_heads(Xt, yt, C=C, tol=1e-2, certified=True)
    fine = fit_heads(Xt, yt, C=C, tol=1e-11, certified=True)
    assert (fine.bound < 1e-8).all()
    for j, c in enumerate(C):
        model = LogisticRegression(C=c, tol=1e-12, max_iter=20000).fit(X, y)
        best = value_and_gradient(X, y, model.coef_, model.intercept_, c)[0]
        at = rough.coef[j, 0].flatten(0, 1).double(), rough.intercept[j, 0].flatten().double()
        gap = value_and_gradient(X, y, *(t.numpy() for t in at), c)[0] - best
        value = float(rough.value[j, 0, 0])
        assert gap <= rough.bound[j, 0, 0] * max(value, FLOOR) + 1e-9
    assert rough.bound.isfinite().all()


@pytest.mark.parametrize("name", ["multinomial", "binary", "wide", "one class with 3 images"])
@pytest.mark.usefixtures("products")
def test_probabilities_are_those_of_scikit_learn(name):
    X, y = problem(name)
    for C in (1e-3, 1.0, 30.0):
        theirs = LogisticRegression(C=C, tol=1e-10, max_iter=20000).fit(X, y)
        ours = fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=[C], tol=1e-12).head(
            "abcd"[: y.max() + 1]
        )
        np.testing.assert_allclose(
            ours.predict_proba(torch.from_numpy(X)), theirs.predict_proba(X), atol=2e-5
        )


@pytest.mark.usefixtures("products")
def test_findings_are_separate_regressions_over_their_known_rows():
    rng = np.random.default_rng(1)
    X = rng.standard_normal((300, 10))
    Y = (X[:, :5] + rng.standard_normal((300, 5)) > 0.5).astype(float)
    Y[rng.random(Y.shape) < 0.3] = np.nan
    heads = fit_heads(torch.from_numpy(X), torch.from_numpy(Y), C=[0.1, 10.0], tol=1e-12)
    for j, C in enumerate((0.1, 10.0)):
        p = heads.head("vwxyz", j).predict_proba(torch.from_numpy(X)).numpy()
        for k in range(5):
            known = ~np.isnan(Y[:, k])
            theirs = LogisticRegression(C=C, tol=1e-10, max_iter=20000).fit(X[known], Y[known, k])
            np.testing.assert_allclose(p[:, k], theirs.predict_proba(X)[:, 1], atol=1e-6)


def test_a_weight_of_zero_leaves_out_and_a_weight_of_two_repeats():
    X, y = (torch.from_numpy(a) for a in problem("multinomial"))
    weights = torch.ones(3, len(y))
    weights[1, ::3] = 0
    weights[2, ::2] = 2
    heads = fit_heads(X, y, C=PATH[::6], weights=weights, tol=1e-12)
    kept = torch.arange(len(y)) % 3 != 0
    twice = torch.cat([torch.arange(len(y)), torch.arange(0, len(y), 2)])
    for group, rows in ((1, kept), (2, twice)):
        alone = fit_heads(X[rows], y[rows], C=PATH[::6], tol=1e-12)
        torch.testing.assert_close(
            heads.probabilities(X, group), alone.probabilities(X), atol=1e-6, rtol=0
        )


def test_the_order_of_strengths_is_the_caller_s():
    X, y = (torch.from_numpy(a) for a in problem("multinomial"))
    up = fit_heads(X, y, C=[0.01, 1.0, 100.0], tol=1e-10)
    down = fit_heads(X, y, C=[100.0, 0.01, 1.0, 1.0], tol=1e-10)
    torch.testing.assert_close(down.coef, up.coef[[2, 0, 1, 1]], atol=1e-5, rtol=1e-5)


def test_what_float32_gives_up_is_solved_in_float64_from_there_on(monkeypatch):
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X[:300] / 16).float(), torch.from_numpy(y[:300])
    C = np.logspace(-4, 4, 17).tolist()
    weights = torch.ones(3, 300)
    weights[1, ::3] = weights[2, 1::3] = 0
    before = fit_heads(X, y, C=C, weights=weights)
    monkeypatch.setattr(fit, "FLOAT32_HOPELESS", 0.0)  # the first strength ends float32's path
    found = fit_heads(X, y, C=C, weights=weights)
    assert found.converged.all()
    assert torch.equal(found.coef[0], before.coef[0])
    assert not torch.equal(found.coef[-1], before.coef[-1])
    for name in ("coef", "intercept"):
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(before, name).double(), atol=2e-2, rtol=1e-2
        )
    torch.testing.assert_close(found.value, before.value, atol=2e-9, rtol=2e-6)


def test_not_converging_is_loud(monkeypatch):
    settings = fit.SolverSettings
    monkeypatch.setattr(fit, "SolverSettings", partial(settings, max_newton=1))
    X, y = (torch.from_numpy(a) for a in problem("separable"))
    with pytest.warns(
        ConvergenceWarning, match="of 45 heads did not reach a relative gap of 1e-06"
    ):
        heads = fit_heads(X, y, C=PATH)
    assert not heads.converged.all()


def test_features_that_are_not_finite_and_labels_of_one_class_are_refused():
    X, y = (torch.from_numpy(a) for a in problem("multinomial"))
    with pytest.raises(ProbeError, match="NaN or infinity"):
        fit_heads(torch.where(X > 2, torch.nan, X), y, C=[1.0])
    with pytest.raises(ProbeError, match="at least two"):
        fit_heads(X, torch.zeros_like(y), C=[1.0])
    with pytest.raises(ProbeError, match="no training row left"):
        fit_heads(X, y, C=[1.0], weights=torch.zeros(1, len(y)))


@pytest.mark.parametrize("left", [(0, 1, 2), (0, 3), (2,)])
def test_a_class_that_a_group_lacks_changes_nothing_for_the_others(left):
    X, y = problem("multinomial")
    some = np.isin(y, left)
    weights = torch.from_numpy(np.stack([some, np.ones(len(y), bool)]).astype(np.float32))
    heads = fit_heads(
        torch.from_numpy(X), torch.from_numpy(y), C=[0.01, 1, 1e4], weights=weights, tol=1e-10
    )
    assert heads.converged.all()
    whole = fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=[0.01, 1, 1e4], tol=1e-10)
    torch.testing.assert_close(heads.coef[:, 1], whole.coef[:, 0], atol=1e-5, rtol=1e-5)
    gone = np.setdiff1d(range(4), left)
    assert not heads.coef[:, 0, 0, gone].any()
    p = heads.probabilities(torch.from_numpy(X)).numpy()
    assert (p[:, :, gone] < 1e-17).all()
    if len(left) == 1:
        return
    b = np.full(4, -1e3)
    for j, C in enumerate((0.01, 1, 1e4)):
        W, b[list(left)] = heads.coef[j, 0, 0].numpy(), heads.intercept[j, 0, 0, list(left)]
        _, slope, flat = value_and_gradient(X[some], y[some], W, b, C)  # at -1000 for the others
        assert max(np.abs(slope).max(), np.abs(flat).max()) < 1e-5


def test_a_saved_head_says_the_same_and_holds_no_pickle(tmp_path):
    X, y = (torch.from_numpy(a) for a in problem("binary"))
    head = fit_heads(X, y, C=[1.0]).head(["no", "yes"])
    head.save(tmp_path / "run" / "heads", feature="final/mean")
    loaded, about = Head.load(tmp_path / "run" / "heads.json")
    assert torch.equal(loaded.predict_proba(X), head.predict_proba(X))
    assert about["feature"] == "final/mean"
    assert json.loads((tmp_path / "run" / "heads.json").read_text())["classes"] == ["no", "yes"]
    (tmp_path / "run" / "heads.safetensors").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ProbeError, match="is not a saved head"):
        Head.load(tmp_path / "run" / "heads.json")


def test_a_sweep_warns_of_nothing_when_all_is_well():
    X, y = (torch.from_numpy(a) for a in problem("multinomial"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_heads(X, y, C=PATH[::8])


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("D", [40, 600])  # fewer columns than rows, and more
def test_labels_with_one_side_only_are_done_at_once_beside_others(D):
    r = np.random.default_rng(3)
    X = r.standard_normal((400, D)).astype(np.float32)
    y = (X[:, :6] + r.standard_normal((400, 6)) > [0, 1, 2, 2.5, 99, -99]).astype(float)
    y[::7, 4] = np.nan
    weights = (r.integers(0, 5, 400) != np.arange(-1, 5)[:, None]).astype(np.float32)
    C = 10 ** np.linspace(-6, 5, 45)
    heads = fit_heads(
        torch.from_numpy(X), torch.from_numpy(y), C=C, weights=torch.from_numpy(weights)
    )
    assert heads.converged.all()
    assert heads.gap.isfinite().all()
    assert heads.passes[..., 4:].max() < 5
    p = heads.probabilities(torch.from_numpy(X))
    np.testing.assert_allclose(p[..., 4], 0, atol=1e-9)
    np.testing.assert_allclose(p[..., 5], 1, atol=1e-6)
    theirs = LogisticRegression(C=C[20], tol=1e-10, max_iter=10_000).fit(X, y[:, 1])
    np.testing.assert_allclose(p[20, :, 1], theirs.predict_proba(X)[:, 1], atol=2e-3)
