"""One store in, results out.

Choose C (or k) on folds of the training rows, refit on all of them, test once. There is a result
for each feature, number of shots and seed; those of a feature with the same number of shots are
fitted together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from probe import choose, results, splits
from probe.choose import Fit, Selection, TrainingSet
from probe.data import Data, load
from probe.heads import Head, fit_heads
from probe.identity import Identity, data_of
from probe.likeness import Seen, measure
from probe.probing import ProbeOptions, ProbeSettings
from probe.score import metrics
from probe.score.predictions import (
    LabelledPredictions,
    check_scoring,
    labelled_predictions,
)
from probe.solve.path import HeadProgress
from probe.tested import audit_splits, evaluate, metric_of, remarks, scored, to_predictions

__all__ = ["ProbeOptions", "probe", "probe_all"]


def probe(path: Path, **given: Any) -> results.Result:
    """Probe a store where the settings ask for one result; see probe_all."""
    [result] = probe_all(path, **given)
    return result


def probe_all(
    path: Path,
    *,
    out: Path,
    settings: ProbeOptions | None = None,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    progress: HeadProgress | None = None,
    fit: Fit = fit_heads,
) -> list[results.Result]:
    """Probe a store and return a result per feature, number of shots and seed.

    Writes heads, predictions and lines of results.jsonl into `out`. fit solves linear heads, in
    this process or over rows that others hold. Raises StoreError for a store that can't be read,
    ProbeError for labels or options that no head can be fitted to.
    """
    asked = settings or ProbeOptions()
    resolved = asked.resolve()
    rows = []
    with FeatureStore.open(path) as store:
        manifest = store.manifest()
        metric = metric_of(manifest, asked.metric)
        leaks = audit_splits(store, manifest, strict=asked.strict_splits)
        for feature in _features(store, asked.feature):
            data = load(store, manifest, feature, resolved.uncertain, resolved.device)
            check_scoring(manifest, data.rows[~data.train], data.y[~data.train], resolved)
            problem = _Problem(
                store=store,
                manifest=manifest,
                metric=metric,
                feature=feature,
                data=data,
                settings=resolved,
                audit=leaks,
                out=out,
                provenance={"command": command, "versions": dict(versions or {})},
            )
            for shots in resolved.shots:
                started = time.perf_counter()
                subsets = problem.training_sets(shots)
                chosen = problem.choose(subsets, fit, progress)
                controls = problem.fit_controls(subsets, fit)
                seconds = (time.perf_counter() - started) / len(subsets)
                for subset, selection, control in zip(subsets, chosen, controls, strict=True):
                    rows.append(problem.test(subset, selection, control, seconds))
    return rows


def _features(store: FeatureStore, asked: str | None) -> list[str]:
    """Return the feature asked for, the store's default, or with "all" every vector in it."""
    if asked != "all":
        return [asked or store.default_feature]
    return [name for name, shape in store.features.items() if len(shape) == 1]


