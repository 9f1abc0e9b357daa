"""One store in, results out.

Choose C (or k) on folds of the training rows, refit on all of them, test once. A cell is a feature,
a number of shots and a seed; all cells of a feature with as many shots are fitted together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.errors import ProbeError
from features.manifest import Manifest
from features.store import FeatureStore
from probe import choose, protocols, results, splits
from probe.choose import Fit, Selection, TrainingSet
from probe.data import Data, Features, load
from probe.heads import Head, fit_heads
from probe.identity import data_of
from probe.likeness import Seen, measure
from probe.score import evaluation, metrics
from probe.solve.path import Progress
from probe.tested import audited, metric_of, predictions_of, remarks, scored, tested


@dataclass(frozen=True)
class Settings(evaluation.Scoring):
    """How to probe. None takes the protocol's, the store's or the task's own."""

    protocol: str = "dinov2-logreg"
    head: str | None = None  # linear or knn
    feature: str | None = None  # "all": every vector in the store
    metric: str | None = None
    C: tuple[float, ...] | None = None
    k: tuple[int, ...] | None = None
    temperature: float | None = None
    folds: int | None = None
    shots: tuple[int | None, ...] | None = None  # training images per class; None in it: all
    seeds: int | None = None  # draws of each number of shots
    control: str | None = None  # "shuffle": fit to shuffled labels as well
    uncertain: str = "zeros"  # what -1 and an empty cell count as: zeros, ones (-1 only), ignore
    strict_splits: bool = False  # refuse splits that leak
    device: str = "cpu"
    tol: float = 1e-6
    fit: Fit = fit_heads  # of linear heads: in this process, or over rows that others hold

    def of_head(self, C: Sequence[float]) -> dict[str, Any]:
        """Return what changes the head beyond an Identity's own fields; `filled` settings only.

        C are the strengths tried, whoever named them.
        """
        if self.head == "knn":
            found: dict[str, Any] = {"k": list(self.k or ()), "temperature": self.temperature}
        else:
            found = {"C": list(C), "tol": self.tol}
        return found | {"folds": self.folds}

    def filled(self) -> Settings:
        """Return the settings with the protocol's values where none is given.

        Raises ProbeError where the protocol has none for the head.
        """
        protocol = protocols.find(self.protocol)
        head = self.head or protocol.head
        if head != protocol.head and self.protocol != Settings.protocol:
            raise ProbeError(f"protocol {protocol.name} has a {protocol.head} head, not {head}")
        if protocol.trained:
            raise ProbeError(
                f"protocol {protocol.name} trains its head by epochs: see probe.train.finetune"
            )
        if self.C and (protocol.l2 is not None or protocol.per_size is not None):
            raise ProbeError(f"protocol {protocol.name} has its own penalty: leave --C out")
        if head == "knn" and self.C:
            raise ProbeError("a knn head has no strengths: leave --C out, or take --head linear")
        if head != "knn" and (self.k or self.temperature):
            raise ProbeError("--k and --temperature are of --head knn: leave them out")
        if head == "knn":
            protocol = protocols.find("knn") if protocol.head != "knn" else protocol
        return replace(
            self,
            protocol=protocol.name,
            head=head,
            C=tuple(sorted(self.C or protocol.C)),
            k=tuple(sorted(self.k or protocol.k)),
            temperature=self.temperature or protocol.temperature,
            folds=self.folds or protocol.folds,
            shots=self.shots or protocol.shots,
            seeds=self.seeds or protocol.seeds,
        )


def probe(path: Path, **given: Any) -> results.Result:
    """Probe a store where the settings ask for one result; see probe_all."""
    [result] = probe_all(path, **given)
    return result


