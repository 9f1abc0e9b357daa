"""What a backbone is: a row of facts (Spec), and loaded its network, weights and transform."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from features.backbones.configuration import configuration_digest
from features.backbones.network import Network, Parts
from features.errors import BackboneError, MedprobeError
from features.images import Transform

LARGEST = 4096  # pixels of a side


@dataclass(frozen=True)
class Spec:
    """The facts about a backbone, known without loading it.

    params counts the trunk as `params_counts` says. input_size is the side in pixels that is taken
    unless another is asked for, native_size the one of pre-training; other sides are multiples of
    patch.
    tokens is the number of positions at input_size, layers the number of blocks or stages,
    feature_dim the width of default_feature. pretraining_images is a power of ten.
    """

    name: str
    family: str
    architecture: str
    params: int
    params_counts: str
    input_size: int
    native_size: int
    patch: int
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
    pretraining_images: float
    loader: str  # "module:function" taking (spec, weights, image_size); imported when asked for
    bfloat16: bool = True  # whether it keeps the direction of features (cosine above 0.999)
    fit: str = "crop"  # as fill and corner: see images.Transform
    fill: tuple[int, int, int] = (0, 0, 0)
    corner: str = "round"

    def transform(self, image_size: int | None) -> Transform:
        """Return the preprocessing that belongs to the weights, for another size in proportion.

        Raises BackboneError for a size that the patches don't fill; it names the nearest that do.
        Its own size is taken in any case: SigLIP's 384 pixels are 27 patches of 14 and a rest.
        """
        size = image_size or self.input_size
        if size not in (self.input_size, self.native_size):
            check_patches(self.name, size, self.patch)
        return Transform(
            size=size,
            resize=round(self.resize * size / self.input_size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            fit=self.fit,
            fill=self.fill,
            corner=self.corner,
        )


def check_patches(name: str, size: int, patch: int) -> None:
    """Raise BackboneError for a size that patches don't fill; it names the nearest that do."""
    if size % patch or size <= 0:
        near = max(size // patch, 1) * patch
        raise BackboneError(
            f"{name} takes image sizes that are multiples of {patch}: "
            f"found {size}, the nearest are {near} and {near + patch}"
        )


def check_side(name: str, size: int | None) -> None:
    """Raise BackboneError for images too large for any model; before memory is taken for one."""
    if size and size > LARGEST:
        raise BackboneError(
            f"{name}: found images of {size} pixels a side, want {LARGEST} at most: give another "
            "--image-size"
        )


@dataclass(frozen=True)
class Library:
    """What a model's own library makes of images, to compare with.

    pixels(image) gives (3, S, S) of an RGB image by the library's transform, of which `transform`
    is ours; embed(pixels) gives the feature named `feature` of (B, 3, S, S), (B, D).
    """

    transform: Transform
    feature: str
    pixels: Callable[[Any], Tensor]
    embed: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone, in eval mode. weights is "published", "file" or "random".

    library: what there is to compare with, of models that a library loads by any name.
    configuration: what the module is beside its weights (configuration.py), when it was loaded.
    """

    spec: Spec
    module: nn.Module
    network: Network
    transform: Transform
    weights: str
    weights_digest: str
    library: Library | None = None
    configuration: str = ""

    @classmethod
    def of(
        cls,
        spec: Spec,
        module: nn.Module,
        network: Network,
        transform: Transform,
        weights: str,
        library: Library | None = None,
    ) -> Backbone:
        """Return a backbone ready for inference."""
        module.requires_grad_(False)
        digests = weights_digest(module), configuration_digest(module)
        return cls(spec, module, network, transform, weights, digests[0], library, digests[1])

    def to(self, device: str, dtype: torch.dtype) -> None:
        """Bring the weights to a device and a precision, channels last as `normalise` gives."""
        self.module.to(device, dtype)
        self.module.to(memory_format=torch.channels_last)

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (pixels / 255 - mean) / std, (B, 3, H, W), of uint8 (B, H, W, 3) on its device.

        The result lies in memory as the pixels do, channels last: EfficientNet-Lite0 at float32
        runs 2 to 3 times faster so on 2 cores, and GPUs at reduced precision.
        """
        mean, std = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1)
            for values in (self.transform.mean, self.transform.std)
        )
        x = pixels.permute(0, 3, 1, 2).to(torch.float32)
        return x.mul_(1 / (255 * std)).sub_(mean / std).to(dtype)

    def normalised_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> Backbone:
        """Return the same with another mean and std per channel."""
        m, s = ((v[0], v[-2] if len(v) > 2 else v[0], v[-1]) for v in (mean, std))
        return replace(self, transform=replace(self.transform, mean=m, std=s))

    def select(self, layers: str, pools: Sequence[str], tokens: bool) -> tuple[str, ...]:
        """Return the names of features: layers is last, all, or a list; no pools is the default's.

        Raises BackboneError for a layer or pool it hasn't got.
        """
        known = self.network.layers
        chosen = {"last": ["final"], "all": known}.get(layers) or [
            f"block{int(part):02d}" if part.isdecimal() else part for part in layers.split(",")
        ]
        for layer in chosen:
            if layer not in known:
                inner = f"{known[0]} to {known[-2]}, or " if len(known) > 1 else ""
                raise BackboneError(f"{self.spec.name} has no layer {layer!r}: want {inner}final")
        default = self.spec.default_feature.split("/")[1]
        tried = (default, "cls", "mean")
        inner = next((p for p in tried if f"{known[0]}/{p}" in self.network.features), default)
        names = [
            f"{layer}/{pool}"
            for layer in chosen
            for pool in (pools or ([default] if layer == "final" else [inner]))
        ] + (["final/tokens"] if tokens else [])
        for pool in pools:
            if not any(f"{layer}/{pool}" in self.network.features for layer in chosen):
                have = sorted({name.split("/")[1] for name in self.network.features})
                raise BackboneError(
                    f"{self.spec.name} has no pool {pool!r} there: it has {', '.join(have)}"
                )
        return tuple(dict.fromkeys(name for name in names if name in self.network.features))


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors and names: the same weights from any file."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def origin_of(weights: str | None) -> str:
    """Return where weights come from: "published" for None, "random", or "file"."""
    return "published" if weights is None else "random" if weights == "random" else "file"


