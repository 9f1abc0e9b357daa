"""Any model of timm, as `timm:NAME`, `timm:hf-hub:ORG/NAME` or `timm:local-dir:DIR`.

All that is known of a model is asked of timm: its transform, its intermediates, its embedding.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import base, network
from features.backbones.base import Backbone, Spec
from features.backbones.families import default_feature
from features.backbones.known import Build
from features.backbones.network import Forward, Network, Parts
from features.backbones.timm_weights import classifiers, published
from features.backbones.weights import misfit, read_state_dict
from features.backbones.wrappers import unwrapped
from features.errors import BackboneError
from features.images import Transform

RANDOM_SEED = 0
AS_IT_IS = Build()
SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
FITS = {"center": "crop", "squash": "squash", "border": "pad"}
REMEDY = "Models that timm builds are listed by `timm.list_models()`"
# Heads by the names they have in files; the classifier's own name is added.
HEADS = ("head", "head.fc", "head_dist", "fc", "classifier", "last_linear")
# What an architecture has only if it is asked for, told by the names in a file of weights.
EXTRAS: dict[str, dict[str, Any]] = {"ls1.gamma": {"init_values": 1e-5}}


def load_any(
    name: str, weights: str | None, image_size: int | None, build: Build = AS_IT_IS
) -> Backbone:
    """Load any timm model by its name there, with its own transform and embedding.

    build: what its authors say beside its configuration. Raises BackboneError for a name, weights
    or a size that don't fit, whatever timm raises.
    """
    with base.loading(f"timm:{name}", REMEDY):
        if not name.startswith(SOURCES):
            _check_name(name)
        module = _module(name, weights, image_size, build)
        transform = transform_of(module, f"timm:{name}", image_size)
        _check_size(module, f"timm:{name}", transform.size)
        found = network_of(module, transform.size)
        spec = _spec_of(name, module, found, transform)
        library = _library(module, found, transform)
        return Backbone.of(spec, module, found, transform, base.origin_of(weights), library)


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


def _module(name: str, weights: str | None, image_size: int | None, build: Build) -> Any:
    """Build a model with its weights, for an image size where it is built for one."""
    options = {key: _thing(value) for key, value in build.options.items()}
    options |= {"img_size": image_size} if image_size else {}
    if weights == "random":
        return created(name, options)
    what = f"timm:{name}'s weights" + (f" {weights}" if weights else "")
    state = published(name) if weights is None else read_state_dict(Path(weights))
    state = {key: value for key, value in state.items() if not key.startswith(build.drop)}
    if build.initial:
        made = created(name, options).state_dict()
        state |= {key: value for key, value in made.items() if key.startswith(build.initial)}
    try:
        return _with_weights(name, options, state)
    except RuntimeError as error:
        bare = unwrapped(state, created(name, options).state_dict(), what)
        if bare.keys() == state.keys():
            raise BackboneError(misfit(what, error)) from None
    try:
        return _with_weights(name, options, bare)
    except RuntimeError as error:
        raise BackboneError(misfit(what, error)) from None


def _thing(value: Any) -> Any:
    """Return the class that is written as where it is, such as torch.nn.SiLU; else the value."""
    if not isinstance(value, str) or "." not in value:
        return value
    module, _, name = value.rpartition(".")
    return getattr(importlib.import_module(module), name)


def created(name: str, options: Mapping[str, Any], **more: Any) -> Any:
    """Return a model of timm's, its weights random, the same every time, without a classifier."""
    import timm

    with torch.random.fork_rng(), base.quiet():
        torch.manual_seed(RANDOM_SEED)
        try:
            return timm.create_model(name, num_classes=0, **options, **more)
        except TypeError:  # networks that take any size have no such argument
            if "img_size" not in options:
                raise
        torch.manual_seed(RANDOM_SEED)
        rest = {key: value for key, value in options.items() if key != "img_size"}
        return timm.create_model(name, num_classes=0, **rest, **more)


