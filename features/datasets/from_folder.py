"""`folder:DIR`: one sub-folder per class, or train/ val/ test/ above them.

Sub-folders of a class are read too. DIR may be a URL.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from features import dicom
from features.datasets.build import Listing, build, index_classes
from features.datasets.options import Options
from features.datasets.splitting import SPLIT_NAMES
from features.errors import DatasetError
from features.files import NotRegularError
from features.manifest import Manifest
from features.urls import Location, Url, opened

SUFFIXES = frozenset(
    [".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)


def read(folder: Location, options: Options, *, dataset: str = "", note: str = "") -> Manifest:
    """Return the manifest of a folder. Raises DatasetError where it isn't laid out as above."""
    if not folder.is_dir():
        raise DatasetError(f"folder:{folder}: there is no such folder")
    files = _files(folder)
    splits = {f.parts[0] for f in files if len(f.parts) > 1 and f.parts[0].lower() in SPLIT_NAMES}
    depth = 1 if splits else 0
    rows = [
        file
        for file in files
        if (len(file.parts) > depth + 1 or not options.labelled)
        and (not splits or file.parts[0] in splits)
        and is_image(folder / file.as_posix())
    ]
    if not rows:
        raise DatasetError(
            f"folder:{folder} holds no images in class sub-folders: want {folder.name}/CLASS/IMAGE "
            f"or {folder.name}/train/CLASS/IMAGE, as {', '.join(sorted(SUFFIXES))} or DICOM"
        )
    flat = any(len(path.parts) < depth + 2 for path in rows)
    label, classes = index_classes(["" if flat else path.parts[depth] for path in rows])
    return build(
        Listing(
            dataset=dataset or folder.resolve().name,
            root=folder.resolve(),
            paths=[path.as_posix() for path in rows],
            label=label,
            classes=classes,
            splits=[path.parts[0] for path in rows] if splits else None,
            where=f"folder:{folder}",
            note=note,
            order_from="names",
        ),
        options,
    )


def _files(folder: Location) -> list[PurePosixPath]:
    """Return the files below, in one order on every machine: in each folder files come first."""
    if isinstance(folder, Url):
        files = [PurePosixPath(name) for name in folder.walk()]
    else:
        files = [
            PurePosixPath(Path(where, name).relative_to(folder))
            for where, _, names in os.walk(folder)
            for name in names
        ]
    seen = [file for file in files if not file.name.startswith(".")]
    return sorted(seen, key=lambda f: [*((1, part) for part in f.parts[:-1]), (0, f.name)])


def is_image(path: Location) -> bool:
    """Say whether a file is taken for an image: by its suffix, or else as DICOM by its start."""
    if path.suffix.lower() in SUFFIXES | dicom.SUFFIXES:
        return True
    if not dicom.may_be_dicom(path.name):
        return False
    try:
        with opened(path) as file:
            return dicom.is_dicom(file.read(dicom.HEAD))
    except NotRegularError:
        return False
