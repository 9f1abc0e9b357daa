"""What fit_heads is given: any type of number, any offset; what can't be fitted is refused."""

import numpy as np
import pytest
import torch
from newton import optimum, value
from sklearn.linear_model import LogisticRegression

from features.errors import ProbeError
from probe.heads import Head, fit_heads


def rows(N=100, D=8):
    rng = np.random.default_rng(5)
    X = np.abs(rng.normal(size=(N, D))) * 60 + 5
    return np.clip(X, 0, 120), (X[:, 0] + X[:, 1] + 30 * rng.normal(size=N) > 130).astype(int)


def gap(heads, X, y, C, j=0, K=2):
    """How far a head as it was returned is from the optimum on the rows as they were given."""
    best, known_to = optimum(X, y, C, K)
    size = max(best, 1e-3)
    assert known_to < 1e-9 * size
    coef, intercept = heads.coef[j, 0, 0].double(), heads.intercept[j, 0, 0].double()
    return (value(X, y, coef.numpy(), intercept.numpy(), C) - best) / size


FLOATS = ["float64", "float32", "float16", "bfloat16"]
TYPES = [*FLOATS, "uint8", "int8", "int16", "int32", "int64", "bool"]


@pytest.mark.parametrize("name", TYPES)
def test_features_of_any_type_are_the_numbers_that_they_are(name):
    X, y = rows()
    given = torch.from_numpy(X > 50 if name == "bool" else X).to(getattr(torch, name))
    heads = fit_heads(given, torch.from_numpy(y), C=[1e-4, 1.0])
    assert heads.converged.all()
    for j, C in enumerate((1e-4, 1.0)):
        assert gap(heads, given.double().numpy(), y, C, j) < 1e-6


def test_float16_that_would_overflow_and_integers_that_would_wrap_or_round():
    X, y = rows()
    large = torch.from_numpy(300 * X).half()
    pixels = torch.from_numpy(2 * X).to(torch.uint8)
    wide = torch.from_numpy(X).to(torch.int64) + 2**30
    for given in (large, pixels, wide):
        heads = fit_heads(given, torch.from_numpy(y), C=[1.0])
        assert heads.converged.all()
        assert gap(heads, given.double().numpy(), y, 1.0) < 1e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e18])
def test_features_of_any_size_are_fitted(scale):
    X, y = rows()
    X = X.astype(np.float32) * np.float32(scale)
    C = 1 / float(np.square(X.astype(float)).mean())  # so that the penalty is felt
    heads = fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=[C])
    assert heads.converged.all()
    assert gap(heads, X.astype(float), y, C) < 1e-6


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("offset", [0, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_a_head_as_returned_is_at_the_optimum_however_far_features_are_from_zero(offset, K):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 20)) + offset * rng.normal(size=20)
    X = X.astype(np.float32)
    centred = X.astype(float) - X.astype(float).mean(0)
    y = (centred[:, :K] + rng.normal(size=(300, K))).argmax(1)
    heads = fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=[1.0, 1e4], n_classes=K)
    assert heads.coef.dtype == (torch.float32 if offset < 1e3 else heads.coef.dtype)
    for j, C in enumerate((1.0, 1e4)):
        assert gap(heads, X.astype(float), y, C, j, K) < 1e-6
        model = LogisticRegression(C=C, tol=1e-12, max_iter=10_000).fit(centred, y)
        p = heads.head("abc"[:K], j).predict_proba(torch.from_numpy(X))
        np.testing.assert_allclose(p, model.predict_proba(centred), atol=1e-3)


def test_a_head_in_float64_is_kept_so_and_one_in_float32_is_read(tmp_path):
    X, y = rows()
    far = torch.from_numpy((X + 1e7).astype(np.float32))
    heads = fit_heads(far, torch.from_numpy(y), C=[1.0])
    assert heads.coef.dtype == heads.intercept.dtype == torch.float64
    head = heads.head(["no", "yes"])
    head.save(tmp_path / "far")
    loaded, _ = Head.load(tmp_path / "far.json")
    assert loaded.coef.dtype == torch.float64
    assert torch.equal(loaded.predict_proba(far), head.predict_proba(far))
    near = fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=[1e-4]).head(["no", "yes"])
    assert near.coef.dtype == torch.float32
    near.save(tmp_path / "near")
    loaded, _ = Head.load(tmp_path / "near.json")
    assert loaded.coef.dtype == torch.float32
    assert torch.equal(loaded.predict_proba(far), near.predict_proba(far))