def probe_all(
    path: Path,
    *,
    out: Path,
    settings: Settings | None = None,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> list[results.Result]:
    """Probe a store and return a result per feature, number of shots and seed.

    Writes heads, predictions and lines of results.jsonl into `out`. Raises StoreError for a store
    that can't be read, ProbeError for labels or options no head can be fitted to.
    """
    settings = (settings or Settings()).filled()
    found = []
    with FeatureStore.open(path) as store:
        manifest = store.manifest()
        metric = metric_of(manifest, settings.metric)
        leaks = audited(store, manifest, strict=settings.strict_splits)
        for feature in _features(store, settings.feature):
            data = load(store, manifest, feature, settings.uncertain, settings.device)
            evaluation.check(manifest, data.rows[~data.train], data.y[~data.train], settings)
            for shots in settings.shots or ():
                started = time.perf_counter()
                subsets = _training_sets(manifest, data, settings, shots)
                chosen = _choose(data, subsets, settings, manifest, metric, progress)
                controls = _control(data, subsets, settings, manifest, metric)
                seconds = (time.perf_counter() - started) / len(subsets)
                about = {"command": command, "versions": dict(versions or {})}
                cell = _Cell(store, manifest, metric, feature, data, settings, leaks, out, about)
                for subset, one, control in zip(subsets, chosen, controls, strict=True):
                    found.append(cell.test(subset, one, control, seconds))
    return found


def _features(store: FeatureStore, asked: str | None) -> list[str]:
    if asked != "all":
        return [asked or store.default_feature]
    return [name for name, shape in store.features.items() if len(shape) == 1]


def _training_sets(
    manifest: Manifest, data: Data, settings: Settings, shots: int | None
) -> list[TrainingSet]:
    """Return the training sets of a number of shots, one per seed; all rows once."""
    train, k = np.flatnonzero(data.train), settings.folds or 0
    if shots is None:
        k = _check_folds(k, manifest, data)
        folds = splits.folds(manifest, data.rows[train], k=k, seed=settings.seed)
        return [TrainingSet(np.arange(len(train)), folds, settings.seed)]
    if manifest.task != "multiclass":
        raise ProbeError(
            "--shots counts images per class, and images of this data set have several findings: "
            "leave --shots out, or extract one finding as a class of its own (--label-col, --name)"
        )
    subsets = []
    for seed in range(settings.seed, settings.seed + (settings.seeds or 1)):
        subject = manifest.subject[data.rows[train]]
        rows = splits.few(data.y[train], subject, shots, seed=seed)
        folds = splits.within(manifest, data.rows[train[rows]], k=k, seed=seed)
        subsets.append(TrainingSet(rows, folds, seed, shots))
    return subsets


def _choose(
    data: Data,
    subsets: list[TrainingSet],
    settings: Settings,
    manifest: Manifest,
    metric: metrics.Metric,
    progress: Progress | None = None,
    order: NDArray[np.int64] | None = None,
) -> list[Selection]:
    """Fit the subsets' heads on the training rows, whose labels may come in another order."""
    features, y = data.features.take(data.train), data.y[data.train]
    y = y if order is None else y[order]
    protocol = protocols.find(settings.protocol)
    if settings.head == "linear" and protocol.l2 is not None:
        return choose.least_squares(
            features, y, subsets, l2=protocol.l2, classes=manifest.classes, metric=metric
        )
    if settings.head == "knn":
        return choose.neighbours(
            features,
            y,
            subsets,
            k=settings.k or (),
            temperature=settings.temperature or 1.0,
            classes=manifest.classes,
            metric=metric,
            device=settings.device,
        )
    return choose.linear(
        features,
        y,
        subsets,
        C=_strengths(settings, features, manifest),
        classes=manifest.classes,
        metric=metric,
        tol=settings.tol,
        device=settings.device,
        progress=progress,
        fit=settings.fit,
    )


def _strengths(settings: Settings, features: Features, manifest: Manifest) -> tuple[float, ...]:
    """Return the strengths to try: those asked for, or the protocol's, which may know the size."""
    protocol = protocols.find(settings.protocol)
    return settings.C or protocol.of_size(features.width, len(manifest.classes))


def _control(
    data: Data,
    subsets: list[TrainingSet],
    settings: Settings,
    manifest: Manifest,
    metric: metrics.Metric,
) -> list[Selection | None]:
    """Fit the same heads to labels that were shuffled among each subset's rows."""
    if settings.control is None:
        return [None] * len(subsets)
    found: list[Selection | None] = []
    for subset in subsets:
        order = np.arange(int(data.train.sum()))
        rng = np.random.default_rng([subset.seed, 1])
        order[subset.rows] = subset.rows[rng.permutation(len(subset.rows))]
        found += _choose(data, [subset], settings, manifest, metric, order=order)
    return found


@dataclass(frozen=True)
class _Cell:
    """What the results of one feature and number of shots share."""

    store: FeatureStore
    manifest: Manifest
    metric: metrics.Metric
    feature: str
    data: Data
    settings: Settings
    leaks: dict[str, Any]
    out: Path
    about: dict[str, Any]

    def test(
        self, subset: TrainingSet, chosen: Selection, control: Selection | None, seconds: float
    ) -> results.Result:
        """Score the test rows once; write the result with its head and predictions; return it."""
        started = time.perf_counter()
        manifest, data = self.manifest, self.data
        settings = replace(self.settings, seed=subset.seed)
        test = ~data.train
        y_train = data.y[data.train][subset.rows]

        def answers(head: Selection) -> evaluation.LabelledPredictions:
            z = _said(head, data.features.take(test))
            rows = data.rows[test]
            return evaluation.answers(manifest, rows, data.y[test], z, y_train, settings)

        said = answers(chosen)
        found = tested(
            self.store,
            manifest,
            said,
            self.metric,
            held_out=chosen.held_out(),
            chosen_on=subset.folds.kind,
            settings=settings,
            data=data_of(self.store, manifest, settings.uncertain),
        )
        uncertain = settings.uncertain if manifest.task == "multilabel" else ""
        notes = remarks(manifest, y_train, said, found, settings, uncertain)
        protocol = protocols.find(settings.protocol)
        against = None
        if control:
            by_chance = scored([self.metric], answers(control), settings)
            against = {"kind": settings.control, "C": control.C} | by_chance[self.metric.name]
        result = results.Result(
            scenario=f"frozen-{settings.head}",
            head=settings.head or "linear",
            feature=self.feature,
            protocol=settings.protocol,
            C=chosen.C,
            folds=chosen.folds,
            n_train=len(subset.rows),
            n_bad=data.n_bad,
            seed=subset.seed,
            predictions="",
            heads="",
            converged=chosen.converged,
            seconds=round(seconds + time.perf_counter() - started, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=[note for note in (chosen.note, protocol.note) if note] + notes,
            shots=subset.shots,
            control=against,
            audit=self.leaks,
            settings=settings.of_head(_strengths(settings, data.features, manifest)),
            **self.about,
            **found,
        )
        about = {"thresholds": found["thresholds"]}
        save = partial(self._save, chosen.head, about) if chosen.head else None
        return results.record(self.out, result, predictions_of(said, manifest.classes), save)

    @cached_property
    def _seen(self) -> Seen | None:
        """Return what all training rows are like, of which `predict` tells what is unlike."""
        data = self.data
        features, rows = data.features.take(data.train), data.rows[data.train]
        return measure(features.chunks, self.manifest.subject[rows])

    def _save(self, head: Head, about: Mapping[str, Any], folder: Path) -> None:
        """Write heads.json and heads.safetensors, with what the head reads."""
        head.save(
            folder / "heads",
            self._seen,
            **about,
            feature=self.feature,
            task=self.manifest.task,
            dataset=self.manifest.dataset,
            backbone=self.store.fingerprint["backbone"],
            features=self.store.fingerprint,
            store_fingerprint=self.store.fingerprint_digest,
        )


def _said(chosen: Selection, features: Features) -> NDArray[Any]:
    """Return a head's log-odds of some rows, (n, K)."""
    return torch.cat([chosen.log_odds(X) for X in features.chunks()]).cpu().numpy()


def _check_folds(k: int, manifest: Manifest, data: Data) -> int:
    subjects = len(np.unique(manifest.subject[data.rows[data.train]]))
    if not 2 <= k <= subjects:
        raise ProbeError(
            f"{k} folds of {subjects} training subjects: want 2 to {subjects}, see --folds"
        )
    return k
