"""Read a file of weights without running anything in it, and load it strictly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from features.errors import BackboneError


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or PyTorch file; a wrapping dict is opened.

    Raises BackboneError for a file that isn't there, isn't weights, or can't be read without code.
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
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise BackboneError(f"weights {file}: want a state dict (names to tensors)")
    return dict(found)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict; a missing, unexpected or misshapen tensor is a BackboneError naming it."""
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
