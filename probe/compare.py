"""Do models differ? Paired tests on one test set, ranks over many, the spread over seeds.

A model is what varies among the results: backbone, head, feature, protocol, ... (identity.py). Its
score on a data set is the mean over seeds, and so is what intervals and tests are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ContradictedError, ProbeError
from probe.identity import data_names, model_names
from probe.results import Predictions, Result, load, read_predictions
from probe.score import metrics
from probe.score.intervals import interval_of_mean
from probe.score.metric_names import resolve
from probe.score.paired import ALPHA, Difference, compare, delong_test
from probe.score.ranks import Ranks, holm, ranks, wilcoxon_holm
from probe.score.winner import Winner, choose

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
    notes: list[str] = field(default_factory=list)  # what a reader must know
    best: list[Best] = field(default_factory=list)  # of each data set with two models or more

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
    found = list(known.values())
    if by:
        used = {result.metric for _, result in found}
        named = resolve(by, used)
        found = [(source, result) for source, result in found if result.metric == named]
        if not found:
            raise ProbeError(f"no result by {by}: found {', '.join(sorted(used))}")
    identities = [result.identity for _, result in found]
    names = model_names(identities)
    if len(set(names)) < 2:
        raise ProbeError(f"one model only ({', '.join(set(names))}): nothing to compare with")
    cells: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    data = data_names(identities, [result.label_from for _, result in found])
    for name, dataset, pair in zip(names, data, found, strict=True):
        cells.setdefault((dataset, name), []).append(pair)
    for runs in cells.values():
        runs.sort(key=lambda pair: pair[1].seed)
    datasets = list(dict.fromkeys(dataset for dataset, _ in cells))
    models = list(dict.fromkeys(names))
    for dataset in datasets:
        used = {run[1].metric for m in models for run in cells.get((dataset, m), [])}
        if len(used) > 1:
            raise ProbeError(
                f"{dataset} has results by {', '.join(sorted(used))}: name one by --metric"
            )
    scores = {key: _score(*key, [result for _, result in runs]) for key, runs in cells.items()}
    notes = _several_ways([identity.data for identity in identities])
    pairs, best = [], []
    false: set[tuple[str, str]] = set()  # whose rows say what their predictions don't
    for dataset in datasets:
        there = {model: cells[dataset, model] for model in models if (dataset, model) in cells}
        said, missing, refused = _said(there)
        for model, why in missing.items():
            how = "is left out" if model in refused else "is in no test"
            notes.append(f"{dataset}: {model} {how}: {why}")
        false |= {(dataset, model) for model in refused}
        first = next(iter(there.values()))[0][1]
        metric = metrics.find(first.metric, first.task)
        for model, seeds in said.items():
            scores[dataset, model] = _with_interval(
                scores[dataset, model], metric, seeds, n=n, seed=seed
            )
        tested = _pairs(dataset, metric, said, missing, n=n, seed=seed)
        pairs += tested
        notes += _few(dataset, [result for runs in there.values() for _, result in runs])
        score = {model: _better_is_more(scores[dataset, model], cells) for model in there}
        untrained = [m for m, runs in there.items() if runs[0][1].weights == "random"]
        notes += [f"{dataset}: {model} is untrained, so never the best" for model in untrained]
        order = sorted({*said} - {*untrained}, key=lambda model: (-score[model], model))
        answers = [said[m] for m in order]
        kept, chosen = chosen_among(metric, answers, n=n, seed=seed) if order else ([], None)
        if chosen:
            among = [order[k] for k in kept]
            best.append(Best(dataset, metric.name, among, _no_surer(chosen, among, tested)))
    scores = {key: score for key, score in scores.items() if key not in false}
    whole = [d for d in datasets if all((d, m) in scores for m in models)]
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
        notes=notes,
    )


def _several_ways(data: Sequence[tuple[str, str, str]]) -> list[str]:
    """Say which data sets have several splits or labels among the results."""
    names = [name for name, _, _ in set(data)]
    return [
        f"{name} is split or labelled in {names.count(name)} ways: "
        "models are compared within each, not across"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]


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


def _with_interval(
    score: Score, metric: metrics.Metric, seeds: Sequence[Predictions], *, n: int, seed: int
) -> Score:
    """Return a score of several seeds with the interval of their mean."""
    alike = [p for p in seeds if not unpaired(seeds[0], p)]
    if len(seeds) == 1 or len(alike) < len(seeds):
        return score
    y, subjects = np.asarray(seeds[0].labels), np.asarray(seeds[0].subjects)
    answers, rng = [p.scores(metric) for p in seeds], np.random.default_rng(seed)
    low, high = interval_of_mean(metric, y, answers, subjects, n=n, rng=rng)
    return replace(score, ci_low=low, ci_high=high)


def _few(dataset: str, results: Sequence[Result]) -> list[str]:
    return [f"{dataset}: {said}" for said in dict.fromkeys(r.few for r in results) if said]


def _no_surer(chosen: Winner, models: Sequence[str], pairs: Sequence[Pair]) -> Winner:
    """Return what was chosen with no p below that of the pair's own test, which knows no search."""
    own = {frozenset((pair.a, pair.b)): pair.difference for pair in pairs if pair.difference}
    p = [
        max(p, own[key].p) if (key := frozenset((models[0], model))) in own else p
        for model, p in zip(models, chosen.p, strict=True)
    ]
    return replace(chosen, p=p)


def _better_is_more(score: Score, cells: dict[tuple[str, str], list[tuple[Path, Result]]]) -> float:
    task = cells[score.dataset, score.model][0][1].task
    return score.value if metrics.find(score.metric, task).higher else -score.value


