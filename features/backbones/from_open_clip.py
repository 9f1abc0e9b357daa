"""The study's OpenCLIP, the image tower of open_clip's ViT-B-16, from its official file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base
from features.backbones.base import Backbone, Spec, own
from features.backbones.download import fetch
from features.backbones.network import Parts, hooked, sequence
from features.backbones.weights import load_strictly, read_state_dict, resample_positions
from features.backbones.wrappers import unwrapped

RANDOM_SEED = 0


def load_study(spec: Spec, weights: str | None, image_size: int | None) -> Backbone:
    """Load the study's OpenCLIP from a whole CLIP or its visual part alone."""
    transform = spec.transform(image_size)
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        module = _visual(spec.architecture, transform.size)
    if weights != "random":
        file = fetch(spec.source, spec.name) if weights is None else Path(weights)
        what = f"{spec.name}'s weights {file}"
        state = own(read_state_dict(file), ("visual.",), ())
        state = unwrapped(state, module.state_dict(), what)
        state["positional_embedding"] = resample_positions(
            state.get("positional_embedding", torch.empty(0, 1))[None],
            transform.size // spec.patch,
            prefix=1,
            antialias=True,
        )[0]
        load_strictly(module, state, what)
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

    network = hooked(
        final=final,
        blocks=list(module.transformer.resblocks),
        split=sequence(1),
        size=transform.size,
        module=module,
    )
    return Backbone.of(spec, module, network, transform, base.origin_of(weights))


def _visual(architecture: str, image_size: int | None) -> Any:
    import open_clip

    with base.quiet():  # it warns that no weights are loaded: they are, afterwards
        model: Any = open_clip.create_model(
            architecture, pretrained=None, load_weights=False, force_image_size=image_size
        )
    return model.visual
