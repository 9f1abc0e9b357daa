"""Do intervals cover, and do tests keep their size? Simulated, with fixed seeds.

python benchmarks/bench_statistics.py            # all tables, 1,000 test sets a cell
python benchmarks/bench_statistics.py 200 paired # fewer test sets, one table of three

Test sets are made as a patient's are: the images of a subject share a label and part of what a
model makes of them. The truth is the score of 400,000 images.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from probe.score import metrics, resampling
from probe.score.intervals import METHODS, intervals
from probe.score.paired import compare, delong_test
from probe.score.ranks import holm
from probe.score.winner import choose

SHOWN = ("auroc", "accuracy", "balanced_accuracy", "quadratic_kappa")
CASES = {  # subjects, images of each, share of the rarest class, separation, classes
    "10 subjects x 4": (10, 4, 0.5, 0.84, 2),
    "20 subjects x 4": (20, 4, 0.5, 0.84, 2),
    "50 subjects x 4": (50, 4, 0.5, 0.84, 2),
    "200 subjects x 4": (200, 4, 0.5, 0.84, 2),
    "20 images": (20, 1, 0.5, 0.84, 2),
    "75 images, 4 %": (75, 1, 0.04, 0.84, 2),
    "75 images, 4 %, easy": (75, 1, 0.04, 1.6, 2),
    "20 subjects x 4, easy": (20, 4, 0.5, 1.6, 2),
    "30 subjects x 3, 5 classes": (30, 3, 0.2, 1.0, 5),
    "100 subjects x 2, 5 %": (100, 2, 0.05, 1.0, 2),
}


def answers(rng, subjects, each, share, skill, K):
    """Return subject, labels and probabilities of one test set."""
    rest = (1 - share) / (K - 1)
    y = np.repeat(rng.choice(K, subjects, p=[rest] * (K - 1) + [share]), each)
    subject = np.repeat(np.arange(subjects), each)
    noise = np.repeat(rng.normal(size=subjects), each) * 0.8 + rng.normal(size=len(y)) * 0.6
    if K == 2:
        q = expit(skill * (2 * y - 1) + noise)
        return subject, y, np.stack([1 - q, q], axis=1)
    logits = -(((y + noise / skill)[:, None] - np.arange(K)) ** 2)
    p = np.exp(logits)
    return subject, y, p / p.sum(1, keepdims=True)


def pairs_of(rng, subjects, skills, scales, shifts, each=3):
    """Return subject, labels and the answers of models that share part of what they see."""
    y = np.repeat(rng.integers(0, 2, subjects), each)
    common = np.repeat(rng.normal(size=subjects), each) * 0.7
    p = []
    for skill, scale, shift in zip(skills, scales, shifts, strict=True):
        own = np.repeat(rng.normal(size=subjects), each) * 0.5 + rng.normal(size=len(y)) * 0.5
        q = expit(scale * (skill * (2 * y - 1) + common + own) + shift)
        p.append(np.stack([1 - q, q], axis=1))
    return np.repeat(np.arange(subjects), each), y, p


def cover(case: str, truth: dict[str, float], i: int) -> dict[tuple[str, str], tuple[bool, float]]:
    """Return whether each method's interval of each metric covers, and how wide it is."""
    subjects, each, share, skill, K = CASES[case]
    rng = np.random.default_rng([7, i])
    while True:  # a test set has at least two subjects of each class
        subject, y, p = answers(rng, subjects, each, share, skill, K)
        if np.bincount(y, minlength=K).min() >= 2 * each:
            break
    wanted = [metrics.find(name, "multiclass") for name in SHOWN]
    out = {}
    for method in METHODS:
        own = np.random.default_rng([8, i])
        found = intervals(wanted, y, p, subject, n=1000, rng=own, method=method)
        for name, one in found.items():
            low, high = one["ci_low"], one["ci_high"]
            there = low is not None and low <= truth[name] <= high
            out[name, method] = (there, np.nan if low is None else high - low)
    return out


