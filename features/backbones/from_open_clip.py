"""Image towers that open_clip builds: the study's ViT-B-16, and any `openclip:NAME/TAG`."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base
from features.backbones.base import Backbone, Network, Parts, Spec, own
from features.backbones.download import fetch
from features.backbones.weights import load_strictly, read_state_dict, resample_positions
from features.errors import BackboneError

RANDOM_SEED = 0


def load_study(spec: Spec, weights: str | None, image_size: int | None) -> Backbone:
    """Load the study's OpenCLIP from a whole CLIP or its visual part alone."""
    return _load(spec, spec.architecture, weights, image_size, spec.source)


def load_any(name: str, weights: str | None, image_size: int | None) -> Backbone:
    """Load the image tower of NAME/TAG as open_clip lists them."""
    import open_clip

    architecture, _, tag = name.partition("/")
    if architecture not in open_clip.list_models():
        close = difflib.get_close_matches(architecture, open_clip.list_models(), 3, cutoff=0.4)
        hint = f"; the closest are {', '.join(close)}" if close else ""
        raise BackboneError(f"open_clip has no model {architecture!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags and weights is None:
        raise BackboneError(
            f"open_clip has no weights {tag!r} of {architecture}: "
            f"want openclip:{architecture}/TAG with a tag of {', '.join(tags) or 'none'}"
        )
    config: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, tag) or {}
    shape = _visual(architecture, None)
    size = int(shape.image_size[0])
    spec = Spec(
        name=f"openclip:{name}",
        family="OpenCLIP",
        architecture=architecture,
        params=base.count_params(shape),
        params_counts="the image tower with its projection",
        input_size=size,
        native_size=size,
        patch=int(shape.patch_size[0]),
        resize=size,
        interpolation=config.get("interpolation") or "bicubic",
        mean=tuple(config.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        std=tuple(config.get("std") or open_clip.OPENAI_DATASET_STD),
        feature_dim=int(shape.output_dim),
        default_feature="final/proj",
        tokens=int(shape.grid_size[0]) ** 2,
        layers=len(shape.transformer.resblocks),
        source=f"open_clip {name}",
        licence="see the model's card",
        pretraining_data=tag or "see the model's card",
        pretraining_images=0,
        loader="features.backbones.from_open_clip:load_any",
    )
    url = config.get("url") or (
        f"https://huggingface.co/{config.get('hf_hub', '').strip('/')}"
        "/resolve/main/open_clip_pytorch_model.bin"
    )
    return _load(spec, architecture, weights, image_size, url)


def _visual(architecture: str, image_size: int | None) -> Any:
    import open_clip

    logging.disable(logging.WARNING)  # it warns that no weights are loaded: they are, afterwards
    try:
        model: Any = open_clip.create_model(
            architecture, pretrained=None, load_weights=False, force_image_size=image_size
        )
    finally:
        logging.disable(logging.NOTSET)
    if not hasattr(model.visual, "transformer"):
        raise BackboneError(
            f"open_clip's {architecture} has an image tower of another library: "
            "take it as timm:NAME"
        )
    return model.visual


def _load(
    spec: Spec, architecture: str, weights: str | None, image_size: int | None, url: str
) -> Backbone:
    transform = spec.transform(image_size)
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        module = _visual(architecture, transform.size)
    if weights != "random":
        file = fetch(url, spec.name) if weights is None else Path(weights)
        tensors = read_state_dict(file)
        state = own(tensors, ("visual.",), ())
        state["positional_embedding"] = resample_positions(
            state.get("positional_embedding", torch.empty(0, 1))[None],
            transform.size // spec.patch,
            prefix=1,
            antialias=True,
        )[0]
        load_strictly(module, state, f"{spec.name}'s weights {file}")
    module.output_tokens = True

    def final(pixels: Tensor) -> Parts:
        normed: list[Tensor] = []
        hook = module.ln_post.register_forward_hook(lambda _m, _i, out: normed.append(out))
        try:
            pooled, _ = module(pixels)
        finally:
            hook.remove()
        whole = normed[0]
        return {"cls": whole[:, 0], "proj": pooled, "tokens": whole[:, 1:]}

    network = Network(
        final=final,
        blocks=list(module.transformer.resblocks),
        split=base.sequence(1),
        size=transform.size,
        module=module,
    )
    return Backbone.of(spec, module, network, transform, base.origin_of(weights))
