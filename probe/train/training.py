"""One training loop for every scenario that trains more than a linear head.

AdamW, linear warm-up, then constant or cosine; every epoch is validated, and the best one counts.
The same loop runs on a CPU, a GPU, or several processes (`accelerate launch`): a batch is
batch_size images per process, its loss the weighted mean over all of them. What an epoch draws
(order, augmentation) depends on the seed and the epoch's number only, so that a run that was
stopped goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from numpy.typing import NDArray
from torch import Tensor, nn

from features.effects import of_run, without_effect
from features.errors import ProbeError
from probe.identity import Identity, differences
from probe.score import log_odds, metrics
from probe.score.metrics import Metric, evaluate_log_odds
from probe.train import checkpoints
from probe.train.feeds import Feed, RowIndex
from probe.train.loss import class_weights, loss_of, weights_of
from probe.train.tuned import parameter_groups

Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Training:
    """How to train. Defaults are the study's of its public code.

    A run may go on for more epochs, or with another patience; the seed is an Identity's own field.
    """

    epochs: int = of_run(100)
    batch_size: int = 64  # per process
    accumulate: int = without_effect(1)  # pieces of a batch whose gradients are summed
    checkpointing: bool = without_effect(False)  # compute blocks twice, to save memory
    lr: float = 1e-4
    weight_decay: float = 1e-5
    warmup: int | None = None  # steps; None is 1000, or 5 epochs where that is less
    schedule: str = "constant"  # or "cosine"
    clip: float = 1.0  # norm of the gradient
    layer_decay: float = 1.0
    patience: int | None = of_run(None)  # epochs without a better validation score
    balance: str = "none"  # "weights" of classes, or "sampling"
    augment: bool = True
    mixed: str = "no"  # "bf16", "fp16"
    tensorboard: str | None = without_effect(None)  # a folder for scalars
    device: str = without_effect("cpu")
    seed: int = of_run(0)


@dataclass(frozen=True)
class Task:
    """What is learnt: rows of a feed to train on (n,) and to choose the epoch on, and their labels.

    y has the labels of every row of the feed.
    """

    feed: Feed
    train: RowIndex
    val: RowIndex
    y: NDArray[Any]  # (N,) class index, or (N, L) of 1, 0 and NaN (left out of the loss)
    outputs: int
    metric: Metric


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run's checkpoints, and what tells it from other runs."""

    folder: Path
    identity: Identity


