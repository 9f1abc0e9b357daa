"""What is in an open store: features, marks, manifest. Each row is checked against its checksum."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from features import checksums, layout
from features.checks import check_manifest, check_store
from features.checksums import BAD, DONE, PENDING, SOURCE
from features.columns import Column
from features.errors import StoreError
from features.files import meant
from features.layout import (
    COLUMNS,
    RECOMPUTE,
    TAKEN,
    TEXT,
    column_of,
    decode,
    feature_of,
    manifest_checksum,
)
from features.manifest import Manifest, digest
from features.urls import locate

VERIFY = "`medprobe verify` names all that is damaged"


class StoreReader:
    """An open store, to be read. A context manager."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.path = path
        self._open(write)

    @classmethod
    def open(cls, path: Path | str, *, write: bool = False) -> Self:
        """Open a store; StoreError for a file that isn't there or isn't a store of this version."""
        path = Path(path)
        if not path.is_file():
            raise StoreError(
                f"there is no store {path}{meant(path)}: make it with `medprobe extract`"
            )
        return cls(path, write=write)

    def _open(self, write: bool) -> None:
        structure = layout.read(self.path)
        self.attributes, self.about = structure.attributes, structure.about
        features = [feature for name in structure.extents if (feature := feature_of(name))]
        check_store(self.path, self.attributes, self.about, structure.extents, features)
        self.descriptor = os.open(self.path, os.O_RDWR if write else os.O_RDONLY)
        self.columns = {
            name: Column(self.descriptor, *extent) for name, extent in structure.extents.items()
        }
        self._extents = structure.extents
        self._right: dict[str, NDArray[np.bool_]] = {}  # (N,) rows that were found undamaged

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process open the same file, for reading."""
        return type(self), (self.path.absolute(),)

    def __repr__(self) -> str:
        """Return where it is, and what is in it."""
        features = ", ".join(f"{name} {shape}" for name, shape in list(self.features.items())[:3])
        more = len(self.features) - 3
        features += f" and {more} more" if more > 0 else ""
        state = "closed"
        if self.descriptor >= 0:
            marks = self.columns["done"].read()
            state = ", ".join(
                f"{int((marks == mark).sum())} {word}"
                for mark, word in ((DONE, "done"), (PENDING, "to be done"), (BAD, "bad"))
            )
        name, dataset = type(self).__name__, self.about["dataset"]
        return f"{name}({str(self.path)!r}, {dataset}: {state}; {features})"

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the features were made from."""
        fingerprint: dict[str, Any] = json.loads(self.attributes["fingerprint"])
        return fingerprint

    @property
    def parity(self) -> dict[str, Any]:
        """What was measured of parity with the model's library; nothing where none was made."""
        found: dict[str, Any] = json.loads(self.attributes.get("parity", "{}"))
        return found

    @property
    def fingerprint_digest(self) -> str:
        """The fingerprint's short name."""
        return digest(self.fingerprint)

    @property
    def default_feature(self) -> str:
        """The feature that is probed unless another is named."""
        return str(self.attributes["default_feature"])

    @property
    def batch_size(self) -> int:
        """Rows per batch: the unit of commit, kept so that a resumed run has the same batches."""
        return int(self.attributes["batch_size"])

    @property
    def features(self) -> dict[str, tuple[int, ...]]:
        """LAYER/POOL -> shape of a row: (D,), (T, D) for tokens, (V, ...) for views."""
        return {
            feature: column.shape[1:]
            for name, column in self.columns.items()
            if (feature := feature_of(name))
        }

    @property
    def done(self) -> NDArray[np.uint8]:
        """(N,) PENDING, DONE or BAD. Raises StoreError where marks are damaged."""
        marks, wrong = checksums.marks(self.columns)
        if wrong.any():
            rows = np.flatnonzero(wrong)
            raise StoreError(
                f"{self.path}: the marks of {len(rows)} images in /done are damaged, from row "
                f"{rows[0]} on; {VERIFY}, and `medprobe extract` computes these anew"
            )
        return marks

    @property
    def taken(self) -> NDArray[np.bool_]:
        """(N,) rows that were done before the store grew: no later batch has them in it."""
        done = self.done == DONE
        return np.zeros_like(done) if self.kept is None else done & self.kept

    def bad(self) -> dict[int, str]:
        """Return row -> reason of the bad images."""
        return self._texts_of(BAD)

    def remarks(self) -> dict[int, str]:
        """Return row -> remark, of the good images of which there is something to say."""
        return {row: text for row, text in self._texts_of(DONE).items() if text}

    def _texts_of(self, mark: int) -> dict[int, str]:
        rows = np.flatnonzero(self.done == mark)
        reasons = self.columns["reason"].take(rows)
        return {
            int(i): text.decode(errors="replace") for i, text in zip(rows, reasons, strict=True)
        }

    def manifest(self) -> Manifest:
        """Return the manifest as it was stored. Raises StoreError where it is damaged or odd."""
        self._check_manifest()
        id_, path, subject, split = (
            decode(self.columns[f"manifest/{name}"].read()) for name in TEXT
        )
        manifest = Manifest(
            id=id_,
            path=path,
            subject=subject,
            split=split,
            dataset=self.about["dataset"],
            root=locate(self.about["root"]),
            label=self.columns["manifest/label"].read(),
            classes=tuple(json.loads(self.about["classes"])),
            split_from=self.about["split_from"],
            metric=self.about["metric"] or None,
            note=self.about["note"],
            label_from=self.about.get("label_from", ""),  # stores of earlier versions have none
            order_from=self.about.get("order_from", ""),
            labelled_by=self.about.get("labelled_by", ""),
            columns={
                name.removeprefix(COLUMNS): decode(column.read())
                for name, column in self.columns.items()
                if name.startswith(COLUMNS)
            },
        )
        check_manifest(self.path, manifest, self.about["task"])
        return manifest

    def source(self) -> dict[str, NDArray[Any]]:
        """Return hash (hex SHA-256), size and mtime_ns of every image as it was read, each (N,)."""
        columns = {name: self.columns[f"manifest/{name}"].read() for name in SOURCE}
        return columns | {"hash": np.char.decode(columns["hash"], "latin-1")}

    def hashes(self) -> list[str]:
        """Return the SHA-256 of each image's bytes in hex, N of them, "" where none was read."""
        return [one.decode("latin-1") for one in self.columns["manifest/hash"].read().tolist()]

    def read(
        self, feature: str, rows: NDArray[np.integer] | slice = slice(None)
    ) -> NDArray[np.floating[Any]]:
        """Return rows of a feature, (n, D) float32, or (n, T, D) float16 for tokens.

        Only committed rows mean anything. Threads and forked processes may read at once.

        Raises StoreError for a feature that the store hasn't got, and for committed rows that are
        not what was written: each is checked against its checksum the first time that it is read.
        """
        values, wrong = self.examine(feature, rows)
        if len(wrong):
            raise StoreError(
                f"{self.path}: {feature} of {len(wrong)} images is damaged, from row {wrong[0]} "
                f"on; {VERIFY}; {RECOMPUTE}"
            )
        return values

    def examine(
        self, feature: str, rows: NDArray[np.integer] | slice = slice(None)
    ) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
        """Return what `read` does, (n, ...), and which of the rows are damaged, (m,)."""
        if feature not in self.features:
            raise StoreError(
                f"{self.path} has no feature {feature!r}: found {', '.join(self.features)}"
            )
        column = self.columns[column_of(feature)]
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(column.shape[0])
            values, rows = column.read(start, stop), np.arange(start, stop)
        else:
            rows = np.arange(column.shape[0])[rows] if isinstance(rows, slice) else rows
            values = column.take(rows)
        return values, self._damaged(feature, np.asarray(rows), values)

    def _damaged(
        self, feature: str, rows: NDArray[np.integer], values: NDArray[Any]
    ) -> NDArray[np.int64]:
        """Return which committed rows of rows (n,) have values (n, ...) that weren't written, (m,).

        A row that was found undamaged once is not checked again.
        """
        right = self._right.setdefault(feature, np.zeros(self.columns["done"].shape, dtype=bool))
        new = np.flatnonzero(~right[rows])
        new = new[self.columns["done"].take(rows[new]) == DONE]
        if not len(new):
            return np.empty(0, dtype=np.int64)
        committed = rows[new]
        wanted = self.columns[f"checksums/{column_of(feature)}"].take(committed)
        same = checksums.of_rows(values if len(new) == len(values) else values[new]) == wanted
        right[committed[same]] = True
        return np.asarray(committed[~same], dtype=np.int64)

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """(N,) rows that were done when the store last grew; None where it never did."""
        return self.columns[TAKEN].read() > 0 if TAKEN in self.columns else None

    def _check_manifest(self) -> None:
        if self.about["checksum"] != manifest_checksum(self.columns):
            raise StoreError(f"{self.path}: the manifest is damaged; {VERIFY}; {RECOMPUTE}")
