"""The fingerprint: everything that can change a feature's value beyond its last bits.

It is one dict with a digest. A store is reused only where fingerprints are equal; where
not, `differences` names what differs. Device, batch size and thread count move the last
bits of a float and are kept as provenance beside it, not in it. Labels, subjects and splits
change no feature and are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from features.augment import RECIPE
from features.backbones import Backbone
from features.dicom import asked_for
from features.errors import StoreError
from features.images import DECODE
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

    exact, views and seed are those of workers.Recipe; `dicom` is what dicom.applied says of the
    images: without DICOM among them there is no entry.
    """
    t = backbone.transform
    made: dict[str, Any] = {"views": {"count": views, "seed": seed, "recipe": RECIPE}}
    return (made if views else {}) | {
        "backbone": {
            "name": backbone.spec.name,
            "architecture": backbone.spec.architecture,
            "weights": backbone.weights,
            "weights_digest": backbone.weights_digest,
        },
        "features": sorted(features),
        "image": {
            "size": t.size,
            "resize": t.resize,
            "interpolation": t.interpolation,
            "decode": DECODE[exact],
            **({"dicom": dict(dicom)} if dicom else {}),
        },
        "normalize": {"mean": list(t.mean), "std": list(t.std)},
        "precision": precision,
        "manifest": {"images": len(manifest), "digest": manifest.digest()},
        "versions": {name: version(name) for name in LIBRARIES},
    }


def decoding(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the images of a fingerprint were decoded: exact, window, frame, as a Recipe.

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


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line for every value that differs: `image.size: stored 224, asked 448`."""
    out = []
    for key in sorted(stored.keys() | asked.keys()):
        a, b = stored.get(key), asked.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: stored {a}, asked {b}")
    return out
