"""A run of training: its settings, the rows it learns from and is tested on, and its identity."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.effects import NONE, RUN, with_effect, without_effect
from features.errors import ProbeError
from features.lock import writing
from features.manifest import Manifest
from features.store import FeatureStore
from probe import splits
from probe.data import load
from probe.identity import Identity, data_of
from probe.score.predictions import Scoring, check_scoring
from probe.tested import audit_splits, metric_of
from probe.train import checkpoints
from probe.train.feeds import Feed, StoredFeatures
from probe.train.training import Task, Training, processes

VAL_FOLDS = 5  # one of them chooses the epoch where there is no val split


@dataclass(frozen=True)
class TrainSettings(Scoring):
    """What to train and how it is scored. `training` has the loop's own settings."""

    protocol: str = "finetune"  # or "study"
    head: str = "linear"  # or "deit"
    head_size: str = "deit-base"
    head_weights: str | None = None  # of the DeiT: None for ImageNet's, "random", or a file
    unfreeze: str = "all"  # "none", "last:K"
    drop_last: int = 0  # blocks
    init: str = "probe"  # or "random": of a linear head
    metric: str | None = None
    uncertain: str = "zeros"
    outer: int | str | None = None  # folds that each test once, or "subject": one per subject
    fold: int | None = None  # of these, the one that this run tests
    strict_splits: bool = without_effect(False)
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        """Raise ProbeError for a seed that is not that of training, which counts."""
        if self.seed not in (0, self.training.seed):
            raise ProbeError(
                f"seed {self.seed} is not training's, {self.training.seed}: give Training(seed=...)"
            )

    def of_head(self, processes: int) -> dict[str, Any]:
        """Return what changes the trained model beyond an Identity's own fields, as JSON values.

        processes: that train together. A run may go on for more epochs than it was begun for, so
        their number is in it only where the schedule depends on it.
        """
        loop = with_effect(self.training, leave_out=(NONE, RUN))
        loop["batch_size"] = self.training.batch_size * processes
        if self.training.schedule != "constant":
            loop["epochs"] = self.training.epochs
        loop |= {"outer": self.outer} if self.outer is not None else {}
        loop |= {"fold": self.fold} if self.fold is not None else {}
        if self.head == "linear":
            return loop | {
                "unfreeze": self.unfreeze,
                "drop_last": self.drop_last,
                "init": self.init,
            }
        weights = self.head_weights or "published"
        if Path(weights).is_file():
            with Path(weights).open("rb") as file:
                weights = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        deit = {"head_size": self.head_size, "head_weights": weights}
        return loop | {"unfreeze": self.unfreeze, "drop_last": self.drop_last} | deit

    @property
    def name(self) -> str:
        """Return the protocol, with what is not as usual in it."""
        usual = "random" if self.protocol == "study" else "probe"
        words = [
            self.head_size if self.head == "deit" and self.head_size != "deit-base" else "",
            f"init {self.init}" if self.head == "linear" and self.init != usual else "",
            "" if self.unfreeze in ("all", "none") else self.unfreeze,
            f"drop {self.drop_last}" if self.drop_last else "",
        ]
        return " ".join([self.protocol, *filter(None, words)])


@dataclass(frozen=True)
class RunData:
    """What of a store is trained and tested on: the task (train, val, labels) and the test rows."""

    store: FeatureStore
    manifest: Manifest
    task: Task
    test: NDArray[np.int64]
    chosen_on: str
    n_bad: int
    audit: dict[str, Any]
    outer: splits.Outer | None = None  # of the labelled rows, where folds of all of them test


@dataclass(frozen=True)
class Run:
    """A run: what is trained on what. Its folder lies in `out`, named by its identity."""

    rows: RunData
    scenario: str
    feature: str
    out: Path
    settings: TrainSettings

    @cached_property
    def data(self) -> dict[str, Any]:
        """Return the parts of its identity that its store has."""
        rows, views = self.rows, isinstance(self.rows.task.feed, StoredFeatures)
        outer = rows.outer is not None
        uncertain = self.settings.uncertain
        return data_of(rows.store, rows.manifest, uncertain, views=views, outer=outer)

    @cached_property
    def identity(self) -> Identity:
        """Return what tells it from other runs, however its answers are scored."""
        settings = self.settings
        return Identity(
            **self.data,
            scenario=self.scenario,
            head=settings.head,
            feature=self.feature,
            protocol=settings.name,
            metric=self.rows.task.metric.name,
            scored_by="image",
            shots=None,
            seed=settings.training.seed,
            settings=settings.of_head(processes(settings.training.device).num_processes),
        )

    @property
    def checkpoints(self) -> Path:
        """Return where its checkpoints are."""
        return self.out / self.identity.folder / checkpoints.FOLDER

    @property
    def begun(self) -> bool:
        """Say whether there is a checkpoint to go on from."""
        return (self.checkpoints / checkpoints.STATE).is_file()

    def writing(self) -> AbstractContextManager[None]:
        """Hold the right to write to its folder, in the one process that does."""
        if not processes(self.settings.training.device).is_main_process:
            return nullcontext()
        return writing(self.out / self.identity.folder / "run")


def run_data(
    store: FeatureStore, manifest: Manifest, feed: Feed, settings: TrainSettings
) -> RunData:
    """Return the rows (N,) of a store that have a label, dealt into training, validation and test.

    Without a val split one training subject in VAL_FOLDS is held out for it. With outer folds the
    test is settings.fold, whatever splits are given. Raises ProbeError where that leaves none, and
    for leaks with strict_splits.
    """
    nested, seed = settings.outer is not None, settings.training.seed
    leaks = audit_splits(store, manifest, strict=settings.strict_splits, outer=nested)
    data = load(store, manifest, store.default_feature, settings.uncertain, outer=nested)
    outer = None
    if settings.outer is None:
        tested, train = ~data.train, data.rows[data.train]
        folds = splits.folds(manifest, train, k=VAL_FOLDS, seed=seed)
    else:
        outer = splits.outer(
            manifest, data.rows, k=settings.outer, seed=seed, hashes=store.hashes()
        )
        tested = outer.part == settings.fold
        train, group = data.rows[~tested], outer.group[~tested]
        folds = splits.dealt(group, manifest.label[train], k=VAL_FOLDS, seed=seed, by=outer.by)
    check_scoring(manifest, data.rows[tested], data.y[tested], settings)
    val = folds.held_out[0]
    y = np.full((len(manifest), *data.y.shape[1:]), -1, dtype=data.y.dtype)
    y[data.rows] = data.y
    metric = metric_of(manifest, settings.metric)
    task = Task(feed, train[~val], train[val], y, len(manifest.classes), metric)
    if not len(task.train) or not len(task.val):
        raise ProbeError(f"{store.path}: too few training images to hold any out for validation")
    chosen_on = folds.kind if len(folds.held_out) == 1 else f"one of {folds.kind}"
    test = data.rows[tested]
    return RunData(store, manifest, task, test, chosen_on, data.n_bad, leaks, outer)
