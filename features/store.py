"""FeatureStore: one HDF5 file of features per (dataset, backbone).

docs/format.md specifies it without code.

Why it survives a crash at any moment. All of HDF5's own structure is written once, into a draft
file that is renamed into place when complete; every dataset is contiguous and has its place from
then on. Filling writes raw bytes at those places, without the HDF5 library, and changes no
structure, so there is no moment at which the file can't be opened. A batch is committed in two
steps, each forced to disk: its rows and checksums, then its marks in /done. A crash between the two
loses that batch only. What changes structure (new labels, more layers) builds a new draft.

Rows are checked against their checksums where they are read, once per open store (checksums.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features import checksums
from features.checks import leads_out
from features.checksums import STRUCTURE
from features.errors import StoreError
from features.layout import BLOCK_BYTES, RECOMPUTE, build, column_of
from features.manifest import Manifest
from features.store_reader import StoreReader
from features.store_writer import StoreWriter

PENDING, DONE, BAD = checksums.PENDING, checksums.DONE, checksums.BAD


class FeatureStore(StoreWriter):
    """An open store. Make one with `create` or `open`, as a context manager.

    It is read as store_reader.py says, and filled as store_writer.py does.
    """

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
        parity: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an empty store with room for every row; features maps LAYER/POOL to its shape.

        parity: fields of parity.Parity. Raises StoreError where the disk has no room for it.
        """
        build(
            path,
            manifest,
            features,
            {
                "fingerprint": json.dumps(fingerprint, sort_keys=True),
                "default_feature": default_feature,
                "batch_size": batch_size,
                **({"parity": json.dumps(parity)} if parity else {}),
            },
        )

    def relabel(self, manifest: Manifest) -> None:
        """Replace the manifest; features stay, in a copy that takes the store's place.

        It has labels, classes, subjects, splits, columns and root.
        """
        attributes, taken = self.attributes, self.kept
        build(self.path, manifest, self.features, attributes, self.columns, taken=taken)
        self.close()
        self._open(write=True)

    def grow(self, manifest: Manifest, fingerprint: Mapping[str, Any], batch_size: int) -> None:
        """Make room for further images, in a copy that takes the store's place.

        All images of the store must be in the manifest; what is done of them stays to the bit, and
        is in no batch any more.
        """
        rows = manifest.rows_of(self.manifest())
        taken = np.zeros(len(manifest), dtype=bool)
        taken[rows] = self.done == DONE
        made_from = {"fingerprint": json.dumps(fingerprint, sort_keys=True)}
        attributes = self.attributes | made_from | {"batch_size": batch_size}
        columns, features = self.columns, self.features
        build(self.path, manifest, features, attributes, columns, rows=rows, taken=taken)
        self.close()
        self._open(write=True)

    def absorb(self, other: StoreReader, fingerprint: Mapping[str, Any]) -> None:
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

    def verify(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        """Yield, for `done`, each feature and the `source`, the rows (m,) that are damaged.

        Of features these are committed rows. Raises StoreError where the structure of the file or
        the manifest is damaged, or where features are missing.
        """
        if STRUCTURE in self.columns:
            wanted = self.columns[STRUCTURE].read()[0]
            if checksums.structure(self.descriptor, self._extents) != wanted:
                raise StoreError(
                    f"{self.path}: bytes outside its rows are damaged (attributes, shapes, names, "
                    f"or the file's length); {RECOMPUTE}"
                )
        if leads_out(self.manifest().dataset):
            raise StoreError(
                f"{self.path}: its data set is called {self.about['dataset']!r}, which is a path: "
                "not made by `medprobe extract`. What is written of it stays in the folders that "
                "are asked for"
            )
        gone = set(self.fingerprint.get("features", ())) - set(self.features)
        if gone or not self.features:
            raise StoreError(
                f"{self.path} is without its {min(gone, default='features')}; {RECOMPUTE}"
            )
        yield "done", checksums.wrong_marks(self.columns)
        for feature in self.features:
            damaged = checksums.wrong_rows(self.columns, column_of(feature), BLOCK_BYTES)
            yield feature, np.concatenate([np.empty(0, dtype=np.int64), *damaged])
        yield "source", checksums.wrong_sources(self.columns)

    def unverifiable(self) -> str:
        """Say what of the store carries no checksum; nothing for one of this version's making."""
        if STRUCTURE in self.columns:
            return ""
        return (
            "it was made by an earlier version, so attributes above 4 kB (long lists of classes) "
            "and marks turned from done to still to be done can't be checked"
        )
