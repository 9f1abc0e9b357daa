"""One store in, one result out.

Choose C on folds of the training rows, refit on all of them, test once. All heads are fitted
together: the refit on every training row is group 0, fold f is group f + 1.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.audit import audit
from features.errors import ProbeError
from features.manifest import (
    ABSENT,
    NO_LABEL,
    NOT_STATED,
    PRESENT,
    SPLITS,
    UNCERTAIN,
    Manifest,
)
from features.store import BAD, DONE, PENDING, FeatureStore
from probe import evaluation, metrics, protocols, results, splits
from probe.heads import Heads, fit_heads
from probe.path import Progress
from probe.statistics import intervals

UNCERTAIN_AS = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan}


@dataclass(frozen=True)
class Settings(evaluation.Scoring):
    """How to probe. None takes the protocol's, the store's or the task's own."""

    protocol: str = "dinov2-logreg"
    feature: str | None = None
    metric: str | None = None
    C: tuple[float, ...] | None = None
    folds: int | None = None
    uncertain: str = "zeros"  # what -1 and an empty cell count as: zeros, ones (-1 only), ignore
    strict_splits: bool = False  # refuse splits that leak
    device: str = "cpu"
    tol: float = 1e-6


@dataclass(frozen=True)
class Data:
    """What of a store is probed: manifest rows (n,), X (n, D), y (n,) or (n, L), and train (n,)."""

    rows: NDArray[np.int64]
    X: torch.Tensor
    y: NDArray[Any]
    train: NDArray[np.bool_]  # train and val rows
    n_bad: int


