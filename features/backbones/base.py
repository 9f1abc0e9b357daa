"""What a backbone is.

A row of facts (Spec), and once loaded a function from pixels to features (Backbone).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from features.errors import BackboneError
from features.images import Transform


@dataclass(frozen=True)
class Spec:
    """The facts about a backbone, known without loading it.

    params counts the trunk without any classifier. tokens is the number of positions at
    input_size, layers the number of blocks. A feature is named LAYER/POOL; feature_dim is
    the width of default_feature.
    """

    name: str
    family: str
    architecture: str
    params: int
    input_size: int
    resize: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    feature_dim: int
    default_feature: str
    tokens: int
    layers: int
    source: str
    licence: str
    pretraining_data: str
    loader: str  # "module:function" taking (spec, weights); imported when asked for


class Network(Protocol):
    """What a loader returns beside the module: which features there are and how to compute them."""

    features: dict[str, int]  # LAYER/POOL -> width

    def __call__(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return the wanted features, each (B, width), of normalised pixels (B, 3, H, W)."""


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone, in eval mode. weights is "published", "file" or "random"."""

    spec: Spec
    module: nn.Module
    network: Network
    transform: Transform
    weights: str
    weights_digest: str

    def check(self, features: Sequence[str]) -> None:
        """Raise BackboneError for a feature it hasn't got."""
        for name in features:
            if name not in self.network.features:
                raise BackboneError(
                    f"{self.spec.name} has no feature {name!r}: "
                    f"want {', '.join(self.network.features)}"
                )


def transform_of(spec: Spec) -> Transform:
    """Return the preprocessing the weights were made with."""
    return Transform(
        size=spec.input_size,
        resize=spec.resize,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
    )


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors and their names, the same from any file."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def count_params(module: nn.Module) -> int:
    """Return how many parameters a module has."""
    return sum(p.numel() for p in module.parameters())
