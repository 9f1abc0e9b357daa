"""Stores of the same images and features under another name of the data set.

What a store holds depends on its fingerprint and its images, not on labels or names. So a table
that is extracted again under another name, for another column of labels, needs no computing: its
rows are copied. A twin is taken only where its fingerprint is the one asked for, its images are the
same files under the same ids, and none of these has changed since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ImageError, StoreError
from features.images import read_bytes
from features.layout import build
from features.lock import writing
from features.manifest import Manifest
from features.store import DONE, FeatureStore


def changed_files(store: FeatureStore, manifest: Manifest) -> dict[int, str]:
    """Return the done rows whose files have changed since they were read, and their hash now.

    Files are compared by size and time, and where those differ by their bytes. One that can't be
    read any more counts as unchanged: its features are as good as they were.
    """
    source, changed = store.source(), {}
    for i in np.flatnonzero(store.done == DONE).tolist():
        path = manifest.file(i)
        try:
            stat = path.stat()
            if (stat.st_size, stat.st_mtime_ns) == (source["size"][i], source["mtime_ns"][i]):
                continue
            digest = hashlib.sha256(read_bytes(path)).hexdigest()
        except (OSError, ImageError):
            continue
        if digest != source["hash"][i]:
            changed[i] = digest
    return changed


def find_twin(
    path: Path, manifest: Manifest, shapes: Mapping[str, Any], asked: Mapping[str, Any]
) -> Path | None:
    """Return a store beside `path`, under another name, that has the features asked for, if any.

    shapes: of these features; asked: their fingerprint.
    """
    if not path.parent.parent.is_dir():
        return None
    for folder in sorted(path.parent.parent.iterdir()):
        other = folder / path.name
        if other == path or not other.is_file():
            continue
        try:
            with FeatureStore.open(other) as store:
                if _suits(store, manifest, shapes, asked):
                    return other
        except (StoreError, OSError):  # it is damaged, or somebody's else: no twin
            continue
    return None


def _suits(
    store: FeatureStore,
    manifest: Manifest,
    shapes: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> bool:
    made = {k: v for k, v in store.fingerprint.items() if k != "views" or k in asked}
    if made | {"features": 0} != dict(asked) | {"features": 0}:
        return False
    if not shapes.items() <= store.features.items() or not (store.done == DONE).any():
        return False
    stored = store.manifest()
    same_files = str(stored.root) == str(manifest.root) and np.array_equal(
        stored.path, manifest.path
    )
    return same_files and not changed_files(store, manifest)


def copy_twin(
    twin: Path,
    path: Path,
    manifest: Manifest,
    shapes: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    default_feature: str,
    parity: Mapping[str, Any] | None = None,
) -> None:
    """Write a store with a twin's rows, marks and checksums, and the manifest's labels.

    Raises StoreLockedError while another process writes to the twin.
    """
    with writing(twin), FeatureStore.open(twin) as store:
        attributes = {
            "fingerprint": json.dumps(asked, sort_keys=True),
            "default_feature": default_feature,
            "batch_size": store.batch_size,
            **({"parity": json.dumps(parity)} if parity else {}),
        }
        build(path, manifest, shapes, attributes, store.columns, taken=store.kept)
