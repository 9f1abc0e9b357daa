"""What people's checkpoints wrap weights in, taken off: dicts, prefixes, shards, adapters.

A checkpoint is a dict that holds weights somewhere, under names that training tools put words
before. Which words, the names of the module tell that is to be loaded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from features.errors import BackboneError

# The first that holds tensors is opened, and what is in it again. Averages of weights come before
# the weights of the last step, as in timm's load_state_dict: they are what is evaluated.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher",
    "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params",
)  # fmt: skip
# What DataParallel, torch.compile, FSDP and activation checkpointing put into names, anywhere.
NOISE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
DATA_PARALLEL = "module."
ADAPTERS = re.compile(
    r"\.lora_(?:A|B|embedding|magnitude)|\.(?:hada_w|lokr_w)|^base_model\.model\."
)
INDEX = ".index.json"
PREFERRED = ("teacher.", "ema.", "model_ema.")  # of two that fit alike


def opened(found: Any, depth: int = 3) -> Any:
    """Return the mapping of names to tensors inside wrapping dicts, or what was given."""
    for word in WRAPPERS if depth and isinstance(found, Mapping) else ():
        inner = opened(found[word], depth - 1) if word in found else None
        if isinstance(inner, Mapping) and any(isinstance(v, Tensor) for v in inner.values()):
            return inner
    return found


def cleaned(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return tensors by the names that they had before training tools wrapped their modules.

    Raises BackboneError for adapters that aren't merged into the weights that they change.
    """
    adapters = [name for name in state if ADAPTERS.search(name)]
    if adapters:
        raise BackboneError(
            f"{what} hold adapters (LoRA) apart from the weights they change, such as "
            f"{adapters[0]}: merge them first, in peft by merge_and_unload(), and save the result"
        )
    named = {NOISE.sub("", name): value for name, value in state.items()}
    while named and all(name.startswith(DATA_PARALLEL) for name in named):
        named = {name.removeprefix(DATA_PARALLEL): value for name, value in named.items()}
    return named


def unwrapped(state: Mapping[str, Tensor], wanted: Iterable[str], what: str) -> dict[str, Tensor]:
    """Return the tensors of a module: those under the prefix that most of the wanted names follow.

    Such as model., encoder., backbone. of Lightning. Names under other prefixes belong to other
    modules and are left out. A state whose names have no prefix is returned as it is. Raises
    BackboneError where two prefixes fit alike, and neither is an average of weights.
    """
    names = set(wanted)
    fits = Counter(
        prefix for key in state for prefix in _prefixes(key) if key[len(prefix) :] in names
    )
    best = max(fits.values(), default=0)
    alike = [prefix for prefix, count in fits.items() if count == best]
    if not alike or "" in alike:
        return dict(state)
    chosen = next((p for end in PREFERRED for p in alike if p.endswith(end)), alike[0])
    if len(alike) > 1 and not chosen.endswith(PREFERRED):
        raise BackboneError(
            f"{what} hold {len(alike)} sets of tensors that fit alike, under "
            f"{' and '.join(sorted(alike))}: save the one that is wanted by itself"
        )
    return {k.removeprefix(chosen): v for k, v in state.items() if k.startswith(chosen)}


def _prefixes(name: str) -> list[str]:
    """Return "", "a." and "a.b." of a.b.c."""
    return [name[:i] for i in (0, *(m.end() for m in re.finditer(r"\.", name)))]


def shards(index: Path, read: Callable[[Path], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of all files that an index names (model.safetensors.index.json).

    Raises BackboneError for an index that isn't one, and files that aren't beside it.
    """
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"weights {index}: want a weight_map of names to files beside the index ({error})"
        ) from None
    found: dict[str, Tensor] = {}
    for name in files:
        found |= read(index.parent / name)
    return found
