"""Every metric beside scikit-learn: seconds of one weighting and of many, and the memory taken.

python benchmarks/bench_metrics.py [IMAGES CLASSES]
"""

import sys
import time
import warnings
from datetime import UTC, datetime
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import sklearn
import sklearn.metrics as theirs

from probe.score import metrics

SETS = ((20_000, 1_000), (1_300_000, 1_000))
MANY = 20  # weightings
PART = 20_000  # images of which scikit-learn makes a table of images x classes
SOME = 10  # classes, or pairs of them, that scikit-learn is timed on; the rest is estimated
WHOLE = ("auroc",)  # of rankings of a million images; others' time is estimated from SOME + 1


def answers(N: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (N,) and probabilities (N, K), float32, right of seven images in ten."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, K, N)
    p = np.empty((N, K), np.float32)
    for start in range(0, N, PART):
        rows = slice(start, start + PART)
        part = rng.random((len(y[rows]), K), np.float32)
        place = np.where(rng.random(len(part)) < 0.7, y[rows], rng.integers(0, K, len(part)))
        part[np.arange(len(part)), place] += 50 * rng.random(len(part), np.float32)
        p[rows] = part / part.sum(1, keepdims=True)
    return y, p


def one_class(score, y, p, w=None, *, k):
    """Return a score of class k against the rest."""
    return score(y == k, p[:, k], sample_weight=w)


def sensitivity(truth, score, sample_weight=None):
    """Return the sensitivity at 90 % specificity by roc_curve."""
    fpr, tpr, _ = theirs.roc_curve(
        truth, score, sample_weight=sample_weight, drop_intermediate=False
    )
    return tpr[fpr <= 0.1].max()


def one_pair(y, p, w=None, *, pair):
    """Return AUROC of two classes, both ways, as roc_auc_score's "ovo" makes it."""
    rows = np.logical_or(y == pair[0], y == pair[1])
    return [theirs.roc_auc_score(y[rows] == k, p[rows, k]) for k in pair]


def judges(N: int, K: int) -> dict:
    """Return per metric how scikit-learn is timed: (calls, and how often as much the whole is)."""
    called = {
        "accuracy": theirs.accuracy_score,
        "balanced_accuracy": theirs.balanced_accuracy_score,
        "kappa": theirs.cohen_kappa_score,
        "quadratic_kappa": partial(theirs.cohen_kappa_score, weights="quadratic"),
        "mcc": theirs.matthews_corrcoef,
        "f1": partial(theirs.f1_score, average="macro"),
        "f1_macro": partial(theirs.f1_score, average="macro"),
    }
    out = {
        name: ([lambda y, p, w=None, f=f: f(y, p.argmax(1), sample_weight=w)], 1.0)
        for name, f in called.items()
    }
    tables = {"log_loss": theirs.log_loss, "brier": theirs.brier_score_loss}
    for name, f in tables.items():
        part = slice(min(N, PART))

        def call(y, p, w=None, f=f, part=part):
            return f(
                y[part], p[part], sample_weight=None if w is None else w[part], labels=range(K)
            )

        out[name] = ([call], N / min(N, PART))
    ranked = {
        "auroc": theirs.roc_auc_score,
        "average_precision": theirs.average_precision_score,
        "sensitivity_at_90": sensitivity,
    }
    for name, f in ranked.items():
        some = range(0, K, K // SOME)
        out[name] = ([partial(one_class, f, k=k) for k in some], K / len(some))
    pairs = list(combinations(range(K), 2))
    some = pairs[:: len(pairs) // SOME]
    out["auroc_ovo"] = ([partial(one_pair, pair=pair) for pair in some], len(pairs) / len(some))
    return out


def seconds(call) -> float:
    """Return the shorter of two runs, or the only one where it takes long."""
    took = []
    while len(took) < 2 and sum(took) < 60:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def status(name: str) -> float:
    """Return a line of the process's status, in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1e6
    return float("nan")


def taken(call) -> tuple[float, float]:
    """Return seconds, and by how many GB memory grew meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    took = seconds(call)
    return took, status("VmHWM") - before


def measure(N: int, K: int, many: int) -> None:
    """Print a Markdown table for one size."""
    y, p = answers(N, K)
    print(f"\n{N:,} images x {K:,} classes, float32, {p.nbytes / 1e9:.2f} GB\n")
    heads = ["metric", "one weighting, s", "scikit-learn, s", "ratio", "memory, GB"]
    heads += [f"{many} weightings, s", f"{many} times scikit-learn, s", "ratio"] if many else []
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    weights = np.random.default_rng(1).poisson(1, (max(many, 1), N)).astype(float)
    for metric in metrics.of_task("multiclass"):
        calls, times = judges(N, K).get(metric.name, ([], 1.0))
        if many or not metric.ranking or metric.name in WHOLE:
            ours, memory = taken(partial(metrics.evaluate, metric, y, p))
        else:
            ours, memory = taken(partial(of_some, metric, y, p))
            ours *= K / (SOME + 1)
        other = times * sum(seconds(partial(call, y, p)) for call in calls)
        row = [metric.name, f"{ours:.3g}", *_beside(ours, other), f"{memory:.2f}"]
        if many:
            ours = seconds(partial(metrics.evaluate, metric, y, p, weights))
            other = many * times * sum(seconds(partial(call, y, p, weights[0])) for call in calls)
            row += [f"{ours:.3g}", *_beside(ours, other)]
        print(f"| {' | '.join(row)} |", flush=True)


def of_some(metric, y, p):
    """Score SOME classes and one that stands for the rest."""
    some = np.arange(0, p.shape[1], p.shape[1] // SOME)
    place = np.full(p.shape[1], SOME)
    place[some] = np.arange(SOME)
    return metrics.evaluate(metric, place[y], p[:, [*some, 1]])


def _beside(ours: float, other: float) -> list[str]:
    return [f"{other:.3g}", f"{ours / other:.3f}"] if other else ["", ""]


def main() -> None:
    """Print the date and a table per size."""
    warnings.simplefilter("ignore")
    print(f"{datetime.now(UTC):%Y-%m-%d}, scikit-learn {sklearn.__version__}")
    given = [tuple(int(v) for v in sys.argv[1:3])] if len(sys.argv) > 2 else SETS
    for N, K in given:
        measure(N, K, many=MANY if N <= 100_000 else 0)


if __name__ == "__main__":
    main()