def probe(
    path: Path,
    *,
    out: Path,
    settings: Settings | None = None,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> results.Result:
    """Probe a store and return the result.

    Writes heads, predictions and a line of results.jsonl into `out`. Raises StoreError for a store
    that can't be read, ProbeError for labels or options no head can be fitted to.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    protocol = protocols.find(settings.protocol)
    with FeatureStore.open(path) as store:
        manifest = store.manifest()
        metric = metrics.find(
            settings.metric or manifest.metric or metrics.DEFAULT[manifest.task], manifest.task
        )
        feature = settings.feature or store.default_feature
        data = load(store, manifest, feature, settings.uncertain)
        made_from, fingerprint_digest = store.fingerprint, store.fingerprint_digest
        leaks = audit(manifest, hashes=store.source()["hash"].tolist(), usable=store.done == DONE)
    if settings.strict_splits and leaks.leaks:
        raise ProbeError(f"{path}: {leaks.line()}. See `medprobe audit {path}`, or --split drawn")

    strengths = tuple(sorted(settings.C or protocol.C))
    chosen_by = splits.folds(
        manifest,
        data.rows[data.train],
        k=_check_folds(settings.folds or protocol.folds, manifest, data),
        seed=settings.seed,
    )
    X, y = data.X[data.train], data.y[data.train]
    weights = np.vstack([np.ones((1, len(y)), dtype=np.float32), ~chosen_by.held_out])
    heads = fit_heads(
        X,
        torch.from_numpy(y),
        C=strengths,
        n_classes=len(manifest.classes),
        weights=torch.from_numpy(weights),
        tol=settings.tol,
        device=settings.device,
        progress=progress,
    )
    scores = _fold_scores(heads, X, y, chosen_by, metric)
    best = _choose(scores, metric)

    test = ~data.train
    head = heads.head(manifest.classes, best)
    p = head.predict_proba(data.X[test].double()).cpu().numpy()
    answers = evaluation.answers(manifest, data.rows[test], data.y[test], p, y, settings)
    y_test, p, subjects = answers.y, answers.p, answers.subjects
    scored = intervals(
        metrics.of_task(manifest.task),
        y_test,
        p,
        subjects,
        n=settings.bootstrap,
        rng=np.random.default_rng(settings.seed),
        method=settings.interval,
    )
    value, low, high = (scored[metric.name][k] for k in ("value", "ci_low", "ci_high"))
    if value is None or low is None or high is None:
        raise ProbeError(
            f"{path}: {metric.name} is not defined on this test split "
            f"({_unranked(manifest, y_test)}); choose another --metric or another split"
        )

    predictions = results.Predictions(
        ids=answers.ids.tolist(),
        subjects=subjects.tolist(),
        labels=y_test,
        probabilities=p,
        classes=manifest.classes,
    )
    run = Path(
        manifest.dataset,
        path.stem,
        f"{protocol.name}_{feature.replace('/', '-')}_{metric.name}_seed{settings.seed}"
        + (f"_{settings.unit}-{settings.aggregate}" if settings.aggregate else ""),
    )
    results.write_predictions(out / run / "predictions.csv", predictions)
    head.save(
        out / run / "heads",
        feature=feature,
        task=manifest.task,
        dataset=manifest.dataset,
        backbone=made_from["backbone"],
        store_fingerprint=fingerprint_digest,
    )
    result = results.Result(
        dataset=manifest.dataset,
        backbone=made_from["backbone"]["name"],
        weights=made_from["backbone"]["weights"],
        scenario="frozen-linear",
        head="linear",
        feature=feature,
        protocol=protocol.name,
        metric=metric.name,
        value=value,
        ci_low=low,
        ci_high=high,
        metrics=scored,
        C=strengths[best],
        folds={
            "kind": chosen_by.kind,
            "C": list(strengths),
            "scores": _jsonable(scores),
            "converged": heads.converged[:, 1:].all(2).tolist(),
            "gap": heads.gap[:, 1:].amax(2).tolist(),
        },
        task=manifest.task,
        classes=list(manifest.classes),
        n_train=int(data.train.sum()),
        n_test=len(y_test),
        n_bad=data.n_bad,
        n_subjects_test=len(np.unique(subjects)),
        seed=settings.seed,
        split_digest=manifest.split_digest(),
        store=str(path),
        store_fingerprint=fingerprint_digest,
        predictions=(run / "predictions.csv").as_posix(),
        heads=(run / "heads.json").as_posix(),
        converged=bool(heads.converged.all()),
        seconds=round(time.perf_counter() - started, 3),
        command=command,
        versions=dict(versions or {}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=_notes(manifest, y, y_test, heads, settings)
        + [note for note in [evaluation.caveat(low, high, len(np.unique(subjects)))] if note],
        **evaluation.extras(
            answers,
            manifest.classes,
            metric,
            held_out=_held_out(heads, X, y, chosen_by, best),
            chosen_on=chosen_by.kind,
            settings=settings,
        ),
        audit={
            "line": leaks.line(),
            "leaks": len(leaks.leaks),
            "conflicts": len(leaks.conflicts),
        },
    )
    results.append(out, result)
    return result


def load(store: FeatureStore, manifest: Manifest, feature: str, uncertain: str) -> Data:
    """Read what can be probed: committed rows with a label. ProbeError if a split is left empty."""
    done = store.done
    if (done == PENDING).any():
        raise ProbeError(
            f"{store.path} is not complete: "
            f"{int((done == PENDING).sum())} of {len(done)} images are still to be done; "
            "run the same `medprobe extract` again"
        )
    if len(store.features.get(feature, (0,))) > 1:
        raise ProbeError(
            f"{feature} is a matrix per image: a linear head takes a vector, see --feature"
        )
    used = np.isin(manifest.split, SPLITS)
    rows = np.flatnonzero((done == DONE) & _labelled(manifest.label) & used)
    X = torch.from_numpy(store.read(feature, rows))
    y = _targets(manifest.label[rows], uncertain)
    train = manifest.split[rows] != "test"
    if not train.any() or train.all():
        raise ProbeError(
            f"{store.path}: no usable image is left "
            f"in the {'test' if train.all() else 'train'} split"
        )
    return Data(rows, X, y, train, int((done == BAD).sum()))


def _labelled(label: NDArray[np.int32]) -> NDArray[np.bool_]:
    there = label[:, None] != NO_LABEL if label.ndim == 1 else label != NOT_STATED
    return np.asarray(there.any(1))


def _targets(label: NDArray[np.int32], uncertain: str) -> NDArray[Any]:
    """Return class indices as they are; states of findings as 1, 0 or NaN (left out)."""
    if label.ndim == 1:
        return label.astype(np.int64)
    y = np.full(label.shape, np.nan)
    y[label == PRESENT], y[label == ABSENT] = 1, 0
    y[label == UNCERTAIN] = UNCERTAIN_AS[uncertain]
    y[label == NOT_STATED] = np.nan if uncertain == "ignore" else 0
    return y


def _check_folds(k: int, manifest: Manifest, data: Data) -> int:
    subjects = len(np.unique(manifest.subject[data.rows[data.train]]))
    if not 2 <= k <= subjects:
        raise ProbeError(
            f"{k} folds of {subjects} training subjects: want 2 to {subjects}, see --folds"
        )
    return k


def _fold_scores(
    heads: Heads, X: torch.Tensor, y: NDArray[Any], chosen_by: splits.Folds, metric: metrics.Metric
) -> NDArray[np.float64]:
    """Return the metric of every strength on every fold's held-out rows, (J, F)."""
    out = np.full((len(heads.C), len(chosen_by.held_out)), np.nan)
    for f, held_out in enumerate(chosen_by.held_out):
        p = heads.probabilities(X[held_out].to(heads.coef.device), f + 1).cpu().numpy()
        for j in range(len(out)):
            out[j, f] = metrics.evaluate(metric, y[held_out], p[j])[0]
    return out


def _held_out(
    heads: Heads, X: torch.Tensor, y: NDArray[Any], chosen_by: splits.Folds, best: int
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return labels and probabilities of every held-out row, by the fold's head that hadn't it."""
    parts = [
        (y[rows], heads.probabilities(X[rows].to(heads.coef.device), f + 1)[best].cpu().numpy())
        for f, rows in enumerate(chosen_by.held_out)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _choose(scores: NDArray[np.float64], metric: metrics.Metric) -> int:
    """Return the strength with the best mean; of equals the smallest C, the strongest penalty."""
    defined = ~np.isnan(scores)
    if not defined.any():
        raise ProbeError(
            f"{metric.name} is not defined on any fold: use fewer folds or another --metric"
        )
    mean = np.where(defined, scores, 0).sum(1) / np.maximum(defined.sum(1), 1)
    mean[~defined.any(1)] = -np.inf if metric.higher else np.inf
    return int(np.argmax(mean if metric.higher else -mean))


def _jsonable(scores: NDArray[np.float64]) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in scores]


def _unranked(manifest: Manifest, y: NDArray[Any]) -> str:
    """Name the classes or findings that the test split has only one side of."""
    names = metrics.unranked(y, manifest.classes)
    return f"no positive or no negative test image: {', '.join(names)}" if names else ""


def _notes(
    manifest: Manifest,
    y_train: NDArray[Any],
    y_test: NDArray[Any],
    heads: Heads,
    settings: Settings,
) -> list[str]:
    """Return what a reader of the number must know."""
    notes = [manifest.note] if manifest.note else []
    notes.append(f"split: {manifest.split_from}")
    if settings.aggregate:
        notes.append(f"scored per {settings.unit}: the {settings.aggregate} of its images")
    if unranked := _unranked(manifest, y_test):
        notes.append(f"left out of AUROC and average precision, {unranked}")
    if untaught := metrics.unranked(y_train, manifest.classes):
        scored = "" if y_train.ndim == 1 else ", so not scored"
        notes.append(f"one side only in training{scored}: {', '.join(untaught)}")
    if manifest.task == "multilabel":
        notes.append(f"uncertain labels: {settings.uncertain}")
    loose = int((~heads.converged).sum())
    if loose:
        notes.append(f"{loose} of {heads.converged.numel()} heads did not converge")
    return notes
