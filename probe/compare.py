"""Do models differ? Paired tests on one test set, ranks over many, the spread over seeds.

A model is what varies among the results: backbone, head, feature, protocol, ... (identity.py). Its
score on a data set is the mean over seeds; a paired test takes the predictions of its first seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from probe import metrics
from probe.identity import data_names, model_names
from probe.ranks import Ranks, holm, ranks, wilcoxon_holm
from probe.results import Predictions, Result, load, read_predictions
from probe.statistics import Difference, compare, delong_test

AGREE = 1e-6  # predictions whose score differs more from their row's are another result's


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
class Comparison:
    """All that `medprobe compare` says. `ranks` is in the order of `models`."""

    scores: list[Score]
    pairs: list[Pair]
    models: list[str]
    datasets: list[str]  # those on which every model has a result
    ranks: Ranks | None
    wilcoxon: list[list[float]] | None  # Holm's adjusted p of every pair, over data sets

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def compare_results(sources: Sequence[Path], *, n: int = 2000, seed: int = 0) -> Comparison:
    """Compare the models of results folders.

    Raises ProbeError where there are no two models, or results of one data set by two metrics.
    """
    found = [(source, result) for source in sources for result in load(source)]
    identities = [result.identity for _, result in found]
    names = model_names(identities)
    if len(set(names)) < 2:
        raise ProbeError(f"one model only ({', '.join(set(names))}): nothing to compare with")
    cells: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    for name, data, pair in zip(names, data_names(identities), found, strict=True):
        cells.setdefault((data, name), []).append(pair)
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
    pairs = []
    for dataset in datasets:
        there = [model for model in models if (dataset, model) in cells]
        pairs += _pairs(dataset, {m: cells[dataset, m][0] for m in there}, n=n, seed=seed)
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
    )


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


def _pairs(dataset: str, runs: dict[str, tuple[Path, Result]], *, n: int, seed: int) -> list[Pair]:
    said: dict[str, Predictions] = {}
    missing: dict[str, str] = {}
    for model, (source, result) in runs.items():
        try:
            folder = source if source.is_dir() else source.parent
            said[model] = in_order(predictions_of(folder, result))
        except ProbeError as error:
            missing[model] = str(error)
    out = []
    for a, b in combinations(runs, 2):
        result = runs[a][1]
        pair = Pair(dataset, result.metric, a, b, None, None)
        gone = [missing[model] for model in (a, b) if model in missing]
        if why_not := "; ".join(gone) or unpaired(said[a], said[b]):
            out.append(replace(pair, why_not=why_not))
            continue
        metric = metrics.find(result.metric, result.task)
        out.append(replace(pair, difference=paired_test(metric, said[a], said[b], n=n, seed=seed)))
    raw = [pair.difference.p for pair in out if pair.difference]
    adjusted = iter(holm(raw).tolist())
    return [replace(pair, p_holm=next(adjusted)) if pair.difference else pair for pair in out]


def predictions_of(folder: Path, result: Result) -> Predictions:
    """Read a result's predictions. ProbeError where they are not there, or not this result's.

    They are scored again: the score and the number of images must be those of the row.
    """
    path = folder / result.predictions
    said = read_predictions(path)
    metric = metrics.METRICS.get((result.task, result.metric))
    value = float(metrics.evaluate(metric, said.labels, said.probabilities)[0]) if metric else None
    differ = [
        f"{name} {found:.6g}, in the row {wanted:.6g}"
        for name, found, wanted, close in (
            ("images", len(said.ids), result.n_test, 0),
            (result.metric, value, result.value, AGREE),
        )
        if found is not None and not abs(found - wanted) <= close
    ]
    if differ:
        raise ProbeError(
            f"{path} is not what its row in results.jsonl says ({'; '.join(differ)}): "
            f"run it again: {result.command}"
        )
    return said


def unpaired(a: Predictions, b: Predictions) -> str:
    """Say why predictions, each in the order of their ids, make no pairs; "" where they do."""
    same = a.ids == b.ids and np.array_equal(a.labels, b.labels, equal_nan=True)
    return "" if same else "not the same test images and labels"


def paired_test(
    metric: metrics.Metric, a: Predictions, b: Predictions, *, n: int, seed: int
) -> Difference:
    """Return DeLong's test for the AUROC of two classes and independent images, else resampling."""
    y, subjects = np.asarray(a.labels), np.asarray(a.subjects)
    independent = len(set(a.subjects)) == len(subjects)
    if metric.name == "auroc" and y.ndim == 1 and len(a.classes) == 2 and independent:
        return delong_test(y == 1, a.probabilities[:, 1], b.probabilities[:, 1])
    rng = np.random.default_rng(seed)
    return compare(metric, y, a.probabilities, b.probabilities, subjects, n=n, rng=rng)


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
