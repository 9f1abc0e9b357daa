"""Weights: read a file running nothing in it and inflating nothing, load it strictly.

torch.load takes memory by what a PyTorch file declares: the sizes of the records of its zip, which
may be packed, and of the tensors in its pickle. torch.save packs nothing, so both are at most the
size of the file; check_size sees to it before torch.load reads anything.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from features.backbones import torchscript, wrappers
from features.errors import BackboneError

ITEM = {"Double": 8, "Long": 8, "ComplexFloat": 8, "ComplexDouble": 16, "Float": 4, "Int": 4,
        "QInt32": 4, "Half": 2, "BFloat16": 2, "Short": 2}  # fmt: skip  # bytes; others have one
LEGACY = 4  # pickles of a file without a zip, the last with the tensors: before PyTorch 1.6


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; what training tools wrap them in is taken off (wrappers.py).

    It is .safetensors, an index of several, or a PyTorch file. Raises BackboneError for a file that
    isn't there, isn't weights, or needs code to be read.
    """
    if file.name.endswith(wrappers.INDEX):
        return wrappers.shards(file, read_state_dict)
    return wrappers.cleaned(_read(file), f"weights {file}")


def _read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file, its wrapping dicts opened."""
    if not file.is_file():
        raise BackboneError(f"weights {file}: there is no such file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        check_size(file)
        if torchscript.is_torchscript(file):
            return torchscript.read(file)
        # Training scripts put their arguments beside the weights, as MAE's do: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise BackboneError(
            f"weights {file} hold more than tensors and are refused, "
            f"because reading them would run code: {reason}"
        ) from None
    except BackboneError:
        raise
    except Exception as error:  # on damaged data torch raises KeyError, EOFError, RuntimeError ...
        reason = str(error).partition("\n")[0]
        raise BackboneError(
            f"weights {file} can't be read ({type(error).__name__}: {reason})"
        ) from None
    state = wrappers.opened(state)
    if not isinstance(state, Mapping):
        raise BackboneError(f"weights {file}: want a state dict (names to tensors)")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise BackboneError(f"weights {file}: no tensors in it; found {', '.join(map(str, state))}")
    return tensors


def check_size(file: Path, what: str = "") -> None:
    """Raise BackboneError for a PyTorch file that takes more memory to read than it has bytes.

    what: its name in the error, in the plural; by default it is weights. Raises what pickle and
    zipfile raise for damaged data, too.
    """
    size = file.stat().st_size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            if torchscript.is_torchscript(file):  # its program is packed, and not read
                records = [record for record in records if torchscript.is_read(record.filename)]
            declared = sum(record.file_size for record in records)
            if declared <= size and not any(record.compress_type for record in records):
                declared = 0
                for record in records:
                    if record.filename.rpartition("/")[2] == "data.pkl":
                        with archive.open(record) as stream:
                            declared += _declared(stream, 1)
            else:
                declared = max(declared, size + 1)
    else:
        with file.open("rb") as stream:
            declared = _declared(stream, LEGACY)
    if declared > size:
        raise BackboneError(
            f"{what or f'weights {file}'} take {declared / 1e6:,.1f} MB of memory by what they "
            f"declare, and the file has {size / 1e6:,.1f} MB: refused, because torch.save packs "
            "nothing; load it where that is safe and save it again"
        )


def _declared(stream: IO[bytes], pickles: int) -> int:
    """Return the bytes of all tensors that the last of some pickles declares; nothing is run."""
    reader = _Sizes(stream)
    for _ in range(pickles):
        reader = _Sizes(stream)
        reader.load()
    return sum(reader.sizes.values())


class _Thing:
    """Stands for any object of a pickle: takes what is done to it, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Thing:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    append = extend = add = update = __setstate__


# The one in C would take memory for as many remembered objects as a pickle says it has.
class _Sizes(pickle._Unpickler):
    """Reads a pickle of torch.save for the sizes of its storages; every class is _Thing."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="latin1")
        self.sizes: dict[str, int] = {}

    def find_class(self, _: str, name: str) -> Any:
        return type(name, (_Thing,), {})

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) > 4 and pid[0] in ("storage", b"storage"):
            storage, key, numel = pid[1], str(pid[2]), int(pid[4])
            each = ITEM.get(getattr(storage, "__name__", "").removesuffix("Storage"), 1)
            self.sizes[key] = max(self.sizes.get(key, 0), numel * each)
        return _Thing()


def misfit(what: str, error: Exception) -> str:
    """Return in words what torch's load_state_dict found wrong: how many of what, and the first."""
    text, found = str(error), []
    for word, pattern in (
        ("missing", r"Missing key\(s\) in state_dict: (.*?)\. "),
        ("unexpected", r"Unexpected key\(s\) in state_dict: (.*?)\. "),
    ):
        if listed := re.search(pattern, f"{text} ", re.S):
            names = re.findall(r'"([^"]+)"', listed[1])
            found.append(f"{len(names)} {word}, the first {names[0]}")
    shapes = re.findall(
        r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)",
        text,
        re.S,
    )
    if shapes:
        name, have, want = shapes[0]
        found.append(f"{len(shapes)} misshapen, the first {name} is ({have}), want ({want})")
    return f"{what} don't fit: {'; '.join(found) or ' '.join(text.split())[:300]}"


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict, under any prefix; BackboneError names what is missing or doesn't fit."""
    wanted = module.state_dict()
    state = wrappers.unwrapped(state, wanted, what)
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
