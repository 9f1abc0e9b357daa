"""DICOM to 8-bit RGB, as a viewer would show it first.

Grey pixels: rescaled (slope and intercept, or the modality LUT), then brought to black..white by
the VOI LUT, else the first window of the header, else (up to 8 bits) the full range, or (beyond)
the image's own minimum and maximum; MONOCHROME1 is inverted; padding becomes black. A window
that is given takes the place of the header's. Colour (RGB, YBR, palette) becomes RGB by the full
range of its bits. Of several frames one is shown. Standard: DICOM PS3.3, C.7.6.3 and C.11.

Nothing of the header is kept but, where it is asked for, the patient id.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from features.errors import ImageError
from features.urls import Location

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Array: TypeAlias = Any  # numpy arrays; their dtypes vary with the file
Window: TypeAlias = tuple[float, float]  # centre and width, in units after rescaling

RULES = "dicom-1"  # part of the fingerprint: a change of the rules above changes this word
LIBRARIES = ("pydicom", "python-gdcm", "pylibjpeg-openjpeg")
SUFFIXES = frozenset([".dcm", ".dicom", ".ima"])
HEAD = 132  # bytes that tell a DICOM file
LIMIT = 178_956_970  # pixels; Pillow's limit against decompression bombs

# pydicom warns of every oddity of a header; what matters ends as an ImageError.
warnings.filterwarnings("ignore", module=r"pydicom|features\.dicom")


def is_dicom(data: bytes) -> bool:
    """Say whether bytes begin a DICOM file, with its preamble or (as old files do) without."""
    if data[128:132] == b"DICM":
        return True
    # Without one: an element of group 2 or 8, little-endian or (group 8) big-endian.
    little = data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\x00"
    if little or (data[:2] == b"\x00\x08" and data[2:3] == b"\x00"):
        explicit = re.match(rb"[A-Z]{2}", data[4:6])
        return bool(explicit) or (little and int.from_bytes(data[4:8], "little") < 256)
    return False


def may_be_dicom(name: str) -> bool:
    """Say whether a file of this name is looked into for DICOM: .dcm, no suffix, or 1.2.840.1."""
    suffix = PurePath(name).suffix.lower()
    return suffix in SUFFIXES or not suffix or suffix[1:].isdigit()


def applied(names: Iterable[str], window: Window | None, frame: int | None) -> dict[str, Any]:
    """Return what a fingerprint holds of decoding these files: nothing where none is DICOM."""
    if window is None and frame is None and not any(map(may_be_dicom, names)):
        return {}
    return {
        "rules": RULES,
        "window": "header" if window is None else list(window),
        "frame": "middle" if frame is None else frame,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def asked_for(said: Mapping[str, Any]) -> tuple[Window | None, int | None]:
    """Return the window and the frame that `applied` was given."""
    window, frame = said.get("window", "header"), said.get("frame", "middle")
    return (
        None if window == "header" else (window[0], window[1]),
        None if frame == "middle" else frame,
    )


def decode_dicom(
    data: bytes, *, window: Window | None = None, frame: int | None = None
) -> Image.Image:
    """Return an 8-bit RGB image of a DICOM file's bytes.

    Parameters
    ----------
    window : centre and width of what goes from black to white (LINEAR_EXACT), for grey pixels.
    frame : which of several, from 1 as DICOM counts; None is the middle one, n // 2 + 1 of n.

    Raises ImageError with the reason for what has no pixels or can't be decoded.
    """
    import pydicom
    from pydicom.pixels.utils import pixel_array

    try:
        ds = pydicom.dcmread(io.BytesIO(data), force=True)
        _settle_encoding(ds)
        number = _frame_number(ds, frame)
        pixels = pixel_array(ds, index=number)
        photometric = str(ds.PhotometricInterpretation)
        if photometric.startswith("MONOCHROME"):
            grey = _grey(pixels, ds, number, window)
            return Image.fromarray(grey).convert("RGB")
        return Image.fromarray(_colour(pixels, ds, photometric))
    except ImageError:
        raise
    # Damaged files raise every kind of error in pydicom, its decoders and NumPy.
    except Exception as error:
        raise ImageError(f"DICOM that can't be decoded: {_one_line(error)}") from None


def patient_id(path: Location) -> str:
    """Return a DICOM file's patient id, "" where it has none. Raises ImageError if it isn't one."""
    import pydicom

    try:
        with path.open("rb") as file:
            if not is_dicom(file.read(HEAD)):
                raise ImageError("not a DICOM file")
            file.seek(0)
            tags = ["PatientID"]
            ds = pydicom.dcmread(file, force=True, stop_before_pixels=True, specific_tags=tags)
        return str(ds.get("PatientID") or "").strip()
    except ImageError:
        raise
    except OSError as error:
        raise ImageError(f"can't be read: {error.strerror or error}") from None
    except Exception as error:
        raise ImageError(f"DICOM that can't be read: {_one_line(error)}") from None


def _settle_encoding(ds: Dataset) -> None:
    """Give a file without a meta header the transfer syntax that it was evidently written in."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not any(k in ds for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = ds.get("Modality") or "no modality"
        raise ImageError(f"DICOM without pixels ({kind}): not an image")
    if "TransferSyntaxUID" in getattr(ds, "file_meta", ()):
        return
    implicit, little = ds.original_encoding
    if not little:
        syntax = ExplicitVRBigEndian
    else:
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    if not hasattr(ds, "file_meta"):
        ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax


