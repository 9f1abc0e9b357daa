"""Image processors of transformers as a Transform, found by what they do and not by what they are.

A processor has fields (size, crop_size, crop_pct, resample, ...) that each class reads in its own
way. They only suggest transforms; the one whose pixels are the processor's own on a few synthetic
oblong images is taken. Where none is, the processor can't be followed, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.backbones.base import LARGEST
from features.images import FILTERS, FITS, Decoded, Transform, picture

SHAPES = ((301, 437), (437, 298), (90, 151))  # height, width of the images compared
LEVEL = 1 / 255
# Pillow and torchvision round differently: of 22 processors, their two backends differ by more than
# a level at most in 0.3 % of the pixels, at most by 4 levels.
SHARE, MOST = 0.99, 5

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Followed:
    """A processor's transform; `flipped`: channels go blue, green, red to the model."""

    transform: Transform
    flipped: bool = False


def follow(processor: Any) -> Followed | str:
    """Return the transform whose pixels are the processor's own; or in words why there is none.

    processor(image) gives "pixel_values" (1, 3, S, S) of an RGB image.
    """
    if (side := max(_numbers(processor.to_dict()), default=0)) > LARGEST:
        return f"its processor makes images of {side} pixels, more than {LARGEST}"
    found = [_run(processor, shape) for shape in SHAPES]
    shapes = {wanted.shape for _, wanted in found}
    if len(shapes) > 1 or found[0][1].ndim != 3 or found[0][1].shape[0] != 3:
        return "its processor gives " + " and ".join(str(shape) for shape in sorted(shapes))
    high, wide = found[0][1].shape[1:]
    if high != wide:
        return f"its processor gives {wide} x {high} pixels, which is no square"
    fields = _fields(processor)
    # Margins of every remainder by 4: there roundings of where the centre begins differ.
    sides = {high, *_sides(fields, high)[:1]}
    found += [_run(processor, (side, side + more)) for side in sides for more in (1, 2, 3, 4)]
    for transform, flipped in _candidates(fields, high):
        for one in (transform, _measured(transform, flipped, *found[0])):
            if all(_equal(one, flipped, image, wanted) for image, wanted in found):
                return Followed(one, flipped)
    return f"no resize, crop or padding gives the pixels of its {type(processor).__name__}"


def _numbers(fields: Mapping[str, Any]) -> Iterator[int]:
    """Yield the sides in pixels that a processor's fields name."""
    for key in ("size", "crop_size", "pad_size"):
        value = fields.get(key)
        for side in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(side, int | float):
                yield int(side)


def _run(processor: Any, shape: tuple[int, int]) -> tuple[Decoded, NDArray[Any]]:
    image = picture(*shape)
    wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
    return Decoded(image, image.size), wanted


def _equal(transform: Transform, flipped: bool, image: Decoded, y: NDArray[Any]) -> bool:
    pixels = transform.prepare(image, exact=True).transpose(2, 0, 1) * LEVEL
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (transform.mean, transform.std))
    theirs = (y[::-1] if flipped else y) * std + mean
    apart = np.abs(theirs - pixels)
    return bool(np.mean(apart <= 1.01 * LEVEL) >= SHARE and apart.max() <= MOST * LEVEL)


def _measured(
    transform: Transform, flipped: bool, image: Decoded, wanted: NDArray[Any]
) -> Transform:
    """Return a transform with the mean and std that the processor has in effect, whatever it says.

    Least squares of its values on our pixels, per channel.
    """
    pixels = transform.prepare(image, exact=True).transpose(2, 0, 1).reshape(3, -1) * LEVEL
    values = (wanted[::-1] if flipped else wanted).reshape(3, -1).astype(np.float64)
    lines = [np.polyfit(x, y, 1) for x, y in zip(pixels, values, strict=True)]
    if any(abs(slope) < LEVEL for slope, _ in lines):
        return transform
    (a, b), (c, d), (e, f) = ((float(-shift / slope), float(1 / slope)) for slope, shift in lines)
    return replace(transform, mean=(a, c, e), std=(b, d, f))


def _candidates(fields: Mapping[str, Any], size: int) -> Iterator[tuple[Transform, bool]]:
    """Yield transforms that the fields suggest, the likely ones first."""
    named, sides = _names(fields.get("resample")), _sides(fields, size)
    flips = (True, False) if fields.get("do_flip_channel_order") else (False,)
    scales = list(dict.fromkeys([_scale(fields), _scale({**fields, "do_normalize": False})]))
    ways = product(named, scales, FITS, sides, ("round", "floor"), flips)
    for filter_, (mean, std), fit, side, corner, flipped in ways:
        fills = _fills(mean) if fit == "pad" else ((0, 0, 0),)
        for fill in fills:
            yield Transform(size, side, filter_, mean, std, fit, fill, corner), flipped


def _fields(processor: Any) -> dict[str, Any]:
    """Return a processor's fields; those of timm's models in transformers have timm's names."""
    fields: dict[str, Any] = dict(processor.to_dict())
    timm = getattr(processor, "data_config", None)
    if isinstance(timm, Mapping):
        fields |= {"image_mean": timm["mean"], "image_std": timm["std"]}
        fields |= {"crop_pct": timm["crop_pct"], "resample": timm["interpolation"]}
    return fields


def _names(resample: Any) -> list[str]:
    """Return the filters to try: the one that is named, then Pillow's others."""
    numbers = {int(value): name for name, value in FILTERS.items()}
    name = resample if isinstance(resample, str) else numbers.get(int(resample or 2), "bilinear")
    return [name, *(other for other in ("bicubic", "bilinear", "lanczos") if other != name)]


def _sides(fields: Mapping[str, Any], size: int) -> list[int]:
    """Return the sides that images may be resized to."""
    found = []
    for key in ("size", "crop_size"):
        value = fields.get(key)
        if isinstance(value, Mapping):
            found += [int(v) for v in value.values() if isinstance(v, int | float)]
        elif isinstance(value, int):
            found.append(value)
    found = [*found, size]
    share = fields.get("crop_pct")
    found += [int(side / share) for side in found] if share else []
    found += [int(256 / 224 * side) for side in found]  # LeViT's, written into its class
    return list(dict.fromkeys(side for side in found if 0 < side < 4 * size))


def _scale(fields: Mapping[str, Any]) -> tuple[Colour, Colour]:
    """Return mean and std, of pixels from 0 to 1, of rescaling and normalising."""
    factor = fields.get("rescale_factor", LEVEL) if fields.get("do_rescale", True) else 1.0
    factor = 1.0 if abs(255 * factor - 1) < 1e-9 else 255 * factor
    off = 1.0 if fields.get("do_rescale", True) and fields.get("rescale_offset") else 0.0
    normal = fields.get("do_normalize", True) and fields.get("image_mean") is not None
    mean, std = ((fields[k] if normal else v) for k, v in (("image_mean", 0.0), ("image_std", 1.0)))
    (r, g, b), (x, y, z) = (v if isinstance(v, list | tuple) else (v,) * 3 for v in (mean, std))
    if factor == 1.0 and not off:
        return (r, g, b), (x, y, z)
    mean, std = tuple((off + m) / factor for m in (r, g, b)), tuple(s / factor for s in (x, y, z))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _fills(mean: Colour) -> tuple[tuple[int, int, int], ...]:
    red, green, blue = (min(255, max(0, round(255 * value))) for value in mean)
    return ((0, 0, 0), (red, green, blue))


def resized(transform: Transform, size: int) -> Transform:
    """Return a transform for another size, in proportion."""
    side = round(transform.resize * size / transform.size)
    return replace(transform, size=size, resize=side)
