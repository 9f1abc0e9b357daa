"""Bytes to pixels: decode, orient, bring to 8 bits, resize and crop.

What comes out for what: 16-bit grey is scaled by 257 (its full range, so that images of a set stay
comparable); transparency lies over black; of an animation the first frame; EXIF orientation is
applied; CMYK, palette and 1-bit become RGB. DICOM: see dicom.py. Grey stays one channel until it
is cropped: resizing three equal channels gives the same pixels for three times the work.

Two ways to decode. "exact" is full decoding and antialiased resizing, equal to torchvision's. The
ordinary one takes two short cuts where an image is much larger than what is wanted of it: JPEGs
are decoded at 1/2, 1/4 or 1/8 of their size (libjpeg-turbo's scaled DCT) as long as the result is
at least SPARE times the wanted side, and what is left over GAP times is first averaged in boxes.
What that does to features is in benchmarks/README.md.

No torch here: the processes that decode import this module and must start quickly.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from features.dicom import Window, decode_dicom, is_dicom
from features.errors import ImageError
from features.urls import Location

NOT_FOUND = "file not found"  # the reason of a bad image that isn't there
DECODE = {True: "pillow-exact", False: "pillow-scaled"}  # by `exact`; part of the fingerprint
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SPARE = 2  # at 1 the least cosine to exact features was 0.980, at 1.5 it was 0.992, at 2 0.9975
GAP = 3.0  # at 2 the least cosine was 0.9973, at 3 0.9985


@dataclass(frozen=True)
class Transform:
    """What a backbone wants: shorter side `resize` pixels, centre crop `size`, (x - mean) / std."""

    size: int
    resize: int
    interpolation: str  # a name of FILTERS; antialiased, as Pillow does
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def crop(self, decoded: Decoded, *, exact: bool) -> Image.Image:
        """Return the resized centre crop, in RGB; with exact it equals torchvision's."""
        image, (width, height) = decoded.image, decoded.full
        short = min(width, height)
        wide, high = (int(self.resize * side / short) for side in (width, height))
        if (wide, high) != image.size:
            gap = None if exact else GAP
            image = image.resize((wide, high), FILTERS[self.interpolation], reducing_gap=gap)
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size)).convert("RGB")

    def prepare(self, decoded: Decoded, *, exact: bool) -> NDArray[np.uint8]:
        """Return the pixels of `crop`, (size, size, 3)."""
        return np.array(self.crop(decoded, exact=exact))


@dataclass(frozen=True)
class Decoded:
    """An image in mode L or RGB, and the size (width, height) of which it may be a scaled copy."""

    image: Image.Image
    full: tuple[int, int]


def read_bytes(path: Location) -> bytes:
    """Return a file's bytes. Raises ImageError with the reason."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(NOT_FOUND) from None
    except OSError as error:
        raise ImageError(f"can't be read: {error.strerror or error}") from None
    if not data:
        raise ImageError("file is empty")
    return data


def decode(
    data: bytes, *, side: int | None = None, window: Window | None = None, frame: int | None = None
) -> Decoded:
    """Return an image of any kind that Pillow or pydicom knows.

    side is the shorter side in pixels that will be wanted of it; None decodes in full. window and
    frame are for DICOM, see dicom.py. Raises ImageError with the reason for what can't be decoded.
    """
    if is_dicom(data):
        image = decode_dicom(data, window=window, frame=frame)
        return Decoded(image, image.size)
    try:
        opened = Image.open(io.BytesIO(data))
        width, height = opened.size
        if side is not None and opened.format == "JPEG":
            scale = SPARE * side / min(width, height)
            opened.draft(None, (round(width * scale), round(height * scale)))
        loaded = _load(opened, data)
        turned = ImageOps.exif_transpose(loaded)
        if loaded.getexif().get(0x0112, 1) >= 5:  # orientations that lie on their side
            width, height = height, width
        return Decoded(_to_8_bits(turned), (width, height))
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow knows") from None
    except Image.DecompressionBombError:
        raise ImageError("over 179 megapixels: refused as a decompression bomb") from None
    except ImageError:
        raise
    # Damaged data raises many kinds of error in Pillow, among them SyntaxError and struct.error.
    except Exception as error:
        raise ImageError(f"can't be decoded: {error}") from None


def _load(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
    """Decode an opened image; plain PNGs by imagecodecs where it is installed.

    PNG is lossless, so the pixels are the same; 1.3 to 1.9 times faster for large RGB files.
    """
    plain = image.format == "PNG" and image.mode in ("L", "RGB") and not image.has_transparency_data
    if plain and image.tile and image.tile[0][3] == image.mode and b"eXIf" not in data:
        codec = _png_codec()
        if codec is not None:
            try:
                pixels = codec(data)
            except Exception:  # Pillow says better what is wrong with it
                pixels = None
            bands = {"L": (), "RGB": (3,)}[image.mode]
            if pixels is not None and pixels.shape == (*image.size[::-1], *bands):
                loaded = Image.fromarray(pixels)
                loaded.info = image.info
                return loaded
    image.load()
    return image


def _png_codec() -> Any:
    try:
        from imagecodecs import png_decode
    except ImportError:
        return None
    return png_decode


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image in mode L or RGB."""
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, in one of Pillow's ways
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError("32-bit integer pixels: convert to 8 or 16 bits first")
        return Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("floating-point pixels: convert to 8 or 16 bits first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")