@pytest.mark.parametrize(
    ("C", "said"),
    [
        ([-1.0], "C = -1: want positive"),
        ([1.0, 0.0], "C = 0: want positive"),
        ([float("nan")], "C = nan: want positive"),
        ([float("inf")], "C = inf: want positive"),
        ([], "no strength C"),
        (1.0, "no strength C"),
    ],
)
def test_strengths_that_are_none_are_refused(C, said):
    X, y = rows()
    with pytest.raises(ProbeError, match=said):
        fit_heads(torch.from_numpy(X), torch.from_numpy(y), C=C)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_features_that_are_not_finite_are_refused(dtype, wrong):
    X, y = rows()
    X = torch.from_numpy(X).to(dtype)
    X[3, 2] = wrong
    with pytest.raises(ProbeError, match="NaN or infinity"):
        fit_heads(X, torch.from_numpy(y), C=[1.0])


def test_features_that_are_no_table_of_numbers_are_refused():
    X, y = (torch.from_numpy(a) for a in rows())
    with pytest.raises(ProbeError, match=r"e\+201 in size"):
        fit_heads(X * 1e200, y, C=[1.0])
    with pytest.raises(ProbeError, match=r"at least one image and one feature"):
        fit_heads(X[:, :0], y, C=[1.0])
    with pytest.raises(ProbeError, match=r"want real numbers \(N, D\)"):
        fit_heads(X[:, 0], y, C=[1.0])
    with pytest.raises(ProbeError, match="want real numbers"):
        fit_heads(X * 1j, y, C=[1.0])


def test_labels_and_weights_that_are_none_are_refused():
    X, y = (torch.from_numpy(a) for a in rows())
    for labels, said in [
        (y[:-1], "labels of shape"),
        (2 * y - 1, "from -1 to 1"),
        (y * 0.5, "not whole numbers"),
        (y[:, None] * 2.0, "more than 1, 0 and NaN"),
    ]:
        with pytest.raises(ProbeError, match=said):
            fit_heads(X, labels, C=[1.0])
    with pytest.raises(ProbeError, match="from 0 to 3: want 0 to 1"):
        fit_heads(X, 3 * y, C=[1.0], n_classes=2)
    for wrong in (-1.0, torch.nan, torch.inf):
        weights = torch.ones(1, len(y))
        weights[0, 3] = wrong
        with pytest.raises(ProbeError, match="negative or not finite"):
            fit_heads(X, y, C=[1.0], weights=weights)
    with pytest.raises(ProbeError, match="weights of shape"):
        fit_heads(X, y, C=[1.0], weights=torch.ones(len(y)))
    assert fit_heads(X, y, C=[1.0], weights=torch.ones(1, len(y)).int()).converged.all()


@pytest.mark.parametrize("D", [6, 300])  # fewer columns than rows, and more
@pytest.mark.parametrize("C", [[1e-6], [1.0], 10 ** np.linspace(-6, 5, 12)])
def test_classes_without_a_row_change_nothing_for_the_others(D, C):
    rng = np.random.default_rng(1)
    X = rng.standard_normal((90, D))  # in float32 scikit-learn is further off than we are
    y = (X[:, :3] + rng.standard_normal((90, 3))).argmax(1)
    weights = torch.ones(2, 90)
    weights[1, torch.from_numpy(y == 2)] = 0  # in one fold one more is missing
    spread = torch.from_numpy(np.array([1, 4, 7])[y])
    heads = fit_heads(torch.from_numpy(X), spread, C=C, n_classes=9, weights=weights, tol=1e-10)
    assert heads.converged.all()
    p = heads.probabilities(torch.from_numpy(X)).numpy()
    for j, c in enumerate(C):
        theirs = LogisticRegression(C=c, tol=1e-12, max_iter=20_000).fit(X, y)
        np.testing.assert_allclose(p[j][:, [1, 4, 7]], theirs.predict_proba(X), atol=1e-4)
        assert p[j][:, [0, 2, 3, 5, 6, 8]].max() < 1e-6
    p = heads.probabilities(torch.from_numpy(X), 1).numpy()
    assert p[..., [0, 2, 3, 5, 6, 7, 8]].max() < 1e-6
