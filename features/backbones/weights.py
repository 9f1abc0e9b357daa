"""Weights: read a file running nothing in it, load it strictly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from features.errors import BackboneError

WRAPPERS = ("state_dict", "model", "teacher")
DATA_PARALLEL = "module."


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or PyTorch file; wrapping dicts are opened.

    Raises BackboneError for a file that isn't there, isn't weights, or needs code to be read.
    """
    if not file.is_file():
        raise BackboneError(f"weights {file}: there is no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(
            f"weights {file} hold more than tensors and are refused, "
            f"because reading them would run code: {reason}"
        ) from None
    except Exception as error:  # on damaged data torch raises KeyError, EOFError, RuntimeError ...
        reason = str(error).partition("\n")[0]
        raise BackboneError(
            f"weights {file} can't be read ({type(error).__name__}: {reason})"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping):
        raise BackboneError(f"weights {file}: want a state dict (names to tensors)")
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise BackboneError(f"weights {file}: no tensors in it; found {', '.join(map(str, found))}")
    if all(name.startswith(DATA_PARALLEL) for name in tensors):
        return {name.removeprefix(DATA_PARALLEL): v for name, v in tensors.items()}
    return tensors


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict; BackboneError names a missing, unexpected or misshapen tensor."""
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)}, want {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {word}, the first {names[0]}"
        for word, names in (("missing", missing), ("unexpected", extra), ("misshapen", shapes))
        if names
    ]
    if problems:
        raise BackboneError(f"{what} don't fit: {'; '.join(problems)}")
    module.load_state_dict(state)


def resample_positions(table: Tensor, grid: int, *, prefix: int, antialias: bool) -> Tensor:
    """Return a position table (1, prefix + g * g, C) for another square grid, bicubic.

    Without antialiasing as DINOv2 and BLIP do it in transformers, with it as timm and open_clip do.
    """
    cls, patches = table[:, :prefix], table[:, prefix:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return table
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    image = torch.nn.functional.interpolate(
        image, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    patches = image.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(table.dtype)
    return torch.cat([cls, patches], 1)
