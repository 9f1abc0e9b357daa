"""Bootstrap by weights: seconds for 10,000 resamples of a test set of 25,000 images, 8 classes.

python benchmarks/bench_bootstrap.py
"""

import time

import numpy as np
import sklearn.metrics as theirs

from probe.score import intervals, metrics

IMAGES, RESAMPLES = 25_000, 10_000


def main() -> None:
    """Print a Markdown table; copies are scikit-learn on resampled arrays, timed on 5 of them."""
    rng = np.random.default_rng(0)
    share = [0.18, 0.5, 0.13, 0.035, 0.1, 0.01, 0.01, 0.035]  # about ISIC2019's
    y = rng.choice(8, IMAGES, p=share)
    p = rng.random((IMAGES, 8)) + 2 * rng.random((IMAGES, 1)) * np.eye(8)[y]
    p /= p.sum(1, keepdims=True)
    subject = np.arange(IMAGES).astype(str)
    copies = {
        "balanced_accuracy": lambda r: theirs.balanced_accuracy_score(y[r], p[r].argmax(1)),
        "quadratic_kappa": lambda r: theirs.cohen_kappa_score(
            y[r], p[r].argmax(1), weights="quadratic"
        ),
        "auroc": lambda r: theirs.roc_auc_score(y[r], p[r], multi_class="ovr"),
    }
    print("| metric | by weights, s | by copies (scikit-learn), s | ratio |\n|---|---|---|---|")
    for name, score in copies.items():
        start = time.perf_counter()
        metric = metrics.find(name, "multiclass")
        intervals.intervals([metric], y, p, subject, n=RESAMPLES, rng=rng)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(5):
            score(rng.integers(0, IMAGES, IMAGES))
        other = (time.perf_counter() - start) / 5 * RESAMPLES
        print(f"| {name} | {ours:.1f} | {other:.0f} | {other / ours:.0f} |")


if __name__ == "__main__":
    main()