def coverage(sims: int) -> Iterator[str]:
    """Yield the table of coverages."""
    heads = [f"{name} {method}" for name in SHOWN for method in METHODS]
    yield f"| 95 % intervals cover | {' | '.join(heads)} |"
    yield f"|---|{'---|' * len(heads)}"
    for case, (_, _, share, skill, K) in CASES.items():
        _, y, p = answers(np.random.default_rng(1), 400_000, 1, share, skill, K)
        truth = {
            name: float(metrics.evaluate(metrics.find(name, "multiclass"), y, p)[0])
            for name in SHOWN
        }
        found = simulated(partial(cover, case, truth), sims)
        cells = [
            f"{np.mean([one[name, method][0] for one in found]):.3f} "
            f"({np.nanmean([one[name, method][1] for one in found]):.2f})"
            for name in SHOWN
            for method in METHODS
        ]
        yield f"| {case} | {' | '.join(cells)} |"


PAIRS = {  # metric, subjects, skills, scales, shifts
    "null, AUROC": ("auroc", 40, (1, 1), (1, 1), (0, 0)),
    "null, AUROC, scales 1 and 6": ("auroc", 40, (1, 1), (1, 6), (0, 0)),
    "null, AUROC, scale 0.3, shift 2.5": ("auroc", 40, (1, 1), (1, 0.3), (0, 2.5)),
    "null, AUROC, shifts 3 and -3": ("auroc", 40, (1, 1), (1, 1), (3, -3)),
    "null, average precision, shift -4": ("average_precision", 40, (1, 1), (1, 1), (0, -4)),
    "null, AUROC, 15 subjects": ("auroc", 15, (1, 1), (1, 1), (0, 0)),
    "null, accuracy": ("accuracy", 40, (1, 1), (1, 1), (0, 0)),
    "null, kappa, scales 1 and 6": ("quadratic_kappa", 40, (1, 1), (1, 6), (0, 0)),
    "null, log-loss": ("log_loss", 40, (1, 1), (1, 1), (0, 0)),
    "better, AUROC": ("auroc", 60, (1.3, 0.8), (1, 1), (0, 0)),
    "better, AUROC, shifts 3 and -3": ("auroc", 60, (1.3, 0.8), (1, 1), (3, -3)),
    "better, AUROC, scale 0.3, shift 2.5": ("auroc", 60, (1.3, 0.8), (1, 0.3), (0, 2.5)),
    "better, average precision, shift -4": ("average_precision", 60, (1.3, 0.8), (1, 1), (0, -4)),
    "better, accuracy": ("accuracy", 60, (1.3, 0.8), (1, 1), (0, 0)),
}


def paired_case(case: str, i: int) -> tuple[bool, bool]:
    """Return whether p is at most 5 %, and whether the interval leaves 0 out."""
    name, subjects, skills, scales, shifts = PAIRS[case]
    subject, y, (a, b) = pairs_of(np.random.default_rng([9, i]), subjects, skills, scales, shifts)
    metric = metrics.find(name, "multiclass")
    found = compare(metric, y, a, b, subject, n=1000, rng=np.random.default_rng([10, i]))
    return found.p <= 0.05, not found.ci_low <= 0 <= found.ci_high


def paired(sims: int) -> Iterator[str]:
    """Yield the table of sizes and powers."""
    yield "| two models | p <= .05 | interval without 0 |\n|---|---|---|"
    for case in PAIRS:
        tested, outside = np.mean(simulated(partial(paired_case, case), sims), axis=0)
        yield f"| {case} | {tested:.3f} | {outside:.3f} |"
    for positives in (5, 10, 20):
        sizes = [one for one in simulated(partial(delong_case, positives), sims) if one is not None]
        said = f"{np.mean(sizes):.3f}" if sizes else "no test"
        yield f"| null, AUROC, DeLong, {positives} positive of 80 | {said} | |"


def delong_case(positives: int, i: int) -> bool | None:
    """Return whether DeLong's p of two equal models is at most 5 %."""
    rng = np.random.default_rng([11, i])
    truth = np.arange(80) < positives
    common = truth + rng.normal(size=80) * 0.7
    a, b = common + rng.normal(size=(2, 80)) * 0.7
    found = delong_test(truth, a, b)
    return found and found.p <= 0.05


CHOICES = {  # metric, images, skills
    "10 equal models, accuracy": ("accuracy", 300, [1.0] * 10),
    "10 equal models, AUROC": ("auroc", 300, [1.0] * 10),
    "10 equal models, accuracy, 60 images": ("accuracy", 60, [1.0] * 10),
    "2 equal at the top, 8 below": ("accuracy", 300, [1.0] * 2 + [0.5] * 8),
    "a slope of 10": ("accuracy", 300, list(np.linspace(1.0, 0.6, 10))),
    "1 clear winner of 10": ("accuracy", 300, [1.6] + [0.8] * 9),
}


