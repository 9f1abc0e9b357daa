"""Do models differ? Paired tests on one test set, ranks over many, the spread over seeds.

A model is what varies among the results: backbone, head, feature, protocol, ... Its score on a data
set is the mean over seeds; a paired test takes the predictions of its first seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from probe import metrics
from probe.paired import ALPHA, Difference, compare, delong_test
from probe.ranks import Ranks, holm, ranks, wilcoxon_holm
from probe.results import Predictions, Result, load, read_predictions
from probe.selection import Chosen, choose

PARTS = ("backbone", "weights", "scenario", "head", "feature", "protocol", "scored_by")


@dataclass(frozen=True)
class Score:
    """A model on a data set: mean over seeds, and their standard deviation (None of one seed)."""

    dataset: str
    model: str
    metric: str
    value: float
    deviation: float | None
    seeds: list[int]
    ci_low: float  # of the first seed
    ci_high: float


@dataclass(frozen=True)
class Pair:
    """a minus b on one data set; p_holm is p adjusted for the data set's number of pairs."""

    dataset: str
    metric: str
    a: str
    b: str
    difference: Difference | None
    p_holm: float | None
    why_not: str = ""


@dataclass(frozen=True)
class Best:
    """The best model of a data set, held against those with the same test images.

    `chosen` has its corrected score, and p of it being better than each of `models` (itself first).
    """

    dataset: str
    metric: str
    models: list[str]
    chosen: Chosen

    @property
    def sentence(self) -> str:
        """Say it, allowing for the search."""
        c = self.chosen
        worse = [name for name, p in zip(self.models, c.p, strict=True) if p < ALPHA]
        others = len(self.models) - 1
        said = f"{', '.join(worse)}" if 0 < len(worse) <= 3 else f"{len(worse)} of {others} others"
        found = f"it is better than {said}" if worse else "it is not distinguishable from any other"
        return (
            f"{self.dataset}: the best of {len(self.models)} is {self.models[0]}, "
            f"{self.metric} {c.value:.3f}; having been chosen on these images, it is estimated at "
            f"{c.estimate:.3f} [{c.ci_low:.3f}, {c.ci_high:.3f}]; {found} "
            f"(5 %, allowing for the search)"
        )


@dataclass(frozen=True)
class Comparison:
    """All that `medprobe compare` says. `ranks` is in the order of `models`."""

    scores: list[Score]
    pairs: list[Pair]
    models: list[str]
    datasets: list[str]  # those on which every model has a result
    ranks: Ranks | None
    wilcoxon: list[list[float]] | None  # Holm's adjusted p of every pair, over data sets
    best: list[Best] = field(default_factory=list)  # of each data set with two models or more

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def compare_results(sources: Sequence[Path], *, n: int = 2000, seed: int = 0) -> Comparison:
    """Compare the models of results folders.

    Raises ProbeError where there are no two models, or results of one data set by two metrics.
    """
    found = [(source, result) for source in sources for result in load(source)]
    names = _model_names([result for _, result in found])
    if len(set(names)) < 2:
        raise ProbeError(f"one model only ({', '.join(set(names))}): nothing to compare with")
    cells: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    for name, pair in zip(names, found, strict=True):
        cells.setdefault((pair[1].dataset, name), []).append(pair)
    for runs in cells.values():
        runs.sort(key=lambda pair: pair[1].seed)
    datasets = list(dict.fromkeys(dataset for dataset, _ in cells))
    models = list(dict.fromkeys(names))
    for dataset in datasets:
        used = {run[1].metric for m in models for run in cells.get((dataset, m), [])}
        if len(used) > 1:
            raise ProbeError(
                f"{dataset} has results by {', '.join(sorted(used))}: give one folder per metric"
            )
    scores = {key: _score(*key, [result for _, result in runs]) for key, runs in cells.items()}
    pairs, best = [], []
    for dataset in datasets:
        there = {model: cells[dataset, model] for model in models if (dataset, model) in cells}
        said = {model: [_said(*run) for run in runs] for model, runs in there.items()}
        first = next(iter(there.values()))[0][1]
        metric = metrics.find(first.metric, first.task)
        pairs += _pairs(dataset, metric, {m: of[0] for m, of in said.items()}, n=n, seed=seed)
        score = {model: _better_is_more(scores[dataset, model], cells) for model in there}
        order = sorted(there, key=lambda model: -score[model])
        kept, chosen = chosen_among(metric, [said[m] for m in order], n=n, seed=seed)
        if chosen:
            best.append(Best(dataset, metric.name, [order[k] for k in kept], chosen))
    whole = [d for d in datasets if all((d, m) in cells for m in models)]
    table = np.array([[_better_is_more(scores[d, m], cells) for m in models] for d in whole])
    p = wilcoxon_holm(table) if len(whole) else None
    return Comparison(
        scores=list(scores.values()),
        pairs=pairs,
        models=models,
        datasets=whole,
        ranks=ranks(table) if len(whole) else None,
        wilcoxon=None if p is None else p.tolist(),
        best=best,
    )


