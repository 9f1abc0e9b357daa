"""Apply a saved head to a store."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch

from features.errors import ProbeError
from features.store import DONE, FeatureStore
from probe.heads import Head


def predict(head_path: Path, store_path: Path) -> str:
    """Return a CSV table: id, predicted (of a multiclass head), and a probability per class.

    Raises ProbeError where the store was made by another backbone or other weights than the head.
    """
    head, about = Head.load(head_path)
    with FeatureStore.open(store_path) as store:
        made, wanted = store.fingerprint["backbone"], about["backbone"]
        differ = [
            f"{k}: {made.get(k)}, want {wanted[k]}" for k in wanted if made.get(k) != wanted[k]
        ]
        if differ:
            raise ProbeError(f"{store_path} doesn't suit the head {head_path}: {'; '.join(differ)}")
        rows = np.flatnonzero(store.done == DONE)
        X = torch.from_numpy(store.read(about["feature"], rows))
        ids = store.manifest().id[rows]
    p = head.predict_proba(X.double()).numpy()
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    single = head.kind != "sigmoid"
    writer.writerow(["id", *(["predicted"] if single else []), *(f"p:{c}" for c in head.classes)])
    for id_, row in zip(ids.tolist(), p, strict=True):
        said = [head.classes[int(row.argmax())]] if single else []
        writer.writerow([id_, *said, *(f"{v:.9g}" for v in row)])
    return table.getvalue()
