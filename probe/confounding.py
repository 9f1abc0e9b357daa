"""Shortcuts: can features tell a column of the manifest, and does the label go with it.

Everything is predicted out of fold, by subject, over all labelled images (OUTER outer folds, C
chosen within each). The labels' folds are the same for the features, for the column alone and for
balanced training, so that the scores belong to the same images and deals. Scores are AUROCs: they
don't depend on how frequent a class is, which differs between the values of a column.

Shapes: N labelled images, D features, K classes, L findings, V values of a column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.manifest import NO_LABEL, Manifest
from features.store import FeatureStore
from probe import choose
from probe.choose import TrainingSet
from probe.confounders import Association, Confounder, Score, adjusted
from probe.data import Data, Features, load
from probe.identity import data_of
from probe.probing import ProbeOptions, ProbeSettings
from probe.score import metrics
from probe.score.association import cramers_v, permutation_p
from probe.score.folded import Folded
from probe.score.groups import subgroups, without
from probe.score.intervals import intervals
from probe.score.paired import FINER
from probe.score.predictions import column, taught
from probe.strata import Values, balanced, counted_only, empty, values_of, worth_of
from probe.trials import Trial, trials_of

OUTER, INNER = 5, 3  # folds: a set for each of 5 x (3 + 1) trains a head of every C
STRENGTHS = tuple(10.0 ** np.arange(-6, 6))  # of C: a decade apart


def confounders(
    path: Path,
    columns: Sequence[str],
    *,
    feature: str | None = None,
    uncertain: str = "zeros",
    device: str = "cpu",
    seed: int = 0,
    bootstrap: int = 1000,
    progress: Callable[[int, int], None] = lambda done, of: None,
    **about: Any,
) -> list[Confounder]:
    """Look at columns of a store's manifest, one Confounder each; about is command and versions.

    bootstrap: resamples of an interval, and permutations of a test. progress is called with how
    many columns are done, of how many. Raises StoreError for a store that can't be read, ProbeError
    for a column that there isn't, and for too few subjects.
    """
    asked = ProbeOptions(
        C=STRENGTHS,
        folds=INNER,
        outer=OUTER,
        metric="auroc",
        uncertain=uncertain,
        device=device,
        seed=seed,
        bootstrap=bootstrap,
    )
    with FeatureStore.open(path) as store:
        manifest = store.manifest()
        feature = feature or store.default_feature
        data = load(store, manifest, feature, uncertain, device, outer=True)
        given = {name: column(manifest, name, data.rows) for name in dict.fromkeys(columns)}
        tests = len(given) * (1 if manifest.task == "multiclass" else len(manifest.classes))
        most = max(bootstrap, FINER * tests) - 1
        study = _Study(store, manifest, feature, data, asked.resolve(), most)
        of = data_of(store, manifest, uncertain, outer=True)
        said = {
            **{name: of[name] for name in ("dataset", "labels_digest", "backbone", "extraction")},
            "feature": feature,
            "task": manifest.task,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            **about,
        }
        found = []
        for name, values in given.items():
            found.append(study.look(name, values, said))
            progress(len(found), len(given))
        return adjusted(found)


@dataclass(frozen=True)
class _Study:
    """A feature of a store, and how its heads are fitted."""

    store: FeatureStore
    manifest: Manifest
    feature: str
    data: Data
    settings: ProbeSettings
    permutations: int  # at most

    def look(self, name: str, given: NDArray[Any], said: dict[str, Any]) -> Confounder:
        """Return what there is to say of a column's values (N,)."""
        subject = self.manifest.subject[self.data.rows]
        unit = "subject" if self.manifest.has_subjects else "image"
        values = values_of(given, subject, unit)
        known = values.known
        one = Confounder(
            **said,
            column=name,
            why=values.why,
            quartiles=values.quartiles,
            values={v: int((values.codes == k).sum()) for k, v in enumerate(values.names)},
            left_out=int((~known).sum()),
            n=int(known.sum()),
            subjects=len(np.unique(subject[known])),
        )
        if values.why:
            return one
        told_y, told_z, told_fold = self._tell(values)
        z, fold = self.by_features, self.fold
        alone = self._fit(self._one_hot(values), counted_only(self.trial, known))

        def score(y: NDArray[Any], z: NDArray[np.float64]) -> Score:
            return self._score(y[known], z[known], subject[known], fold[known])

        strata = self._strata(name, values)
        parted, worth, why = self._balanced(values)
        return replace(
            one,
            told=self._score(told_y, told_z, subject[known], told_fold, "multiclass"),
            association=self._association(values),
            label=score(self._y, z),
            alone=score(self._y, alone),
            strata=strata,
            across=self._across(strata, known),
            balanced=score(parted[0], parted[1]) if parted else None,
            unbalanced=score(parted[0], z) if parted else None,
            balanced_why=why,
            effective=worth,
        )

    @cached_property
    def trial(self) -> Trial:
        """Return the outer folds by the label."""
        [trial] = trials_of(self.manifest, self.data, self.settings, None, self.store.hashes())
        return trial

    @property
    def fold(self) -> NDArray[np.int64]:
        """Return the outer fold (N,) of each image."""
        return self.trial.tested_by - 1

    @cached_property
    def by_features(self) -> NDArray[np.float64]:
        """Return log-odds (N, K) of the label by the features, out of fold."""
        return self._fit(self.data.features, self.trial.training_sets[1:])

    @cached_property
    def _y(self) -> NDArray[Any]:
        """Return labels (N,) or (N, L), without findings that a fold was taught one side of."""
        y = self.data.y.copy()
        for f, subset in enumerate(self.trial.training_sets[1:]):
            y[self.fold == f] = taught(y[self.fold == f], self.data.y[subset.rows])
        return y

    def _tell(self, values: Values) -> tuple[NDArray[Any], ...]:
        """Return codes (n,), log-odds (n, V) by the features, out of fold, and folds (n,)."""
        known, data = values.known, self.data
        labels = np.full(len(self.manifest), NO_LABEL, dtype=np.int32)
        labels[data.rows] = values.codes
        as_label = replace(self.manifest, label=labels, classes=values.names)
        some = replace(
            data,
            rows=data.rows[known],
            features=data.features.take(known),
            y=values.codes[known],
            train=data.train[known],
        )
        [trial] = trials_of(as_label, some, self.settings, None, self.store.hashes())
        z = self._predict(some.features, some.y, trial.training_sets[1:], values.names)
        return some.y, z, trial.tested_by - 1

    def _one_hot(self, values: Values) -> Features:
        """Return a column of 1 and 0 for each value, (N, V), none of them 1 where it has none."""
        ones = np.eye(len(values.names) + 1, dtype=np.float32)[values.codes, :-1]
        return replace(self.data.features, X=torch.from_numpy(ones))

    def _fit(self, features: Features, subsets: Sequence[TrainingSet]) -> NDArray[np.float64]:
        """Return log-odds (N, K) of the label, out of fold; a training set for each outer fold."""
        return self._predict(features, self.data.y, subsets, self.manifest.classes)

    def _predict(
        self,
        features: Features,
        y: NDArray[Any],
        subsets: Sequence[TrainingSet],
        classes: Sequence[str],
    ) -> NDArray[np.float64]:
        """Return log-odds (n, K) of y (n,) or (n, L), each row by the set that is without it."""
        task = "multilabel" if y.ndim == 2 else "multiclass"
        settings = self.settings
        chosen = choose.linear(
            features,
            y,
            subsets,
            C=settings.C,
            classes=classes,
            metric=metrics.find("auroc", task),
            tol=settings.tol,
            device=settings.device,
        )
        z = np.empty((len(y), len(classes)))
        for subset, one in zip(subsets, chosen, strict=True):
            rows = np.setdiff1d(np.arange(len(y)), subset.rows)
            parts = [one.log_odds(X) for X in features.take(rows).chunks()]
            z[rows] = torch.cat(parts).cpu().numpy()
        return z

    def _score(
        self,
        y: NDArray[Any],
        z: NDArray[np.float64],
        subject: NDArray[Any],
        fold: NDArray[Any],
        task: str = "",
    ) -> Score:
        """Return the AUROC of log-odds z (n, K), ranked within folds (n,), with its interval."""
        metric = metrics.find("auroc", task or self.manifest.task)
        found = intervals(
            [metric],
            y,
            Folded(z, fold),
            subject,
            n=self.settings.bootstrap,
            rng=np.random.default_rng(self.settings.seed),
            method=self.settings.interval,
        )[metric.name]
        return Score(value=found["value"], ci_low=found["ci_low"], ci_high=found["ci_high"])

    def _strata(self, name: str, values: Values) -> list[Any]:
        """Return the label's score among the images of each value."""
        known = values.known
        return subgroups(
            self._y[known],
            self.by_features[known],
            self.manifest.subject[self.data.rows[known]],
            {name: np.array(values.names)[values.codes[known]]},
            metrics.find("auroc", self.manifest.task),
            self.manifest.classes,
            fold=self.fold[known],
            n=self.settings.bootstrap,
            seed=self.settings.seed,
            method=self.settings.interval,
        )

    def _across(self, strata: Sequence[Any], known: NDArray[np.bool_]) -> Score | None:
        """Return the score of all known images (N,) over the outputs that every value's mean has.

        None where the means are over different ones.
        """
        lacking = {tuple(g["left_out"]) for g in strata if g["value"] is not None}
        if len(lacking) != 1:
            return None
        left_out = {self.manifest.classes.index(name) for name in lacking.pop()}
        metric = metrics.find("auroc", self.manifest.task)
        y, z = self._y[known], self.by_features[known]
        reduced, y, z = without(metric, y, z, left_out)
        subject = self.manifest.subject[self.data.rows[known]]
        return self._score(y, z, subject, self.fold[known], reduced.task)

    def _association(self, values: Values) -> dict[str, Association]:
        """Return how far the label, or each finding, goes with the column."""
        subject = self.manifest.subject[self.data.rows]
        found = {}
        for name, y, there in self._outcomes():
            rows = there & values.known
            v = cramers_v(y[rows], values.codes[rows]) if rows.sum() > 1 else float("nan")
            if not np.isfinite(v):
                found[name] = Association(v=None, p=None, p_holm=None)
                continue
            rng = np.random.default_rng([self.settings.seed, 2])
            some = (y[rows], values.codes[rows], subject[rows])
            p = permutation_p(*some, n=self.permutations, rng=rng)
            found[name] = Association(v=v, p=p, p_holm=None)
        return found

    def _outcomes(self) -> list[tuple[str, NDArray[np.int64], NDArray[np.bool_]]]:
        """Return the classes ("") or each finding: its name, codes (N,), and where it is stated."""
        y = self.data.y
        if y.ndim == 1:
            return [("", y, np.ones(len(y), dtype=bool))]
        return [
            (name, np.nan_to_num(y[:, k]).astype(np.int64), ~np.isnan(y[:, k]))
            for k, name in enumerate(self.manifest.classes)
        ]

    def _balanced(
        self, values: Values
    ) -> tuple[tuple[NDArray[Any], NDArray[np.float64]] | None, float | None, str]:
        """Return labels and log-odds by heads trained on balanced weights, and what is missing.

        Each finding has weights, and so heads, of its own; between these, how many images the
        weights of the least of them are worth.
        """
        y, lacking, worth = self._y.copy(), [], []
        z = np.zeros((len(y), len(self.manifest.classes)))
        for k, (name, outcome, there) in enumerate(self._outcomes()):
            rows = there & values.known
            sets = counted_only(self.trial, rows)
            if pair := next(filter(None, (empty(s, outcome, values.codes) for s in sets)), None):
                absent, value = pair
                lacking.append((name, absent, values.names[value]))
                if y.ndim == 2:
                    y[:, k] = np.nan
                continue
            sets = [balanced(one, outcome, values.codes) for one in sets]
            worth += [worth_of(one) for one in sets]
            classes = self.manifest.classes if y.ndim == 1 else ("no", name)
            said = self._predict(self.data.features, outcome, sets, classes)
            if y.ndim == 1:
                z = said
            else:
                z[:, k] = said[:, 1]
        why = self._unbalanced(lacking)
        return ((y, z), min(worth), why) if worth else (None, None, why)

    def _unbalanced(self, lacking: Sequence[tuple[str, int, str]]) -> str:
        """Say which labels can't be balanced against which value, and why."""
        if not lacking:
            return ""
        name, absent, value = lacking[0]
        if not name:
            label = self.manifest.classes[absent]
            return f"label and column can't be parted: a fold has no image of {value} and {label}"
        what = f"{'with' if absent else 'without'} {name}"
        of_all = f"{len(lacking)} of {len(self.manifest.classes)} findings"
        return f"{of_all} can't be balanced: a fold has no image of {value} {what}"
