"""A certificate of parity: our features of a few images beside those of the model's own library.

Made once per store, of a model that a library loads by any name. Each image goes two ways: through
the library's own transform and forward, and through ours, decoded by the same processes as in
extraction. With it goes what a reduced precision does to the features. What is measured here is
kept beside a store's fingerprint and not in it: it may differ in its last digits between machines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.backbones import Backbone
from features.backbones.base import loading
from features.devices import PRECISIONS
from features.errors import BackboneError, DatasetError, ImageError
from features.images import decode, read_bytes
from features.manifest import Manifest
from features.workers import ImageRecipe, Workers

IMAGES, TRIED = (
    4,
    12,
)  # images that are compared; of so many, evenly spread, the first that are good
COSINE = 0.9999  # to the library's features, decoded in full
FAST = 0.995  # decoded as it is usual, see images.py
REDUCED = 0.999  # of a reduced precision to float32
LEVEL = 1.01  # grey levels by which a pixel may differ, of 255
REMEDY = "Choose how images are prepared with --fit crop, squash or pad"
SHARE, MOST = 0.99, 5.0  # of so many pixels; of the others: libraries' own backends differ so much


@dataclass(frozen=True)
class Parity:
    """What was measured, on `images` images. None is what was not.

    cosine: the least one, of float32 features decoded in full, to the library's; fast: the same,
    decoded as usual. pixels: the largest difference in grey levels; within: the share of pixels
    that differ by a level at most. These are None where the images are prepared in another way than
    the library's (--fit, --normalize, --image-size, or as the model's authors do it): then both
    have our pixels. reduced: by precision the least cosine to features of float32.
    """

    feature: str
    images: int
    cosine: float | None = None
    fast: float | None = None
    pixels: float | None = None
    within: float | None = None
    reduced: dict[str, float] | None = None

    def settled(self, precision: str) -> str:
        """Return the precision that "auto" takes: float32 where the other harms the features."""
        cosine = (self.reduced or {}).get(precision, 1.0)
        return precision if cosine > REDUCED else "float32"

    def say(self, name: str, precision: str, *, exact: bool) -> None:
        """Warn of what differs. Raises BackboneError where features are not the library's."""
        if not self.images:
            warnings.warn(
                f"{name}: no image could be read to compare its features with its library's",
                stacklevel=4,
            )
            return
        far = self.cosine is not None and not self.cosine >= COSINE
        other = self.pixels is not None and not (
            self.within is not None and self.within >= SHARE and self.pixels <= MOST
        )
        if far or other:
            raise BackboneError(
                f"{name}: {self.feature} is not what its library gives: of {self.images} images "
                f"the least cosine is {_said(self.cosine)} (want {COSINE}), and pixels differ by "
                f"up to {_said(self.pixels)} of 255. {REMEDY}"
            )
        if not exact and self.fast is not None and not self.fast >= FAST:
            warnings.warn(
                f"{name}: decoded fast, features have a cosine of {_said(self.fast)} at least to "
                f"its library's (want {FAST}): take --exact-decode",
                stacklevel=4,
            )
        if self.settled(precision) != precision:
            cosine = (self.reduced or {})[precision]
            warnings.warn(
                f"{name}: {precision} features have a cosine of {cosine:.4f} at least to "
                f"float32's (want {REDUCED}): float32 is taken",
                stacklevel=4,
            )


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def certify(
    backbone: Backbone, manifest: Manifest, given: ImageRecipe, device: str, reduced: str
) -> Parity:
    """Compare a backbone's features of a few images with those of its library.

    given: how images are decoded, but for its transforms. reduced: a precision to compare with
    float32, or float32 for none. The weights are left on the device, in float32.
    """
    library = backbone.library
    assert library
    exact, fast, theirs = _images(backbone, manifest, given)
    if not len(exact):
        return Parity(library.feature, 0)
    backbone.to(device, torch.float32)
    with torch.no_grad():
        x, usual = (
            backbone.normalise(torch.from_numpy(pixels).to(device), torch.float32)
            for pixels in (exact, fast)
        )
        ours, quick = (backbone.network(pixels, [library.feature]) for pixels in (x, usual))
        with loading(f"{backbone.spec.name}'s library", REMEDY):
            wanted = library.embed(torch.stack(theirs).to(device) if theirs else x)
        if not wanted.isfinite().all():
            raise BackboneError(
                f"{backbone.spec.name}: {library.feature} has values that are not finite (NaN or "
                "infinite), in its library too: the weights are damaged, want others"
            )
        found: dict[str, Any] = {"cosine": _least(ours[library.feature], wanted)}
        if theirs:
            found["fast"] = _least(quick[library.feature], wanted)
            found |= _apart(backbone, exact, theirs)
        if reduced != "float32":
            default = [backbone.spec.default_feature]
            full = backbone.network(usual, default)
            with _in(backbone, PRECISIONS[reduced]):
                half = backbone.network(usual.to(PRECISIONS[reduced]), default)
            found["reduced"] = {reduced: _least(half[default[0]], full[default[0]])}
    return Parity(library.feature, len(exact), **found)


