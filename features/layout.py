"""The layout of a store: which HDF5 datasets there are, written once and read when it is opened.

docs/format.md specifies it without code. This is the only user of h5py: what lies in the datasets
is read and written by position (columns.py).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from shutil import disk_usage
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from features import checksums
from features.checksums import MARKS, SOURCE, STRUCTURE
from features.columns import Column, Extent
from features.errors import StoreError
from features.files import drafting, reason
from features.manifest import Manifest

FORMAT, VERSION = "medprobe-features", 2
VIEWS = "@views"  # `final/mean@views` is the feature of an image's augmented views
REASON_BYTES = 240
BLOCK_BYTES = 64 << 20  # read at once where a whole column is gone through
TEXT = ("id", "path", "subject", "split")
COLUMNS = "manifest/columns/"  # further facts of the images, as text
TAKEN = "manifest/taken"  # which images were done before others were added
RECOMPUTE = "compute it anew with `medprobe extract ... --overwrite always`"


Filled = dict[str, tuple[tuple[int, ...], str]]  # dataset -> shape and type


@dataclass(frozen=True)
class Structure:
    """What is known of a store without reading a row: attributes of / and /manifest, extents."""

    attributes: dict[str, Any]
    about: dict[str, Any]
    extents: dict[str, Extent]


def read(path: Path) -> Structure:
    """Return a store's structure; StoreError for a file that isn't a store of this version."""
    try:
        # HDF5's locks fail on some network disks and block readers of a store in the making.
        with h5py.File(path, "r", locking=False) as file:
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
            version = (attributes.get("format"), attributes.get("version"))
            if version != (FORMAT, VERSION):
                older = f"; {RECOMPUTE}" if version[0] == FORMAT else ""
                raise StoreError(
                    f"{path} is not a feature store of this version: "
                    f"found {version}, want {(FORMAT, VERSION)}{older}"
                )
            if not isinstance(file.get("manifest", getlink=True), h5py.HardLink):
                raise ValueError("it has no /manifest of its own")  # a link may lead elsewhere
            about = {name: _plain(value) for name, value in file["manifest"].attrs.items()}
            extents: dict[str, Extent] = {}
            file.visititems(lambda name, item: extents.update(_extent(name, item)))
            return Structure(attributes, about, extents)
    except StoreError:
        raise
    except Exception as error:  # damaged structure surfaces in h5py as errors of many kinds
        raise StoreError(f"{path} can't be opened as HDF5: {error}") from None


def build(
    path: Path,
    manifest: Manifest,
    features: Mapping[str, tuple[int, ...]],
    attributes: Mapping[str, Any],
    *sources: Mapping[str, Column],
    rows: NDArray[np.integer] | None = None,
    taken: NDArray[np.bool_] | None = None,
) -> None:
    """Write a store beside `path` and put it in place in one rename.

    Columns that one of `sources` has are copied from it (the last that has it), but for the
    manifest's, which are those of `manifest`. The others are holes to be filled. Row i of a source
    becomes row rows[i], by default i. `taken` (N,) is the column of that name, if any. Raises
    StoreError where the disk has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _need_room(path, len(manifest) * sum(row_bytes(n, shape) for n, shape in features.items()))
    known = _of_manifest(manifest, taken)
    filled = _to_be_filled(len(manifest), features)
    try:
        with drafting(path) as draft:
            _write_structure(draft, manifest, attributes, known, filled)
            _write_values(draft, known, filled, sources, rows)
    except (OSError, RuntimeError) as error:  # h5py raises the second where it can't close a file
        cause = error if isinstance(error, OSError) else error.__context__
        why = reason(cause) if isinstance(cause, OSError) else str(error).partition("(")[0]
        raise StoreError(
            f"{path} can't be written ({why}); what was there is as before. Make room, or choose "
            "another place"
        ) from None


def _need_room(path: Path, need: int) -> None:
    """Raise StoreError where the disk has not so many bytes left."""
    free = disk_usage(path.parent).free
    if need > free:
        raise StoreError(
            f"{path} needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
            "make room, or choose another place with -o"
        )


def _of_manifest(manifest: Manifest, taken: NDArray[np.bool_] | None) -> dict[str, NDArray[Any]]:
    """Return the datasets that are written as the store is made, (N,), or (N, L) of labels."""
    known = {f"manifest/{name}": _encode(getattr(manifest, name)) for name in TEXT}
    known |= {"manifest/label": manifest.label.astype("<i4")}
    known |= {COLUMNS + name: _encode(values) for name, values in manifest.columns.items()}
    return known if taken is None else known | {TAKEN: taken.astype("u1")}


def _write_structure(
    draft: Path,
    manifest: Manifest,
    attributes: Mapping[str, Any],
    known: Mapping[str, NDArray[Any]],
    filled: Filled,
) -> None:
    """Make an HDF5 file with all attributes, and a place for every dataset."""
    # The version of the format whose structure carries checksums of its own.
    with h5py.File(draft, "w", libver=("v110", "v110"), locking=False) as file:
        made = {"format": FORMAT, "version": VERSION} | dict(attributes)
        made.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
        _describe(file, made)
        for name, values in known.items():
            _reserve(file, name, values.shape, values.dtype)
        for name, (shape, dtype) in filled.items():
            _reserve(file, name, shape, np.dtype(dtype))
        _reserve(file, STRUCTURE, (1,), np.dtype("<u4"))
        _describe(
            file["manifest"],
            {
                "dataset": manifest.dataset,
                "root": str(manifest.root),
                "task": manifest.task,
                "classes": json.dumps(manifest.classes, ensure_ascii=False),
                "split_from": manifest.split_from,
                "split_digest": manifest.split_digest(),
                "metric": manifest.metric or "",
                "note": manifest.note,
                "label_from": manifest.label_from,
                "order_from": manifest.order_from,
                "labelled_by": manifest.labelled_by,
                "checksum": manifest_checksum(known),
            },
        )