def _with_weights(name: str, options: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Have timm load a state dict as it loads its own: renamed, resampled, strictly."""
    heads = {*HEADS, *classifiers(name)}
    state = {
        key: value
        for key, value in state.items()
        if key.removesuffix(".weight").removesuffix(".bias") not in heads
    }
    # Classes that agree leave timm strict; the source "" is the state dict itself.
    overlay = {"state_dict": state, "num_classes": 0, "source": "", "custom_load": False}
    try:
        return created(name, options, pretrained=True, pretrained_cfg_overlay=overlay)
    except RuntimeError:
        extra = [more for leaf, more in EXTRAS.items() if any(k.endswith(leaf) for k in state)]
        if extra and not extra[0].items() <= options.items():
            return _with_weights(name, options | extra[0], state)
        beside = _beside_classifiers(name, options, state)
        if not beside:
            raise
        return _with_weights(name, options, {k: v for k, v in state.items() if k not in beside})


def _beside_classifiers(
    name: str, options: Mapping[str, Any], state: Mapping[str, Tensor]
) -> set[str]:
    """Return the names of what goes with a classifier, such as its norm (`head.bn` of LeViT).

    They stand in the module that holds the classifier, of which a model without one has nothing.
    """
    holders = {one.rpartition(".")[0] + "." for one in classifiers(name) if "." in one}
    found = {k for k in state if k.startswith(tuple(holders))}
    wanted = created(name, options).state_dict() if found else {}
    gone = tuple(one for one in holders if not any(k.startswith(one) for k in wanted))
    return {k for k in found if k.startswith(gone)}


def transform_of(module: Any, name: str, image_size: int | None) -> Transform:
    """Return timm's own transform, create_transform(is_training=False), with its rounding.

    Source: timm/data/transforms_factory.py, transforms_imagenet_eval.
    """
    config = _config(module)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise BackboneError(
            f"{name} takes {width} x {height} pixels of {channels} channels: want a model of "
            "square images in 3 channels"
        )
    size, mean = image_size or height, tuple(config["mean"])
    return Transform(
        size=size,
        resize=math.floor(size / config["crop_pct"]),
        interpolation=config["interpolation"],
        mean=mean,
        std=tuple(config["std"]),
        fit=FITS[config["crop_mode"]],
        fill=tuple(round(255 * v) for v in mean) if config["crop_mode"] == "border" else (0, 0, 0),
    )


def _config(module: Any) -> dict[str, Any]:
    from timm.data.config import resolve_data_config

    found: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
        pretrained_cfg=module.pretrained_cfg
    )
    return found


def _library(module: Any, found: Network, transform: Transform) -> base.Library | None:
    """Return timm's own transform and embedding; of models that pool nothing the class token."""
    from timm.data.transforms_factory import create_transform

    feature = next((f for f in ("final/pooled", "final/cls") if f in found.features), None)
    if feature is None:
        return None
    side = {"input_size": (3, transform.size, transform.size)}
    pixels = create_transform(**_config(module) | side, is_training=False)

    def embed(x: Tensor) -> Tensor:
        last = module.forward_features(x)
        if feature == "final/cls":
            token: Tensor = last[:, 0]
            return token
        embedding: Tensor = module.forward_head(last, pre_logits=True)
        return embedding

    return base.Library(transform, feature, pixels, embed)


def network_of(module: Any, size: int) -> Network:
    """Return a timm model by its forward_intermediates, forward_features and forward_head."""
    run, count, blocks = intermediates(
        module, size, lambda x: module.forward_head(x, pre_logits=True)
    )
    return Network(run, count=count, blocks=blocks, size=size, module=module)


def intermediates(
    module: Any, size: int, pool: Callable[[Any], Any]
) -> tuple[Forward, int, list[torch.nn.Module]]:
    """Return how a model of timm runs, its number of intermediates, and the modules that end them.

    pool: from what forward_features gives to the embedding. What comes out is found by running it.
    """
    options: dict[str, Any] = {"output_fmt": "NCHW"}
    if getattr(module, "num_prefix_tokens", 0):
        given = inspect.signature(module.forward_intermediates).parameters
        options |= {k: True for k in ("return_prefix_tokens",) if k in given}
    has_class = bool(
        getattr(module, "has_class_token", getattr(module, "cls_token", None) is not None)
    )
    module.eval()
    like = next(module.parameters())
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(like.dtype)
    with torch.no_grad():
        features = module.forward_features(noise)
        whole, maps = module.forward_intermediates(noise, **options)
        some, _ = module.forward_intermediates(noise, indices=[0], **options)
    # Most models end forward_intermediates as forward_features; the others need a pass for each.
    one_pass = all(_equal(features, other) for other in (whole, some))
    final = _final(module, _split(maps[-1], has_class)["tokens"].shape[1], has_class, pool)

    def run(pixels: Tensor, layers: AbstractSet[str]) -> dict[str, Parts]:
        indices = sorted(int(layer.removeprefix("block")) for layer in layers - {"final"})
        if not indices:
            return {"final": final(module.forward_features(pixels))}
        if "final" in layers and one_pass:
            last, found = module.forward_intermediates(pixels, indices=indices, **options)
        else:
            early = {"intermediates_only": True, "stop_early": True}
            found = module.forward_intermediates(pixels, indices=indices, **options, **early)
            last = module.forward_features(pixels) if "final" in layers else None
        blocks = zip(indices, found, strict=True)
        parts = {f"block{i:02d}": _split(x, has_class) for i, x in blocks}
        return parts if last is None else parts | {"final": final(last)}

    return run, len(maps), _ends(module)


def _equal(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.shape == other.shape and torch.allclose(one, other, 1e-4, 1e-5)


def _split(x: Any, has_class: bool) -> Parts:
    """Return the parts of an intermediate: a map (B, C, H, W), with it maybe tokens (B, P, C)."""
    image, prefix = x if isinstance(x, tuple | list) else (x, None)
    first = {"cls": prefix[:, 0]} if has_class and prefix is not None else {}
    return first | network.channels_first(image)


def _final(
    module: Any, positions: int, has_class: bool, pool: Callable[[Any], Any]
) -> Callable[[Any], Parts]:
    """Return how to split what forward_features gives, of which `positions` are of the image."""
    last = str(getattr(module, "output_fmt", None) or "NCHW").endswith("NHWC")

    def split(x: Any) -> Parts:
        if not isinstance(x, Tensor):  # several branches, which only the head brings together
            return {}
        if x.ndim == 4:
            return network.channels_last(x) if last else network.channels_first(x)
        prefix = x.shape[1] - positions if x.shape[1] >= positions else x.shape[1]
        parts = {"cls": x[:, 0]} if has_class and prefix else {}
        return parts if prefix == x.shape[1] else parts | {"tokens": x[:, prefix:]}

    def run(x: Any) -> Parts:
        embedding = pool(x)
        own = {"pooled": embedding} if isinstance(embedding, Tensor) and embedding.ndim == 2 else {}
        return own | split(x)

    return run


def _ends(module: Any) -> list[torch.nn.Module]:
    """Return the modules that feature_info names, of those that have weights."""
    info = module.feature_info
    names = [one["module"] for one in info] if isinstance(info, list) else info.module_name()
    known = dict(module.named_modules())
    found = [known[name] for name in names if name and name in known]
    return [end for end in found if any(True for _ in end.parameters())]


def _check_size(module: Any, name: str, size: int) -> None:
    """Raise BackboneError for a size that isn't the model's own and that its patches don't fill.

    Some models of timm pad images to whole patches (dynamic_img_pad), some have patches that
    overlap; the others cut the rest off, or fail at it.
    """
    base.check_side(name, size)
    embed = getattr(module, "patch_embed", None) or getattr(module, "stem", None)
    proj: Any = getattr(embed, "proj", None)
    apart = isinstance(proj, torch.nn.Conv2d) and proj.kernel_size == proj.stride
    own = size == _config(module)["input_size"][-1]
    if apart and not own and not getattr(embed, "dynamic_img_pad", False):
        base.check_patches(name, size, proj.stride[0])


def patch_of(module: Any) -> int:
    """Return the side of a transformer's patches in pixels; 1 for other networks."""
    side = getattr(getattr(module, "patch_embed", None), "patch_size", 1)
    return int(side[0] if isinstance(side, tuple | list) else side)


def _spec_of(name: str, module: Any, found: Network, transform: Transform) -> Spec:
    """Return the facts about a timm model, at its own size."""
    config = module.pretrained_cfg
    source, _, rest = name.rpartition(":")
    architecture, _, tag = rest.partition(".")
    architecture = str(config.get("architecture") or architecture)
    own = transform_of(module, f"timm:{name}", None)
    default = default_feature(found, architecture, rest if source else "")
    return base.described(
        found,
        own,
        default,
        name=f"timm:{name}",
        family=type(module).__name__,
        architecture=architecture,
        params=base.count_params(module),
        params_counts="the model without its classifier",
        patch=patch_of(module),
        source=f"timm {name}",
        licence=str(config.get("license") or base.CARD),
        pretraining_data=tag or base.CARD,
        loader="features.backbones.any_timm:load_any",
    )
