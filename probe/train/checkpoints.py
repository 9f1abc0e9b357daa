"""Checkpoints of a training run, whole at any moment.

    last-0007.safetensors   the model after epoch 7
    last-0007.optimizer     its optimiser, in torch's format, read weights-only
    best.safetensors        the model of the best validation score so far
    state.json              which of them count: written last, by renaming

Whatever stops a run, state.json names files that are complete. Files of an epoch that it doesn't
name are of a run that was stopped while saving, and are written again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from features.backbones.weights import check_size
from features.errors import BackboneError, ProbeError
from features.files import write_whole
from features.schema import read_json
from probe.schema import State

FOLDER, STATE, BEST = "checkpoints", "state.json", "best.safetensors"


def save(
    folder: Path,
    state: Mapping[str, Any],
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    *,
    best: bool,
) -> None:
    """Save after epoch state["epoch"]. ProbeError where the disk is full; the last one stays."""
    epoch = state["epoch"]
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"last-{epoch:04d}"
        data = to_bytes(tensors)
        write_whole(folder / f"{name}.safetensors", data)
        if best:
            write_whole(folder / BEST, data)
        buffer = io.BytesIO()
        torch.save(dict(optimizer), buffer)
        write_whole(folder / f"{name}.optimizer", buffer.getvalue())
        write_whole(folder / STATE, json.dumps(dict(state), indent=1, allow_nan=False).encode())
    except OSError as error:
        raise ProbeError(
            f"{folder}: the checkpoint of epoch {epoch} can't be written ({error.strerror}); "
            "make room and run the same command again: it goes on from the last one"
        ) from None
    for old in folder.glob("last-*"):
        if not old.name.startswith(name):
            old.unlink()


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]] | None:
    """Return state, model and optimiser of the last checkpoint, or None where there is none."""
    if not (folder / STATE).is_file():
        return None
    try:
        state = read_json(folder / STATE, State)
        if [record["epoch"] for record in state["history"]] != list(range(state["epoch"] + 1)):
            raise ValueError("its history is not that of its epochs")
        name = f"last-{state['epoch']:04d}"
        model = load_file(folder / f"{name}.safetensors")
        check_size(file := folder / f"{name}.optimizer", f"the tensors of {file.name}")
        optimizer = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # damaged files raise errors of many kinds
        error_type = "" if isinstance(error, BackboneError) else f"{type(error).__name__}: "
        raise ProbeError(
            f"{folder} holds a checkpoint that can't be read ({error_type}{error}); "
            "move it away to start anew"
        ) from None
    return state, model, optimizer


def load_best(folder: Path) -> dict[str, Tensor]:
    """Return the model of the best validation score. ProbeError where it can't be read."""
    try:
        return load_file(folder / BEST)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ProbeError(
            f"{folder / BEST} can't be read ({error}): copy it again, or move the folder away and "
            "run `medprobe finetune` again"
        ) from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(dict(value), indent=1) + "\n").encode())