def _frame_number(ds: Dataset, frame: int | None) -> int:
    """Return which frame is shown, from 0."""
    if ds.Rows * ds.Columns > LIMIT:
        raise ImageError("over 179 megapixels: refused as a decompression bomb")
    frames = int(ds.get("NumberOfFrames") or 1)
    if frame is None:
        return frames // 2
    if not 1 <= frame <= frames:
        raise ImageError(f"has no frame {frame}: found {frames}")
    return frame - 1


def _holder(ds: Dataset, frame: int, macro: str, keyword: str) -> Dataset:
    """Return the part of the header that says `keyword` of a frame.

    Enhanced objects say it per frame, or once for all frames (PS3.3, C.7.6.16); others at the top.
    """
    groups = ds.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*groups[frame : frame + 1], *(ds.get("SharedFunctionalGroupsSequence") or [])]:
        if (items := group.get(macro)) and keyword in items[0]:
            found: Dataset = items[0]
            return found
    return ds


def _grey(pixels: Array, ds: Dataset, frame: int, window: Window | None) -> Array:
    """Return (rows, columns) uint8 of stored grey values."""
    padding = _padding(pixels, ds)
    values = _modality(pixels, ds, frame)
    if not np.isfinite(values).all():
        raise ImageError("DICOM with pixels that are not finite")
    if window is not None:
        shown = _window(values, *window, "LINEAR_EXACT")
    elif ds.get("VOILUTSequence"):
        shown = _voi_lut(values, ds)
    elif (header := _header_window(ds, frame)) is not None:
        shown = _window(values, *header)
    else:
        low, high = _range(values[~padding], ds, frame)
        shown = np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1)
    if ds.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    shown[padding] = 0
    return (shown * 255 + 0.5).astype(np.uint8)


def _padding(pixels: Array, ds: Dataset) -> Array:
    """Return which stored values only fill the frame (PS3.3, C.7.5.1.1.2)."""
    low = ds.get("PixelPaddingValue")
    if low is None or not np.issubdtype(pixels.dtype, np.integer):
        return np.zeros(pixels.shape, dtype=bool)
    high = ds.get("PixelPaddingRangeLimit")
    # A negative value is sometimes written as unsigned; brought to the pixels' type it is the same.
    ends = [np.int64(int(v)).astype(pixels.dtype) for v in (low, low if high is None else high)]
    return (pixels >= min(ends)) & (pixels <= max(ends))


def _modality(pixels: Array, ds: Dataset, frame: int) -> Array:
    """Return stored values in their physical unit, float64."""
    from pydicom.pixels.processing import apply_modality_lut

    if ds.get("ModalityLUTSequence"):
        return apply_modality_lut(pixels, ds).astype(np.float64)
    holder = _holder(ds, frame, "PixelValueTransformationSequence", "RescaleSlope")
    slope, intercept = holder.get("RescaleSlope"), holder.get("RescaleIntercept")
    return pixels * float(1 if slope is None else slope) + float(intercept or 0)


def _header_window(ds: Dataset, frame: int) -> tuple[float, float, str] | None:
    """Return centre, width and function of the first window, or None where there is none."""
    holder = _holder(ds, frame, "FrameVOILUTSequence", "WindowCenter")
    first = []
    for keyword in ("WindowCenter", "WindowWidth"):
        value = holder.get(keyword)
        several = value if isinstance(value, (list, tuple)) or hasattr(value, "insert") else [value]
        if not len(several) or several[0] is None or several[0] == "":
            return None
        first.append(float(several[0]))
    return first[0], first[1], str(holder.get("VOILUTFunction") or "LINEAR").upper()


def _window(values: Array, center: float, width: float, function: str) -> Array:
    """Return values in [0, 1] by a VOI window (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    if width < (1 if function == "LINEAR" else np.finfo(float).tiny):
        raise ImageError(f"DICOM with a window of width {width:g}: give one with --window C/W")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise ImageError(f"DICOM with an unknown VOI LUT function {function!r}")
    low = center - width / 2
    if width == 0:
        return (values > low).astype(np.float64)
    return np.clip((values - low) / width, 0, 1)


def _voi_lut(values: Array, ds: Dataset) -> Array:
    """Return values in [0, 1] by the first VOI LUT; its white is all ones of the bits it uses."""
    from pydicom.pixels.processing import apply_voi

    table = apply_voi(np.rint(values).astype(np.int64), ds).astype(np.float64)
    bits = max(8, int(ds.VOILUTSequence[0].LUTDescriptor[2]))
    return np.clip(table / (2**bits - 1), 0, 1)


def _range(values: Array, ds: Dataset, frame: int) -> tuple[float, float]:
    """Return what is black and what white where the header doesn't say."""
    if ds.BitsStored <= 8 and "PixelData" in ds and not ds.get("ModalityLUTSequence"):
        stored = np.array([0, 2**ds.BitsStored - 1], dtype=np.float64)
        if ds.PixelRepresentation == 1:
            stored -= 2 ** (ds.BitsStored - 1)
        ends = _modality(stored, ds, frame)
        return float(ends.min()), float(ends.max())
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def _colour(pixels: Array, ds: Dataset, photometric: str) -> Array:
    """Return (rows, columns, 3) uint8; YBR has become RGB when it was decoded."""
    from pydicom.pixels.processing import apply_color_lut

    bits = int(ds.BitsStored)
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, ds)[..., :3]
        bits = 8 * pixels.dtype.itemsize
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ImageError(f"DICOM with photometric interpretation {photometric}: not supported")
    if bits == 8 and pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    shown = np.clip(pixels.astype(np.float64) / (2**bits - 1), 0, 1)
    return (shown * 255 + 0.5).astype(np.uint8)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.removeprefix(
        "Unable to decode as exceptions were raised by all available plugins: "
    )
