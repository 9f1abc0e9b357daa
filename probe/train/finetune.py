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

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from features.backbones import Backbone
from features.backbones.base import weights_digest
from features.errors import ProbeError
from features.files import filename
from features.store import FeatureStore
from probe import protocols, results
from probe.heads import fit_heads
from probe.score import metrics
from probe.score.predictions import labelled_predictions
from probe.tested import evaluate, remarks, to_predictions
from probe.train import checkpoints
from probe.train.feeds import Images, StoredFeatures, recipe_of
from probe.train.runs import Run, RunData, run_data
from probe.train.runs import TrainSettings as TrainSettings
from probe.train.scalars import scalars
from probe.train.token_head import TokenHead, token_head
from probe.train.training import RunFolder, Say, best_of, predict, processes, train
from probe.train.tuned import Tuned, feature_of, recompute, unfreeze

FORMAT = "medprobe-finetuned"  # of run.json


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
        rows = run_data(opened, manifest, feed, settings)
        name = feature_of(backbone, tokens=settings.head == "deit", drop_last=settings.drop_last)
        shape = backbone.network.features[name]
        unfreeze(backbone, settings.unfreeze)
        model = Tuned(backbone, name, build_head(settings, shape, rows.task.outputs))
        scenario = f"{'frozen' if settings.unfreeze == 'none' else 'unfrozen'}-{settings.head}"
        run = Run(rows, scenario, name, out, settings)
        with run.writing():
            if settings.head == "linear" and settings.init == "probe" and not run.begun:
                _start_from_probe(model.head, rows, name, settings)
            return _train_and_test(model, run, say, about or {})


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
        rows = run_data(opened, opened.manifest(), feed, settings)
        model = build_head(settings, opened.features[feature], rows.task.outputs)
        run = Run(rows, f"frozen-{settings.head}", feature, out, settings)
        with run.writing():
            return _train_and_test(model, run, say, about or {})


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


def _train_and_test(
    model: nn.Module, run: Run, say: Say, about: Mapping[str, Any]
) -> results.Result:
    started = time.perf_counter()
    history = _trained(model, run, say)
    predictions, evaluation, notes = _tested(model, run)
    seconds = round(time.perf_counter() - started, 3)
    result = replace(_result(run, history, evaluation, about), notes=notes, seconds=seconds)
    if processes(run.settings.training.device).is_main_process:
        _write(run.out, result, _saved(model, run, result), predictions)
    return result


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


def _tested(
    model: nn.Module, run: Run
) -> tuple[results.Predictions, results.Evaluation, list[str]]:
    """Return a trained model's test predictions, how they score, and what must be known of it."""
    rows, settings = run.rows, run.settings
    task, manifest, training = rows.task, rows.manifest, settings.training
    device = next(model.parameters()).device
    z_val, z_test = (
        predict(model, task, part, training.batch_size, device) for part in (task.val, rows.test)
    )
    scoring = replace(settings, seed=training.seed)
    predictions = labelled_predictions(
        manifest, rows.test, task.y[rows.test], z_test, task.y[task.train], scoring
    )
    evaluation = evaluate(
        manifest,
        predictions,
        task.metric,
        held_out=(task.y[task.val], z_val),
        chosen_on=rows.chosen_on,
        settings=scoring,
    )
    uncertain = settings.uncertain if manifest.task == "multilabel" else ""
    notes = remarks(manifest, task.y[task.train], predictions, evaluation, scoring, uncertain)
    return to_predictions(predictions, manifest.classes), evaluation, notes


def _saved(model: nn.Module, run: Run, result: results.Result) -> dict[str, Any]:
    """Return what run.json says: all that is needed to use the model again."""
    backbone = run.rows.store.fingerprint["backbone"]
    if isinstance(model, Tuned) and not run.scenario.startswith("frozen"):
        backbone = backbone | {"weights_digest": weights_digest(model.trunk)}
        if backbone["weights"] == "published":
            backbone |= {"weights": "file"}
    return {
        "format": FORMAT,
        "version": 1,
        "task": run.rows.manifest.task,
        "backbone": backbone,
        "features": run.rows.store.fingerprint,
        "scenario": run.scenario,
        "feature": run.feature,
        "classes": list(run.rows.manifest.classes),
        "settings": asdict(run.settings),
        "best_epoch": result.folds["epoch"],
        "history": result.history,
        "thresholds": result.thresholds,
    }


def _result(
    run: Run,
    history: list[dict[str, Any]],
    evaluation: results.Evaluation,
    about: Mapping[str, Any],
) -> results.Result:
    """Return a run's line of results.jsonl, without its time and notes."""
    rows, settings, folder = run.rows, run.settings, run.identity.folder
    best = best_of(history, rows.task.metric)
    unit = "" if settings.aggregate is None else "_" + filename(settings.scored_by)
    tuned = ("unfreeze", "drop_last", "init", "head_size", "head_weights")
    return results.result_of(
        replace(run.identity, scored_by=settings.scored_by),
        evaluation,
        C=None,
        folds={"kind": rows.chosen_on, "epoch": best, "score": history[best]["value"]},
        n_train=len(rows.task.train),
        n_bad=rows.n_bad,
        store=str(rows.store.path),
        store_fingerprint=rows.store.fingerprint_digest,
        predictions=(folder / f"predictions{unit}.csv").as_posix(),
        heads=(folder / "run.json").as_posix(),
        converged=True,
        seconds=0.0,
        command=str(about.get("command", "")),
        versions=dict(about.get("versions", {})),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        audit=rows.audit,
        history=history,
        tuned={name: getattr(settings, name) for name in tuned},
    )


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
