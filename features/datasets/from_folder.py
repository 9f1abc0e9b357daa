"""`folder:DIR`: one sub-folder per class, or train/ val/ test/ above them.

Sub-folders of a class are read too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from features import dicom
from features.datasets.drawing import SPLIT_NAMES, build, index_classes
from features.datasets.options import Options
from features.errors import DatasetError
from features.manifest import Manifest

SUFFIXES = frozenset(
    [".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)


def read(folder: Path, options: Options, *, dataset: str = "", note: str = "") -> Manifest:
    """Return the manifest of a folder. Raises DatasetError where it isn't laid out as above."""
    if not folder.is_dir():
        raise DatasetError(f"folder:{folder}: there is no such folder")
    splits = [
        p.name for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in SPLIT_NAMES
    ]
    depth = 1 if splits else 0
    rows = [
        relative
        for top in (splits or ["."])
        for relative in _images(folder, folder / top)
        if len(relative.parts) > depth + 1 or not options.labelled
    ]
    if not rows:
        raise DatasetError(
            f"folder:{folder} holds no images in class sub-folders: want {folder.name}/CLASS/IMAGE "
            f"or {folder.name}/train/CLASS/IMAGE, as {', '.join(sorted(SUFFIXES))} or DICOM"
        )
    flat = any(len(path.parts) < depth + 2 for path in rows)
    label, classes = index_classes(["" if flat else path.parts[depth] for path in rows])
    return build(
        dataset=dataset or folder.resolve().name,
        root=folder.resolve(),
        paths=[path.as_posix() for path in rows],
        label=label,
        classes=classes,
        subjects=None,
        splits=[path.parts[0] for path in rows] if splits else None,
        options=options,
        where=f"folder:{folder}",
        note=note,
    )


def _images(root: Path, folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder, relative to root, in one order on every machine."""
    for where, below, files in os.walk(folder):
        below.sort()
        for name in sorted(files):
            path = Path(where, name)
            if not name.startswith(".") and is_image(path):
                yield path.relative_to(root)


def is_image(path: Path) -> bool:
    """Say whether a file is taken for an image: by its suffix, or else as DICOM by its start."""
    if path.suffix.lower() in SUFFIXES | dicom.SUFFIXES:
        return True
    if not dicom.may_be_dicom(path.name):
        return False
    with path.open("rb") as file:
        return dicom.is_dicom(file.read(dicom.HEAD))
