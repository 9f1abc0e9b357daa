"""Scalars of training for TensorBoard, one point per epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from features.errors import ProbeError


@contextmanager
def scalars(folder: Path | None, metric: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what writes a record of training.train into event files of `folder`, if there is one.

    Raises ProbeError where tensorboard is not installed.
    """
    if folder is None:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ProbeError(
            "--tensorboard needs the package tensorboard: pip install 'medprobe[tensorboard]'"
        ) from None
    names = {"train_loss": "loss/train", "value": f"{metric}/validation", "lr": "lr"}
    with SummaryWriter(str(folder)) as writer:

        def write(record: dict[str, Any]) -> None:
            for key, name in names.items():
                if record[key] is not None:
                    writer.add_scalar(name, record[key], record["epoch"])
            writer.flush()

        yield write