def _said(
    runs: Mapping[str, Sequence[tuple[Path, Result]]],
) -> tuple[dict[str, list[Predictions]], dict[str, str], set[str]]:
    """Return each model's predictions by seed, of those that can't be used why, and who is refused.

    Refused are models whose predictions don't score what their rows say.
    """
    said, missing, refused = {}, {}, set()
    for model, found in runs.items():
        try:
            folders = [s if s.is_dir() else s.parent for s, _ in found]
            pairs = zip(folders, found, strict=True)
            said[model] = [
                in_order(read_checked_predictions(folder, r)) for folder, (_, r) in pairs
            ]
        except ContradictedError as error:
            missing[model] = str(error)
            refused.add(model)
        except ProbeError as error:
            missing[model] = str(error)
    return said, missing, refused


def _pairs(
    dataset: str,
    metric: metrics.Metric,
    said: Mapping[str, Sequence[Predictions]],
    missing: Mapping[str, str],
    *,
    n: int,
    seed: int,
) -> list[Pair]:
    """Test every pair of models; of those without predictions, `missing` says why."""
    out = []
    for a, b in combinations([*said, *missing], 2):
        gone = "; ".join(missing[model] for model in (a, b) if model in missing)
        why_not = gone or unpaired(said[a][0], said[b][0])
        out.append(Pair(dataset, metric.name, a, b, None, None, why_not))
    count = sum(not pair.why_not for pair in out)
    for k, pair in enumerate(out):
        if not pair.why_not:
            found = paired_test(metric, said[pair.a], said[pair.b], n=n, seed=seed, pairs=count)
            out[k] = replace(pair, difference=found)
    raw = [pair.difference.p for pair in out if pair.difference]
    adjusted = iter(holm(raw).tolist())
    return [replace(pair, p_holm=next(adjusted)) if pair.difference else pair for pair in out]


def read_checked_predictions(folder: Path, result: Result) -> Predictions:
    """Read a result's predictions. ProbeError where they are not there.

    They are scored again: the score and the number of images must be those of the row. Raises
    ContradictedError where they are not.
    """
    path = folder / result.predictions
    said = read_predictions(path)
    metric = metrics.METRICS.get((result.task, result.metric))
    value = float(metrics.evaluate(metric, said.labels, said.scores(metric))[0]) if metric else None
    differ = [
        f"{name} {found:.6g}, in the row {wanted:.6g}"
        for name, found, wanted, close in (
            ("images", len(said.ids), result.n_test, 0),
            (result.metric, value, result.value, AGREE),
        )
        if found is not None and not abs(found - wanted) <= close
    ]
    if differ:
        raise ContradictedError(
            f"{path} is not what its row in results.jsonl says ({'; '.join(differ)}): "
            f"run it again: {result.command}",
            "; ".join(differ),
        )
    return said


def chosen_among(
    metric: metrics.Metric, answers: Sequence[Sequence[Predictions]], *, n: int, seed: int
) -> tuple[list[int], Winner | None]:
    """Return which models have the test images of the first, the best, and how it compares.

    A model is the predictions of its seeds; where seeds differ in their images, of the first of
    them. Winner is None where there is no second model.
    """
    first = answers[0][0]
    kept = [k for k, seeds in enumerate(answers) if not unpaired(first, seeds[0])]
    if len(kept) < 2:
        return kept, None
    models = [[s.scores(metric) for s in answers[k] if not unpaired(first, s)] for k in kept]
    rng = np.random.default_rng(seed)
    y, subjects = np.asarray(first.labels), np.asarray(first.subjects)
    return kept, choose(metric, y, models, subjects, n=n, rng=rng, best=0)


def unpaired(a: Predictions, b: Predictions) -> str:
    """Say why predictions, each in the order of their ids, make no pairs; "" where they do."""
    same = a.ids == b.ids and np.array_equal(a.labels, b.labels, equal_nan=True)
    return "" if same else "not the same test images and labels"


def paired_test(
    metric: metrics.Metric,
    ours: Sequence[Predictions],
    theirs: Sequence[Predictions],
    *,
    n: int,
    seed: int,
    pairs: int = 1,
) -> Difference:
    """Return DeLong's test for the AUROC of two classes and independent images, else resampling.

    A model is the predictions of its seeds, and its score their mean; seeds with other test images
    than the first of `ours` are left out. DeLong's is for one seed each, and not for few images of
    a class or no variance. `pairs` is for how many p will be adjusted.
    """
    first = ours[0]
    a, b = ([p for p in side if not unpaired(first, p)] for side in (ours, theirs))
    y, subjects = np.asarray(first.labels), np.asarray(first.subjects)
    independent = len(set(first.subjects)) == len(subjects)
    binary = metric.name == "auroc" and y.ndim == 1 and len(first.classes) == 2
    if binary and independent and len(a) == len(b) == 1:
        found = delong_test(y == 1, a[0].log_odds[:, 1], b[0].log_odds[:, 1])
        if found:
            return found
    scores_a, scores_b = ([p.scores(metric) for p in side] for side in (a, b))
    rng = np.random.default_rng(seed)
    return compare(metric, y, scores_a, scores_b, subjects, n=n, rng=rng, pairs=pairs)


def in_order(predictions: Predictions) -> Predictions:
    """Return predictions in the order of their ids."""
    order: NDArray[np.int64] = np.argsort(np.asarray(predictions.ids))
    return Predictions(
        ids=[predictions.ids[i] for i in order],
        subjects=[predictions.subjects[i] for i in order],
        labels=predictions.labels[order],
        probabilities=predictions.probabilities[order],
        classes=predictions.classes,
        log_odds=predictions.log_odds[order],
    )