def _write_values(
    draft: Path,
    known: Mapping[str, NDArray[Any]],
    filled: Filled,
    sources: Sequence[Mapping[str, Column]],
    rows: NDArray[np.integer] | None,
) -> None:
    """Write what is known (N, ...), and copy what sources have; then the structure's checksum."""
    structure = read(draft)
    descriptor = os.open(draft, os.O_RDWR)
    try:
        columns = {name: Column(descriptor, *extent) for name, extent in structure.extents.items()}
        for name, values in known.items():
            columns[name].write(np.arange(len(values)), values)
        for name in filled:
            for source in (source for source in sources if name in source):
                for start, block in source[name].blocks(BLOCK_BYTES):
                    copied = np.arange(start, start + len(block))
                    columns[name].write(copied if rows is None else rows[copied], block)
        whole = checksums.structure(descriptor, structure.extents)
        columns[STRUCTURE].write(np.arange(1), np.array([whole]))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_be_filled(n: int, features: Mapping[str, tuple[int, ...]]) -> Filled:
    """Return the shape and type of every dataset that is filled as images are computed."""
    filled: Filled
    filled = {f"manifest/{name}": ((n,), dtype) for name, dtype in SOURCE.items()}
    filled |= {"done": ((n,), "u1"), "reason": ((n,), f"S{REASON_BYTES}")}
    filled |= {"checksums/source": ((n,), "<u4"), MARKS: ((n,), "<u4")}
    for name, shape in features.items():
        filled[column_of(name)] = ((n, *shape), dtype_of(name))
        filled[f"checksums/{column_of(name)}"] = ((n,), "<u4")
    return filled


def _describe(item: Any, attributes: Mapping[str, Any]) -> None:
    """Write attributes; text goes in place, where HDF5's checksums cover it."""
    for name, value in attributes.items():
        if isinstance(value, str):
            data = value.encode("utf-8", "surrogateescape")
            dtype = h5py.string_dtype("utf-8", max(len(data), 1))
            item.attrs.create(name, np.array(data, dtype=dtype))
        else:
            item.attrs[name] = value


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Create a contiguous dataset with its place in the file; it stays a hole until written."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    stored_dtype = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
    file.create_dataset(name, shape=shape, dtype=stored_dtype, dcpl=plan)


def _extent(name: str, item: Any) -> dict[str, Extent]:
    """Return where a dataset's bytes lie: offset, shape and type."""
    if not isinstance(item, h5py.Dataset):
        return {}
    offset = item.id.get_offset()
    if offset is None:
        raise ValueError(f"/{name} is not contiguous")
    dtype = np.dtype(f"S{item.dtype.itemsize}") if item.dtype.kind == "S" else item.dtype
    return {name: (offset, item.shape, dtype)}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.item() if isinstance(value, np.generic) else value


def _encode(texts: NDArray[Any]) -> NDArray[np.bytes_]:
    """Return texts (n,) as UTF-8 (n,), as wide as the longest of them."""
    data = [text.encode("utf-8", "surrogateescape") for text in texts.tolist()]
    return np.array(data, dtype=f"S{max(map(len, data), default=1) or 1}")


def decode(texts: NDArray[np.bytes_]) -> NDArray[np.str_]:
    """Return texts (n,) as str (n,); bytes that aren't UTF-8 as Python's file names have them."""
    decoded = [text.decode("utf-8", "surrogateescape") for text in texts.tolist()]
    return np.array(decoded, dtype=np.str_)


def manifest_checksum(columns: Mapping[str, Any]) -> int:
    """Return the CRC-32 of the manifest's text and labels, column after column."""
    crc = 0
    first = [f"manifest/{name}" for name in (*TEXT, "label")]
    last = [TAKEN] if TAKEN in columns else []
    for name in (*first, *sorted(n for n in columns if n.startswith(COLUMNS)), *last):
        column = columns[name]
        values = column.read() if isinstance(column, Column) else column
        crc = zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data, crc)
    return crc


def column_of(feature: str) -> str:
    """Return where a feature lies: features/LAYER/POOL, or views/LAYER/POOL."""
    if feature.endswith(VIEWS):
        return f"views/{feature.removesuffix(VIEWS)}"
    return f"features/{feature}"


def is_filled(column: str) -> bool:
    """Say whether a dataset is filled as images are computed, and not when the store is made."""
    group, _, rest = column.partition("/")
    return (group != "manifest" or rest in SOURCE) and column != STRUCTURE


def feature_of(column: str) -> str:
    """Return the name of a feature that lies there, or nothing."""
    group, _, rest = column.partition("/")
    return {"features": rest, "views": rest + VIEWS}.get(group, "")


def dtype_of(feature: str) -> str:
    """Return what a feature is stored as: a vector in float32, tokens in float16."""
    return "<f2" if feature.removesuffix(VIEWS).endswith("/tokens") else "<f4"


def row_bytes(feature: str, shape: tuple[int, ...]) -> int:
    """Return what a row of a feature takes on disk."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype_of(feature)).itemsize