def _model_names(results: Sequence[Result]) -> list[str]:
    """Return each result's model: the backbone, and of the other parts those that vary."""
    varying = [part for part in PARTS[1:] if len({getattr(r, part) for r in results}) > 1]
    return [" ".join(str(getattr(r, part)) for part in ("backbone", *varying)) for r in results]


def _score(dataset: str, model: str, results: Sequence[Result]) -> Score:
    values = [result.value for result in results]
    first = results[0]
    return Score(
        dataset=dataset,
        model=model,
        metric=first.metric,
        value=float(np.mean(values)),
        deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        seeds=[result.seed for result in results],
        ci_low=first.ci_low,
        ci_high=first.ci_high,
    )


def _better_is_more(score: Score, cells: dict[tuple[str, str], list[tuple[Path, Result]]]) -> float:
    task = cells[score.dataset, score.model][0][1].task
    return score.value if metrics.find(score.metric, task).higher else -score.value


def _said(source: Path, result: Result) -> Predictions:
    folder = source if source.is_dir() else source.parent
    return in_order(read_predictions(folder / result.predictions))


def _pairs(
    dataset: str, metric: metrics.Metric, said: dict[str, Predictions], *, n: int, seed: int
) -> list[Pair]:
    """Test every pair of models, each by the predictions of its first seed."""
    out = [
        Pair(dataset, metric.name, a, b, None, None, unpaired(said[a], said[b]))
        for a, b in combinations(said, 2)
    ]
    count = sum(not pair.why_not for pair in out)
    for k, pair in enumerate(out):
        if not pair.why_not:
            a, b = said[pair.a], said[pair.b]
            found = paired_test(metric, a, b, n=n, seed=seed, pairs=count)
            out[k] = replace(pair, difference=found)
    raw = [pair.difference.p for pair in out if pair.difference]
    adjusted = iter(holm(raw).tolist())
    return [replace(pair, p_holm=next(adjusted)) if pair.difference else pair for pair in out]


def chosen_among(
    metric: metrics.Metric, answers: Sequence[Sequence[Predictions]], *, n: int, seed: int
) -> tuple[list[int], Chosen | None]:
    """Return which models have the test images of the first, the best, and how it compares.

    A model is the predictions of its seeds; where seeds differ in their images, of the first of
    them. Chosen is None where there is no second model.
    """
    first = answers[0][0]
    kept = [k for k, seeds in enumerate(answers) if not unpaired(first, seeds[0])]
    if len(kept) < 2:
        return kept, None
    models = [[s.probabilities for s in answers[k] if not unpaired(first, s)] for k in kept]
    rng = np.random.default_rng(seed)
    y, subjects = np.asarray(first.labels), np.asarray(first.subjects)
    return kept, choose(metric, y, models, subjects, n=n, rng=rng, best=0)


def unpaired(a: Predictions, b: Predictions) -> str:
    """Say why predictions, each in the order of their ids, make no pairs; "" where they do."""
    same = a.ids == b.ids and np.array_equal(a.labels, b.labels, equal_nan=True)
    return "" if same else "not the same test images and labels"


def paired_test(
    metric: metrics.Metric, a: Predictions, b: Predictions, *, n: int, seed: int, pairs: int = 1
) -> Difference:
    """Return DeLong's test for the AUROC of two classes and independent images, else resampling.

    Resampling also where DeLong's can't be made: few images of a class, or no variance. `pairs` is
    for how many p will be adjusted.
    """
    y, subjects = np.asarray(a.labels), np.asarray(a.subjects)
    independent = len(set(a.subjects)) == len(subjects)
    if metric.name == "auroc" and y.ndim == 1 and len(a.classes) == 2 and independent:
        found = delong_test(y == 1, a.probabilities[:, 1], b.probabilities[:, 1])
        if found:
            return found
    return compare(
        metric,
        y,
        a.probabilities,
        b.probabilities,
        subjects,
        n=n,
        rng=np.random.default_rng(seed),
        pairs=pairs,
    )


def in_order(predictions: Predictions) -> Predictions:
    """Return predictions in the order of their ids."""
    order: NDArray[np.int64] = np.argsort(np.asarray(predictions.ids))
    return Predictions(
        ids=[predictions.ids[i] for i in order],
        subjects=[predictions.subjects[i] for i in order],
        labels=predictions.labels[order],
        probabilities=predictions.probabilities[order],
        classes=predictions.classes,
    )
