"""The scenarios beyond a linear head on frozen features, from a data set to a result.

    frozen-deit      an appended DeiT on tokens of a store (no backbone at all), or of a frozen one
    frozen-linear    a linear head on vectors of a store, as the study trains it
    unfrozen-linear  the backbone and a linear head
    unfrozen-deit    the backbone and an appended DeiT

Frozen features are extracted first: they say which images can be used, and lead to the probe that a
linear head starts from (LP-FT, Kumar et al. 2022, arXiv:2202.10054), so that training begins at the
probe's validation score.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from features.backbones import Backbone
from features.backbones.base import weights_digest
from features.errors import ProbeError
from features.files import filename
from features.lock import writing
from features.manifest import Manifest
from features.store import FeatureStore
from probe import protocols, results, splits
from probe.data import load
from probe.heads import fit_heads
from probe.identity import Identity, data_of
from probe.score import evaluation, metrics
from probe.tested import audited, metric_of, predictions_of, remarks, tested
from probe.train import checkpoints
from probe.train.feeds import Feed, Images, Stored, recipe_of
from probe.train.scalars import scalars
from probe.train.token_head import TokenHead, token_head
from probe.train.training import FREE, Say, Task, Training, best_of, predict, processes, train
from probe.train.tuned import Tuned, feature_of, recompute, unfreeze

FORMAT = "medprobe-finetuned"  # of run.json
HELD_OUT = 5  # a fifth of the training subjects chooses the epoch where there is no val split


@dataclass(frozen=True)
class Settings(evaluation.Scoring):
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
    strict_splits: bool = False
    training: Training = field(default_factory=Training)

    def of_head(self, processes: int) -> dict[str, Any]:
        """Return what changes the trained model beyond an Identity's own fields, as JSON values.

        processes: that train together. A run may go on for more epochs than it was begun for, so
        their number is in it only where the schedule depends on it.
        """
        loop = {k: v for k, v in asdict(self.training).items() if k not in FREE}
        loop["batch_size"] = self.training.batch_size * processes
        if self.training.schedule != "constant":
            loop["epochs"] = self.training.epochs
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
class _Rows:
    """What of a store is trained and tested on; y (N,) or (N, L) of every image of the manifest."""

    store: FeatureStore
    manifest: Manifest
    task: Task
    test: NDArray[np.int64]
    chosen_on: str
    n_bad: int
    audit: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    """A run: what is trained on what. Its folder lies in `out`, named by its identity."""

    rows: _Rows
    feed: Feed
    scenario: str
    feature: str
    out: Path
    settings: Settings

    @cached_property
    def data(self) -> dict[str, Any]:
        """Return the parts of its identity that its store has."""
        rows, views = self.rows, isinstance(self.feed, Stored)
        return data_of(rows.store, rows.manifest, self.settings.uncertain, views=views)

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


def finetune(
    store: Path,
    backbone: Backbone,
    *,
    out: Path,
    settings: Settings,
    say: Say = lambda _: None,
    about: Mapping[str, Any] | None = None,
) -> results.Result:
    """Train a backbone with a head on the images of a store, and test once.

    Checkpoints, the best model and run.json go to a folder of `out`; a run that was stopped
    goes on from there. about: "command" and "versions" for the result.

    Raises StoreError and ProbeError.
    """
    with FeatureStore.open(store) as opened:
        rows = _rows(opened, settings)
        name = feature_of(backbone, tokens=settings.head == "deit", drop_last=settings.drop_last)
        shape = backbone.network.features[name]
        unfreeze(backbone, settings.unfreeze)
        model = Tuned(backbone, name, build_head(settings, shape, rows.task.outputs))
        scenario = f"{'frozen' if settings.unfreeze == 'none' else 'unfrozen'}-{settings.head}"
        recipe = recipe_of(opened, backbone.transform)
        feed = Images(rows.manifest, recipe, settings.training.seed)
        run = _Run(rows, feed, scenario, name, out, settings)
        with run.writing():
            if settings.head == "linear" and settings.init == "probe" and not run.begun:
                _start_from_probe(model.head, rows, name, settings)
            return _train_and_test(model, run, say, about or {})


def train_on_store(
    store: Path,
    *,
    feature: str | None = None,
    out: Path,
    settings: Settings,
    say: Say = lambda _: None,
    about: Mapping[str, Any] | None = None,
) -> results.Result:
    """Train a head on the features of a store: no backbone runs. As finetune otherwise.

    feature: None is the tokens for an appended DeiT, and the store's default for a linear head,
    which starts at random.
    """
    settings = replace(settings, init="random", unfreeze="none")
    with FeatureStore.open(store) as opened:
        feature = feature or ("final/tokens" if settings.head == "deit" else opened.default_feature)
        if feature not in opened.features:
            raise ProbeError(
                f"{store} holds no {feature}: found {', '.join(opened.features)}; "
                f"run `medprobe extract` with {'--tokens' if settings.head == 'deit' else '--pool'}"
            )
        rows = _rows(opened, settings)
        model = build_head(settings, opened.features[feature], rows.task.outputs)
        feed = Stored(opened, feature, settings.training.seed)
        run = _Run(rows, feed, f"frozen-{settings.head}", feature, out, settings)
        with run.writing():
            return _train_and_test(model, run, say, about or {})


def _rows(store: FeatureStore, settings: Settings) -> _Rows:
    manifest = store.manifest()
    leaks = audited(store, manifest, strict=settings.strict_splits)
    data = load(store, manifest, store.default_feature, settings.uncertain)
    evaluation.check(manifest, data.rows[~data.train], data.y[~data.train], settings)
    train = data.rows[data.train]
    folds = splits.folds(manifest, train, k=HELD_OUT, seed=settings.training.seed)
    val = folds.held_out[0]
    y = np.full((len(manifest), *data.y.shape[1:]), -1, dtype=data.y.dtype)
    y[data.rows] = data.y
    metric = metric_of(manifest, settings.metric)
    task = Task(train[~val], train[val], y, len(manifest.classes), metric)
    if not len(task.train) or not len(task.val):
        raise ProbeError(f"{store.path}: too few training images to hold any out for validation")
    kind = folds.kind if len(folds.held_out) == 1 else f"one of {folds.kind}"
    return _Rows(store, manifest, task, data.rows[~data.train], kind, data.n_bad, leaks)


def build_head(
    settings: Settings, shape: tuple[int, ...], outputs: int, weights: str | None = None
) -> nn.Module:
    """Return a head on features of a shape, new; `weights` of a DeiT instead of the settings'."""
    if settings.head == "linear":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.training.seed)
            return nn.Linear(shape[0], outputs)
    return token_head(
        settings.head_size,
        weights or settings.head_weights,
        width=shape[1],
        tokens=shape[0],
        outputs=outputs,
        seed=settings.training.seed,
    )


