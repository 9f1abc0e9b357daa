"""FeatureStore: one HDF5 file of features per (dataset, backbone).

docs/format.md specifies it without code.

Why it survives a crash at any moment. All of HDF5's own structure is written once, into a draft
file that is renamed into place when complete; every dataset that is filled later is contiguous and
allocated then. Filling writes raw bytes at fixed places and changes no structure, so there is no
moment at which the file can't be opened. A batch is committed in two steps, each forced to disk:
its rows and checksums, then its marks in /done. A crash between the two loses that batch only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from shutil import disk_usage
from typing import Any, Self

import h5py
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from features.errors import StoreError, StoreLockedError
from features.manifest import Manifest, digest

FORMAT, VERSION = "medprobe-features", 1
PENDING, DONE, BAD = 0, 1, 2
REASON_BYTES = 240
VERIFY_BYTES = 64 << 20  # read at once
TEXT = h5py.string_dtype()
SOURCE = {"hash": "S64", "size": "i8", "mtime_ns": "i8"}


class FeatureStore:
    """An open store. Make one with `create` or `open`, as a context manager."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self.file = file

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.file.close()

    # --- making and opening -----------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path,
        manifest: Manifest,
        features: Mapping[str, tuple[int, ...]],
        *,
        fingerprint: Mapping[str, Any],
        default_feature: str,
        batch_size: int,
    ) -> None:
        """Write an empty store with room for every row; features maps LAYER/POOL to its shape.

        Raises StoreError where the disk has no room for it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        need = sum(_row_bytes(shape) for shape in features.values()) * len(manifest)
        free = disk_usage(path.parent).free
        if need > free:
            raise StoreError(
                f"{path} needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
                "make room, or choose another place with -o"
            )
        draft = path.with_suffix(".draft")
        with h5py.File(draft, "w", locking=False) as file:
            file.attrs.update(
                format=FORMAT,
                version=VERSION,
                fingerprint=json.dumps(fingerprint, sort_keys=True),
                default_feature=default_feature,
                batch_size=batch_size,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            _write_manifest(file, manifest)
            n = len(manifest)
            for name, kind in SOURCE.items():
                _reserve(file, f"manifest/{name}", (n,), kind)
            for name, shape in features.items():
                _reserve(file, f"features/{name}", (n, *shape), _dtype(shape))
                _reserve(file, f"checksums/{name}", (n,), "<u4")
            _reserve(file, "done", (n,), "u1")
            _reserve(file, "reason", (n,), f"S{REASON_BYTES}")
        _sync(draft)
        draft.replace(path)
        _sync(path.parent)

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> FeatureStore:
        """Open a store; StoreError for a file that isn't there or isn't a store of this version."""
        if not path.is_file():
            raise StoreError(f"there is no store {path}: make it with `medprobe extract`")
        try:
            # HDF5's locks fail on some network disks and block readers of a store in the making.
            file = h5py.File(path, "r+" if write else "r", locking=False)
        except OSError as error:
            raise StoreError(f"{path} can't be opened as HDF5: {error}") from None
        found = (file.attrs.get("format"), file.attrs.get("version"))
        if found != (FORMAT, VERSION):
            file.close()
            raise StoreError(
                f"{path} is not a feature store: found {found}, want {(FORMAT, VERSION)}"
            )
        return cls(path, file)

    # --- what is in it ----------------------------------------------------------------------------

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the features were made from."""
        found: dict[str, Any] = json.loads(self.file.attrs["fingerprint"])
        return found

    @property
    def fingerprint_digest(self) -> str:
        """The fingerprint's short name."""
        return digest(self.fingerprint)

    @property
    def default_feature(self) -> str:
        """The feature that is probed unless another is named."""
        return str(self.file.attrs["default_feature"])

    @property
    def batch_size(self) -> int:
        """Rows per batch: the unit of commit, kept so that a resumed run has the same batches."""
        return int(self.file.attrs["batch_size"])

    @property
    def features(self) -> dict[str, tuple[int, ...]]:
        """LAYER/POOL -> shape of a row: (D,), or (T, D) for tokens."""
        found: dict[str, tuple[int, ...]] = {}
        for layer, pools in self.file["features"].items():
            found |= {f"{layer}/{pool}": tuple(pools[pool].shape[1:]) for pool in pools}
        return found

    @property
    def done(self) -> NDArray[np.uint8]:
        """(N,) PENDING, DONE or BAD."""
        return np.asarray(self.file["done"][:], dtype=np.uint8)

    def bad(self) -> dict[int, str]:
        """Return row -> reason of the bad images."""
        rows = np.flatnonzero(self.done == BAD)
        reasons = self.file["reason"][:]
        return {int(i): reasons[i].decode(errors="replace") for i in rows}

    def manifest(self) -> Manifest:
        """Return the manifest as it was stored."""
        group = self.file["manifest"]
        text = {k: group[k].asstr()[:].astype(np.str_) for k in ("id", "path", "subject", "split")}
        return Manifest(
            dataset=group.attrs["dataset"],
            root=Path(group.attrs["root"]),
            label=group["label"][:],
            classes=tuple(json.loads(group.attrs["classes"])),
            split_from=group.attrs["split_from"],
            metric=group.attrs["metric"] or None,
            note=group.attrs["note"],
            columns={k: v.asstr()[:].astype(np.str_) for k, v in group.get("columns", {}).items()},
            **text,
        )

    def source(self) -> dict[str, NDArray[Any]]:
        """Return hash (hex SHA-256), size and mtime_ns of every image as it was read, each (N,)."""
        found = {name: self.file[f"manifest/{name}"][:] for name in SOURCE}
        return found | {"hash": found["hash"].astype(np.str_)}

    def read(
        self, feature: str, rows: NDArray[np.integer] | slice = slice(None)
    ) -> NDArray[np.floating[Any]]:
        """Return rows of a feature, (n, D) float32, or (n, T, D) float16 for tokens.

        Only committed rows mean anything.

        Raises StoreError for a feature that the store hasn't got.
        """
        if feature not in self.features:
            raise StoreError(
                f"{self.path} has no feature {feature!r}: found {', '.join(self.features)}"
            )
        data = self.file[f"features/{feature}"]
        if isinstance(rows, slice):
            return np.asarray(data[rows])
        if data.ndim > 2:  # tokens are too many to be read whole
            return np.stack([data[int(i)] for i in rows]) if len(rows) else data[:0]
        # HDF5 picks scattered rows one by one; a whole read, then a selection, is far faster.
        return np.asarray(data[:][rows])

    def verify(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Yield, for each feature, its committed rows that don't match their checksum."""
        done = np.flatnonzero(self.done == DONE)
        for feature in self.features:
            data, sums = self.file[f"features/{feature}"], self.file[f"checksums/{feature}"][:]
            wrong = []
            step = max(1, VERIFY_BYTES // _row_bytes(data.shape[1:]))
            for start in range(0, len(sums), step):
                block = data[start : start + step]
                inside = done[(done >= start) & (done < start + step)]
                wrong += [i for i in inside if _checksum(block[i - start]) != sums[i]]
            yield feature, np.array(wrong, dtype=np.int64)

    # --- filling ----------------------------------------------------------------------------------

    def commit(
        self,
        rows: NDArray[np.integer],
        features: Mapping[str, NDArray[np.floating[Any]]],
        source: Mapping[str, Sequence[Any]],
        bad: Mapping[int, str],
    ) -> None:
        """Write a batch: features (n, D) and sources of its good rows, and reasons of its bad ones.

        A source is an image's hash, size and mtime. When it returns, the batch survives a power
        cut. Raises StoreError for features that are not finite.
        """
        features = {name: v.astype(_dtype(v.shape[1:])) for name, v in features.items()}
        for name, values in features.items():
            finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            if not finite.all():
                i = int(rows[np.flatnonzero(~finite)[0]])
                raise StoreError(
                    f"{self.path}: feature {name} of row {i} is not finite; "
                    "nothing of this batch was stored. "
                    "Try --precision float32, or look at the weights"
                )
        for name, values in features.items():
            self.file[f"features/{name}"][rows] = values
            self.file[f"checksums/{name}"][rows] = [_checksum(row) for row in values]
        for name, column in source.items():
            self.file[f"manifest/{name}"][rows] = np.array(column, dtype=SOURCE[name])
        for i, reason in bad.items():
            self.file["reason"][i] = reason.encode()[:REASON_BYTES]
        self._flush()
        marks = self.file["done"]
        if len(rows):
            marks[rows] = DONE
        for i in bad:
            marks[i] = BAD
        self._flush()

    def forget(self, rows: NDArray[np.integer]) -> None:
        """Mark rows as still to be done."""
        self.file["done"][rows] = PENDING
        self._flush()

    def relabel(self, manifest: Manifest) -> None:
        """Replace labels, subjects and splits only, in a copy that takes the store's place."""
        draft = self.path.with_suffix(".draft")
        with h5py.File(draft, "w", locking=False) as file:
            for name, value in self.file.attrs.items():
                file.attrs[name] = value
            for name in self.file:
                if name != "manifest":
                    self.file.copy(name, file)
            _write_manifest(file, manifest)
            for name in SOURCE:
                self.file.copy(f"manifest/{name}", file["manifest"])
        _sync(draft)
        self.file.close()
        draft.replace(self.path)
        self.file = h5py.File(self.path, "r+", locking=False)

    def _flush(self) -> None:
        self.file.flush()
        _sync(self.path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the right to write to a store; a second writer's StoreLockedError says who holds it.

    The lock is the operating system's and ends with the process, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    holder = path.with_suffix(".holder")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text().strip() if holder.is_file() else "another process"
        raise StoreLockedError(
            f"{path} is being written by {who}: wait for it, or stop it; nothing was changed"
        ) from None
    try:
        holder.write_text(
            f"process {os.getpid()} on {socket.gethostname()} "
            f"since {datetime.now(UTC).isoformat(timespec='seconds')} "
            f"({' '.join(sys.argv)[:200]})\n"
        )
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _write_manifest(file: h5py.File, manifest: Manifest) -> None:
    group = file.require_group("manifest")
    for name in ("id", "path", "subject", "split"):
        group.create_dataset(name, data=getattr(manifest, name).astype(object), dtype=TEXT)
    group.create_dataset("label", data=manifest.label)
    for name, values in manifest.columns.items():
        group.create_dataset(f"columns/{name}", data=values.astype(object), dtype=TEXT)
    group.attrs.update(
        dataset=manifest.dataset,
        root=str(manifest.root),
        task=manifest.task,
        classes=json.dumps(manifest.classes, ensure_ascii=False),
        split_from=manifest.split_from,
        split_digest=manifest.split_digest(),
        metric=manifest.metric or "",
        note=manifest.note,
    )


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Create a contiguous dataset of zeros whose bytes have their place in the file from now on."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    if name.startswith("features/"):  # large: left as a hole in the file until written
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    file.create_dataset(name, shape=shape, dtype=dtype, dcpl=plan)


def _dtype(shape: tuple[int, ...]) -> str:
    """Return what a row is stored as: a vector in float32, tokens in float16."""
    return "<f4" if len(shape) == 1 else "<f2"


def _row_bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * np.dtype(_dtype(shape)).itemsize


def _checksum(row: NDArray[np.floating[Any]]) -> int:
    """Return the CRC-32 of a row's bytes as they lie in the file (little-endian)."""
    return zlib.crc32(np.ascontiguousarray(row, dtype=_dtype(row.shape)).tobytes())


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