@dataclass(frozen=True)
class _Problem:
    """A feature of a store, and how to probe it: what its results share. audit is of its splits."""

    store: FeatureStore
    manifest: Manifest
    metric: metrics.Metric
    feature: str
    data: Data
    settings: ProbeSettings
    audit: dict[str, Any]
    out: Path
    provenance: dict[str, Any]  # command and versions

    def training_sets(self, shots: int | None) -> list[TrainingSet]:
        """Return the training sets of a number of shots, one per seed; all rows once."""
        manifest, data, settings = self.manifest, self.data, self.settings
        train = np.flatnonzero(data.train)
        if shots is None:
            k = _check_folds(settings.folds, manifest, data)
            folds = splits.folds(manifest, data.rows[train], k=k, seed=settings.seed)
            return [TrainingSet(np.arange(len(train)), folds, settings.seed)]
        if manifest.task != "multiclass":
            raise ProbeError(
                "--shots counts images per class, and images of this data set have several "
                "findings: leave --shots out, or extract one finding as a class of its own "
                "(--label-col, --name)"
            )
        subsets = []
        for seed in range(settings.seed, settings.seed + settings.seeds):
            subject = manifest.subject[data.rows[train]]
            rows = splits.few(data.y[train], subject, shots, seed=seed)
            folds = splits.within(manifest, data.rows[train[rows]], k=settings.folds, seed=seed)
            subsets.append(TrainingSet(rows, folds, seed, shots))
        return subsets

    def choose(
        self,
        subsets: list[TrainingSet],
        fit: Fit,
        progress: HeadProgress | None = None,
        order: NDArray[np.int64] | None = None,
    ) -> list[Selection]:
        """Fit the subsets' heads on the training rows (n,); order (n,) permutes their labels."""
        settings, data = self.settings, self.data
        features, y = data.features.take(data.train), data.y[data.train]
        y = y if order is None else y[order]
        scoring: dict[str, Any] = {"classes": self.manifest.classes, "metric": self.metric}
        if settings.head == "linear" and settings.protocol.l2 is not None:
            return choose.least_squares(features, y, subsets, l2=settings.protocol.l2, **scoring)
        if settings.head == "knn":
            return choose.neighbours(
                features,
                y,
                subsets,
                k=settings.k,
                temperature=settings.temperature,
                device=settings.device,
                **scoring,
            )
        return choose.linear(
            features,
            y,
            subsets,
            C=settings.strengths(features, self.manifest.classes),
            tol=settings.tol,
            device=settings.device,
            progress=progress,
            fit=fit,
            **scoring,
        )

    def fit_controls(self, subsets: list[TrainingSet], fit: Fit) -> list[Selection | None]:
        """Fit the same heads to labels shuffled among each subset's rows, where that is asked."""
        if not self.settings.control:
            return [None] * len(subsets)
        controls: list[Selection | None] = []
        for subset in subsets:
            order = np.arange(int(self.data.train.sum()))
            rng = np.random.default_rng([subset.seed, 1])
            order[subset.rows] = subset.rows[rng.permutation(len(subset.rows))]
            controls += self.choose([subset], fit, order=order)
        return controls

    def test(
        self, subset: TrainingSet, chosen: Selection, control: Selection | None, seconds: float
    ) -> results.Result:
        """Score the test rows once; return the result, written with head and predictions."""
        started = time.perf_counter()
        manifest, data = self.manifest, self.data
        settings = replace(self.settings, seed=subset.seed)
        predictions = self._predictions(chosen, subset, settings)
        evaluation = evaluate(
            manifest,
            predictions,
            self.metric,
            held_out=chosen.held_out(),
            chosen_on=subset.folds.kind,
            settings=settings,
        )
        uncertain = settings.uncertain if manifest.task == "multilabel" else ""
        y_train = data.y[data.train][subset.rows]
        notes = remarks(manifest, y_train, predictions, evaluation, settings, uncertain)
        shuffled = None
        if control:
            of_control = self._predictions(control, subset, settings)
            score = scored([self.metric], of_control, settings)[self.metric.name]
            shuffled = {"kind": settings.control, "C": control.C} | score
        identity = Identity(
            **data_of(self.store, manifest, settings.uncertain),
            scenario=f"frozen-{settings.head}",
            head=settings.head,
            feature=self.feature,
            protocol=settings.protocol.name,
            metric=self.metric.name,
            scored_by=settings.scored_by,
            shots=subset.shots,
            seed=subset.seed,
            settings=settings.of_head(settings.strengths(data.features, manifest.classes)),
        )
        result = results.result_of(
            identity,
            evaluation,
            C=chosen.C,
            folds=chosen.folds,
            n_train=len(subset.rows),
            n_bad=data.n_bad,
            store=str(self.store.path),
            store_fingerprint=self.store.fingerprint_digest,
            predictions="",
            heads="",
            converged=chosen.converged,
            seconds=round(seconds + time.perf_counter() - started, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=[note for note in (chosen.note, settings.protocol.note) if note] + notes,
            control=shuffled,
            audit=self.audit,
            **self.provenance,
        )
        save = partial(self._save, chosen.head, evaluation.thresholds) if chosen.head else None
        return results.record(self.out, result, to_predictions(predictions, manifest.classes), save)

    def _predictions(
        self, chosen: Selection, subset: TrainingSet, settings: ProbeSettings
    ) -> LabelledPredictions:
        """Return a head's predictions of the test rows."""
        data, test = self.data, ~self.data.train
        z = torch.cat([chosen.log_odds(X) for X in data.features.take(test).chunks()]).cpu().numpy()
        y_train = data.y[data.train][subset.rows]
        return labelled_predictions(
            self.manifest, data.rows[test], data.y[test], z, y_train, settings
        )

    @cached_property
    def _seen(self) -> Seen | None:
        """Return statistics of all training rows, by which `predict` tells unlike images."""
        data = self.data
        features, rows = data.features.take(data.train), data.rows[data.train]
        return measure(features.chunks, self.manifest.subject[rows])

    def _save(self, head: Head, thresholds: Mapping[str, Any], folder: Path) -> None:
        """Write heads.json and heads.safetensors, with what the head reads."""
        head.save(
            folder / "heads",
            self._seen,
            thresholds=thresholds,
            feature=self.feature,
            task=self.manifest.task,
            dataset=self.manifest.dataset,
            backbone=self.store.fingerprint["backbone"],
            features=self.store.fingerprint,
            store_fingerprint=self.store.fingerprint_digest,
        )


def _check_folds(k: int, manifest: Manifest, data: Data) -> int:
    """Return k, if there are as many training subjects. Raises ProbeError where not."""
    subjects = len(np.unique(manifest.subject[data.rows[data.train]]))
    if not 2 <= k <= subjects:
        raise ProbeError(
            f"{k} folds of {subjects} training subjects: want 2 to {subjects}, see --folds"
        )
    return k
