"""Why an image is bad: a closed list of sentences, which hold numbers and nothing else.

A reason is stored, shown in reports and passed on. What a library says of a damaged file may quote
what stands in it (a name, a patient's number), so it is never part of one. With MEDPROBE_DEBUG=1
it is printed on standard error.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from enum import Enum

from features.errors import ImageError
from features.files import NotRegularError

KINDS = "BMP, GIF, JPEG, JPEG 2000, PNG, PNM, TIFF, WebP or DICOM"


class Reason(Enum):
    """The sentences; {names} stand for numbers."""

    NOT_FOUND = "file not found"
    EMPTY = "file is empty"
    FOLDER = "can't be read: Is a directory"
    DENIED = "can't be read: Permission denied"
    NAME = "can't be read: no file can have this name"
    NOT_REGULAR = "can't be read: a device, pipe or socket, not a file"
    SYSTEM = "can't be read: error {number} of the system"
    URL = "can't be read from its URL"
    FILE_SIZE = (
        "file of {found:,} MB: over the {most:,} MB that are read of one "
        "(half of MEDPROBE_IMAGE_MEMORY)"
    )
    UNKNOWN = f"not an image of a known kind: want {KINDS}"
    PIXELS = "over 179 megapixels: refused as a decompression bomb"
    COST = (
        "decoding it would take about {found:,} MB of memory: over the {most:,} MB of one image "
        "(MEDPROBE_IMAGE_MEMORY)"
    )
    MEMORY = (
        "decoding it takes more than the {most:,} MB of memory of one image, or than is left here "
        "(MEDPROBE_IMAGE_MEMORY)"
    )
    TRUNCATED = "can't be decoded: the data is truncated"
    DAMAGED = "can't be decoded: the data is damaged, or of a rare kind"
    INTEGERS = "32-bit integer pixels: convert to 8 or 16 bits first"
    FLOATS = "floating-point pixels: convert to 8 or 16 bits first"
    KILLED = "decoding it killed the worker process (signal {number}), the second time alone"
    ENDED = "decoding it ended the worker process with status {number}, the second time alone"
    NOT_DICOM = "not a DICOM file"
    NO_PIXELS = "DICOM without pixels: not an image"
    NO_FRAME = "has no frame {asked}: found {found}"
    INFLATED = (
        "DICOM that inflates to more than {most:,} MB: refused as a decompression bomb "
        "(a quarter of MEDPROBE_IMAGE_MEMORY)"
    )
    CODESTREAM = (
        "DICOM that can't be decoded: its compressed pixels are {width:,} x {height:,}, "
        "its header says {columns:,} x {rows:,}"
    )
    NOT_FINITE = "DICOM with pixels that are not finite"
    PHOTOMETRIC = "DICOM with a photometric interpretation that is not supported"
    TWELVE_BITS = "DICOM that can't be decoded: no decoder for lossy JPEG of 12 bits"
    NO_DECODER = "DICOM that can't be decoded: no decoder for its transfer syntax"
    DICOM = "DICOM that can't be decoded: the data is damaged, or of a rare kind"
    HEADER = "DICOM that can't be read: the header is damaged"


class Remark(Enum):
    """What is said of an image that is good, but was not shown as its file says."""

    NEXT_WINDOW = "DICOM whose first window can't be used: the next that can was taken"
    NO_WINDOW = "DICOM without a window that can be used: shown by its own range"


def bad(reason: Reason, **numbers: float) -> ImageError:
    """Return the error of a bad image, to be raised. TypeError for what is not a number."""
    for name, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise TypeError(f"{name} is no number: a reason quotes nothing")
    return ImageError(reason.value.format(**numbers))


def reason_of(text: str) -> Reason | None:
    """Return which reason a sentence is; None for what is not of the list."""
    return next((reason for reason, pattern in _PATTERNS.items() if pattern.fullmatch(text)), None)


def unreadable(error: OSError, *, remote: bool = False) -> ImageError:
    """Return the error of an image whose file can't be read."""
    explain(error)
    if isinstance(error, NotRegularError):
        return bad(Reason.NOT_REGULAR)
    kinds = (FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES)
    number = error.errno or next((n for error_type, n in kinds if isinstance(error, error_type)), 0)
    if number in _ERRORS:
        return bad(_ERRORS[number])
    return bad(Reason.URL) if remote else bad(Reason.SYSTEM, number=number)


def explain(error: BaseException) -> None:
    """Say on standard error what a library said, with MEDPROBE_DEBUG=1."""
    if os.environ.get("MEDPROBE_DEBUG") == "1":
        print(f"{type(error).__name__}: {error}", file=sys.stderr)


def megabytes(size: float) -> int:
    """Return bytes as whole megabytes, rounded up."""
    return -int(-size // 1_000_000)


_NUMBER = r"-?[\d,.]+"
_PATTERNS = {
    kind: re.compile(_NUMBER.join(re.escape(p) for p in re.split(r"\{[^}]*\}", kind.value)))
    for kind in Reason
}
_ERRORS = {
    errno.ENOENT: Reason.NOT_FOUND,
    errno.ENOTDIR: Reason.NOT_FOUND,
    errno.EISDIR: Reason.FOLDER,
    errno.EACCES: Reason.DENIED,
    errno.EPERM: Reason.DENIED,
    errno.ENAMETOOLONG: Reason.NAME,
    errno.ELOOP: Reason.NOT_FOUND,
}
