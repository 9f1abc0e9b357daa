"""Any image tower of open_clip: `openclip:NAME/TAG`, or hf-hub:ORG/NAME or local-dir:DIR for NAME.

The tower is built as open_clip builds it, without the text tower; transform and embedding are its
own: preprocess_cfg, and encode_image without normalisation.
"""

from __future__ import annotations

import difflib
import json
import math
import warnings
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.backbones import any_timm, base, network
from features.backbones.base import Backbone, Spec
from features.backbones.families import default_feature
from features.backbones.network import Network, Parts
from features.backbones.timm_weights import file_in
from features.backbones.weights import load_strictly, misfit, read_state_dict
from features.backbones.wrappers import unwrapped
from features.errors import BackboneError
from features.images import Transform

RANDOM_SEED = 0
FITS = {"shortest": "crop", "squash": "squash", "longest": "pad"}
REMEDY = "Models of open_clip are listed by `open_clip.list_pretrained()`"
CONFIG = "open_clip_config.json"
NO_TEXT = {"context_length": 2, "vocab_size": 2, "width": 64, "heads": 1, "layers": 1}


@dataclass(frozen=True)
class Model:
    """What is to be built: open_clip's model_cfg and preprocess_cfg, and where its weights are."""

    name: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    repository: str = ""  # of the hub
    folder: Path | None = None
    url: str = ""
    tag: str = ""


def load_any(name: str, weights: str | None, image_size: int | None) -> Backbone:
    """Load the image tower of a model as open_clip names it.

    Raises BackboneError for a name, weights or a size that don't fit, whatever open_clip raises.
    """
    with base.loading(f"openclip:{name}", REMEDY):
        model = find(name, weights)
        native = int(side(model.config["vision_cfg"].get("image_size", 224)))
        size = image_size or native
        base.check_side(f"openclip:{name}", size)
        with torch.random.fork_rng(), base.quiet():
            torch.manual_seed(RANDOM_SEED)
            whole = build(model, size, NO_TEXT)
        tower = whole.visual
        if weights != "random":
            _load_weights(whole, model, weights, size)
        found = _network(tower, size)
        transform = _transform(model.preprocess, size)
        spec = _spec_of(model, tower, found, _transform(model.preprocess, native))
        spec.transform(size)  # raises for a size that the patches don't fill
        library = _library(model, tower, transform)
        return Backbone.of(spec, tower, found, transform, base.origin_of(weights), library)


def side(size: Any) -> int:
    """Return the side of square images. Raises BackboneError for others."""
    sides = set(size) if isinstance(size, tuple | list) else {size}
    if len(sides) > 1:
        raise BackboneError(f"images of {size} pixels: want a model of square images")
    return int(sides.pop())


def find(name: str, weights: str | None) -> Model:
    """Return what a name stands for: a model of the library's list, the hub's, or a folder's."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    default = asdict(PreprocessCfg())
    source, _, rest = name.partition(":")
    if source == "local-dir":
        folder = Path(rest)
        found = _read_config(folder / CONFIG)
        return Model(name, found["model_cfg"], default | found["preprocess_cfg"], folder=folder)
    if source == "hf-hub":
        found = _read_config(_from_hub(name, rest, CONFIG))
        return Model(name, found["model_cfg"], default | found["preprocess_cfg"], repository=rest)
    architecture, _, tag = name.partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), 3, cutoff=0.4)
        hint = f"; the closest are {', '.join(close)}" if close else ""
        raise BackboneError(f"open_clip has no model {architecture!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags and weights is None:
        raise BackboneError(
            f"open_clip has no weights {tag!r} of {architecture}: "
            f"want openclip:{architecture}/TAG with a tag of {', '.join(tags) or 'none'}"
        )
    published: dict[str, Any] = open_clip.get_pretrained_cfg(architecture, tag) or {}
    _say_activation(architecture, tag, config, published)
    mine = {key: value for key, value in published.items() if key in default and value is not None}
    hub = published.get("hf_hub") or ""
    return Model(
        name, config, default | mine, repository=hub, url=published.get("url") or "", tag=tag
    )


def _say_activation(
    architecture: str, tag: str, config: dict[str, Any], published: dict[str, Any]
) -> None:
    """Warn, as open_clip does, of weights that were trained with another activation."""
    import open_clip

    quick = [bool(one.get("quick_gelu", False)) for one in (config, published)]
    if published and quick[0] != quick[1]:
        names = ["GELU", "QuickGELU"]
        other = f"{architecture}-quickgelu" if quick[1] else architecture.removesuffix("-quickgelu")
        there = other != architecture and other in open_clip.list_models()
        remedy = f"want openclip:{other}/{tag}" if there else "it has no name with the other"
        warnings.warn(
            f"openclip:{architecture}/{tag}: open_clip builds it with {names[quick[0]]}, and its "
            f"weights were trained with {names[quick[1]]}: {remedy}",
            stacklevel=2,
        )


def _read_config(file: Path) -> dict[str, Any]:
    """Return a repository's open_clip_config.json."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"preprocess_cfg": {}, **found, "model_cfg": found["model_cfg"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"{file}: want open_clip's model_cfg and preprocess_cfg ({type(error).__name__})"
        ) from None


