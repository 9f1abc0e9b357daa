"""Image models of Hugging Face's transformers, as `hf:ORG/NAME` or `hf:FOLDER`.

Only safetensors are read and no code of a repository is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base
from features.backbones.base import Backbone, Network, Parts, Spec
from features.backbones.weights import load_strictly, read_state_dict
from features.errors import BackboneError

RANDOM_SEED = 0


def load_any(name: str, weights: str | None, image_size: int | None) -> Backbone:
    """Load a vision model that has a last hidden state of positions.

    Its own preprocessing gives mean, std and size. Raises BackboneError for one that can't be
    fetched, or whose output has no last hidden state.
    """
    config, processor, module = _fetch(name, published=weights is None)
    if base.origin_of(weights) == "file":
        load_strictly(module, read_state_dict(Path(str(weights))), f"hf:{name}'s weights {weights}")
    vision = getattr(config, "vision_config", config)
    native, patch = int(getattr(vision, "image_size", 224)), int(getattr(vision, "patch_size", 1))
    network = _network(module, image_size or native, native, patch)
    default = base.default_feature(network)
    shortest = processor.size.get("shortest_edge") or processor.size.get("height") or native
    spec = Spec(
        name=f"hf:{name}",
        family=type(module).__name__,
        architecture=type(module).__name__,
        params=base.count_params(module),
        params_counts="the vision model",
        input_size=native,
        native_size=native,
        patch=patch,
        resize=int(max(shortest, native)),
        interpolation={2: "bilinear", 3: "bicubic"}.get(int(processor.resample), "bicubic"),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        feature_dim=int(network.features[default][0]),
        default_feature=default,
        tokens=int(network.features["final/tokens"][0]),
        layers=len(network.blocks),
        source=f"huggingface.co/{name}",
        licence="see the model's card",
        pretraining_data="see the model's card",
        pretraining_images=0,
        loader="features.backbones.from_transformers:load_any",
    )
    return Backbone.of(spec, module, network, spec.transform(image_size), base.origin_of(weights))


def _fetch(name: str, *, published: bool) -> tuple[Any, Any, Any]:
    """Return a model's configuration, its image processor and its vision module.

    Not `published`, its weights are random, the same every time.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
        processors: Any = AutoImageProcessor
        processor: Any = processors.from_pretrained(name, use_fast=False)
        models: Any = AutoModel
        with torch.random.fork_rng():
            torch.manual_seed(RANDOM_SEED)
            if published:
                module: Any = models.from_pretrained(name, use_safetensors=True)
            else:
                module = models.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BackboneError(
            f"hf:{name} can't be loaded ({reason}). Offline, give a folder that has config.json, "
            "preprocessor_config.json and model.safetensors, as hf:FOLDER"
        ) from None
    return config, processor, getattr(module, "vision_model", module)


def _network(module: Any, size: int, native: int, patch: int) -> Network:
    """Return the module as a function of pixels (B, 3, size, size); native: of pre-training."""
    options = {"interpolate_pos_encoding": True} if size != native else {}

    def final(pixels: Tensor) -> Parts:
        last: Tensor = module(pixel_values=pixels, **options).last_hidden_state
        return split(last)

    def split(x: Tensor | tuple[Tensor, ...]) -> Parts:
        x = x[0] if isinstance(x, tuple) else x
        if x.ndim == 4:
            return base.channels_first(x)
        return base.sequence(x.shape[1] - (size // patch) ** 2)(x)

    return Network(final=final, blocks=_blocks(module), split=split, size=size, module=module)


def _blocks(module: Any) -> list[Any]:
    """Return the encoder's layers or stages, wherever the family keeps them."""
    encoder = getattr(module, "encoder", module)
    for owner in (encoder, module):
        for name in ("layer", "layers", "stages"):
            blocks = getattr(owner, name, None)
            if isinstance(blocks, torch.nn.ModuleList | torch.nn.Sequential):
                return list(blocks)
    return []
