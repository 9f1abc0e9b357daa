"""One feature of a store: fit the heads of its trials, test each once, write the results.

All heads of all trials with the same number of shots are fitted in one call. A trial says which
rows train and which are tested (trials.py); what is fitted is chosen in choose.py.
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

from features.manifest import Manifest
from features.store import FeatureStore
from probe import choose, covariates, results
from probe.calibrated import Held, calibration_of, held_by, recalibrations, sets_of
from probe.choose import Fit, Selection, TrainingSet
from probe.covariates import WithColumns
from probe.data import Data
from probe.heads import Head
from probe.identity import Identity, data_of
from probe.likeness import Seen, measure
from probe.probing import ProbeSettings
from probe.score import metrics
from probe.score.predictions import (
    LabelledPredictions,
    labelled_predictions,
    taught,
)
from probe.score.recalibration import Recalibration
from probe.score.thresholds import HeldOut, Labelled
from probe.solve.path import HeadProgress
from probe.tested import evaluate, remarks, scored, to_predictions
from probe.trials import UNTESTED, Trial, of_outer_folds, trials_of
from probe.zero_shot import ZeroShot

HEADS = 1 << 30  # bytes of heads that are solved at once


@dataclass(frozen=True)
class Problem:
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
    text: ZeroShot | None = None
    left_out: Sequence[str] = ()  # what was excluded, in words

    @property
    def with_columns(self) -> WithColumns | None:
        """Return the rows of columns that heads read, None where they read the image alone."""
        features = self.data.features
        return features if isinstance(features, WithColumns) else None

    def beside(self, columns: Sequence[str], *, image: bool) -> Problem:
        """Return the problem of columns beside the image's features, or without them."""
        given = covariates.covariates(self.manifest, columns, self.data.rows)
        rows = covariates.with_columns(self.data.features, given, image=image)
        return replace(self, data=replace(self.data, features=rows))

    def run(
        self,
        shots: int | None,
        fit: Fit,
        progress: HeadProgress | None,
        over: Sequence[results.Result] = (),
    ) -> list[results.Result]:
        """Fit and test all trials of a number of shots; over: what each is held against."""
        started = time.perf_counter()
        trials = self.trials(shots)
        chosen = self.choose(trials, fit, progress)
        controls = self.fit_controls(trials, fit)
        seconds = (time.perf_counter() - started) / len(trials)
        return [
            self.test(trial, selections, control, seconds, over[k] if over else None)
            for k, (trial, selections, control) in enumerate(
                zip(trials, chosen, controls, strict=True)
            )
        ]

    def trials(self, shots: int | None) -> list[Trial]:
        """Return the trials of a number of shots; of a head that nothing trains, one."""
        data, settings = self.data, self.settings
        if self.text:
            tested_by = np.where(data.train, UNTESTED, 0)
            return [Trial((self.text.training_set(settings.seed),), tested_by)]
        hashes = None if settings.outer is None else self.store.hashes()
        return trials_of(self.manifest, data, settings, shots, hashes)

    def choose(
        self,
        trials: list[Trial],
        fit: Fit,
        progress: HeadProgress | None = None,
        order: NDArray[np.int64] | None = None,
    ) -> list[list[Selection]]:
        """Fit all heads of the trials; order (n,) permutes the labels of the training rows (n,)."""
        flat = [subset for trial in trials for subset in trial.training_sets]
        classes = len(self.manifest.classes)
        one = self.data.features.width * classes * len(self.settings.C or (1,)) * 4  # bytes
        most = max(1, HEADS // (one * (1 + self.settings.folds)))
        found = []
        for start in range(0, len(flat), most):
            found += self._fit(flat[start : start + most], fit, progress, order)
        selections = iter(found)
        return [[next(selections) for _ in trial.training_sets] for trial in trials]

    def _fit(
        self,
        subsets: list[TrainingSet],
        fit: Fit,
        progress: HeadProgress | None,
        order: NDArray[np.int64] | None,
    ) -> list[Selection]:
        settings, data = self.settings, self.data
        features, y = data.features.take(data.train), data.y[data.train]
        y = y if order is None else y[order]
        if self.text:
            return [self.text.selection(features, y)]
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
        scoring |= {"C": settings.strengths(features, self.manifest.classes), "tol": settings.tol}
        scoring |= {"device": settings.device, "progress": progress, "fit": fit}
        if isinstance(features, WithColumns):
            return covariates.linear(features, y, subsets, **scoring)
        return choose.linear(features, y, subsets, **scoring)

    def fit_controls(self, trials: list[Trial], fit: Fit) -> list[list[Selection] | None]:
        """Fit the same heads to labels shuffled among each trial's rows, where that is asked."""
        if not self.settings.control:
            return [None] * len(trials)
        found: list[list[Selection] | None] = []
        for trial in trials:
            rows = trial.training_sets[0].rows
            order = np.arange(int(self.data.train.sum()))
            order[rows] = rows[np.random.default_rng([trial.seed, 1]).permutation(len(rows))]
            found += self.choose([trial], fit, order=order)
        return found

    def test(
        self,
        trial: Trial,
        selections: list[Selection],
        control: list[Selection] | None,
        seconds: float,
        over: results.Result | None = None,
    ) -> results.Result:
        """Score the tested rows once; write the result with the kept head and predictions.

        over: the result of columns alone, of the same trial, which this one is held against.
        """
        started = time.perf_counter()
        manifest, data, kept = self.manifest, self.data, selections[0]
        settings = replace(self.settings, seed=trial.seed)
        held = held_by(trial, selections, data.rows[data.train])
        maps = recalibrations(settings.calibrate, held)
        held = [one.by(recalibrate) for one, recalibrate in zip(held, maps, strict=True)]
        before = predictions = self._predictions(trial, selections, settings)
        if settings.calibrate:
            predictions = self._predictions(trial, selections, settings, maps)
        subset = trial.training_sets[0]
        evaluation = evaluate(
            manifest,
            predictions,
            self.metric,
            held_out=HeldOut(*_labelled(held)),
            chosen_on=subset.folds.kind,
            settings=settings,
        )
        level = settings.conformal
        sets = sets_of(level, held, manifest, predictions, settings) if level else {}
        said = to_predictions(predictions, manifest.classes)
        result = results.result_of(
            self._identity(trial, settings),
            evaluation,
            C=kept.C,
            folds=kept.folds,
            outer=self._of_outer_folds(trial, selections, predictions) if trial.outer else {},
            n_train=len(subset.rows),
            n_bad=data.n_bad,
            store=str(self.store.path),
            store_fingerprint=self.store.fingerprint_digest,
            predictions="",
            heads="",
            calibration=calibration_of(before, predictions, maps[0], settings),
            conformal=sets,
            converged=all(one.converged for one in selections),
            seconds=round(seconds + time.perf_counter() - started, 3),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=self._notes(trial, selections, predictions, evaluation, settings),
            control=self._shuffled(trial, control, settings) if control else None,
            gain=covariates.gain(self.metric, said, over, self.out, settings) if over else {},
            audit=self.audit,
            **self.provenance,
        )
        kept_about = {"thresholds": evaluation.thresholds}
        kept_about |= {"calibration": maps[0].to_json()} if maps[0] else {}
        kept_about |= {"conformal": {k: sets[k] for k in ("level", "threshold")}} if sets else {}
        save = partial(self._save, kept.head, kept_about) if kept.head else None
        return results.record(self.out, result, said, save)

    def _identity(self, trial: Trial, settings: ProbeSettings) -> Identity:
        """Return what tells the result from others."""
        manifest, data = self.manifest, self.data
        of = data_of(self.store, manifest, settings.uncertain, outer=bool(trial.outer))
        rows, head_of = self.with_columns, self.text.settings() if self.text else None
        if head_of is None:
            head_of = settings.of_head(settings.strengths(data.features, manifest.classes))
        return Identity(
            **(of if rows is None or rows.image else of | covariates.NO_BACKBONE),
            scenario=f"frozen-{settings.head}",
            head=settings.head,
            feature=self.feature if rows is None or rows.image else covariates.FEATURE,
            protocol=settings.protocol.name,
            metric=self.metric.name,
            scored_by=settings.scored_by,
            shots=trial.training_sets[0].shots,
            seed=trial.seed,
            settings=head_of | (rows.settings() if rows else {}),
        )

    def _notes(
        self,
        trial: Trial,
        selections: list[Selection],
        predictions: LabelledPredictions,
        evaluation: results.Evaluation,
        settings: ProbeSettings,
    ) -> list[str]:
        """Return what a reader of the number must know."""
        manifest, rows = self.manifest, self.with_columns
        uncertain = settings.uncertain if manifest.task == "multilabel" else ""
        dealt = replace(manifest, split_from=trial.outer) if trial.outer else manifest
        shown = self._taught(trial.training_sets[0])
        notes = remarks(dealt, shown, predictions, evaluation, settings, uncertain)
        own = dict.fromkeys(one.note for one in selections)
        about = [*own, settings.protocol.note, trial.note, rows.note if rows else ""]
        return [*filter(None, about), *self.left_out, *notes]

    def _shuffled(
        self, trial: Trial, control: list[Selection], settings: ProbeSettings
    ) -> dict[str, Any]:
        """Return the score of heads that were fitted to shuffled labels."""
        answers = self._predictions(trial, control, settings)
        score = scored([self.metric], answers, settings)[self.metric.name]
        return {"kind": settings.control, "C": control[0].C} | score

    def _predictions(
        self,
        trial: Trial,
        selections: list[Selection],
        settings: ProbeSettings,
        maps: Sequence[Recalibration | None] = (),
    ) -> LabelledPredictions:
        """Return what each head says of the rows that it is tested on, by its map if it has one."""
        data, y = self.data, self.data.y.copy()
        z = np.empty((len(y), len(self.manifest.classes)))
        for k, (subset, chosen) in enumerate(zip(trial.training_sets, selections, strict=True)):
            rows = np.flatnonzero(trial.tested_by == k)
            if not len(rows):
                continue
            said = [chosen.log_odds(X) for X in data.features.take(rows).chunks()]
            z[rows] = torch.cat(said).cpu().numpy()
            if maps and (recalibrate := maps[k]):
                z[rows] = recalibrate(z[rows], classes=y.ndim == 1)
            y[rows] = taught(data.y[rows], self._taught(subset))
        tested = np.flatnonzero(trial.tested_by != UNTESTED)
        return labelled_predictions(
            self.manifest,
            data.rows[tested],
            y[tested],
            z[tested],
            settings,
            fold=trial.tested_by[tested] - 1 if trial.outer else None,
            ranked_together=settings.outer == "subject",
        )

    def _of_outer_folds(
        self, trial: Trial, selections: list[Selection], predictions: LabelledPredictions
    ) -> dict[str, Any]:
        """Return what the result says of its outer folds, with what was chosen in each."""
        chosen: dict[str, list[Any]] = {"C": [one.C for one in selections[1:]]}
        if "chosen" in selections[0].folds:  # a number of neighbours
            chosen = {"chosen": [one.folds["chosen"] for one in selections[1:]]}
        if trial.values:
            chosen["values"] = list(trial.values)
        return of_outer_folds(trial.outer, predictions, self.metric, **chosen)

    def _taught(self, subset: TrainingSet) -> NDArray[Any]:
        """Return the labels (n,) or (n, L) that a head was shown."""
        return self.text.taught() if self.text else self.data.y[self.data.train][subset.rows]

    @cached_property
    def _seen(self) -> Seen | None:
        """Return statistics of all training rows, by which `predict` tells unlike images."""
        if self.text:
            return None
        data = self.data
        features, rows = data.features.take(data.train), data.rows[data.train]
        return measure(features.chunks, self.manifest.subject[rows])

    def _save(self, head: Head, about: Mapping[str, Any], folder: Path) -> None:
        """Write heads.json and heads.safetensors, with what the head reads; prompts beside it."""
        if self.text:
            self.text.save(folder)
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


def _labelled(held: Sequence[Held]) -> tuple[Labelled, list[Labelled]]:
    """Return labels and log-odds of what was held out: for the kept head, and for each fold's."""
    first, *others = [(one.y, one.z) for one in held]
    return first, others
