"""DICOM to 8-bit RGB, as a viewer would show it first.

Grey pixels: rescaled (slope and intercept, or the modality LUT), then brought to black..white by
the VOI LUT, else the first window of the header that can be used, else (up to 8 bits) the full
range, or (beyond) the image's own minimum and maximum; inverted by the presentation LUT's shape, or
without one where they are MONOCHROME1; padding becomes black (dicom_grey.py). A window that is
given takes the place of the header's. Colour (RGB, YBR, palette) becomes RGB by the full range of
its bits. Of several frames one is shown. Standard: DICOM PS3.3, C.7.6.3 and C.11.

What a file costs is counted before pydicom decodes it: a deflated one is inflated step by step, and
compressed pixels may declare no more than the header does. Nothing of the header is kept but, where
it is asked for, the patient id.
"""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from features import limits
from features.codestreams import rle_size, size_of
from features.dicom_grey import Array, grey
from features.dicom_grey import Window as Window
from features.errors import ImageError
from features.reasons import Reason, bad, explain, megabytes, unreadable
from features.urls import Location, opened

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

RULES = "dicom-2"  # part of the fingerprint: a change of the rules above changes this word
LIBRARIES = ("pydicom", "python-gdcm", "pylibjpeg-openjpeg")
SUFFIXES = frozenset([".dcm", ".dicom", ".ima"])
HEAD = 132  # bytes that tell a DICOM file
DEFLATED, PLAIN = "1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0"  # transfer syntaxes
COLOUR = {"YBR_FULL": 26, "YBR_FULL_422": 26, "PALETTE COLOR": 16}  # bytes of a pixel on its way
RLE = "1.2.840.10008.1.2.5"
META = 4096  # bytes in which a meta header usually ends
STEP = 1 << 18  # bytes that are read and inflated at once

# pydicom warns of every oddity of a header, and quotes it; what matters ends as an ImageError.
warnings.filterwarnings("ignore", module=r"pydicom|features\.dicom")
if os.environ.get("MEDPROBE_DEBUG") != "1":
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


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


def asked_for(options: Mapping[str, Any]) -> tuple[Window | None, int | None]:
    """Return the window and the frame that `applied` was given."""
    window, frame = options.get("window", "header"), options.get("frame", "middle")
    return (
        None if window == "header" else (window[0], window[1]),
        None if frame == "middle" else frame,
    )


def decode_dicom(
    data: bytes, *, window: Window | None = None, frame: int | None = None
) -> Image.Image:
    """Return an 8-bit RGB image of a DICOM file's bytes: the first of what show_dicom returns."""
    return show_dicom(data, window=window, frame=frame)[0]


def show_dicom(
    data: bytes, *, window: Window | None = None, frame: int | None = None
) -> tuple[Image.Image, str]:
    """Return an 8-bit RGB image of a DICOM file's bytes, and a remark (reasons.Remark) or "".

    Parameters
    ----------
    window : centre and width of what goes from black to white (LINEAR_EXACT), for grey pixels.
    frame : which of several, from 1 as DICOM counts; None is the middle one, n // 2 + 1 of n.

    Raises ImageError with the reason for what has no pixels, costs too much or can't be decoded.
    """
    import pydicom
    from pydicom.pixels.utils import pixel_array

    twelve = False
    try:
        ds = pydicom.dcmread(_inflated(io.BytesIO(data)), force=True)
        _settle_encoding(ds)
        number = _frame_number(ds, frame)
        twelve = _check(ds, number, len(data))
        pixels = pixel_array(ds, index=number)
        photometric = str(ds.PhotometricInterpretation)
        if photometric.startswith("MONOCHROME"):
            shown, remark = grey(pixels, ds, number, window)
            return Image.fromarray(shown).convert("RGB"), remark
        return Image.fromarray(_colour(pixels, ds, photometric)), ""
    except ImageError:
        raise
    # Damaged files raise every kind of error in pydicom, its decoders and NumPy.
    except Exception as error:
        explain(error)
        if isinstance(error, MemoryError) or re.search(r"memory|bad_alloc|alloc", str(error), re.I):
            raise bad(Reason.MEMORY, most=megabytes(limits.memory())) from None
        if twelve:
            raise bad(Reason.TWELVE_BITS) from None
        unknown = re.search(r"no.*(decoder|plugin)|not supported|unsupported", str(error), re.I)
        raise bad(Reason.NO_DECODER if unknown else Reason.DICOM) from None


def patient_id(path: Location) -> str:
    """Return a DICOM file's patient id, "" where it has none. Raises ImageError if it isn't one."""
    import pydicom

    try:
        with opened(path) as file:
            if not is_dicom(file.read(HEAD)):
                raise bad(Reason.NOT_DICOM)
            file.seek(0)
            tags = ["PatientID"]
            ds = pydicom.dcmread(
                _inflated(file), force=True, stop_before_pixels=True, specific_tags=tags
            )
        return str(ds.get("PatientID") or "").strip()
    except ImageError:
        raise
    except OSError as error:
        raise unreadable(error) from None
    except Exception as error:
        explain(error)
        raise bad(Reason.HEADER) from None