def _from_hub(name: str, repository: str, file: str) -> Path:
    """Return a file of the hub, fetched the first time."""
    from open_clip.pretrained import download_pretrained_from_hf

    repository, _, revision = repository.partition("@")
    try:
        with base.quiet():
            return Path(
                download_pretrained_from_hf(
                    repository, filename=file or None, revision=revision or None
                )
            )
    except Exception as error:  # the hub's client raises its own errors and its library's
        raise BackboneError(
            f"openclip:{name}: {file or 'the weights'} can't be fetched ({type(error).__name__}). "
            f"Get it from https://huggingface.co/{repository} into a folder and take "
            "openclip:local-dir:FOLDER, or give weights with --weights FILE. Where access must be "
            "asked for on that page, set the variable HF_TOKEN to your token"
        ) from None


def build(model: Model, size: int, text: Mapping[str, Any]) -> Any:
    """Build a model with a text tower of open_clip's text_cfg, such as NO_TEXT, the smallest."""
    import open_clip

    config = deepcopy(model.config)
    config["vision_cfg"] |= {"image_size": size}
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"] |= {
            "image_size": side(model.config["vision_cfg"].get("image_size", 224)),
            "timm_model_pretrained": False,
        }
    return open_clip.CustomTextCLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=config["vision_cfg"],
        text_cfg=dict(text),
        quick_gelu=config.get("quick_gelu", False),
    )


def _load_weights(whole: Any, model: Model, weights: str | None, size: int) -> None:
    """Load the image tower's part of a whole model's weights, or that part alone."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import resize_pos_embed

    file = Path(weights) if weights else published(model)
    state = read_state_dict(file)
    what = f"openclip:{model.name}'s weights {file}"
    try:
        state = convert_state_dict(whole, state)  # Apple's names for MobileCLIP
        state = unwrapped(state, whole.visual.state_dict(), what)
        state = {f"visual.{key}": value for key, value in state.items()}
        resize_pos_embed(state, whole)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise BackboneError(misfit(what, error)) from None
    state = {key.removeprefix("visual."): value for key, value in state.items()}
    load_strictly(whole.visual, state, what)
    if hasattr(whole.visual, "set_input_size") and size != side(whole.visual.image_size):
        whole.visual.set_input_size(size)


def published(model: Model) -> Path:
    """Return the file of a model's published weights, fetched the first time."""
    from open_clip.pretrained import download_pretrained_from_url

    if model.folder:
        return file_in(model.folder)
    if model.repository:
        repository, _, file = _repository(model.repository)
        return _from_hub(model.name, repository, file)
    try:
        return Path(download_pretrained_from_url(model.url))
    except Exception as error:
        raise BackboneError(
            f"openclip:{model.name}: the published weights can't be fetched "
            f"({type(error).__name__}). Get {model.url} and give the file with --weights FILE"
        ) from None


def _repository(text: str) -> tuple[str, str, str]:
    """Return ORG/NAME and a file of ORG/NAME/FILE, as open_clip's table writes it."""
    text, at, revision = text.partition("@")  # which may have slashes too
    org, _, rest = text.partition("/")
    name, slash, file = rest.partition("/")
    return f"{org}/{name}{at}{revision}", slash, file


def _transform(config: dict[str, Any], size: int) -> Transform:
    """Return open_clip's own transform. Source: open_clip/transform.py, image_transform."""
    shown = {"bilinear": "bilinear"}.get(config["interpolation"], "bicubic")  # "random" is bicubic
    mode = config["resize_mode"] or "shortest"
    fill = config["fill_color"]
    return Transform(
        size=size,
        resize=size,
        interpolation=shown,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit=FITS[mode],
        fill=(fill, fill, fill) if isinstance(fill, int) else tuple(fill),
    )


