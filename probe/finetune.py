"""The scenarios beyond a linear head on frozen features, from a data set to a result.

    frozen-deit      an appended DeiT on tokens of a store (no backbone at all), or of a frozen one
    unfrozen-linear  the backbone and a linear head
    unfrozen-deit    the backbone and an appended DeiT

Frozen features are extracted first: they say which images can be used, and lead to the probe that a
linear head starts from (LP-FT, Kumar et al. 2022, arXiv:2202.10054), so that training begins at the
probe's validation score.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from features.audit import audit
from features.backbones import Backbone
from features.errors import ProbeError
from features.manifest import Manifest
from features.store import DONE, FeatureStore
from probe import checkpoints, evaluation, metrics, protocols, results, splits
from probe.data import load
from probe.feeds import Feed, Images, Tokens
from probe.heads import fit_heads
from probe.statistics import intervals
from probe.token_head import token_head
from probe.training import Say, Task, Training, best_of, predict, processes, train
from probe.tuned import Tuned, feature_of, unfreeze

HELD_OUT = 5  # a fifth of the training subjects chooses the epoch where there is no val split


@dataclass(frozen=True)
class Settings(evaluation.Scoring):
    """What to train and how it is scored. `training` has the loop's own settings."""

    head: str = "linear"  # or "deit"
    head_size: str = "deit-base"
    head_weights: str | None = None  # of the DeiT: None for ImageNet's, "random", or a file
    unfreeze: str = "all"  # "none", "last:K"
    drop_last: int = 0  # blocks
    init: str = "probe"  # or "random": of a linear head
    metric: str | None = None
    uncertain: str = "zeros"
    strict_splits: bool = False
    exact: bool = False  # decode in full, as features/plan.py has it
    training: Training = field(default_factory=Training)


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
        model = Tuned(backbone, name, _head(settings, shape, rows.task.outputs))
        if settings.head == "linear" and settings.init == "probe":
            _start_from_probe(model.head, rows, name, settings)
        feed = Images(rows.manifest, backbone.transform, settings.training.seed, settings.exact)
        frozen = settings.unfreeze == "none"
        scenario = f"{'frozen' if frozen else 'unfrozen'}-{settings.head}"
        return _run(model, feed, rows, scenario, name, out, settings, say, about or {})


def train_on_tokens(
    store: Path,
    *,
    feature: str = "final/tokens",
    out: Path,
    settings: Settings,
    say: Say = lambda _: None,
    about: Mapping[str, Any] | None = None,
) -> results.Result:
    """Train an appended DeiT on the tokens of a store: no backbone runs. As finetune otherwise."""
    with FeatureStore.open(store) as opened:
        if feature not in opened.features:
            raise ProbeError(
                f"{store} holds no {feature}: found {', '.join(opened.features)}; "
                "run `medprobe extract` with --tokens"
            )
        rows = _rows(opened, settings)
        model = _head(settings, opened.features[feature], rows.task.outputs)
        feed = Tokens(opened, feature, settings.training.seed)
        return _run(model, feed, rows, "frozen-deit", feature, out, settings, say, about or {})


def _rows(store: FeatureStore, settings: Settings) -> _Rows:
    manifest = store.manifest()
    leaks = audit(manifest, hashes=store.source()["hash"].tolist(), usable=store.done == DONE)
    if settings.strict_splits and leaks.leaks:
        raise ProbeError(f"{store.path}: {leaks.line()}. See `medprobe audit {store.path}`")
    data = load(store, manifest, store.default_feature, settings.uncertain)
    train = data.rows[data.train]
    folds = splits.folds(manifest, train, k=HELD_OUT, seed=settings.training.seed)
    val = folds.held_out[0]
    y = np.full((len(manifest), *data.y.shape[1:]), -1, dtype=data.y.dtype)
    y[data.rows] = data.y
    metric = metrics.find(
        settings.metric or manifest.metric or metrics.DEFAULT[manifest.task], manifest.task
    )
    task = Task(train[~val], train[val], y, len(manifest.classes), metric)
    if not len(task.train) or not len(task.val):
        raise ProbeError(f"{store.path}: too few training images to hold any out for validation")
    found = {"line": leaks.line(), "leaks": len(leaks.leaks), "conflicts": len(leaks.conflicts)}
    kind = folds.kind if len(folds.held_out) == 1 else f"one of {folds.kind}"
    return _Rows(store, manifest, task, data.rows[~data.train], kind, data.n_bad, found)