def _inflated(file: BinaryIO) -> BinaryIO:
    """Return the file, or if its transfer syntax is deflated, it as pydicom reads it without.

    pydicom inflates at once whatever there is. Here it is done step by step: raises ImageError as
    soon as there is more than limits allow.
    """
    syntax = _syntax(file)
    if syntax != DEFLATED:
        file.seek(0)
        return file
    most, inflate, plain = limits.inflated_size(), zlib.decompressobj(-15), io.BytesIO()
    meta = b"\x02\0\x10\0UI" + struct.pack("<H", len(PLAIN)) + PLAIN
    plain.write(bytes(128) + b"DICM\x02\0\0\0UL\x04\0" + struct.pack("<I", len(meta)) + meta)
    while not inflate.eof and (part := inflate.unconsumed_tail or file.read(STEP)):
        plain.write(inflate.decompress(part, STEP))
        if plain.tell() > most:
            raise bad(Reason.INFLATED, most=megabytes(most))
    plain.seek(0)
    return plain


def _syntax(file: BinaryIO) -> str:
    """Return the transfer syntax that pydicom will find, "" for none; the file stands behind it."""
    from pydicom.filereader import read_dataset, read_preamble

    quick = _plain_meta(file.read(META))
    if quick is not None:
        file.seek(quick[1])
        return quick[0]
    file.seek(0)
    read_preamble(file, force=True)
    start = file.tell()

    def read(implicit: bool) -> Dataset:
        file.seek(start)
        return read_dataset(file, implicit, True, stop_when=lambda tag, vr, size: tag >> 16 != 2)

    meta = read(False)
    try:
        for first in list(meta.keys())[:1]:
            meta[first]
    except NotImplementedError:  # no standard, but pydicom takes it so
        meta = read(True)
    return str(meta.get("TransferSyntaxUID", ""))


def _plain_meta(head: bytes) -> tuple[str, int] | None:
    """Return the transfer syntax of a file as files are, and where its meta header ends.

    None for any oddity: pydicom has its own ways with those.
    """
    if head[128:132] != b"DICM":
        return None
    at, syntax = 132, b""
    while head[at : at + 2] == b"\x02\0":
        vr = head[at + 4 : at + 6]
        if vr in (b"OB", b"UN"):
            start, size = at + 12, int.from_bytes(head[at + 8 : at + 12], "little")
        elif vr in (b"UL", b"UI", b"SH", b"AE"):
            start, size = at + 8, int.from_bytes(head[at + 6 : at + 8], "little")
        else:
            return None
        if head[at + 2 : at + 4] == b"\x10\0":
            if vr != b"UI":
                return None
            syntax = head[start : start + size]
        at = start + size
    text = syntax.rstrip(b"\0 ")
    if at + 2 > len(head) or not re.fullmatch(rb"[0-9.]*", text):
        return None
    return text.decode("ascii"), at


def _settle_encoding(ds: Dataset) -> None:
    """Give a file without a meta header the transfer syntax that it was evidently written in."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not any(k in ds for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise bad(Reason.NO_PIXELS)
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
    if ds.Rows * ds.Columns > limits.PIXELS:
        raise bad(Reason.PIXELS)
    frames = int(ds.get("NumberOfFrames") or 1)
    if frame is None:
        return frames // 2
    if not 1 <= frame <= frames:
        raise bad(Reason.NO_FRAME, asked=frame, found=frames)
    return frame - 1


def _check(ds: Dataset, number: int, size: int) -> bool:
    """Raise ImageError where a frame costs too much, or is larger than its header says.

    Returns whether it is lossy JPEG of 12 bits. Counted are the file as bytes and as pydicom has
    it, the stored values and, whichever is largest, what makes them or what is made of them.
    test_limits.py compares it with what is taken.
    """
    from pydicom.encaps import get_frame

    samples = int(ds.get("SamplesPerPixel") or 1)
    pixels, stored = ds.Rows * ds.Columns, samples * -(-int(ds.BitsAllocated) // 8)
    syntax, photometric = ds.file_meta.TransferSyntaxUID, str(ds.PhotometricInterpretation)
    both = 2 * max(size, len(ds.get("PixelData") or b""))

    def check(most: float) -> None:
        limits.check(both + pixels * (stored + max(2 * stored, 6, most)))

    check(COLOUR.get(photometric, 0))
    if not syntax.is_encapsulated:
        return False
    frames = int(ds.get("NumberOfFrames") or 1)
    table = "ExtendedOffsetTable", "ExtendedOffsetTableLengths"
    offsets = tuple(ds[name].value for name in table) if all(n in ds for n in table) else None
    data = get_frame(ds.PixelData, number, number_of_frames=frames, extended_offsets=offsets)
    if syntax == RLE:
        most = limits.memory()
        if 64 * len(data) > most:  # the most that RLE can do; only then it is worth looking
            check(2 * stored + rle_size(data, most) / pixels)
        return False
    stream = size_of(data)
    if stream is None:
        return False
    if stream.width * stream.height > pixels:
        raise bad(
            Reason.CODESTREAM,
            width=stream.width, height=stream.height, columns=ds.Columns, rows=ds.Rows,
        )  # fmt: skip
    if not stream.marker:  # JPEG 2000 is decoded to 32 bits
        check(stored + 5 * max(samples, stream.components))
    return stream.bits == 12 and stream.marker in (0xC1, 0xC2)


def _colour(pixels: Array, ds: Dataset, photometric: str) -> Array:
    """Return (rows, columns, 3) uint8; YBR has become RGB when it was decoded."""
    from pydicom.pixels.processing import apply_color_lut

    bits = int(ds.BitsStored)
    if photometric == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, ds)[..., :3]
        bits = 8 * pixels.dtype.itemsize
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise bad(Reason.PHOTOMETRIC)
    if bits == 8 and pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    out = np.empty(pixels.shape, np.uint8)
    for row, values in enumerate(pixels):
        shown = np.clip(values.astype(np.float64) / (2**bits - 1), 0, 1)
        out[row] = (shown * 255 + 0.5).astype(np.uint8)
    return out
