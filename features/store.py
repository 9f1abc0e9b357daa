"""FeatureStore: one HDF5 file of features per (dataset, backbone).

docs/format.md specifies it without code.

Why it survives a crash at any moment. All of HDF5's own structure is written once, into a draft
file that is renamed into place when complete; every dataset is contiguous and has its place from
then on. Filling writes raw bytes at those places, without the HDF5 library, and changes no
structure, so there is no moment at which the file can't be opened. A batch is committed in two
steps, each forced to disk: its rows and checksums, then its marks in /done. A crash between the two
loses that batch only. What changes structure (new labels, more layers) builds a new draft.

Rows are held against their checksums where they are read, once per open store (checksums.py).
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from features import checksums, layout
from features.checks import check_manifest, check_store, leads_out
from features.checksums import MARKS, OF_MARK, SOURCE, STRUCTURE
from features.columns import Column
from features.errors import StoreError
from features.files import meant, reason
from features.layout import (
    ANEW,
    BLOCK_BYTES,
    COLUMNS,
    REASON_BYTES,
    TAKEN,
    TEXT,
    build,
    column_of,
    decode,
    dtype_of,
    feature_of,
    is_filled,
    manifest_checksum,
)
from features.manifest import Manifest, digest
from features.urls import locate

PENDING, DONE, BAD = checksums.PENDING, checksums.DONE, checksums.BAD
VERIFY = "`medprobe verify` names all that is damaged"


class FeatureStore:
    """An open store. Make one with `create` or `open`, as a context manager."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.path = path
        self._open(write)
        if write:
            self._mend_marks()

    def _open(self, write: bool) -> None:
        structure = layout.read(self.path)
        self.attributes, self.about = structure.attributes, structure.about
        features = [feature for name in structure.places if (feature := feature_of(name))]
        check_store(self.path, self.attributes, self.about, structure.places, features)
        self.descriptor = os.open(self.path, os.O_RDWR if write else os.O_RDONLY)
        self.columns = {
            name: Column(self.descriptor, *place) for name, place in structure.places.items()
        }
        self._places = structure.places
        self._right: dict[str, NDArray[np.bool_]] = {}  # (N,) rows that were found undamaged

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process open the same file, for reading."""
        return FeatureStore, (self.path.absolute(),)

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
        return f"FeatureStore({str(self.path)!r}, {self.about['dataset']}: {state}; {features})"

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
        build(
            path,
            manifest,
            features,
            {
                "fingerprint": json.dumps(fingerprint, sort_keys=True),
                "default_feature": default_feature,
                "batch_size": batch_size,
            },
        )

    @classmethod
    def open(cls, path: Path | str, *, write: bool = False) -> FeatureStore:
        """Open a store; StoreError for a file that isn't there or isn't a store of this version."""
        path = Path(path)
        if not path.is_file():
            raise StoreError(
                f"there is no store {path}{meant(path)}: make it with `medprobe extract`"
            )
        return cls(path, write=write)

    # --- what is in it ----------------------------------------------------------------------------

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the features were made from."""
        found: dict[str, Any] = json.loads(self.attributes["fingerprint"])
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
        found, wrong = checksums.marks(self.columns)
        if wrong.any():
            rows = np.flatnonzero(wrong)
            raise StoreError(
                f"{self.path}: the marks of {len(rows)} images in /done are damaged, from row "
                f"{rows[0]} on; {VERIFY}, and `medprobe extract` computes these anew"
            )
        return found

    @property
    def taken(self) -> NDArray[np.bool_]:
        """(N,) rows that were done before the store grew: no later batch has them in it."""
        done = self.done == DONE
        return np.zeros_like(done) if self.kept is None else done & self.kept

    def bad(self) -> dict[int, str]:
        """Return row -> reason of the bad images."""
        return self._said(BAD)

    def remarks(self) -> dict[int, str]:
        """Return row -> remark, of the good images of which there is something to say."""
        return {row: text for row, text in self._said(DONE).items() if text}

    def _said(self, mark: int) -> dict[int, str]:
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
        found = Manifest(
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
        check_manifest(self.path, found, self.about["task"])
        return found

    def source(self) -> dict[str, NDArray[Any]]:
        """Return hash (hex SHA-256), size and mtime_ns of every image as it was read, each (N,)."""
        found = {name: self.columns[f"manifest/{name}"].read() for name in SOURCE}
        return found | {"hash": np.char.decode(found["hash"], "latin-1")}

    def hashes(self) -> list[str]:
        """Return the SHA-256 of each image's bytes in hex, "" where none was read."""
        return [one.decode("latin-1") for one in self.columns["manifest/hash"].read().tolist()]

    def read(
        self, feature: str, rows: NDArray[np.integer] | slice = slice(None)
    ) -> NDArray[np.floating[Any]]:
        """Return rows of a feature, (n, D) float32, or (n, T, D) float16 for tokens.

        Only committed rows mean anything. Threads and forked processes may read at once.

        Raises StoreError for a feature that the store hasn't got, and for committed rows that are
        not what was written: each is held against its checksum the first time that it is read.
        """
        found, wrong = self.examine(feature, rows)
        if len(wrong):
            raise StoreError(
                f"{self.path}: {feature} of {len(wrong)} images is damaged, from row {wrong[0]} "
                f"on; {VERIFY}; {ANEW}"
            )
        return found

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
        """Return which committed rows have other values than were written."""
        right = self._right.setdefault(feature, np.zeros(self.columns["done"].shape, dtype=bool))
        new = np.flatnonzero(~right[rows])
        new = new[self.columns["done"].take(rows[new]) == DONE]
        if not len(new):
            return np.empty(0, dtype=np.int64)
        there = rows[new]
        wanted = self.columns[f"checksums/{column_of(feature)}"].take(there)
        same = checksums.of_rows(values if len(new) == len(values) else values[new]) == wanted
        right[there[same]] = True
        return np.asarray(there[~same], dtype=np.int64)

    def verify(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Yield, for `done`, each feature and the `source`, the rows (m,) that are damaged.

        Of features these are committed rows. Raises StoreError where the structure of the file or
        the manifest is damaged, or where features are missing.
        """
        if STRUCTURE in self.columns:
            wanted = self.columns[STRUCTURE].read()[0]
            if checksums.structure(self.descriptor, self._places) != wanted:
                raise StoreError(
                    f"{self.path}: bytes outside its rows are damaged (attributes, shapes, names, "
                    f"or the file's length); {ANEW}"
                )
        if leads_out(self.manifest().dataset):
            raise StoreError(
                f"{self.path}: its data set is called {self.about['dataset']!r}, which is a path: "
                "not made by `medprobe extract`. What is written of it stays in the folders that "
                "are asked for"
            )
        gone = set(self.fingerprint.get("features", ())) - set(self.features)
        if gone or not self.features:
            raise StoreError(f"{self.path} is without its {min(gone, default='features')}; {ANEW}")
        yield "done", checksums.wrong_marks(self.columns)
        for feature in self.features:
            found = checksums.wrong_rows(self.columns, column_of(feature), BLOCK_BYTES)
            yield feature, np.concatenate([np.empty(0, dtype=np.int64), *found])
        yield "source", checksums.wrong_sources(self.columns)

    def unverifiable(self) -> str:
        """Say what of the store carries no checksum; nothing for one of this version's making."""
        if STRUCTURE in self.columns:
            return ""
        return (
            "it was made by an earlier version, so attributes above 4 kB (long lists of classes) "
            "and marks turned from done to still to be done can't be checked"
        )

    def _check_manifest(self) -> None:
        if self.about["checksum"] != manifest_checksum(self.columns):
            raise StoreError(f"{self.path}: the manifest is damaged; {VERIFY}; {ANEW}")

    # --- filling ----------------------------------------------------------------------------------

    def commit(
        self,
        rows: NDArray[np.integer],
        features: Mapping[str, NDArray[np.floating[Any]]],
        source: Mapping[str, Sequence[Any]],
        bad: Mapping[int, str],
        remarks: Mapping[int, str] | None = None,
    ) -> None:
        """Write a batch: features (n, D) and sources of its rows, reasons of its bad ones, remarks.

        A source is an image's hash, size and mtime. Rows that `bad` names have a source, and
        features that are not looked at. When it returns, the batch survives a power cut. Raises
        StoreError for features that are not finite, and where the disk is full.
        """
        rows = np.asarray(rows, dtype=np.int64)
        good = np.array([int(i) not in bad for i in rows], dtype=bool)
        kept = {name: v[good].astype(dtype_of(name)) for name, v in features.items()}
        for name, values in kept.items():
            finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            if not finite.all():
                i = int(rows[good][np.flatnonzero(~finite)[0]])
                image = decode(self.columns["manifest/path"].take(np.array([i])))[0]
                raise StoreError(
                    f"{self.path}: feature {name} of row {i} ({image}) is not finite; "
                    "nothing of this batch was stored. "
                    "Try --precision float32, or look at the weights"
                )
        with self._committing(rows, np.where(good, DONE, BAD)):
            for name, values in kept.items():
                self.columns[column_of(name)].write(rows[good], values)
                self._write(f"checksums/{column_of(name)}", rows[good], checksums.of_rows(values))
            for name, kind in SOURCE.items():
                self._write(f"manifest/{name}", rows, np.array(source[name], dtype=kind))
            said = {**(remarks or {}), **{row: why or "no reason" for row, why in bad.items()}}
            reasons = [_cut(said.get(int(i), "")) for i in rows]
            self._write("reason", rows, np.array(reasons, dtype=f"S{REASON_BYTES}"))
            self._write("checksums/source", rows, checksums.of_sources(self.columns, rows))

    def gather(self, part: FeatureStore, rows: NDArray[np.integer]) -> None:
        """Copy what a part has committed, with its checksums; row k of it is row rows[k] here (n,).

        A part is a store of some of the images with the same features. When it returns, the rows
        survive a power cut. Raises StoreError where the disk is full.
        """
        done = part.done
        there = np.flatnonzero(done != PENDING)
        filled = [n for n in self.columns if is_filled(n) and n not in ("done", MARKS)]
        with self._committing(rows[there], done[there]):
            for name in filled:
                step = max(1, BLOCK_BYTES // max(1, self.columns[name].row_bytes))
                for a in range(0, len(there), step):
                    some = there[a : a + step]
                    self.columns[name].write(rows[some], part.columns[name].take(some))

    @contextmanager
    def _committing(self, rows: NDArray[np.integer], marks: NDArray[np.integer]) -> Iterator[None]:
        """Force to disk what is written inside, then the rows' marks: the two steps of a commit.

        The checksums of marks follow, for a mark means the same without.
        """
        done = self.columns["done"]
        try:
            if (done.take(rows) != PENDING).any():  # rows that are made anew
                self.forget(rows)
            yield
            os.fsync(self.descriptor)
            done.write(rows, marks)
            os.fsync(self.descriptor)
            self._write_marks_checksums(rows, marks)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError(
                f"{self.path}: {'the disk is full' if full else reason(error)}. What is stored "
                "stays; make room and give the same command again: it goes on from here"
            ) from None

    def forget(self, rows: NDArray[np.integer]) -> None:
        """Mark rows (n,) as still to be done, and what is written of them as worth nothing."""
        for right in self._right.values():
            right[rows] = False
        nothing = np.full(len(rows), PENDING)
        for name in (MARKS, "done", "checksums/source"):
            if name in self.columns:
                self.columns[name].write(rows, nothing)
                os.fsync(self.descriptor)

    def _mend_marks(self) -> None:
        """Have rows computed anew whose marks are damaged; give marks the checksums they lack.

        Those are lacking after a power cut, or in rows that an earlier version wrote.
        """
        found, wrong = checksums.marks(self.columns)
        if wrong.any():
            warnings.warn(
                f"{self.path}: the marks of {int(wrong.sum())} images were damaged; these are "
                "computed anew",
                stacklevel=4,
            )
            self.forget(np.flatnonzero(wrong))
        elif MARKS in self.columns:
            bare = np.flatnonzero((found != PENDING) & (self.columns[MARKS].read() == 0))
            self._write_marks_checksums(bare, found[bare])

    def _write_marks_checksums(self, rows: NDArray[np.integer], marks: NDArray[np.integer]) -> None:
        if MARKS in self.columns:
            self.columns[MARKS].write(rows, OF_MARK[marks])

    def relabel(self, manifest: Manifest) -> None:
        """Replace labels, subjects and splits only, in a copy that takes the store's place."""
        attributes, taken = self.attributes, self.kept
        build(self.path, manifest, self.features, attributes, self.columns, taken=taken)
        self.close()
        self._open(write=True)

    def grow(self, manifest: Manifest, fingerprint: Mapping[str, Any], batch_size: int) -> None:
        """Make room for further images, in a copy that takes the store's place.

        All images of the store must be in the manifest; what is done of them stays to the bit, and
        is in no batch any more.
        """
        place = {name: row for row, name in enumerate(manifest.id.tolist())}
        rows = np.array([place[name] for name in self.manifest().id.tolist()], dtype=np.int64)
        taken = np.zeros(len(manifest), dtype=bool)
        taken[rows] = self.done == DONE
        made_from = {"fingerprint": json.dumps(fingerprint, sort_keys=True)}
        attributes = self.attributes | made_from | {"batch_size": batch_size}
        columns, features = self.columns, self.features
        build(self.path, manifest, features, attributes, columns, rows=rows, taken=taken)
        self.close()
        self._open(write=True)

    def absorb(self, other: FeatureStore, fingerprint: Mapping[str, Any]) -> None:
        """Take in the features of another store of the same images, both complete.

        It is done in a copy that takes this store's place; the other stays as it is. Raises
        StoreError where the two don't agree on which images are good, or on their bytes.
        """
        names = ("done", "manifest/hash")
        mine, theirs = ([s.columns[name].read() for name in names] for s in (self, other))
        differ = np.any([a != b for a, b in zip(mine, theirs, strict=True)], axis=0)
        if differ.any():
            raise StoreError(
                f"{self.path}: the files of rows {np.flatnonzero(differ)[:5].tolist()} have "
                "changed or are gone since it was made, so nothing can be added to it. "
                "Bring them back, or take --overwrite always"
            )
        attributes = self.attributes | {"fingerprint": json.dumps(fingerprint, sort_keys=True)}
        features = self.features | other.features
        sources = (other.columns, self.columns)
        build(self.path, self.manifest(), features, attributes, *sources, taken=self.kept)
        self.close()
        self._open(write=True)

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """(N,) rows that were done when the store last grew; None where it never did."""
        return self.columns[TAKEN].read() > 0 if TAKEN in self.columns else None

    def _write(self, name: str, rows: NDArray[np.integer], values: Any) -> None:
        self.columns[name].write(rows, np.asarray(values))


def _cut(reason: str) -> bytes:
    """Return a reason short enough, without half a character at its end."""
    data = reason.encode(errors="replace")[:REASON_BYTES]
    return data.decode(errors="ignore").encode()
