"""Test trained models once: one on its test rows, or one per outer fold on the rows of its fold.

Of outer folds each is a run of its own, with its own checkpoints, so that a stopped command goes on
with the fold it was at; their predictions together make one result. No model is kept of them: the
one to use is trained on everything, without outer folds, and its expected score is this result's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from features.backbones.base import weights_digest
from features.files import filename
from probe import results
from probe.score.predictions import labelled_predictions, taught
from probe.score.thresholds import HeldOut, Labelled
from probe.tested import evaluate, remarks, to_predictions
from probe.train import checkpoints
from probe.train.runs import Run
from probe.train.runs import TrainSettings as TrainSettings
from probe.train.training import best_of, predict, processes
from probe.train.tuned import Tuned
from probe.trials import of_outer_folds

FORMAT = "medprobe-finetuned"  # of run.json
History = list[dict[str, Any]]
T = TypeVar("T")
Then = Callable[[nn.Module, Run, History], T]  # what is done with a trained run, under its lock


class TrainRun(Protocol):
    """Train the run of some settings, and do with it what follows."""

    def __call__(self, settings: TrainSettings, then: Then[T], /) -> T:
        """Return what `then` makes of it."""
        ...


def tested(
    train_run: TrainRun, settings: TrainSettings, about: Mapping[str, Any]
) -> results.Result:
    """Train and test once, or once per outer fold; write the result and return it."""
    started = time.perf_counter()
    if settings.outer is None:
        return train_run(settings, partial(_test_run, started, about))
    answers: list[_Answers] = []
    folds = 1
    while len(answers) < folds:
        answers.append(train_run(replace(settings, fold=len(answers)), _answers_of))
        outer = answers[0].run.rows.outer
        assert outer is not None
        folds = int(outer.part.max()) + 1
    return _test_folds(answers, started, about)


def _test_run(
    started: float, about: Mapping[str, Any], model: nn.Module, run: Run, history: History
) -> results.Result:
    """Test a run, write its files and its line."""
    predictions, evaluation, notes = _tested(model, run)
    seconds = round(time.perf_counter() - started, 3)
    result = replace(_result(run, history, evaluation, about), notes=notes, seconds=seconds)
    if processes(run.settings.training.device).is_main_process:
        _write(run.out, result, _saved(model, run, result), predictions)
    return result


@dataclass(frozen=True)
class _Answers:
    """Of a fold's run: log-odds of its validation rows (V, K) and of its test rows (n, K)."""

    run: Run
    history: History
    z_val: NDArray[np.float64]
    z_test: NDArray[np.float64]

    @property
    def held_out(self) -> Labelled:
        """Return labels and log-odds of the validation rows."""
        task = self.run.rows.task
        return task.y[task.val], self.z_val

    @property
    def labels(self) -> NDArray[Any]:
        """Return the labels of the test rows, (n,) or (n, L)."""
        task = self.run.rows.task
        return taught(task.y[self.run.rows.test], task.y[task.train])


def _answers_of(model: nn.Module, run: Run, history: History) -> _Answers:
    task, batch = run.rows.task, run.settings.training.batch_size
    device = next(model.parameters()).device
    z_val, z_test = (
        predict(model, task, part, batch, device) for part in (task.val, run.rows.test)
    )
    return _Answers(run, history, z_val, z_test)


def _test_folds(
    answers: Sequence[_Answers], started: float, about: Mapping[str, Any]
) -> results.Result:
    """Score what the models of all folds say, each of its own fold; write the result."""
    first = answers[0].run
    rows, outer = first.rows, first.rows.outer
    run = replace(first, settings=replace(first.settings, fold=None))
    settings, manifest = replace(run.settings, seed=run.settings.training.seed), rows.manifest
    test = np.concatenate([one.run.rows.test for one in answers])
    order = np.argsort(test)
    predictions = labelled_predictions(
        manifest,
        test[order],
        np.concatenate([one.labels for one in answers])[order],
        np.concatenate([one.z_test for one in answers])[order],
        settings,
        fold=np.repeat(np.arange(len(answers)), [len(one.z_test) for one in answers])[order],
        ranked_together=settings.outer == "subject",
    )
    held = [one.held_out for one in answers]
    together = np.concatenate([y for y, _ in held]), np.concatenate([z for _, z in held])
    evaluation = evaluate(
        manifest,
        predictions,
        rows.task.metric,
        held_out=HeldOut(together, held),
        chosen_on=f"{rows.chosen_on}, in each outer fold",
        settings=settings,
    )
    assert outer is not None
    dealt = replace(manifest, split_from=outer.kind)
    uncertain = settings.uncertain if manifest.task == "multilabel" else ""
    notes = remarks(dealt, rows.task.y[test], predictions, evaluation, settings, uncertain)
    epochs = [best_of(one.history, rows.task.metric) for one in answers]
    result = replace(
        _result(run, answers[0].history, evaluation, about),
        folds={"kind": rows.chosen_on},
        outer=of_outer_folds(outer.kind, predictions, rows.task.metric, epoch=epochs),
        n_train=len(test),
        notes=[*notes, "no model is kept: train the one to use without --outer"],
        history=[],
        predictions="",
        heads="",
        seconds=round(time.perf_counter() - started, 3),
    )
    if not processes(settings.training.device).is_main_process:
        return result
    return results.record(run.out, result, to_predictions(predictions, manifest.classes))


def _tested(
    model: nn.Module, run: Run
) -> tuple[results.Predictions, results.Evaluation, list[str]]:
    """Return a trained model's test predictions, how they score, and what must be known of it."""
    rows, settings = run.rows, run.settings
    task, manifest, training = rows.task, rows.manifest, settings.training
    answers = _answers_of(model, run, [])
    scoring = replace(settings, seed=training.seed)
    predictions = labelled_predictions(manifest, rows.test, answers.labels, answers.z_test, scoring)
    evaluation = evaluate(
        manifest,
        predictions,
        task.metric,
        held_out=HeldOut(answers.held_out),
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
