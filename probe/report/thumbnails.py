"""Small copies of images for the page, of files that are still there and have not changed."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from features.dicom import asked_for, is_dicom
from features.images import decode, read_bytes
from probe.draw.drawing import printable
from probe.report.stores import StoreView

SIDE, QUALITY = 96, 72  # pixels of the longer side; about 2 kB each
LIMIT = 1300  # of a page: 3 to 4 MB


def thumbnails(
    stored: StoreView, ids: Sequence[str], *, dicom: bool, fetch: bool, limit: int
) -> dict[str, str]:
    """Return JPEGs in base64 by id, of the first `limit` ids (as printed) that have one.

    DICOM, and images at URLs, only if asked: a store may be somebody else's, and name any URL.
    """
    names = [printable(str(i)) for i in stored.manifest.id]  # as ids are: alike, they show nothing
    alike = {name for name, count in Counter(names).items() if count > 1}
    row = {name: k for k, name in enumerate(names) if name not in alike}
    wanted = [(i, row[i]) for i in dict.fromkeys(ids) if i in row]
    if not fetch:
        wanted = [(i, k) for i, k in wanted if isinstance(stored.manifest.file(k), Path)]
    wanted = wanted[:limit]
    with ThreadPoolExecutor(cpu_count() or 1) as pool:
        made = list(pool.map(lambda pair: _one(stored, pair[1], dicom), wanted))
    pairs = zip(wanted, made, strict=True)
    return {name: picture for (name, _), picture in pairs if picture}


def _one(stored: StoreView, row: int, dicom: bool) -> str:
    """Return a JPEG in base64; "" where there is to be none."""
    manifest, source = stored.manifest, stored.source
    try:
        data = read_bytes(manifest.file(row))
        medical = is_dicom(data)
        if hashlib.sha256(data).hexdigest() != source["hash"][row] or (medical and not dicom):
            return ""
        window, frame = asked_for(stored.dicom if medical else {})
        image = decode(data, side=SIDE, window=window, frame=frame).image
    except Exception:  # gone, changed, no network, ...: a picture less, not the end of a report
        return ""
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.convert("RGB" if image.mode != "L" else "L").save(file, "JPEG", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()
