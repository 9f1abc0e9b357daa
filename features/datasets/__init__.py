"""The table of sources.

`open_dataset("folder:DIR")` gives a Manifest; nothing here reads a pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from features.datasets.build import Listing, build, index_classes
from features.datasets.limit import limited
from features.datasets.naming import check_name
from features.datasets.options import Options
from features.errors import DatasetError
from features.files import meant
from features.manifest import Manifest
from features.urls import Location, Url, locate

__all__ = ["SOURCES", "Options", "Source", "open_dataset", "open_image"]


@dataclass(frozen=True)
class Source:
    """One kind of source: how it is written on the command line and which function reads it."""

    name: str
    usage: str
    what: str
    reader: str  # "module:function" taking (path, options), loaded when asked for
    needs_path: bool = True
    splits: tuple[str, ...] = ()  # of its own: "study", "official"
    urls: bool = False  # whether its path may be one

    def read(self, path: Location, options: Options) -> Manifest:
        """Return the manifest."""
        module, function = self.reader.split(":")
        reader: Callable[[Any, Options], Manifest] = getattr(import_module(module), function)
        return reader(path, options)


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="sample",
            usage="sample",
            what="1,797 handwritten digits of scikit-learn, for trying the program; not medical",
            reader="features.datasets.sample:read",
            needs_path=False,
        ),
        Source(
            name="folder",
            usage="folder:DIR",
            urls=True,
            what="one sub-folder per class, or train/ val/ test/ above them",
            reader="features.datasets.from_folder:read",
        ),
        Source(
            name="csv",
            usage="csv:FILE",
            urls=True,
            what="a table (CSV, TSV, Excel, Parquet) with columns path, label (or label_*), "
            "and if you have them subject and split",
            reader="features.datasets.from_csv:read",
        ),
        Source(
            name="aptos2019",
            usage="aptos2019:DIR",
            what="fundus photographs, 5 grades of retinopathy; quadratic kappa",
            reader="features.datasets.aptos2019:read",
            splits=("study",),
        ),
        Source(
            name="ddsm",
            usage="ddsm:DIR",
            what="mammograms, normal or not (lists), benign or malignant (CBIS-DDSM); AUROC",
            reader="features.datasets.ddsm:read",
            splits=("study", "official"),
        ),
        Source(
            name="isic2019",
            usage="isic2019:DIR",
            what="dermoscopy, 8 kinds of skin lesion, by lesion; balanced accuracy",
            reader="features.datasets.isic2019:read",
            splits=("study",),
        ),
        Source(
            name="chexpert",
            usage="chexpert:DIR",
            what="chest radiographs, 14 findings, by patient; mean AUROC",
            reader="features.datasets.chexpert:read",
            splits=("study", "official"),
        ),
    )
}


def open_dataset(dataset: str, options: Options | None = None) -> Manifest:
    """Read `name` or `name:path`.

    Raises DatasetError for an unknown name or a source that can't be read.
    """
    name, _, path = dataset.partition(":")
    source = SOURCES.get(name)
    if source is None:
        known = ", ".join(s.usage for s in SOURCES.values())
        if not Path(dataset).exists() and looks_like_a_path(dataset):
            raise DatasetError(
                f"there is no file or folder {dataset}{meant(dataset)}; of data sets, want one of "
                f"{known}"
            )
        source_name = (
            "folder" if Path(dataset).is_dir() else "csv" if Path(dataset).is_file() else ""
        )
        hint = f"; did you mean {source_name}:{dataset}?" if source_name else ""
        raise DatasetError(f"unknown dataset {dataset!r}: want one of {known}{hint}")
    if source.needs_path and not path:
        raise DatasetError(f"dataset {name!r} needs a path: write {source.usage}")
    options = options or Options()
    if options.split not in ("default", "drawn", *source.splits):
        own = ", ".join(source.splits) or "none"
        raise DatasetError(
            f"{name} has no {options.split} split: found {own}; leave --split out, or take drawn"
        )
    location = locate(path)
    if isinstance(location, Url) and not source.urls:
        raise DatasetError(
            f"{source.usage} is read from a local folder: found {path}; "
            "for images at URLs write a table, and take csv:FILE"
        )
    manifest = source.read(location, options)
    if options.limit:
        manifest = limited(manifest, options.limit, seed=options.seed)
    manifest = replace(manifest, labelled_by=options.command if options.labelled else "")
    return replace(manifest, dataset=check_name(options.name)) if options.name else manifest


def looks_like_a_path(text: str) -> bool:
    """Say whether a word is a path rather than the name of a data set: by a slash or a suffix."""
    return "/" in text or "\\" in text or bool(Path(text).suffix)


def open_image(file: Path) -> Manifest:
    """Return the manifest of one image, without a label, to be predicted."""
    label, classes = index_classes([""])
    return build(
        Listing(
            dataset=file.stem or file.name,
            root=file.resolve().parent,
            paths=[file.name],
            label=label,
            classes=classes,
            where=str(file),
        ),
        Options(labelled=False),
    )
