"""Time the sweep beside scikit-learn, in one run, and print a Markdown table with ratios.

The problem is like cached ViT features: N = 16,000, D = 768, 8 classes of unequal size, a power-law
spectrum, accuracy about 0.6. Gaps are to a float64 solution, relative to max(objective, 1e-3).
"""

import datetime
import os
import platform
import time
import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from probe.heads import fit_heads

C = 10 ** np.linspace(-6, 5, 45)


def problem(n=16000, d=768, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.arange(1, d + 1) ** -0.7
    rotation, _ = np.linalg.qr(rng.standard_normal((d, d)))
    Z = rng.standard_normal((20000, d)) * scale
    prior = np.array([0.35, 0.2, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02])
    y = rng.choice(8, size=len(Z), p=prior)
    means = rng.standard_normal((8, d)) * scale * 0.06
    X = (Z + means[y]) @ rotation.T
    X = ((X - X.mean(0)) / X.std(0)).astype(np.float32)
    return X[:n], y[:n]


def objective(X, y, W, b, c):
    logits = (
        torch.from_numpy(X).double() @ torch.as_tensor(W).double().T + torch.as_tensor(b).double()
    )
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y))
    return float(loss + torch.as_tensor(W).double().square().sum() / (2 * c * len(X)))


def timed(function, *args, **settings):
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = function(*args, **settings)
    return time.perf_counter() - start, found


def peak():
    """Return the GFLOP/s of this machine's own float32 matrix product, the best of three."""
    a = torch.randn(4096, 4096)
    return max(2 * 4096**3 / timed(torch.mm, a, a)[0] / 1e9 for _ in range(4))


def theirs(X, y, c):
    """scikit-learn's and scikit-learn-intelex's fit of one head: (name, seconds, model)."""
    yield "scikit-learn", *timed(LogisticRegression(C=c, max_iter=2000).fit, X, y)
    try:
        from sklearnex.linear_model import LogisticRegression as Fast
    except ImportError:
        print("scikit-learn-intelex is not installed\n")
    else:
        yield "scikit-learn-intelex", *timed(Fast(C=c, max_iter=2000).fit, X, y)


def main():
    X, y = problem()
    Xt, yt = torch.from_numpy(X), torch.from_numpy(y)
    exact = fit_heads(Xt, yt, C=C, tol=1e-9).value[:, 0, 0].numpy()

    def gap(coef, intercept, j):
        return (objective(X, y, coef, intercept, C[j]) - exact[j]) / max(exact[j], 1e-3)

    rows, unit = [], {}
    for c in (1.0, 100.0):
        j = int(abs(np.log10(C / c)).argmin())
        for name, seconds, model in theirs(X, y, C[j]):
            rows.append(
                (
                    f"{name}, one head, C = {C[j]:.3g}",
                    seconds,
                    gap(model.coef_, model.intercept_, j),
                )
            )
            unit[name] = seconds  # the last, C = 100, stays
    seconds, heads = timed(fit_heads, Xt, yt, C=[100.0], tol=1e-5)
    rows.append(("Medprobe, one head, C = 100, tol 1e-05", seconds, float(heads.gap.max())))
    for tol in (1e-5, 1e-6):
        seconds, heads = timed(fit_heads, Xt, yt, C=C, tol=tol)
        worst = max(gap(heads.coef[j, 0, 0], heads.intercept[j, 0, 0], j) for j in range(len(C)))
        rows.append((f"Medprobe, 45 strengths, tol {tol:g}", seconds, worst))
    folds = torch.from_numpy(np.random.default_rng(0).permutation(len(y)) % 5)
    weights = torch.stack([torch.ones(len(y)), *((folds != f).float() for f in range(5))])
    seconds, heads = timed(fit_heads, Xt, yt, C=C, weights=weights, tol=1e-5)
    what = "Medprobe, 45 strengths x (5 folds + refit), tol 1e-05 (its own estimate of the gap)"
    rows.append((what, seconds, float(heads.gap.max())))
    passes = float(heads.passes.sum()) * 4 * X.size * 8 / seconds / 1e9

    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, N = {len(X)}, D = {X.shape[1]}, 8 classes\n"
    )
    names = list(unit)
    print(f"| what | seconds | {' | '.join(f'of one {n} fit at C = 100' for n in names)} | gap |")
    print("|---|---|" + "---|" * len(names) + "---|")
    for what, seconds, worst in rows:
        shares = " | ".join(f"{seconds / unit[n]:.2f}" for n in names)
        print(f"| {what} | {seconds:.1f} | {shares} | {worst:.1e} |")
    top = peak()
    print(
        f"\nThe last row's passes run at {passes:.0f} GFLOP/s over its whole time, preconditioners "
        f"and all: {passes / top:.0%} of this machine's matrix product ({top:.0f} GFLOP/s)."
    )


if __name__ == "__main__":
    main()
