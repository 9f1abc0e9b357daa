"""Stored grey values of DICOM -> 8 bits, as a viewer shows them first.

Modality transform, then VOI (a LUT, a window, or the range), then the presentation LUT's shape, as
PS3.3 C.11.1, C.11.2 and C.11.6 have it; one band of rows after the other, so that the wide numbers
in between are never in memory for the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from features.reasons import Reason, Remark, bad

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Array: TypeAlias = Any  # numpy arrays; their dtypes vary with the file
Window: TypeAlias = tuple[float, float]  # centre and width, in units after rescaling
Function: TypeAlias = Callable[[Array], Array]

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
BAND = 1 << 16  # pixels that are worked on at once: half a megabyte of float64


def grey(pixels: Array, ds: Dataset, frame: int, window: Window | None) -> tuple[Array, str]:
    """Return (rows, columns) uint8 of stored values of a frame (from 0), and a remark or "".

    window takes the place of the header's VOI LUT and windows. Raises ImageError for values that
    are not finite.
    """
    rescale, padding = _modality(ds, frame), _padding(pixels.dtype, ds)
    shown, remark = _voi(pixels, ds, frame, window)
    negative = _negative(ds)
    out = np.empty(pixels.shape, np.uint8)
    for rows in _bands(pixels):
        display = shown(rescale(pixels[rows]))
        if negative:
            np.subtract(1, display, out=display)
        if padding:
            display[padding(pixels[rows])] = 0
        display *= 255
        display += 0.5
        out[rows] = display
    return out, remark


def _bands(pixels: Array) -> Iterator[slice]:
    step = max(1, BAND // max(1, pixels.shape[1]))
    for top in range(0, pixels.shape[0], step):
        yield slice(top, top + step)


def _negative(ds: Dataset) -> bool:
    """Say whether small values are bright.

    The Presentation LUT Shape says so where it is there (C.11.6.1.2): INVERSE and MONOCHROME1
    together are one inversion, as in digital X-rays (C.8.11.3.1.2), not two. Without it the
    photometric interpretation does (C.7.6.3.1.2). DCMTK and dcm4che do the same.
    """
    shape = str(ds.get("PresentationLUTShape") or "").strip().upper()
    if shape in ("IDENTITY", "INVERSE"):
        return shape == "INVERSE"
    return str(ds.PhotometricInterpretation) == "MONOCHROME1"


def _voi(pixels: Array, ds: Dataset, frame: int, window: Window | None) -> tuple[Function, str]:
    """Return what brings rescaled values to [0, 1], and a remark or ""."""
    if window is not None:
        return partial(_window, center=window[0], width=window[1], function="LINEAR_EXACT"), ""
    if ds.get("VOILUTSequence"):
        return partial(_voi_lut, ds=ds), ""
    several = _windows(ds, frame)
    for number, one in enumerate(several):
        if one is not None:
            center, width, function = one
            remark = Remark.NEXT_WINDOW.value if number else ""
            return partial(_window, center=center, width=width, function=function), remark
    low, high = _range(pixels, ds, frame)
    return partial(_stretch, low=low, high=high), Remark.NO_WINDOW.value if several else ""


def _stretch(values: Array, low: float, high: float) -> Array:
    return np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1)


def _holder(ds: Dataset, frame: int, macro: str, keyword: str) -> Dataset:
    """Return the part of the header that says `keyword` of a frame.

    Enhanced objects say it per frame, or once for all frames (PS3.3, C.7.6.16); others at the top.
    """
    groups = ds.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*groups[frame : frame + 1], *(ds.get("SharedFunctionalGroupsSequence") or [])]:
        if (items := group.get(macro)) and keyword in items[0]:
            holder: Dataset = items[0]
            return holder
    return ds


def _padding(dtype: Any, ds: Dataset) -> Function | None:
    """Return what says which stored values only fill the frame (PS3.3, C.7.5.1.1.2)."""
    low = ds.get("PixelPaddingValue")
    if low is None or not np.issubdtype(dtype, np.integer):
        return None
    high = ds.get("PixelPaddingRangeLimit")
    # A negative value is sometimes written as unsigned; brought to the pixels' type it is the same.
    ends = [np.int64(int(v)).astype(dtype) for v in (low, low if high is None else high)]
    least, most = min(ends), max(ends)
    return lambda stored: (stored >= least) & (stored <= most)


def _modality(ds: Dataset, frame: int) -> Function:
    """Return what brings stored values to their physical unit, as new floats.

    ImageError for those that are not finite then.
    """
    from pydicom.pixels.processing import apply_modality_lut

    if ds.get("ModalityLUTSequence"):
        return lambda stored: apply_modality_lut(stored, ds).astype(np.float64)
    holder = _holder(ds, frame, "PixelValueTransformationSequence", "RescaleSlope")
    slope, intercept = holder.get("RescaleSlope"), holder.get("RescaleIntercept")
    slope, intercept = float(1 if slope is None else slope), float(intercept or 0)
    harmless = abs(slope) * 2.0**64 + abs(intercept) < 1e300

    def rescale(stored: Array) -> Array:
        values = stored * slope
        values += intercept
        if not (harmless and stored.dtype.kind in "iu") and not np.isfinite(values).all():
            raise bad(Reason.NOT_FINITE)
        return values

    return rescale


def _windows(ds: Dataset, frame: int) -> list[tuple[float, float, str] | None]:
    """Return centre, width and function of each window; None for one that can't be used.

    A window needs two finite numbers, a width of at least 1 (LINEAR) or above 0, and a function
    that the standard knows (PS3.3, C.11.2.1.2 and C.11.2.1.3).
    """
    holder = _holder(ds, frame, "FrameVOILUTSequence", "WindowCenter")
    try:
        pairs = [_several(holder.get(keyword)) for keyword in ("WindowCenter", "WindowWidth")]
    except (TypeError, ValueError, OverflowError):  # pydicom finds that a text is no number
        return [None]
    function = str(holder.get("VOILUTFunction") or "LINEAR").strip().upper()
    windows: list[tuple[float, float, str] | None] = []
    for center, width in zip(*pairs, strict=False):
        try:
            one = float(center), float(width), function
        except (TypeError, ValueError):
            windows.append(None)
            continue
        enough = one[1] >= 1 if function == "LINEAR" else one[1] >= np.finfo(float).tiny
        usable = enough and function in FUNCTIONS and all(map(math.isfinite, one[:2]))
        windows.append(one if usable else None)
    return windows


def _several(value: Any) -> list[Any]:
    """Return a header's values; none where the element is empty."""
    several = isinstance(value, (list, tuple)) or hasattr(value, "insert")
    values = list(value) if several else [value]
    return [] if all(v is None or v == "" for v in values) else values