def _head(settings: Settings, shape: tuple[int, ...], outputs: int) -> nn.Module:
    if settings.head == "linear":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.training.seed)
            return nn.Linear(shape[0], outputs)
    return token_head(
        settings.head_size,
        settings.head_weights,
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
    p = heads.probabilities(seen.to(heads.coef.device)).cpu().numpy()
    scores = [metrics.evaluate(task.metric, task.y[task.val], one)[0] for one in p]
    sign = 1 if task.metric.higher else -1
    best = int(np.argmax(np.nan_to_num(sign * np.array(scores), nan=-np.inf)))
    one = heads.head(rows.manifest.classes, best)
    coef, intercept = one.coef, one.intercept
    if one.kind == "binary":  # one logit, of the second class: the first one's is zero
        coef, intercept = (torch.cat([torch.zeros_like(t), t]) for t in (coef, intercept))
    with torch.no_grad():
        head.weight.copy_(coef)
        head.bias.copy_(intercept)


def _run(
    model: nn.Module,
    feed: Feed,
    rows: _Rows,
    scenario: str,
    feature: str,
    out: Path,
    settings: Settings,
    say: Say,
    about: Mapping[str, Any],
) -> results.Result:
    started = time.perf_counter()
    training, task = settings.training, rows.task
    backbone = rows.store.fingerprint["backbone"]
    folder = _folder(rows, scenario, feature, settings)
    history = train(model, feed, task, training, out / folder / "checkpoints", say)
    device = next(model.parameters()).device
    p_val, p_test = (
        predict(model, feed, part, training.batch_size, task, device)
        for part in (task.val, rows.test)
    )
    best = best_of(history, task.metric)
    made = {
        "format": "medprobe-finetuned",
        "version": 1,
        "backbone": backbone["name"],
        "weights": backbone["weights"],
        "scenario": scenario,
        "feature": feature,
        "classes": list(rows.manifest.classes),
        "settings": asdict(settings),
        "best_epoch": best,
        "history": history,
    }
    value = partial_result(rows, p_val, p_test, replace(settings, seed=training.seed))
    predictions = value.pop("predictions_of")
    result = results.Result(
        dataset=rows.manifest.dataset,
        backbone=backbone["name"],
        weights=backbone["weights"],
        scenario=scenario,
        head=settings.head,
        feature=feature,
        protocol="finetune",
        C=None,
        folds={"kind": rows.chosen_on, "epoch": best, "score": history[best]["value"]},
        n_train=len(task.train),
        n_bad=rows.n_bad,
        seed=training.seed,
        split_digest=rows.manifest.split_digest(),
        store=str(rows.store.path),
        store_fingerprint=rows.store.fingerprint_digest,
        predictions=(folder / "predictions.csv").as_posix(),
        heads=(folder / "run.json").as_posix(),
        converged=True,
        seconds=round(time.perf_counter() - started, 3),
        command=str(about.get("command", "")),
        versions=dict(about.get("versions", {})),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        audit=rows.audit,
        history=history,
        **value,
    )
    if processes(training.device).is_main_process:
        checkpoints.write_json(out / folder / "run.json", made)
        results.write_predictions(out / folder / "predictions.csv", predictions)
        results.append(out, result)
    return result


def partial_result(
    rows: _Rows, p_val: NDArray[Any], p_test: NDArray[Any], settings: Settings
) -> dict[str, Any]:
    """Return what scoring the test rows gives, by the names of Result's fields."""
    manifest, task = rows.manifest, rows.task
    said = evaluation.answers(
        manifest, rows.test, task.y[rows.test], p_test, task.y[task.train], settings
    )
    scored = intervals(
        metrics.of_task(manifest.task),
        said.y,
        said.p,
        said.subjects,
        n=settings.bootstrap,
        rng=np.random.default_rng(settings.seed),
        method=settings.interval,
    )
    score = scored[task.metric.name]
    if any(v is None for v in score.values()):
        raise ProbeError(
            f"{task.metric.name} is not defined on this test split; "
            "choose another --metric or another split"
        )
    subjects = len(np.unique(said.subjects))
    notes = [manifest.note] if manifest.note else []
    notes += [f"split: {manifest.split_from}"]
    caveat = evaluation.caveat(float(score["ci_low"] or 0), float(score["ci_high"] or 0), subjects)
    return {
        "task": manifest.task,
        "classes": list(manifest.classes),
        "metric": task.metric.name,
        "metrics": scored,
        **score,
        "n_test": len(said.y),
        "n_subjects_test": subjects,
        "notes": notes + ([caveat] if caveat else []),
        "predictions_of": results.Predictions(
            ids=said.ids.tolist(),
            subjects=said.subjects.tolist(),
            labels=said.y,
            probabilities=said.p,
            classes=manifest.classes,
        ),
        **evaluation.extras(
            said,
            manifest.classes,
            task.metric,
            held_out=(task.y[task.val], p_val),
            chosen_on=rows.chosen_on,
            settings=settings,
        ),
    }


def _folder(rows: _Rows, scenario: str, feature: str, settings: Settings) -> Path:
    """Return where a run lies, relative to the results: a name for what is trained, and a seed."""
    kind = settings.head_size if settings.head == "deit" else settings.init
    which = settings.unfreeze.replace(":", "-")
    drop = f"_drop-{settings.drop_last}" if settings.drop_last else ""
    name = f"{scenario}_{feature.replace('/', '-')}_{kind}_{which}{drop}"
    seed = f"_seed{settings.training.seed}"
    return Path(rows.manifest.dataset, rows.store.path.stem, name + seed)
