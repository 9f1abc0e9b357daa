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
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import ProbeError
from probe.identity import Identity, differences
from probe.score import log_odds, metrics
from probe.score.metrics import Metric, evaluate_log_odds
from probe.train import checkpoints
from probe.train.feeds import Feed, Rows
from probe.train.tuned import parameter_groups

# May change when a run goes on; the seed is an Identity's own.
FREE = ("epochs", "patience", "device", "accumulate", "checkpointing", "tensorboard", "seed")
Say = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Training:
    """How to train. Defaults are the study's of its public code."""

    epochs: int = 100
    batch_size: int = 64  # per process
    accumulate: int = 1  # pieces of a batch whose gradients are summed before a step
    checkpointing: bool = False  # compute blocks again for their gradients, to save memory
    lr: float = 1e-4
    weight_decay: float = 1e-5
    warmup: int | None = None  # steps; None is 1000, or 5 epochs where that is less
    schedule: str = "constant"  # or "cosine"
    clip: float = 1.0  # norm of the gradient
    layer_decay: float = 1.0
    patience: int | None = None  # epochs without a better validation score
    balance: str = "none"  # "weights" of classes, or "sampling"
    augment: bool = True
    mixed: str = "no"  # "bf16", "fp16"
    tensorboard: str | None = None  # a folder for scalars
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """Rows of the feed: to train on (n,) and to choose the epoch on, and y of every row of it."""

    train: Rows
    val: Rows
    y: NDArray[Any]  # (N,) class index, or (N, L) of 1, 0 and NaN (left out of the loss)
    outputs: int
    metric: Metric


def train(
    model: nn.Module,
    feed: Feed,
    task: Task,
    settings: Training,
    folder: Path,
    say: Say,
    identity: Identity,
) -> list[dict[str, Any]]:
    """Train a model, leaving it with its best weights; return a record per epoch, 0 the start.

    A record: {"epoch", "train_loss" (None at the start), "value" of the metric on val, "lr",
    "seconds"}. `folder` holds checkpoints; training goes on from the last one there, which must be
    of the same identity. Raises ProbeError where it is not, where the loss is not finite, or where
    a checkpoint can't be written.
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
    history: list[dict[str, Any]] = []
    if found := checkpoints.load(folder):
        state, weights, moments = found
        _check(folder, state, identity)
        history = state["history"]
        if len(history) > settings.epochs + 1:
            raise ProbeError(
                f"{folder} holds this run after {len(history) - 1} epochs, more than --epochs "
                f"{settings.epochs}: give as many, or another -o"
            )
        try:
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise ProbeError(
                f"{folder} holds a checkpoint that doesn't fit the model ({reason}); "
                "move it away to start anew"
            ) from None
    bare = model
    model, optimizer = accelerator.prepare(model, optimizer)
    weigh = class_weights(task, settings).to(accelerator.device)
    for epoch in range(len(history), settings.epochs + 1):
        if stale(history, task.metric, settings.patience):
            break
        started, loss, lr = time.perf_counter(), None, 0.0
        torch.manual_seed(settings.seed * 1_000_003 + epoch)
        if epoch:
            loss, lr = run_epoch(model, optimizer, feed, task, settings, epoch, accelerator, weigh)
        z = predict(model, feed, task.val, settings.batch_size, task, accelerator.device)
        value = float(evaluate_log_odds(task.metric, task.y[task.val], z)[0])
        record = {"epoch": epoch, "train_loss": loss, "lr": lr}
        record["value"] = None if math.isnan(value) else value
        history.append(record | {"seconds": round(time.perf_counter() - started, 3)})
        if accelerator.is_main_process:
            say(history[-1])
            checkpoints.save(
                folder,
                {"epoch": epoch, "history": history, "identity": asdict(identity)},
                bare.state_dict(),
                optimizer.state_dict(),
                best=best_of(history, task.metric) == epoch,
            )
        accelerator.wait_for_everyone()
    bare.load_state_dict(checkpoints.load_best(folder))
    return history


def _check(folder: Path, state: Mapping[str, Any], identity: Identity) -> None:
    """Raise ProbeError where a checkpoint is of another run: other data, weights or settings."""
    try:
        found = Identity(**state["identity"])
    except (KeyError, TypeError):
        raise ProbeError(
            f"{folder} holds a run that doesn't say of which data and settings it is: "
            "move it away to start anew"
        ) from None
    if differ := differences(found, identity):
        raise ProbeError(
            f"{folder} holds another run ({'; '.join(differ)}): move it away, or give another -o"
        )


def processes(device: str) -> PartialState:
    """Return what this process is among those that train together, which may be this one alone."""
    return PartialState(cpu=device == "cpu")


def run_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    feed: Feed,
    task: Task,
    settings: Training,
    epoch: int,
    accelerator: Accelerator,
    weigh: Tensor,
) -> tuple[float, float]:
    """Train on every batch of an epoch; return the mean loss and the last rate of learning."""
    world, rank = accelerator.num_processes, accelerator.process_index
    batches = batches_of(task, settings, epoch, world)
    pieces = [np.array_split(batch[rank::world], settings.accumulate) for batch in batches]
    inputs = feed.batches(
        [piece for batch in pieces for piece in batch if len(piece)],
        epoch if settings.augment else None,
    )
    model.train()
    total, weight, factor = 0.0, 0.0, 0.0
    for step, batch in enumerate(batches):
        factor = rate(settings, (epoch - 1) * len(batches) + step, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        whole = float(weights_of(task.y[batch], weigh).sum())
        mine = [piece for piece in pieces[step] if len(piece)]
        for k, piece in enumerate(mine):
            x = next(inputs).to(accelerator.device, non_blocking=True)
            with nullcontext() if k + 1 == len(mine) else accelerator.no_sync(model):
                with accelerator.autocast():
                    logits = model(x)
                loss, _ = loss_of(logits, task.y[piece], weigh)
                accelerator.backward(loss * (world / whole))  # processes are averaged
            total += float(loss.detach())
        weight += whole
        accelerator.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    summed = accelerator.reduce(torch.tensor(total, device=accelerator.device), "sum")
    mean = float(summed) / weight
    if not math.isfinite(mean):
        raise ProbeError(
            f"the loss of epoch {epoch} is {mean}: try a smaller --lr, or float32 instead of "
            f"{settings.mixed}"
        )
    return mean, settings.lr * factor


def loss_of(logits: Tensor, y: NDArray[Any], weigh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of losses of logits (B, K), and the weights' sum.

    y (B,) class index: cross-entropy weighted by class. y (B, L) of 1, 0 and NaN: binary
    cross-entropy of each label that is there.
    """
    target, w = torch.from_numpy(y).to(weigh.device), weights_of(y, weigh)
    if target.ndim == 1:
        each = F.cross_entropy(logits.float(), target, reduction="none")
    else:
        each = F.binary_cross_entropy_with_logits(
            logits.float(), target.nan_to_num(0).float(), reduction="none"
        )
    return (each * w).sum(), w.sum()


