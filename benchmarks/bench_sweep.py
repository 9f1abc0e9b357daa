"""Time the sweep beside scikit-learn, in one run, and print a Markdown table with ratios.

The problem is like cached ViT features: N = 16,000, D = 768, 8 classes of unequal size, a power-law
spectrum, accuracy about 0.6. Gaps are to a float64 solution, relative to max(objective, 1e-3).
"""

import datetime
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from probe.heads import fit_heads
from probe.solve.sources import FromStore

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


def shares(X, y):
    """Our rows, the seconds of theirs, and of their fits at C = 100 the unit of each library."""
    Xt, yt = torch.from_numpy(X), torch.from_numpy(y)
    exact = fit_heads(Xt, yt, C=C, tol=1e-9).value[:, 0, 0].numpy()

    def worst(heads):
        pairs = zip(heads.coef[:, 0, 0], heads.intercept[:, 0, 0], C, exact, strict=True)
        return max((objective(X, y, W, b, c) - f) / max(f, 1e-3) for W, b, c, f in pairs)

    rows, unit = [], {}
    for c in (1.0, 100.0):
        j = int(abs(np.log10(C / c)).argmin())
        for name, seconds, model in theirs(X, y, C[j]):
            gap = objective(X, y, model.coef_, model.intercept_, C[j]) - exact[j]
            rows.append((f"{name}, one head, C = {C[j]:.3g}", seconds, gap / max(exact[j], 1e-3)))
            unit[name] = seconds  # the last, C = 100, stays
    for tol in (1e-5, 1e-6):
        seconds, heads = timed(fit_heads, Xt, yt, C=C, tol=tol)
        rows.append((f"Medprobe, 45 strengths, tol {tol:g}", seconds, worst(heads)))
    seconds, _ = timed(fit_heads, Xt, yt, C=[100.0], tol=1e-6)
    rows.append(("Medprobe, one head, C = 100, tol 1e-06", seconds, None))
    folds = torch.from_numpy(np.random.default_rng(0).permutation(len(y)) % 5)
    weights = torch.stack([torch.ones(len(y)), *((folds != f).float() for f in range(5))])
    for tol in (1e-5, 1e-6):
        seconds, heads = timed(fit_heads, Xt, yt, C=C, weights=weights, tol=tol)
        rows.append((f"Medprobe, 45 strengths x (5 folds + refit), tol {tol:g}", seconds, None))
    flops = float(heads.passes.sum()) * 4 * X.size * 8
    return rows, unit, flops / seconds / 1e9


def growth():
    """Seconds of 45 strengths against N."""
    X, y = problem(n=16000)
    for n in (4000, 8000, 16000):
        seconds, _ = timed(fit_heads, torch.from_numpy(X[:n]), torch.from_numpy(y[:n]), C=C)
        yield n, seconds


def findings(n=50_000, d=768, labels=14):
    """Masked labels one by one: ours in one call, theirs from a sample of its 630 fits."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d)).astype(np.float32) * np.arange(1, d + 1) ** -0.7
    X = (X / X.std()).astype(np.float32)
    logits = X @ rng.standard_normal((d, labels)) * 0.5 - rng.uniform(0, 4, labels)
    Y = (rng.random((n, labels)) < 1 / (1 + np.exp(-logits))).astype(float)
    Y[rng.random(Y.shape) < 0.1] = np.nan
    ours, heads = timed(fit_heads, torch.from_numpy(X), torch.from_numpy(Y), C=C, tol=1e-6)
    sample = []
    for label in (0, 7):
        known = ~np.isnan(Y[:, label])
        for j in range(2, len(C), 8):
            model = LogisticRegression(C=C[j], max_iter=2000)
            sample.append(timed(model.fit, X[known], Y[known, label])[0])
    return ours, float(np.mean(sample)) * labels * len(C), len(sample), bool(heads.converged.all())


def from_file(n=100_000, d=768):
    """Rows left in a file that is in the page cache against rows in memory, the same heads."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d), dtype=np.float32)
    y = torch.from_numpy((X[:, :4] + 2 * rng.standard_normal((n, 4))).argmax(1))
    strengths = np.logspace(-6, 2, 9)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "x.npy", X)
        table = np.load(Path(folder) / "x.npy", mmap_mode="r")
        stored = FromStore(lambda part: table[part], np.arange(n), d, free_bytes=table.nbytes // 4)
        memory, here = timed(fit_heads, torch.from_numpy(X), y, C=strengths)
        file, there = timed(fit_heads, stored, y, C=strengths)
    difference = ((here.value - there.value).abs() / here.value).max()
    return memory, file, float(difference)


def main():
    X, y = problem()
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, N = {len(X)}, D = {X.shape[1]}, 8 classes\n"
    )
    rows, unit, reached = shares(X, y)
    names = list(unit)
    print(f"| what | seconds | {' | '.join(f'of one {n} fit at C = 100' for n in names)} | gap |")
    print("|---|---|" + "---|" * len(names) + "---|")
    for what, seconds, gap in rows:
        of = " | ".join(f"{seconds / unit[n]:.2f}" for n in names)
        print(f"| {what} | {seconds:.1f} | {of} | {'' if gap is None else f'{gap:.1e}'} |")
    top = peak()
    print(
        f"\nThe last row's passes run at {reached:.0f} GFLOP/s over its whole time, with "
        f"preconditioners: {reached / top:.0%} of this machine's product ({top:.0f} GFLOP/s).\n"
    )
    print("| N | 45 strengths, tol 1e-6, seconds |\n|---|---|")
    for n, seconds in growth():
        print(f"| {n} | {seconds:.1f} |", flush=True)
    memory, file, difference = from_file()
    print(
        f"\n100,000 x 768, 9 strengths, 4 classes: {memory:.1f} s in memory, {file:.1f} s from the "
        f"file ({file / memory:.2f} x), objectives differ by {difference:.1e} at most."
    )
    ours, loop, n, converged = findings()
    print(
        f"\n50,000 x 768, 14 labels with a tenth masked, 45 strengths: {ours:.0f} s (converged: "
        f"{converged}); scikit-learn's loop {loop:.0f} s, estimated from {n} of its 630 fits: "
        f"{loop / ours:.0f} x."
    )


if __name__ == "__main__":
    main()