def _library(model: Model, tower: Any, transform: Transform) -> base.Library:
    """Return open_clip's own transform, and what encode_image does before it normalises."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(**model.preprocess | {"size": (transform.size, transform.size)})
    pixels = image_transform_v2(config, is_train=False)
    return base.Library(transform, "final/pooled", pixels, lambda x: _embedding(tower(x)))


def _network(tower: Any, size: int) -> Network:
    """Return a tower by its forward and forward_intermediates; one of timm by timm's."""
    if hasattr(tower, "trunk"):
        run, count, blocks = any_timm.intermediates(
            tower.trunk, size, lambda x: tower.head(tower.trunk.forward_head(x))
        )
        return Network(run, count=count, blocks=blocks, size=size, module=tower)
    return _own_network(tower, size)


def _own_network(tower: Any, size: int) -> Network:
    """Return a tower of open_clip's own, a vision transformer or a ResNet."""
    tower.eval()
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        count = len(tower.forward_intermediates(noise)["image_intermediates"])
        narrow = _ends_alike(tower, noise)

    def run(pixels: Tensor, layers: AbstractSet[str]) -> dict[str, Parts]:
        indices = sorted(int(layer.removeprefix("block")) for layer in layers - {"final"})
        normed: list[Tensor] = []
        norm = getattr(tower, "ln_post", None)
        hook = norm.register_forward_hook(lambda _m, _i, out: normed.append(out)) if norm else None
        try:
            if not indices:
                found: dict[str, Any] = {"image_features": _embedding(tower(pixels))}
            else:
                wanted = indices if narrow else list(range(count))
                extra = {"output_extra_tokens": True}
                found = tower.forward_intermediates(pixels, indices=wanted, **extra)
        finally:
            if hook:
                hook.remove()
        parts = _blocks(found, indices if narrow else list(range(count)))
        return parts | {"final": _final(tower, found["image_features"], normed)}

    blocks = list(tower.transformer.resblocks) if hasattr(tower, "transformer") else _stages(tower)
    return Network(run, count=count, blocks=blocks, size=size, module=tower)


def _ends_alike(tower: Any, noise: Tensor) -> bool:
    """Say whether the embedding is there, and the same, where the first block alone is asked for.

    open_clip's ResNet leaves out what comes after the last block that is asked for.
    """
    try:
        some: Tensor = tower.forward_intermediates(noise, indices=[0])["image_features"]
    except RuntimeError:
        return False
    return torch.allclose(some, _embedding(tower(noise)), 1e-4, 1e-5)


def _stages(tower: Any) -> list[Any]:
    return [getattr(tower, f"layer{i}") for i in range(1, 5)]


def _embedding(x: Any) -> Tensor:
    """Return the embedding of what a tower gives, with or without its tokens."""
    found: Tensor = x[0] if isinstance(x, tuple) else x
    return found


def _blocks(found: dict[str, Any], indices: list[int]) -> dict[str, Parts]:
    maps = found.get("image_intermediates", [])
    first = found.get("image_intermediates_prefix", [None] * len(maps))
    return {
        f"block{i:02d}": ({} if prefix is None else {"cls": prefix[:, 0]})
        | network.channels_first(x)
        for i, x, prefix in zip(indices, maps, first, strict=False)
    }


def _final(tower: Any, embedding: Tensor, normed: list[Tensor]) -> Parts:
    """Return the parts of the last layer; a transformer's positions are after its last norm."""
    parts = {"pooled": embedding}
    if getattr(tower, "proj", None) is not None:
        parts["proj"] = embedding
    grid = math.prod(getattr(tower, "grid_size", (0,)))
    if normed and normed[0].ndim == 3 and normed[0].shape[1] == 1 + grid:
        parts |= {"cls": normed[0][:, 0], "tokens": normed[0][:, 1:]}
    return parts


def _spec_of(model: Model, tower: Any, found: Network, transform: Transform) -> Spec:
    """Return the facts about a tower, at its own size."""
    trunk = getattr(tower, "trunk", None)
    patch = any_timm.patch_of(trunk) if trunk is not None else side(getattr(tower, "patch_size", 1))
    source, _, rest = model.name.rpartition(":")
    architecture = rest if source else rest.partition("/")[0]
    default = default_feature(found, architecture)
    return base.described(
        found,
        transform,
        default,
        name=f"openclip:{model.name}",
        family="OpenCLIP",
        architecture=architecture,
        params=base.count_params(tower),
        params_counts="the image tower with its projection",
        patch=patch,
        source=f"open_clip {model.name}",
        pretraining_data=model.tag or base.CARD,
        loader="features.backbones.any_open_clip:load_any",
    )