@contextmanager
def loading(name: str, remedy: str) -> Iterator[None]:
    """Have whatever a library raises while a model is loaded leave as BackboneError, in words."""
    try:
        yield
    except MedprobeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise BackboneError(
            f"{name} can't be loaded ({type(error).__name__}: {reason}). {remedy}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Have libraries log no warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


CARD = "see the model's card"


def described(
    network: Network, transform: Transform, default_feature: str, *, patch: int, **facts: Any
) -> Spec:
    """Return the facts about a model that its library loaded, at its own size.

    facts are other fields of Spec, as they are known; what only the model's card says is left to
    that. bfloat16 is presumed of transformers, whose patches have a side, and of no others.
    """
    presumed: dict[str, Any] = {
        "native_size": transform.size,
        "licence": CARD,
        "pretraining_data": CARD,
    }
    return Spec(
        input_size=transform.size,
        patch=patch,
        resize=transform.resize,
        interpolation=transform.interpolation,
        mean=transform.mean,
        std=transform.std,
        fit=transform.fit,
        fill=transform.fill,
        corner=transform.corner,
        feature_dim=network.features[default_feature][0],
        default_feature=default_feature,
        tokens=network.features.get("final/tokens", (0,))[0],
        layers=len(network.layers) - 1,
        pretraining_images=0,
        bfloat16=patch > 1,
        **presumed | facts,
    )


def count_params(module: nn.Module) -> int:
    """Return how many parameters a module has."""
    return sum(p.numel() for p in module.parameters())


def own(state: Mapping[str, Tensor], prefixes: Sequence[str], drop: Sequence[str]) -> Parts:
    """Return the backbone's own tensors of a larger state dict, their prefix stripped.

    The first prefix that any name has is taken; names without it belong to something else (a text
    encoder, a decoder). Names that begin with one of `drop` are known and not wanted (classifiers).
    """
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in state)), "")
    mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return {k: v for k, v in mine.items() if not k.startswith(tuple(drop))} if drop else mine
