"""The size that compressed pixels say of themselves: JPEG, JPEG-LS and JPEG 2000 codestreams.

A decoder takes memory by these numbers, whatever the file around it declares. Sources: ITU-T T.81
B.2.2 (JPEG; JPEG-LS frames, T.87, are alike), T.800 A.5.1 (JPEG 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

FRAMES = frozenset([*range(0xC0, 0xD0), 0xF7]) - {0xC4, 0xC8, 0xCC}  # markers SOFn, and SOF55
ALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # markers without a length
J2K = b"\xff\x4f\xff\x51"  # SOC, then SIZ


@dataclass(frozen=True)
class Size:
    """Pixels, components, bits of a sample; `marker` is JPEG's SOF, 0 for JPEG 2000."""

    width: int
    height: int
    components: int
    bits: int
    marker: int = 0


def size_of(data: bytes) -> Size | None:
    """Return what a codestream, or a JP2 file, declares; None for what is neither or too short."""
    if data[:2] == b"\xff\xd8":
        return _jpeg(data)
    if data[:4] == J2K:
        return _jpeg2000(data[4:46])
    if data[4:8] in (b"jP  ", b"jP\x1a\x1a") and (start := data.find(J2K)) > 0:
        return _jpeg2000(data[start + 4 : start + 46])
    return None


def _jpeg(data: bytes) -> Size | None:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:  # not where a marker should be; decoders look for the next one
            at = data.find(b"\xff", at)
            if at < 0:
                return None
            continue
        marker = data[at + 1]
        if marker == 0xFF or marker in ALONE or marker == 0:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in FRAMES:
            head = data[at + 4 : at + 10]
            if len(head) < 6:
                return None
            height, width = (int.from_bytes(head[k : k + 2], "big") for k in (1, 3))
            return Size(width, height, head[5], head[0], marker)
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return None


def _jpeg2000(siz: bytes) -> Size | None:
    """Read what follows the SIZ marker: length, Rsiz, Xsiz, Ysiz, XOsiz, YOsiz, ..., Csiz, Ssiz."""
    if len(siz) < 39:
        return None
    right, bottom, left, top = (int.from_bytes(siz[k : k + 4], "big") for k in (4, 8, 12, 16))
    components = int.from_bytes(siz[36:38], "big")
    return Size(max(0, right - left), max(0, bottom - top), components, (siz[38] & 0x7F) + 1)


def rle_size(frame: bytes, most: int) -> int:
    """Return to how many bytes a DICOM RLE frame expands (PS3.5, G.3.2), counted up to `most`."""
    at, total = 64, 0
    while at < len(frame) and total <= most:
        head = frame[at]
        total += head + 1 if head < 128 else (257 - head if head > 128 else 0)
        at += head + 2 if head < 128 else (2 if head > 128 else 1)
    return total