def weights_of(y: NDArray[Any], weigh: Tensor) -> Tensor:
    """Return the weight of each loss: (B,) of classes, or (B, L), zero where there is no label."""
    target = torch.from_numpy(y).to(weigh.device)
    return weigh[target] if target.ndim == 1 else (~target.isnan() * weigh).float()


def class_weights(task: Task, settings: Training) -> Tensor:
    """Return a weight per class (K,): n / (K n_k) with balance "weights", else 1."""
    if settings.balance != "weights" or task.y.ndim == 2:
        return torch.ones(task.outputs)
    counts = np.bincount(task.y[task.train], minlength=task.outputs)
    weights = len(task.train) / (task.outputs * np.maximum(counts, 1))
    return torch.from_numpy(weights).float()


def batches_of(task: Task, settings: Training, epoch: int, world: int) -> list[Rows]:
    """Return the rows of each batch of an epoch, over all processes.

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
    """Return the share of the full rate of learning at a step, counted from 0."""
    warmup = min(1000, 5 * per_epoch) if settings.warmup is None else settings.warmup
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    last = settings.epochs * per_epoch
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, last - warmup)))


@torch.no_grad()
def predict(
    model: nn.Module,
    feed: Feed,
    rows: Rows,
    batch_size: int,
    task: Task,
    device: torch.device | str,
) -> NDArray[np.float64]:
    """Return log-odds of rows, (n, K): of a softmax of classes, or a sigmoid per label."""
    model.eval()
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    logits = torch.cat([model(x.to(device)).double().cpu() for x in feed.batches(parts, None)])
    z: NDArray[np.float64] = log_odds.of_logits(logits, kind_of(task.y)).numpy()
    return z


def kind_of(y: NDArray[Any]) -> str:
    """Return what a trained head's logits are: of a softmax of classes, or a sigmoid per label."""
    return "softmax" if y.ndim == 1 else "sigmoid"


def best_of(history: list[dict[str, Any]], metric: Metric) -> int:
    """Return the epoch of the best validation score, of equals the first."""
    return metrics.best_of(metric, np.array([r["value"] for r in history], dtype=np.float64))


def stale(history: list[dict[str, Any]], metric: Metric, patience: int | None) -> bool:
    """Say whether the score has not become better for `patience` epochs."""
    return patience is not None and len(history) - 1 - best_of(history, metric) >= patience > 0