@dataclass(frozen=True)
class _Loop:
    """What an epoch needs: the model and its optimiser as Accelerate wraps them, and the task.

    class_weights has the weight of each class (K,), or of each finding's positives (L,).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator
    task: Task
    settings: Training
    class_weights: Tensor


def train(
    model: nn.Module, task: Task, settings: Training, run: RunFolder, say: Say
) -> list[dict[str, Any]]:
    """Train a model, leaving it with its best weights; return a record per epoch, 0 the start.

    A record: {"epoch", "train_loss" (None at the start), "value" of the metric on val, "lr",
    "seconds"}. Training goes on from the last checkpoint of the run. Raises ProbeError where that
    is of another identity, where the loss is not finite, or where a checkpoint can't be written.
    """
    accelerator = Accelerator(cpu=settings.device == "cpu", mixed_precision=settings.mixed)
    optimizer = torch.optim.AdamW(
        parameter_groups(
            model,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            layer_decay=settings.layer_decay,
        )
    )
    history = _resume(model, optimizer, settings, run)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    weights = class_weights(task.y[task.train], task.outputs, settings.balance).to(
        accelerator.device
    )
    loop = _Loop(wrapped, optimizer, accelerator, task, settings, weights)
    for epoch in range(len(history), settings.epochs + 1):
        if out_of_patience(history, task.metric, settings.patience):
            break
        history.append(_epoch(loop, epoch))
        if accelerator.is_main_process:
            say(history[-1])
            checkpoints.save(
                run.folder,
                {"epoch": epoch, "history": history, "identity": asdict(run.identity)},
                model.state_dict(),
                optimizer.state_dict(),
                best=best_of(history, task.metric) == epoch,
            )
        accelerator.wait_for_everyone()
    model.load_state_dict(checkpoints.load_best(run.folder))
    return history


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: Training, run: RunFolder
) -> list[dict[str, Any]]:
    """Load the last checkpoint of a run, if there is one; return the records of its epochs."""
    checkpoint = checkpoints.load(run.folder)
    if checkpoint is None:
        return []
    state, weights, moments = checkpoint
    _check(state, run)
    history: list[dict[str, Any]] = state["history"]
    if len(history) > settings.epochs + 1:
        raise ProbeError(
            f"{run.folder} holds this run after {len(history) - 1} epochs, more than --epochs "
            f"{settings.epochs}: give as many, or another -o"
        )
    try:
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ProbeError(
            f"{run.folder} holds a checkpoint that doesn't fit the model ({reason}); "
            "move it away to start anew"
        ) from None
    return history


def _check(state: Mapping[str, Any], run: RunFolder) -> None:
    """Raise ProbeError where a checkpoint is of another run: other data, weights or settings."""
    try:
        saved = Identity(**state["identity"])
    except (KeyError, TypeError):
        raise ProbeError(
            f"{run.folder} holds a run that doesn't say of which data and settings it is: "
            "move it away to start anew"
        ) from None
    if differ := differences(saved, run.identity):
        raise ProbeError(
            f"{run.folder} holds another run ({'; '.join(differ)}): move it away, or give another "
            "-o"
        )


def processes(device: str) -> PartialState:
    """Return what this process is among those that train together, which may be this one alone."""
    return PartialState(cpu=device == "cpu")


def _epoch(loop: _Loop, epoch: int) -> dict[str, Any]:
    """Train for an epoch (none of it in epoch 0) and validate; return its record."""
    task, settings = loop.task, loop.settings
    started, loss, lr = time.perf_counter(), None, 0.0
    torch.manual_seed(settings.seed * 1_000_003 + epoch)
    if epoch:
        loss, lr = _train_epoch(loop, epoch)
    z = predict(loop.model, task, task.val, settings.batch_size, loop.accelerator.device)
    value = float(evaluate_log_odds(task.metric, task.y[task.val], z)[0])
    return {
        "epoch": epoch,
        "train_loss": loss,
        "lr": lr,
        "value": None if math.isnan(value) else value,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _train_epoch(loop: _Loop, epoch: int) -> tuple[float, float]:
    """Train on every batch of an epoch; return the mean loss and the last learning rate."""
    settings, accelerator, y = loop.settings, loop.accelerator, loop.task.y
    world, rank = accelerator.num_processes, accelerator.process_index
    batches = batches_of(loop.task, settings, epoch, world)
    pieces = [np.array_split(batch[rank::world], settings.accumulate) for batch in batches]
    pieces = [[piece for piece in batch if len(piece)] for batch in pieces]
    inputs = loop.task.feed.batches(
        [piece for batch in pieces for piece in batch], epoch if settings.augment else None
    )
    loop.model.train()
    total, weight, factor = 0.0, 0.0, 0.0
    for step, batch in enumerate(batches):
        factor = rate(settings, (epoch - 1) * len(batches) + step, len(batches))
        for group in loop.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        batch_weight = float(weights_of(y[batch], loop.class_weights).sum())
        for loss in _accumulate_gradient(loop, inputs, pieces[step], world / batch_weight):
            total += loss
        weight += batch_weight
        accelerator.clip_grad_norm_(loop.model.parameters(), settings.clip)
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    summed = accelerator.reduce(torch.tensor(total, device=accelerator.device), "sum")
    mean = float(summed) / weight
    if not math.isfinite(mean):
        raise ProbeError(
            f"the loss of epoch {epoch} is {mean}: try a smaller --lr, or float32 instead of "
            f"{settings.mixed}"
        )
    return mean, settings.lr * factor


def _accumulate_gradient(
    loop: _Loop, inputs: Iterator[Tensor], pieces: list[RowIndex], scale: float
) -> list[float]:
    """Add up the gradients of this process's pieces of a batch; return the summed loss of each.

    scale: the number of processes by the weight of the whole batch. Gradients are averaged over
    the processes, once, at the last piece.
    """
    accelerator, losses = loop.accelerator, []
    for k, piece in enumerate(pieces, 1):
        x = next(inputs).to(accelerator.device, non_blocking=True)
        with nullcontext() if k == len(pieces) else accelerator.no_sync(loop.model):
            with accelerator.autocast():
                logits = loop.model(x)
            loss, _ = loss_of(logits, loop.task.y[piece], loop.class_weights)
            accelerator.backward(loss * scale)
        losses.append(float(loss.detach()))
    return losses


def batches_of(task: Task, settings: Training, epoch: int, world: int) -> list[RowIndex]:
    """Return the rows (B,) of each batch of an epoch, over all processes.

    A last batch with fewer rows than there are processes is left out.
    """
    rng = np.random.default_rng([settings.seed, epoch])
    if settings.balance == "sampling" and task.y.ndim == 1:
        y = task.y[task.train]
        p = 1 / np.bincount(y)[y]
        order = rng.choice(task.train, len(task.train), p=p / p.sum())
    else:
        order = rng.permutation(task.train)
    size = settings.batch_size * world
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return [batch for batch in batches if len(batch) >= world]


def rate(settings: Training, step: int, per_epoch: int) -> float:
    """Return the share of the full learning rate at a step, counted from 0."""
    warmup = min(1000, 5 * per_epoch) if settings.warmup is None else settings.warmup
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    last = settings.epochs * per_epoch
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, last - warmup)))


@torch.no_grad()
def predict(
    model: nn.Module, task: Task, rows: RowIndex, batch_size: int, device: torch.device | str
) -> NDArray[np.float64]:
    """Return log-odds of rows (n,), (n, K): of a softmax of classes, or a sigmoid per label."""
    model.eval()
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    inputs = task.feed.batches(parts, None)
    logits = torch.cat([model(x.to(device)).double().cpu() for x in inputs])
    link = "softmax" if task.y.ndim == 1 else "sigmoid"
    z: NDArray[np.float64] = log_odds.of_logits(logits, link).numpy()
    return z


def best_of(history: list[dict[str, Any]], metric: Metric) -> int:
    """Return the epoch of the best validation score, the first where several are equal."""
    return metrics.best_of(metric, np.array([r["value"] for r in history], dtype=np.float64))


def out_of_patience(history: list[dict[str, Any]], metric: Metric, patience: int | None) -> bool:
    """Say whether the score has not become better for `patience` epochs."""
    return patience is not None and len(history) - 1 - best_of(history, metric) >= patience > 0
