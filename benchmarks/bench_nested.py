"""Simulate nested cross-validation: does its interval hold what it says? Print Markdown.

Each data set is drawn anew from two normal classes (D features, a few of them informative), tested
in 5 outer folds with C chosen in 5 inner ones, all heads in one fit. Its interval is held against
two true scores, measured on 20,000 fresh images: the mean of the five heads that were tested, and
the score of the head that is kept, which is trained on all images. With subjects, images of one
subject share a part of their features.
"""

import sys
import time

import numpy as np
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from features.splits import deal
from probe.heads import fit_heads
from probe.score import metrics
from probe.score.folded import Folded
from probe.score.intervals import OF_FOLDS, intervals

C = tuple(10.0 ** np.arange(-4, 3))
D, INFORMATIVE, FRESH = 30, 5, 20_000
CASES = [(60, 1), (120, 1), (300, 1), (240, 4)]  # images, images per subject
OUTER, INNER = 5, 5


def draw(rng, n, per_subject, apart):
    """Return X (n, D), y (n,) and subject (n,)."""
    subject = np.repeat(np.arange(n // per_subject), per_subject)
    y = rng.permutation(np.arange(n // per_subject) % 2)[subject]
    X = rng.normal(size=(n, D)) + rng.normal(size=(n // per_subject, D))[subject] * (
        per_subject > 1
    )
    X[:, :INFORMATIVE] += (2 * y[:, None] - 1) * apart
    return X.astype(np.float32), y, subject.astype(str)


def nested(X, y, subject, seed):
    """Return out-of-fold log-odds (n, 2), fold (n,), the folds' heads and the one that is kept."""
    fold = deal(subject, y, [1 / OUTER] * OUTER, seed=seed)
    weights, held = [], []
    for without in (-1, *range(OUTER)):
        kept = fold != without
        inner = np.full(len(y), -1)
        inner[kept] = deal(subject[kept], y[kept], [1 / INNER] * INNER, seed=seed)
        weights += [kept, *(kept & (inner != f) for f in range(INNER))]
        held.append([inner == f for f in range(INNER)])
    heads = fit_heads(
        torch.from_numpy(X), torch.from_numpy(y), C=C, n_classes=2,
        weights=torch.from_numpy(np.stack(weights).astype(np.float32)),
    )  # fmt: skip
    accuracy = metrics.find("accuracy", "multiclass")
    found = []
    for k, masks in enumerate(held):
        scores = np.zeros(len(C))
        for f, rows in enumerate(masks):
            z = heads.select(slice(None), k * (INNER + 1) + f + 1).log_odds(
                torch.from_numpy(X[rows])
            )
            scores += [metrics.evaluate_log_odds(accuracy, y[rows], one)[0] for one in z.numpy()]
        found.append(heads.head(("a", "b"), metrics.best_of(accuracy, scores), k * (INNER + 1)))
    z = np.empty((len(y), 2))
    for f in range(OUTER):
        z[fold == f] = found[1 + f].log_odds(torch.from_numpy(X[fold == f])).numpy()
    return z, fold, found[1:], found[0]


def true_scores(head, X, y):
    """Return a head's accuracy and AUROC on fresh images."""
    z = head.log_odds(torch.from_numpy(X)).numpy()
    return np.array([accuracy_score(y, z.argmax(1)), roc_auc_score(y, z[:, 1])])


def main(n):
    """Print a row per case: coverage of either true score, and how far off the estimate is."""
    chosen = [metrics.find(name, "multiclass") for name in ("accuracy", "auroc")]
    print("| images | per subject | metric | covers the tested heads | covers the kept head "
          "| mean width | estimate less tested, kept |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for images, per_subject in CASES:
        rows = []
        for seed in range(n):
            rng = np.random.default_rng([images, per_subject, seed])
            apart = rng.choice([0.15, 0.3, 0.6])
            X, y, subject = draw(rng, images, per_subject, apart)
            fresh, truth, _ = (
                draw(rng, FRESH, 1, apart)
                if per_subject == 1
                else draw(rng, FRESH, per_subject, apart)
            )
            z, fold, tested, kept = nested(X, y, subject, seed)
            mean = np.mean([true_scores(head, fresh, truth) for head in tested], axis=0)
            last = true_scores(kept, fresh, truth)
            for k, metric in enumerate(chosen):
                p = metrics.scores_for(metric, z, fold)
                assert isinstance(p, Folded) == metric.ranking
                how = {"n": 1000, "rng": np.random.default_rng(seed), "longer": OF_FOLDS}
                s = intervals([metric], y, p, subject, **how)[metric.name]
                low, high, value = s["ci_low"], s["ci_high"], s["value"]
                rows.append((k, low <= mean[k] <= high, low <= last[k] <= high, high - low,
                             value - mean[k], value - last[k]))  # fmt: skip
        table = np.array(rows, dtype=float)
        for k, metric in enumerate(chosen):
            mine = table[table[:, 0] == k].mean(0)
            print(f"| {images} | {per_subject} | {metric.name} | {mine[1]:.3f} | {mine[2]:.3f} "
                  f"| {mine[3]:.3f} | {mine[4]:+.3f}, {mine[5]:+.3f} |", flush=True)  # fmt: skip


def cost(n=16_000, d=768):
    """Print what nested cross-validation costs beside folds and a refit, in CPU seconds."""
    from bench_sweep import C as strengths
    from bench_sweep import problem

    X, y = problem(n, d)
    X, y = torch.from_numpy(X), torch.from_numpy(y)
    rng = np.random.default_rng(0)
    outer = rng.integers(0, OUTER, n)
    weights = []
    for without in (-1, *range(OUTER)):
        kept, inner = outer != without, rng.integers(0, INNER, n)
        weights += [kept, *(kept & (inner != f) for f in range(INNER))]
    weights = torch.from_numpy(np.stack(weights).astype(np.float32))
    seconds = []
    for some in (weights[: INNER + 1], weights):
        start = time.process_time()
        heads = fit_heads(X, y, C=strengths, n_classes=8, weights=some)
        seconds.append(time.process_time() - start)
        ratio, done = seconds[-1] / seconds[0], bool(heads.converged.all())
        print(f"| {len(some)} x {len(strengths)} | {seconds[-1]:.1f} | {ratio:.2f} | {done} |")


if __name__ == "__main__":
    if sys.argv[1:] == ["cost"]:
        cost()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