def _images(
    backbone: Backbone, manifest: Manifest, given: ImageRecipe
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[Tensor]]:
    """Return n images by us, decoded in full and fast, (n, S, S, 3), and by the library, (3, S, S).

    The library's are none where it is asked for another transform. Only images that a process of
    its own could decode are decoded here.
    """
    library, size = backbone.library, backbone.transform.size
    exact, fast, theirs = [], [], []
    shape = (1, size, size, 3)
    recipes = [
        ImageRecipe((backbone.transform,), exact=e, window=given.window, frame=given.frame)
        for e in (True, False)
    ]
    with Workers(recipes[0], 1) as full, Workers(recipes[1], 1) as quick:
        for row in _spread(len(manifest)):
            path, blocks = manifest.file(row), [np.empty(shape, np.uint8) for _ in recipes]
            both = [
                workers.load(path, [memoryview(block.data).cast("B")])
                for workers, block in zip((full, quick), blocks, strict=True)
            ]
            if any(future.result().reason for future in both):
                continue
            if library and library.transform == backbone.transform:
                try:
                    image = decode(read_bytes(path), window=given.window, frame=given.frame).image
                except (ImageError, DatasetError):
                    continue
                with loading(f"{backbone.spec.name}'s library", REMEDY):
                    theirs.append(library.pixels(image.convert("RGB")))
            exact.append(blocks[0][0])
            fast.append(blocks[1][0])
            if len(exact) == IMAGES:
                break
    empty = np.empty((0, size, size, 3), np.uint8)
    return np.stack(exact) if exact else empty, np.stack(fast) if fast else empty, theirs


def _spread(images: int) -> list[int]:
    """Return rows to try, evenly spread over a data set."""
    rows = np.unique(np.linspace(0, images - 1, min(images, TRIED)).astype(int)).tolist()
    step = max(1, len(rows) // IMAGES)
    return [int(row) for start in range(step) for row in rows[start::step]]


def _least(ours: Tensor, wanted: Tensor) -> float:
    """Return the least cosine of features (n, D); of equal ones it is 1, of NaN and inf -1."""
    a, b = ours.double(), wanted.double()
    cosines = torch.nn.functional.cosine_similarity(a, b).nan_to_num(-1.0)
    return float(torch.where((a == b).all(1), 1.0, cosines).min())


def _apart(
    backbone: Backbone, exact: NDArray[np.uint8], theirs: Sequence[Tensor]
) -> dict[str, float]:
    """Return the largest difference of pixels in grey levels, and the share within one."""
    t = backbone.transform
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (t.mean, t.std))
    levels = 255 * (torch.stack(list(theirs)) * std + mean)
    apart = (levels - torch.from_numpy(exact).permute(0, 3, 1, 2)).abs()
    return {"pixels": float(apart.max()), "within": float((apart <= LEVEL).double().mean())}


@contextmanager
def _in(backbone: Backbone, dtype: torch.dtype) -> Iterator[None]:
    """Have the weights in another precision for a while; afterwards they are as they were."""
    modules = list(backbone.module.modules())
    weights = [(p, p.data) for p in backbone.module.parameters()]
    buffers = [(m, k, b) for m in modules for k, b in m._buffers.items()]
    backbone.module.to(dtype)
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, key, buffer in buffers:
            module._buffers[key] = buffer