def _start_from_probe(head: nn.Module, rows: _Rows, feature: str, settings: Settings) -> None:
    """Set a linear head to the best of the sweep on the frozen features of the train rows."""
    if feature not in rows.store.features:
        raise ProbeError(
            f"{rows.store.path} holds no {feature} to start from: found "
            f"{', '.join(rows.store.features)}; extract it with --layers, or use --init random"
        )
    assert isinstance(head, nn.Linear)
    task = rows.task
    X = torch.from_numpy(rows.store.read(feature, task.train).astype(np.float32))
    heads = fit_heads(
        X,
        torch.from_numpy(task.y[task.train]),
        C=protocols.find("dinov2-logreg").C,
        n_classes=task.outputs,
        device=settings.training.device,
    )
    seen = torch.from_numpy(rows.store.read(feature, task.val).astype(np.float32))
    z = heads.log_odds(seen.to(heads.coef.device)).cpu().numpy()
    scores = [metrics.evaluate_log_odds(task.metric, task.y[task.val], one)[0] for one in z]
    one = heads.head(rows.manifest.classes, metrics.best_of(task.metric, np.array(scores)))
    coef, intercept = one.coef, one.intercept
    if one.kind == "binary":  # one logit, of the second class: the first one's is zero
        coef, intercept = (torch.cat([torch.zeros_like(t), t]) for t in (coef, intercept))
    with torch.no_grad():
        head.weight.copy_(coef)
        head.bias.copy_(intercept)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: those of its backbone, and of an appended DeiT."""
    found = list(model.backbone.network.blocks) if isinstance(model, Tuned) else []
    head = model.head if isinstance(model, Tuned) else model
    return found + (list(head.blocks) if isinstance(head, TokenHead) else [])  # type: ignore[arg-type]


def _train_and_test(
    model: nn.Module, run: _Run, say: Say, about: Mapping[str, Any]
) -> results.Result:
    started = time.perf_counter()
    rows, feed, settings, folder = run.rows, run.feed, run.settings, run.identity.folder
    training, task = settings.training, rows.task
    backbone = rows.store.fingerprint["backbone"]
    if training.checkpointing:
        recompute(_blocks(model))
    where = training.tensorboard and Path(training.tensorboard, folder)
    with scalars(where or None, task.metric.name) as write:

        def tell(record: dict[str, Any]) -> None:
            write(record)
            say(record)

        history = train(model, feed, task, training, run.checkpoints, tell, run.identity)
    device = next(model.parameters()).device
    z_val, z_test = (
        predict(model, feed, part, training.batch_size, task, device)
        for part in (task.val, rows.test)
    )
    best = best_of(history, task.metric)
    trained = isinstance(model, Tuned) and not run.scenario.startswith("frozen")
    digest = weights_digest(model.trunk) if trained else backbone["weights_digest"]  # type: ignore[arg-type]
    if trained and backbone["weights"] == "published":
        backbone = backbone | {"weights": "file"}
    made = {
        "format": FORMAT,
        "version": 1,
        "task": rows.manifest.task,
        "backbone": backbone | {"weights_digest": digest},
        "features": rows.store.fingerprint,
        "scenario": run.scenario,
        "feature": run.feature,
        "classes": list(rows.manifest.classes),
        "settings": asdict(settings),
        "best_epoch": best,
        "history": history,
    }
    manifest = rows.manifest
    scoring = replace(settings, seed=training.seed)
    said = evaluation.answers(
        manifest, rows.test, task.y[rows.test], z_test, task.y[task.train], scoring
    )
    found = tested(
        rows.store,
        manifest,
        said,
        task.metric,
        held_out=(task.y[task.val], z_val),
        chosen_on=rows.chosen_on,
        settings=scoring,
        data=run.data,
    )
    made["thresholds"] = found["thresholds"]
    uncertain = settings.uncertain if manifest.task == "multilabel" else ""
    unit = "" if scoring.aggregate is None else "_" + filename(scoring.scored_by)
    tuned = ("unfreeze", "drop_last", "init", "head_size", "head_weights")
    result = results.Result(
        scenario=run.scenario,
        head=settings.head,
        feature=run.feature,
        protocol=settings.name,
        C=None,
        folds={"kind": rows.chosen_on, "epoch": best, "score": history[best]["value"]},
        n_train=len(task.train),
        n_bad=rows.n_bad,
        seed=training.seed,
        predictions=(folder / f"predictions{unit}.csv").as_posix(),
        heads=(folder / "run.json").as_posix(),
        converged=True,
        seconds=round(time.perf_counter() - started, 3),
        command=str(about.get("command", "")),
        versions=dict(about.get("versions", {})),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=remarks(manifest, task.y[task.train], said, found, scoring, uncertain),
        audit=rows.audit,
        history=history,
        tuned={name: getattr(settings, name) for name in tuned},
        settings=dict(run.identity.settings),
        **found,
    )
    if processes(training.device).is_main_process:
        _write(run.out, result, made, predictions_of(said, manifest.classes))
    return result


def _write(
    out: Path, result: results.Result, made: Mapping[str, Any], predictions: results.Predictions
) -> None:
    """Write a run's files, then its line. Raises ProbeError where the disk is full."""
    try:
        checkpoints.write_json(out / result.heads, made)
        results.write_predictions(out / result.predictions, predictions)
    except OSError as error:
        raise results.unwritable(out, error) from None
    results.append(out, result)
