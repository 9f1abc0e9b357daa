"""Scenarios that are trained by gradient descent, from a data set to a result.

    frozen-deit      an appended DeiT on tokens of a store (no backbone at all), or of a frozen one
    frozen-linear    a linear head on vectors of a store, as the study trains it
    unfrozen-linear  the backbone and a linear head
    unfrozen-deit    the backbone and an appended DeiT

Frozen features are extracted first: they say which images can be used, and lead to the probe that a
linear head starts from (LP-FT, Kumar et al. 2022, arXiv:2202.10054), so that training begins at the
probe's validation score.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from features.backbones import Backbone
from features.errors import ProbeError
from features.store import FeatureStore
from probe import protocols, results
from probe.heads import fit_heads
from probe.score import metrics
from probe.train.feeds import Images, StoredFeatures, recipe_of
from probe.train.runs import Run, RunData, run_data
from probe.train.runs import TrainSettings as TrainSettings
from probe.train.scalars import scalars
from probe.train.testing import T, Then, tested
from probe.train.token_head import TokenHead, token_head
from probe.train.training import RunFolder, Say, train
from probe.train.tuned import Tuned, feature_of, recompute, unfreeze


def finetune(
    store: Path,
    backbone: Backbone,
    *,
    out: Path,
    settings: TrainSettings,
    say: Say = lambda _: None,
    about: Mapping[str, Any] | None = None,
) -> results.Result:
    """Train a backbone with a head on the images of a store, and test once.

    Checkpoints, the best model and run.json go to a folder of `out`; a run that was stopped
    goes on from there. about: "command" and "versions" for the result.

    Raises StoreError and ProbeError.
    """
    with FeatureStore.open(store) as opened:
        manifest = opened.manifest()
        feed = Images(manifest, recipe_of(opened, backbone.transform), settings.training.seed)
        name = feature_of(backbone, tokens=settings.head == "deit", drop_last=settings.drop_last)
        shape = backbone.network.features[name]
        scenario = f"{'frozen' if settings.unfreeze == 'none' else 'unfrozen'}-{settings.head}"
        unfreeze(backbone, settings.unfreeze)
        untuned = deepcopy(backbone.module.state_dict()) if settings.outer is not None else {}

        def train_run(mine: TrainSettings, then: Then[T]) -> T:
            if untuned:  # another fold has trained it
                backbone.module.load_state_dict(untuned)
            rows = run_data(opened, manifest, feed, mine)
            model = Tuned(backbone, name, build_head(mine, shape, rows.task.outputs))
            run = Run(rows, scenario, name, out, mine)
            with run.writing():
                if mine.head == "linear" and mine.init == "probe" and not run.begun:
                    _start_from_probe(model.head, rows, name, mine)
                return then(model, run, _trained(model, run, say))

        return tested(train_run, settings, about or {})


def train_on_store(
    store: Path,
    *,
    feature: str | None = None,
    out: Path,
    settings: TrainSettings,
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
        feed = StoredFeatures(opened, feature, settings.training.seed)
        manifest, scenario = opened.manifest(), f"frozen-{settings.head}"

        def train_run(mine: TrainSettings, then: Then[T]) -> T:
            rows = run_data(opened, manifest, feed, mine)
            model = build_head(mine, opened.features[feature], rows.task.outputs)
            run = Run(rows, scenario, feature, out, mine)
            with run.writing():
                return then(model, run, _trained(model, run, say))

        return tested(train_run, settings, about or {})


def build_head(
    settings: TrainSettings, shape: tuple[int, ...], outputs: int, weights: str | None = None
) -> nn.Module:
    """Return a head on features of a shape, new; `weights` of a DeiT instead of the settings'."""
    if settings.head == "linear":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.training.seed)
            return nn.Linear(shape[0], outputs)
    return token_head(
        settings.head_size,
        weights or settings.head_weights,
        shape=(shape[0], shape[1]),
        outputs=outputs,
        seed=settings.training.seed,
    )


def _start_from_probe(
    head: nn.Module, rows: RunData, feature: str, settings: TrainSettings
) -> None:
    """Set a linear head to the logistic regression of the train rows that is best on val."""
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
    blocks = list(model.backbone.network.blocks) if isinstance(model, Tuned) else []
    head = model.head if isinstance(model, Tuned) else model
    return blocks + (list(head.blocks) if isinstance(head, TokenHead) else [])  # type: ignore[arg-type]


def _trained(model: nn.Module, run: Run, say: Say) -> list[dict[str, Any]]:
    """Train a run's model; return the record of each epoch."""
    training, task = run.settings.training, run.rows.task
    if training.checkpointing:
        recompute(_blocks(model))
    events = training.tensorboard and Path(training.tensorboard, run.identity.folder)
    with scalars(events or None, task.metric.name) as write:

        def tell(record: dict[str, Any]) -> None:
            write(record)
            say(record)

        return train(model, task, training, RunFolder(run.checkpoints, run.identity), tell)
