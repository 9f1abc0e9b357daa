"""Bytes to pixels: decode, orient, bring to 8-bit RGB, resize and crop.

What comes out for what: 16-bit grey is scaled by 257 (its full range, so that images of a set stay
comparable); transparency lies over black; of an animation the first frame; EXIF orientation is
applied; CMYK, palette and 1-bit become RGB. DICOM: see dicom.py.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from features.dicom import decode_dicom, is_dicom
from features.errors import ImageError

DECODE = "pillow-full"  # part of the fingerprint: a change of the rules above changes this word
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Transform:
    """What a backbone wants: shorter side `resize` pixels, centre crop `size`, (x - mean) / std."""

    size: int
    resize: int
    interpolation: str  # a name of FILTERS; antialiased, as Pillow does
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def prepare(self, image: Image.Image) -> Tensor:
        """Return the resized crop of an RGB image, (3, size, size) uint8; equals torchvision's."""
        width, height = image.size
        short = min(width, height)
        wide, high = (int(self.resize * side / short) for side in (width, height))
        if (wide, high) != (width, height):
            image = image.resize((wide, high), FILTERS[self.interpolation])
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalise(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (pixels / 255 - mean) / std of a batch (B, 3, H, W) uint8, on its device."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return ((pixels.float() / 255 - mean) / std).to(dtype)


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. Raises ImageError with the reason."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError("file not found") from None
    except OSError as error:
        raise ImageError(f"can't be read: {error.strerror}") from None
    if not data:
        raise ImageError("file is empty")
    return data


def decode(
    data: bytes, *, window: tuple[float, float] | None = None, frame: int | None = None
) -> Image.Image:
    """Return an RGB image. Raises ImageError with the reason for what can't be decoded.

    `window` and `frame` are for DICOM, see features/dicom.py.
    """
    if is_dicom(data):
        return decode_dicom(data, window=window, frame=frame)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ImageError("not an image that Pillow knows") from None
    except Image.DecompressionBombError:
        raise ImageError("over 179 megapixels: refused as a decompression bomb") from None
    except ImageError:
        raise
    # Damaged data raises many kinds of error in Pillow, among them SyntaxError and struct.error.
    except Exception as error:
        raise ImageError(f"can't be decoded: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, in one of Pillow's ways
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError("32-bit integer pixels: convert to 8 or 16 bits first")
        return Image.fromarray((grey / 257 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels: convert to 8 or 16 bits first")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")