def _window(values: Array, center: float, width: float, function: str) -> Array:
    """Return values, which it may change, in [0, 1] by a VOI window (PS3.3, C.11.2.1.2 and .3)."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    low = center - width / 2
    if width == 0:
        return (values > low).astype(np.float64)
    values -= low
    values /= width
    return np.clip(values, 0, 1, out=values)


def _voi_lut(values: Array, ds: Dataset) -> Array:
    """Return values in [0, 1] by the first VOI LUT; its white is all ones of the bits it uses."""
    from pydicom.pixels.processing import apply_voi

    table = apply_voi(np.rint(values).astype(np.int64), ds).astype(np.float64)
    bits = max(8, int(ds.VOILUTSequence[0].LUTDescriptor[2]))
    return np.clip(table / (2**bits - 1), 0, 1)


def _range(pixels: Array, ds: Dataset, frame: int) -> tuple[float, float]:
    """Return what is black and what white where the header doesn't say."""
    if ds.BitsStored <= 8 and "PixelData" in ds and not ds.get("ModalityLUTSequence"):
        stored = np.array([0, 2**ds.BitsStored - 1], dtype=np.float64)
        if ds.PixelRepresentation == 1:
            stored -= 2 ** (ds.BitsStored - 1)
        ends = _modality(ds, frame)(stored)
        return float(ends.min()), float(ends.max())
    rescale, padding = _modality(ds, frame), _padding(pixels.dtype, ds)
    low, high = math.inf, -math.inf
    for rows in _bands(pixels):
        values = rescale(pixels[rows])
        if padding:
            values = values[~padding(pixels[rows])]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return (low, high) if low <= high else (0.0, 0.0)