def choice(case: str, i: int) -> tuple[float, ...]:
    """Return what was wrong, found and covered in one choice among models."""
    name, N, skills = CHOICES[case]
    rng = np.random.default_rng([2, i])
    y, base = rng.integers(0, 2, N), rng.normal(size=N)
    logits = [skill * (2 * y - 1) + 0.6 * base + 0.8 * rng.normal(size=N) for skill in skills]
    models = [np.stack([1 - expit(z), expit(z)], axis=1) for z in logits]
    metric, images = metrics.find(name, "multiclass"), np.arange(N)
    found = choose(
        metric, y, [[p] for p in models], images, n=1000, rng=np.random.default_rng([3, i])
    )
    skill = np.array(skills)
    truth = norm.cdf(skill[found.index] * (np.sqrt(2) if name == "auroc" else 1))
    below = np.array(found.p) < 0.05
    wrong = bool((below & (skill >= skill[found.index])).any())
    lower = skill < skill[found.index]
    power = below[lower].mean() if lower.any() else np.nan
    own = intervals(
        [metric], y, models[found.index], images, n=1000, rng=np.random.default_rng([4, i])
    )[name]
    return (
        wrong,
        power,
        own["ci_low"] <= truth <= own["ci_high"],
        found.ci_low <= truth <= found.ci_high,
        found.value - truth,
        found.estimate - truth,
    )


def pairwise_case(i: int) -> bool:
    """Return whether Holm's p of tests in pairs calls the best of 10 equal models better."""
    rng = np.random.default_rng([2, i])
    y, base = rng.integers(0, 2, 300), rng.normal(size=300)
    logits = [2 * y - 1 + 0.6 * base + 0.8 * rng.normal(size=300) for _ in range(10)]
    models = [np.stack([1 - expit(z), expit(z)], axis=1) for z in logits]
    metric = metrics.find("accuracy", "multiclass")
    best = int(np.argmax([metrics.evaluate(metric, y, p)[0] for p in models]))
    raw = [
        compare(metric, y, models[best], p, np.arange(300), n=400, rng=np.random.default_rng(0)).p
        for k, p in enumerate(models)
        if k != best
    ]
    return bool(min(holm(raw)) < 0.05)


def chosen(sims: int) -> Iterator[str]:
    """Yield the table of choices among models."""
    heads = "wrongly called better than any | of what is worse called so | its own interval covers"
    heads += " | corrected interval covers | score less truth | corrected less truth"
    yield f"| the best of 10 | {heads} |\n|---|{'---|' * 6}"
    for case in CHOICES:
        rows = np.array(simulated(partial(choice, case), sims), dtype=float)
        cells = [f"{v:.3f}" if np.isfinite(v) else "" for v in _means(rows)]
        yield f"| {case} | {' | '.join(cells)} |"
    wrong = np.mean(simulated(pairwise_case, sims))
    yield f"| 10 equal models, accuracy: tests in pairs, Holm | {wrong:.3f} | | | | | |"


def _means(rows):
    there = np.isfinite(rows)
    return np.where(there, rows, 0).sum(0) / np.where(there.any(0), there.sum(0), np.nan)


def simulated(one: Callable[[int], object], sims: int) -> list:
    """Return one(0), one(1), ..., made by all cores."""
    with ProcessPoolExecutor(initializer=_alone) as pool:
        return list(pool.map(one, range(sims), chunksize=10))


def _alone() -> None:
    resampling.os.cpu_count = lambda: 1  # processes are as many as there are cores


def main(sims: int = 1000, *only: str) -> None:
    """Print Markdown tables."""
    for name, table in (("coverage", coverage), ("paired", paired), ("chosen", chosen)):
        if only and name not in only:
            continue
        start = time.perf_counter()
        for line in table(sims):
            print(line, flush=True)
        took = time.perf_counter() - start
        print(f"\n{date.today()}, {sims} test sets a cell, {took:.0f} s, {os.cpu_count()} cores\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1000, *sys.argv[2:])
