"""Bytes to pixels: decode, orient, bring to 8 bits, resize and crop.

Read are the formats of FORMATS, and DICOM; which it is, a file's content says, never its name.
Pillow knows more, and some of them start programs (EPS starts Ghostscript): those are bad images.
What one image may cost is in limits.py; it is counted before anything is decoded.

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
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from features import limits
from features.codestreams import size_of
from features.dicom import Window, is_dicom, show_dicom
from features.errors import DatasetError, ImageError
from features.files import TooLargeError
from features.reasons import Reason, bad, explain, megabytes, unreadable
from features.urls import Location, Stat, Url, read

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG2000", "PPM")  # Pillow's names
NOT_FOUND = Reason.NOT_FOUND.value  # the reason of a bad image that isn't there
DECODE = {True: "pillow-exact", False: "pillow-scaled"}  # by `exact`; part of the fingerprint
FILTERS = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}  # by Pillow's names
FITS = ("crop", "squash", "pad")
SPARE = 2  # at 1 the least cosine to exact features was 0.980, at 1.5 it was 0.992, at 2 0.9975
GAP = 3.0  # at 2 the least cosine was 0.9973, at 3 0.9985
ELONGATED = 50  # times as long as wide: of longer ones only the middle is scaled
BAND = 1 << 16  # pixels that are brought to 8 bits at once: they stay in a cache
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Transform:
    """What a backbone wants: `size` x `size` pixels, and (x - mean) / std.

    fit says how an oblong image becomes square:
    crop    shorter side to `resize`, then the centre
    squash  both sides to `resize`, whatever their ratio, then the centre
    pad     longer side to `resize`, then the centre, with `fill` (RGB) around it
    corner says where the centre begins where the margin is odd: "round" as torchvision has it (to
    even), "floor" as transformers.
    """

    size: int
    resize: int
    interpolation: str  # a name of FILTERS; antialiased, as Pillow does
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: str = "crop"
    fill: tuple[int, int, int] = (0, 0, 0)
    corner: str = "round"

    def fitted(self, fit: str, resize: int | None = None) -> Transform:
        """Return the same with another fit: `pad` to the whole size, the others to our `resize`."""
        if fit == self.fit and resize is None:
            return self
        side = resize or (self.size if fit == "pad" else self.resize)
        red, green, blue = (round(255 * value) for value in self.mean)
        return replace(self, fit=fit, resize=side, fill=(red, green, blue))

    def crop(self, decoded: Decoded, *, exact: bool) -> Image.Image:
        """Return the resized centre, in RGB; with exact it equals torchvision's."""
        image, (width, height) = decoded.image, decoded.full
        wide, high = self._scaled(width, height)
        gap, resampling = None if exact else GAP, FILTERS[self.interpolation]
        left, top = self._corner(wide), self._corner(high)
        if self.fit == "crop" and max(wide, high) > ELONGATED * max(self.resize, self.size):
            return _middle(image, (wide, high), (left, top), self.size, resampling, gap).convert(
                "RGB"
            )
        if (wide, high) != image.size:
            image = image.resize((wide, high), resampling, reducing_gap=gap)
        if self.fit == "pad":
            shown = Image.new("RGB", (self.size, self.size), tuple(self.fill))
            shown.paste(image.convert("RGB"), (-left, -top))
            return shown
        return image.crop((left, top, left + self.size, top + self.size)).convert("RGB")

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """Return the size that an image of width x height is resized to."""
        if self.fit == "squash":
            return self.resize, self.resize
        if self.fit == "pad":  # timm's ResizeKeepRatio rounds, torchvision's Resize cuts
            ratio = max(width, height) / self.resize
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        short = min(width, height)
        return int(self.resize * width / short), int(self.resize * height / short)

    def _corner(self, side: int) -> int:
        """Return where the centre begins of a side; below zero is what is padded before it."""
        if side < self.size and self.fit == "pad":
            return -((self.size - side) // 2)
        margin = side - self.size
        return margin // 2 if self.corner == "floor" else round(margin / 2)

    def prepare(self, decoded: Decoded, *, exact: bool) -> NDArray[np.uint8]:
        """Return the pixels of `crop`, (size, size, 3)."""
        return np.array(self.crop(decoded, exact=exact))


def _middle(
    image: Image.Image,
    scaled: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    resampling: Image.Resampling,
    gap: float | None,
) -> Image.Image:
    """Return the crop of a very long image, without scaling what the crop doesn't show.

    Scaled whole, 60,000 x 1 pixels would be 15 million x 256. The pixels are those of scaling to
    `scaled` and cropping `size` at `corner`, but for rounding.
    """
    along = 0 if scaled[0] > scaled[1] else 1
    step = image.size[along] / scaled[along]  # pixels of the image per pixel of the scaled one
    begin, end = corner[along] * step, (corner[along] + size) * step
    spare = 4 * max(1.0, step) + 1  # what the filter looks at beyond
    first = max(0, int(begin - spare))
    last = min(image.size[along], int(end + spare) + 1)
    box = [0, 0, *image.size]
    box[along], box[along + 2] = first, last
    strip = image.crop((box[0], box[1], box[2], box[3]))
    span: list[float] = [0, 0, *strip.size]
    span[along], span[along + 2] = begin - first, end - first
    to = [scaled[0], scaled[1]]
    to[along] = size
    whole = strip.resize(
        (to[0], to[1]), resampling, box=(span[0], span[1], span[2], span[3]), reducing_gap=gap
    )
    across = [0, 0]
    across[1 - along] = corner[1 - along]
    return whole.crop((across[0], across[1], across[0] + size, across[1] + size))


@dataclass(frozen=True)
class Decoded:
    """An image in mode L or RGB, and the size (width, height) of which it may be a scaled copy.

    remark says what of its file could not be followed, see reasons.Remark; "" is nothing.
    """

    image: Image.Image
    full: tuple[int, int]
    remark: str = ""


def read_file(path: Location) -> tuple[bytes, Stat]:
    """Return a file's bytes, and its size and time as they were before.

    Raises ImageError with the reason for what can't be read, isn't a file, is empty or too large.
    """
    try:
        data, status = read(path, limits.file_size())
    except TooLargeError as error:
        most = limits.file_size()
        raise bad(Reason.FILE_SIZE, found=megabytes(error.size), most=megabytes(most)) from None
    except OSError as error:
        raise unreadable(error, remote=isinstance(path, Url)) from None
    except ValueError:  # such as a zero byte in the name
        raise bad(Reason.NAME) from None
    except MemoryError:
        raise bad(Reason.MEMORY, most=megabytes(limits.memory())) from None
    except Exception as error:  # libraries of object stores have errors of their own
        if isinstance(error, DatasetError) or not isinstance(path, Url):
            raise
        explain(error)
        raise bad(Reason.URL) from None
    if not data:
        raise bad(Reason.EMPTY)
    return data, status


def read_bytes(path: Location) -> bytes:
    """Return a file's bytes. Raises ImageError with the reason."""
    return read_file(path)[0]


def decode(
    data: bytes, *, side: int | None = None, window: Window | None = None, frame: int | None = None
) -> Decoded:
    """Return an image of any kind of FORMATS, or DICOM.

    side is the shorter side in pixels that will be wanted of it; None decodes in full. window and
    frame are for DICOM, see dicom.py. Raises ImageError with the reason for what can't be decoded.
    """
    try:
        if is_dicom(data):
            image, remark = show_dicom(data, window=window, frame=frame)
            return Decoded(image, image.size, remark)
        return _decode(data, side)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise bad(Reason.UNKNOWN) from None
    except Image.DecompressionBombError:
        raise bad(Reason.PIXELS) from None
    except MemoryError:
        raise bad(Reason.MEMORY, most=megabytes(limits.memory())) from None
    # Damaged data raises many kinds of error in Pillow, among them SyntaxError and struct.error.
    except Exception as error:
        explain(error)
        cut = re.search(r"truncated|not enough|unexpected end|end of file", str(error), re.I)
        raise bad(Reason.TRUNCATED if cut else Reason.DAMAGED) from None


def _decode(data: bytes, side: int | None) -> Decoded:
    opened = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = opened.size
    if side is not None and opened.format == "JPEG":
        scale = SPARE * side / min(width, height)
        opened.draft(None, (round(width * scale), round(height * scale)))
    limits.check(_cost(opened, (width, height), data))
    loaded = _load(opened, data)
    if loaded.getexif().get(ORIENTATION, 1) >= 5:  # orientations that lie on their side
        width, height = height, width
    ImageOps.exif_transpose(loaded, in_place=True)
    return Decoded(_to_8_bits(loaded), (width, height))


def _cost(image: ImageFile.ImageFile, full: tuple[int, int], data: bytes) -> float:
    """Return about how many bytes decoding an opened image takes at most, its file with them.

    Counted are the decoded pixels and, whichever is largest, the decoder's own copy of them, the
    image turned, or the image in 8 bits. test_limits.py compares it with what is taken.
    """
    pixels = image.width * image.height
    one = {"1": 1, "L": 1, "P": 1, "I": 4, "F": 4}.get(image.mode, 4)  # bytes, as Pillow keeps them
    if image.mode.startswith("I;16"):
        one = 2
    own = 4.5 * pixels  # what becomes of it afterwards
    match image.format:
        case "JPEG" | "MPO":  # coefficients, where there are several scans
            own = max(own, 2.2 * len(image.getbands()) * full[0] * full[1])
        case "PNG":  # imagecodecs' array; text and profiles, which Pillow has a limit for
            own += 64e6
        case "WEBP":  # two canvasses, and what is given of them
            own = 16.0 * pixels
        case "JPEG2000":
            declared = size_of(data)
            if declared is None or declared.width * declared.height > pixels:
                raise bad(Reason.DAMAGED)
            own = 6.0 * pixels * max(declared.components, len(image.getbands()))
        case "TIFF":
            own = max(own, _tiff(image))
    return len(data) + one * pixels + own


def _tiff(image: ImageFile.ImageFile) -> float:
    """Return how many bytes libtiff takes for a strip, at most the image, or a tile."""

    def tag(number: int, default: int) -> int:
        value = image.tag_v2.get(number, default)  # type: ignore[attr-defined]
        return max(int(v) for v in (value if isinstance(value, tuple) else (value,)))

    each = max(1, tag(277, 1)) * -(-max(1, tag(258, 8)) // 8)  # samples of a pixel, bits of each
    tile = tag(322, 0) * tag(323, 0)
    return float(max(each, 4) * max(tile, image.width * image.height))


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
    """Return an image in mode L or RGB; in bands, so that no more than both are in memory."""
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise bad(Reason.FLOATS)
    if image.mode.startswith("I"):  # 16 bits of grey, in one of Pillow's ways
        out = np.empty(image.size[::-1], np.uint8)
        for top, band in bands(image):
            grey = np.asarray(band)
            if grey.min() < 0 or grey.max() > 65535:
                raise bad(Reason.INTEGERS)
            out[top : top + band.height] = (grey.astype(np.uint32) + 128) // 257
        return Image.fromarray(out)
    if not image.has_transparency_data:
        return image.convert("L" if image.mode == "1" else "RGB")
    shown = Image.new("RGB", image.size)
    for top, band in bands(image):
        clear = band.convert("RGBA")
        black = Image.new("RGBA", clear.size, (0, 0, 0, 255))
        shown.paste(Image.alpha_composite(black, clear).convert("RGB"), (0, top))
    return shown


def bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in bands of whole rows, each with its first row."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return a synthetic RGB image, smooth with noise, on which two ways are compared."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (2 + height // 24, 2 + width // 24, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(np.int16) + rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
