"""The fingerprint: everything that can change a feature's value beyond its last bits.

It is one dict with a digest. A store is reused only where fingerprints are equal; where
not, `in_words` says what differs. Device, batch size and thread count move the last
bits of a float and are kept as provenance beside it, not in it. Labels, subjects and splits
change no feature and are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from features.augment import RECIPE
from features.backbones import BACKBONES, Backbone
from features.dicom import asked_for
from features.errors import StoreError
from features.images import DECODE, Transform
from features.manifest import Manifest

LIBRARIES = ("torch", "torchvision", "timm", "open_clip_torch", "transformers", "pillow")


def fingerprint(
    manifest: Manifest,
    backbone: Backbone,
    features: Sequence[str],
    precision: str,
    *,
    exact: bool,
    views: int,
    seed: int,
    dicom: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the fingerprint of a store: nested dicts of JSON values; `views` only if it has any.

    exact, views and seed are those of workers.ImageRecipe; `dicom` is what dicom.applied says of
    the images: without DICOM among them there is no entry.
    """
    t = backbone.transform
    made: dict[str, Any] = {"views": {"count": views, "seed": seed, "recipe": RECIPE}}
    return (made if views else {}) | {
        "backbone": {
            "name": backbone.spec.name,
            "architecture": backbone.spec.architecture,
            "weights": backbone.weights,
            "weights_digest": backbone.weights_digest,
            **_configuration(backbone),
        },
        "features": sorted(features),
        "image": {
            "size": t.size,
            "resize": t.resize,
            "interpolation": t.interpolation,
            "decode": DECODE[exact],
            **_fit(t),
            **({"dicom": dict(dicom)} if dicom else {}),
        },
        "normalize": {"mean": list(t.mean), "std": list(t.std)},
        "precision": precision,
        "manifest": {"images": len(manifest), "digest": manifest.digest()},
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _configuration(backbone: Backbone) -> dict[str, str]:
    """Return what a model is beside its weights; nothing of the study's, which are always built so.

    A fixed name of theirs stands for one architecture, and their stores stay valid.
    """
    if backbone.spec.name in BACKBONES or not backbone.configuration:
        return {}
    return {"configuration": backbone.configuration}


def _fit(t: Transform) -> dict[str, Any]:
    """Return how images become square; nothing where they are cropped as torchvision does it."""
    made: dict[str, Any] = {"fit": t.fit} if t.fit != "crop" else {}
    made |= {"fill": list(t.fill)} if t.fit == "pad" else {}
    return made | ({"corner": t.corner} if t.corner != "round" else {})


def transform_of(made: Mapping[str, Any]) -> Transform:
    """Return the transform of a fingerprint, which says all of it (size, resize, mean, std, ...).

    Raises StoreError for a fingerprint of an earlier version that doesn't.
    """
    image, scale = made.get("image", {}), made.get("normalize", {})
    try:
        return Transform(
            size=image["size"],
            resize=image["resize"],
            interpolation=image["interpolation"],
            mean=tuple(scale["mean"]),
            std=tuple(scale["std"]),
            fit=image.get("fit", "crop"),
            fill=tuple(image.get("fill", (0, 0, 0))),
            corner=image.get("corner", "round"),
        )
    except KeyError as error:
        raise StoreError(
            f"the fingerprint doesn't say how images are prepared ({error.args[0]} is missing): "
            "make the store anew with `medprobe extract`"
        ) from None


def decoding(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the images of a fingerprint were decoded: exact, window, frame (ImageRecipe).

    Raises StoreError for a fingerprint that doesn't say it.
    """
    image = made.get("image", {})
    if "decode" not in image:
        raise StoreError(
            "the store's fingerprint doesn't say how its images were decoded: make it anew with "
            "`medprobe extract`"
        )
    window, frame = asked_for(image.get("dicom", {}))
    return {"exact": image["decode"] == DECODE[True], "window": window, "frame": frame}


WORDS = {  # what fields are called where they differ; versions are called by their library
    "backbone.name": "backbone",
    "backbone.architecture": "architecture",
    "backbone.configuration": "configuration of the model",
    "image.size": "image size",
    "image.resize": "resized side",
    "image.interpolation": "interpolation",
    "image.fit": "fit (--fit)",
    "image.fill": "colour of the padding",
    "image.corner": "rounding of the crop",
    "image.decode": "decoding (--exact-decode)",
    "image.dicom": "DICOM",
    "image.dicom.window": "DICOM window (--window)",
    "image.dicom.frame": "DICOM frame (--frame)",
    "image.dicom.rules": "rules of DICOM",
    "image.dicom.versions": "versions for DICOM",
    "versions": "versions",
    "normalize.mean": "mean (--normalize)",
    "normalize.std": "std (--normalize)",
    "precision": "precision",
    "features": "features",
    "views": "augmented views",
    "views.count": "views",
    "views.seed": "seed of views (--view-seed)",
    "views.recipe": "recipe of views",
    "manifest.images": "images",
}
SAID = {"published": "the published ones", "random": "random ones", "file": "those of a file"}


def in_words(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Return one line for every value that differs, as a person says it.

    `image size: stored 224, asked 448`; weights and images by what they are, not by their hash.
    """
    out = []
    one, other = (made.get("backbone", {}) for made in (stored, asked))
    kinds = [SAID.get(made.get("weights"), made.get("weights")) for made in (one, other)]
    digests = [str(made.get("weights_digest", "unknown"))[:8] for made in (one, other)]
    if kinds[0] != kinds[1]:
        out.append(f"weights: stored {kinds[0]}, asked {kinds[1]}")
    elif digests[0] != digests[1]:
        whose = "of a file" if one.get("weights") == "file" else f"({kinds[0]})"
        out.append(f"weights {whose}: stored {digests[0]}..., asked {digests[1]}... (SHA-256)")
    count, wanted = (made.get("manifest", {}).get("images") for made in (stored, asked))
    for name, a, b in _differing(stored, asked):
        if name in ("backbone.weights", "backbone.weights_digest"):
            continue
        if name == "manifest.digest":
            out += [] if count != wanted else [f"images: stored {count}, asked {wanted} others"]
            continue
        word = WORDS.get(name) or f"version of {name.rpartition('versions.')[2]}"
        out.append(f"{word}: stored {_plain(a)}, asked {_plain(b)}")
    return out


def _plain(value: Any) -> str:
    """Return a value of a fingerprint as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "/".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "none" if value is None else str(value)


def _differing(
    stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return name, stored and asked value of everything that differs."""
    out = []
    for key in sorted(stored.keys() | asked.keys()):
        a, b = stored.get(key), asked.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differing(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append((f"{prefix}{key}", a, b))
    return out
