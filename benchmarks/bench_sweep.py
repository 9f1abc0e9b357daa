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


def timed(function):
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def main():
    X, y = problem()
    Xt, yt = torch.from_numpy(X), torch.from_numpy(y)
    exact = fit_heads(Xt, yt, C=C, tol=1e-12).value[:, 0, 0].numpy()

    def gap(values):
        return float(np.max((values - exact) / np.maximum(exact, 1e-3)))

    rows = []
    for c in (1.0, 100.0):
        j = int(abs(np.log10(C / c)).argmin())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds, model = timed(lambda c=C[j]: LogisticRegression(C=c, max_iter=2000).fit(X, y))
        value = objective(X, y, model.coef_, model.intercept_, C[j])
        rows.append(
            (f"scikit-learn, one head, C = {C[j]:.3g}, tol 1e-4", seconds, value / exact[j] - 1)
        )
    for tol in (1e-5, 1e-6):
        seconds, heads = timed(lambda tol=tol: fit_heads(Xt, yt, C=C, tol=tol))
        values = [
            objective(X, y, heads.coef[j, 0, 0], heads.intercept[j, 0, 0], C[j])
            for j in range(len(C))
        ]
        rows.append((f"Medprobe, all 45 strengths, tol {tol:g}", seconds, gap(np.array(values))))
    folds = torch.from_numpy(np.random.default_rng(0).permutation(len(y)) % 5)
    weights = torch.stack([torch.ones(len(y)), *((folds != f).float() for f in range(5))])
    seconds, heads = timed(lambda: fit_heads(Xt, yt, C=C, weights=weights))
    worst = float(heads.gap.max())
    rows.append(("Medprobe, 45 strengths x (5 folds + refit), tol 1e-06", seconds, worst))

    one = rows[1][1]
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, N = {len(X)}, D = {X.shape[1]}, 8 classes\n"
    )
    print("| what | seconds | of one scikit-learn fit at C = 100 | worst relative gap |")
    print("|---|---|---|---|")
    for what, seconds, worst in rows:
        print(f"| {what} | {seconds:.1f} | {seconds / one:.2f} | {worst:.1e} |")


if __name__ == "__main__":
    main()
