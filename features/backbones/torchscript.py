"""Tensors of a TorchScript archive, such as OpenAI's CLIP files, read without running any of it.

An archive is a zip: data.pkl is a pickle of modules as dicts of their tensors and modules, whose
bytes are in data/, and code/ is a program, which is never opened. torch.load refuses such files
where it is told to read weights only.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
CONSTANTS = "constants.pkl"  # what a TorchScript archive has and a state dict's file hasn't


class _Module:
    """A module of the archive: what it holds, by name."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.held = dict(state) if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    """Reads data.pkl: tensors, and modules as _Module. Whatever else it names is refused."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}/data.pkl"))
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_Module,), {"__new__": lambda cls, *_: _new(cls)})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt
        if module == "torch" and name in DTYPES:
            return name
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values: values
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is neither tensor nor module"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=DTYPES[dtype], count=numel)
        return self.storages[key]


def _new(cls: Any) -> Any:
    found = object.__new__(cls)
    found.held = {}
    return found


def _rebuilt(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # A view: what a file declares by strides of zero takes no memory.
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def is_torchscript(file: Path) -> bool:
    """Say whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.rpartition("/")[2] == CONSTANTS for name in archive.namelist())


def is_read(name: str) -> bool:
    """Say whether a record of an archive is one of those that `read` takes."""
    parts = name.split("/")
    return parts[1:] == ["data.pkl"] or parts[1:2] == ["data"]


def read(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive by their names in the module's state dict.

    Raises pickle.UnpicklingError for one that names more than tensors and modules, and what
    pickle, zipfile and torch raise for damaged data.
    """
    with zipfile.ZipFile(file) as archive:
        names = [name.split("/") for name in archive.namelist()]
        folder = next(parts[0] for parts in names if parts[1:] == ["data.pkl"])
        whole = _Reader(archive, folder).load()
    found: dict[str, Tensor] = {}
    _collect(whole, "", found)
    return found


def _collect(module: Any, prefix: str, found: dict[str, Tensor]) -> None:
    for name, value in module.held.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", found)
