"""Do models differ? Paired tests on one test set, ranks over many, the spread over seeds.

A model is what varies among the results: backbone, head, feature, protocol, ... (identity.py). Its
score on a data set is the mean over seeds, and so is what intervals and tests are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ContradictedError, ProbeError
from probe.identity import data_names, model_names
from probe.pairing import (
    chosen_among,
    in_order,
    interval_of_seeds,
    paired_tests,
    read_checked_predictions,
)
from probe.results import Predictions, Result, load
from probe.score import metrics
from probe.score.metric_names import resolve
from probe.score.paired import ALPHA, Difference
from probe.score.ranks import Ranks, ranks, wilcoxon_holm
from probe.score.winner import Winner


@dataclass(frozen=True)
class Score:
    """A model on a data set: mean over seeds, and their standard deviation (None of one seed)."""

    dataset: str
    model: str
    metric: str
    value: float
    deviation: float | None
    seeds: list[int]
    ci_low: float  # of the mean
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
    """The best trained model of a data set, held against others with the same test images.

    `chosen` has its corrected score, and p of it being better than each of `models` (itself first).
    """

    dataset: str
    metric: str
    models: list[str]
    chosen: Winner

    @property
    def sentence(self) -> str:
        """Say it, allowing for the search."""
        c = self.chosen
        worse = [name for name, p in zip(self.models, c.p, strict=True) if p < ALPHA]
        others = len(self.models) - 1
        named = f"{', '.join(worse)}" if 0 < len(worse) <= 3 else f"{len(worse)} of {others} others"
        verdict = "it is not distinguishable from any other"
        if worse:
            verdict = f"it is better than {named}"
        return (
            f"{self.dataset}: the best of {len(self.models)} is {self.models[0]}, "
            f"{self.metric} {c.value:.3f}; having been chosen on these images, it is estimated at "
            f"{c.estimate:.3f} [{c.ci_low:.3f}, {c.ci_high:.3f}]; {verdict} "
            f"(5 %, allowing for the search)"
        )


@dataclass(frozen=True)
class Comparison:
    """All that `medprobe compare` says. `ranks` and `wilcoxon` are in the order of `ranked`.

    Ranked are the models that were trained on the data sets they are tested on, if there are two;
    a head that was trained elsewhere is tested on few of the data sets, and is held in pairs only.
    """

    scores: list[Score]
    pairs: list[Pair]
    models: list[str]
    datasets: list[str]  # those on which every ranked model has a result
    ranks: Ranks | None
    wilcoxon: list[list[float]] | None  # Holm's adjusted p of every pair, over data sets
    notes: list[str] = field(default_factory=list)  # what a reader must know
    best: list[Best] = field(default_factory=list)  # of each data set with two models or more
    ranked: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def compare_results(
    sources: Sequence[Path], *, n: int = 2000, seed: int = 0, by: str | None = None
) -> Comparison:
    """Compare the models of results folders, of results by one metric where it is named.

    Raises ProbeError where there are no two models, or results of one data set by two metrics.
    """
    known = {result.identity.digest: (s, result) for s in sources for result in load(s)}
    rows = _by_metric(list(known.values()), by)
    identities = [result.identity for _, result in rows]
    names = model_names(identities)
    models = list(dict.fromkeys(names))
    if len(models) < 2:
        raise ProbeError(f"one model only ({', '.join(models)}): nothing to compare with")
    data = data_names(identities, [result.label_from for _, result in rows])
    on: dict[str, dict[str, list[tuple[Path, Result]]]] = {name: {} for name in data}
    for name, dataset, row in zip(names, data, rows, strict=True):
        on[dataset].setdefault(name, []).append(row)
    sets = []
    for dataset, of_models in on.items():
        read = [_Model.read(m, of_models[m]) for m in models if m in of_models]
        sets.append(_on_one_set(dataset, read, n=n, seed=seed))
    upwards = [{m.name: m.upwards for m in one.models if not m.refused} for one in sets]
    own = list(
        dict.fromkeys(n for n, one in zip(names, identities, strict=True) if not one.trained_on)
    )
    ranked = own if len(own) > 1 else models
    whole = [k for k, values in enumerate(upwards) if set(ranked) <= values.keys()]
    table = np.array([[upwards[k][m] for m in ranked] for k in whole])
    p = wilcoxon_holm(table) if whole else None
    notes = _several_ways([identity.data for identity in identities])
    return Comparison(
        scores=[score for one in sets for score in one.scores],
        pairs=[pair for one in sets for pair in one.pairs],
        models=models,
        datasets=[sets[k].dataset for k in whole],
        ranks=ranks(table) if whole else None,
        wilcoxon=None if p is None else p.tolist(),
        best=[one.best for one in sets if one.best],
        ranked=ranked,
        notes=notes + [note for one in sets for note in one.notes],
    )


def _by_metric(rows: list[tuple[Path, Result]], asked: str | None) -> list[tuple[Path, Result]]:
    """Return the results by one metric, where one is named."""
    if not asked:
        return rows
    used = {result.metric for _, result in rows}
    metric = resolve(asked, used)
    kept = [row for row in rows if row[1].metric == metric]
    if not kept:
        raise ProbeError(f"no result by {asked}: found {', '.join(sorted(used))}")
    return kept


@dataclass(frozen=True)
class _Model:
    """A model on one data set: its results by seed, their predictions or why there are none."""

    name: str
    results: list[Result]
    predictions: list[Predictions]
    missing: str = ""
    refused: bool = False  # its predictions don't score what its rows say

    @classmethod
    def read(cls, name: str, rows: Sequence[tuple[Path, Result]]) -> _Model:
        """Read the predictions of results, each in the folder or file it was found in."""
        rows = sorted(rows, key=lambda row: row[1].seed)
        results = [result for _, result in rows]
        folders = [source if source.is_dir() else source.parent for source, _ in rows]
        try:
            pairs = zip(folders, results, strict=True)
            read = [in_order(read_checked_predictions(folder, result)) for folder, result in pairs]
        except ProbeError as error:
            return cls(name, results, [], str(error), isinstance(error, ContradictedError))
        return cls(name, results, read)

    @property
    def upwards(self) -> float:
        """Return its mean score over seeds, negated where less is better."""
        value = float(np.mean([result.value for result in self.results]))
        first = self.results[0]
        return value if metrics.find(first.metric, first.task).higher else -value


@dataclass(frozen=True)
class _OneSet:
    """The comparison of the models of one data set."""

    dataset: str
    models: list[_Model]
    scores: list[Score]
    pairs: list[Pair]
    best: Best | None
    notes: list[str]


def _on_one_set(dataset: str, models: list[_Model], *, n: int, seed: int) -> _OneSet:
    """Compare the models of one data set. Raises ProbeError for results by two metrics."""
    results = [result for model in models for result in model.results]
    used = sorted({result.metric for result in results})
    if len(used) > 1:
        raise ProbeError(f"{dataset} has results by {', '.join(used)}: name one by --metric")
    metric = metrics.find(results[0].metric, results[0].task)
    pairs = _pairs(dataset, metric, models, n=n, seed=seed)
    notes = [
        f"{m.name} {'is left out' if m.refused else 'is in no test'}: {m.missing}"
        for m in models
        if m.missing
    ]
    notes += list(dict.fromkeys(result.few for result in results if result.few))
    untrained = [m.name for m in models if m.results[0].weights == "random"]
    notes += [f"{name} is untrained, so never the best" for name in untrained]
    trained = [m for m in models if m.predictions and m.name not in untrained]
    return _OneSet(
        dataset,
        models,
        scores=[_score(dataset, m, metric, n=n, seed=seed) for m in models if not m.refused],
        pairs=pairs,
        best=_best(dataset, metric, trained, pairs, n=n, seed=seed),
        notes=[f"{dataset}: {note}" for note in notes],
    )


def _pairs(
    dataset: str, metric: metrics.Metric, models: Sequence[_Model], *, n: int, seed: int
) -> list[Pair]:
    """Test every pair of models, those without predictions last."""
    ordered = sorted(models, key=lambda model: bool(model.missing))
    pairs = list(combinations(ordered, 2))
    tests = paired_tests(metric, [(a.predictions, b.predictions) for a, b in pairs], n=n, seed=seed)
    return [
        Pair(
            *(dataset, metric.name, a.name, b.name, test.difference, test.p_holm),
            why_not="; ".join(m.missing for m in (a, b) if m.missing) or test.why_not,
        )
        for (a, b), test in zip(pairs, tests, strict=True)
    ]


def _best(
    dataset: str,
    metric: metrics.Metric,
    models: Sequence[_Model],
    pairs: Sequence[Pair],
    *,
    n: int,
    seed: int,
) -> Best | None:
    """Return the best of trained models, held against the others; None where there is no other."""
    order = sorted(models, key=lambda model: (-model.upwards, model.name))
    if not order:
        return None
    kept, chosen = chosen_among(metric, [model.predictions for model in order], n=n, seed=seed)
    if not chosen:
        return None
    among = [order[k].name for k in kept]
    own = {frozenset((pair.a, pair.b)): pair.difference for pair in pairs}
    tested = [own.get(frozenset((among[0], name))) for name in among]
    sure = chosen.no_surer_than([test.p if test else None for test in tested])
    return Best(dataset, metric.name, among, sure)


def _several_ways(data: Sequence[tuple[str, str, str]]) -> list[str]:
    """Say which data sets have several splits or labels among the results."""
    names = [name for name, _, _ in set(data)]
    return [
        f"{name} is split or labelled in {names.count(name)} ways: "
        "models are compared within each, not across"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]


def _score(dataset: str, model: _Model, metric: metrics.Metric, *, n: int, seed: int) -> Score:
    """Return a model's score; of several seeds with the interval of their mean."""
    values = [result.value for result in model.results]
    first, predictions = model.results[0], model.predictions
    of_mean = interval_of_seeds(metric, predictions, n=n, seed=seed)
    low, high = of_mean or (first.ci_low, first.ci_high)
    return Score(
        dataset=dataset,
        model=model.name,
        metric=first.metric,
        value=float(np.mean(values)),
        deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        seeds=[result.seed for result in model.results],
        ci_low=low,
        ci_high=high,
    )
