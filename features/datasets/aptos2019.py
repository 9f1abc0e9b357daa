"""`aptos2019:DIR`: APTOS 2019 Blindness Detection, fundus photographs, 5 grades of retinopathy.

Read from train.csv (id_code, diagnosis) and train_images/<id_code>.png, as Kaggle's archive
unpacks; its test.csv has no labels. No patient ids are published, so a subject is an image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from features.datasets.build import Listing, build
from features.datasets.options import Options
from features.datasets.tables import need, read_rows, shuffled_split, some_there
from features.errors import DatasetError
from features.manifest import Manifest

SOURCE = "https://www.kaggle.com/competitions/aptos2019-blindness-detection/data"
CLASSES = ("no DR", "mild", "moderate", "severe", "proliferative DR")
MEAN, STD = (0.415, 0.221, 0.073), (0.275, 0.150, 0.081)


def read(folder: Path, options: Options) -> Manifest:
    """Return the manifest. Raises DatasetError for missing files or grades other than 0 to 4."""
    where = f"aptos2019:{folder}"
    table = need(folder, ["train.csv"], "aptos2019", SOURCE)
    images = need(folder, ["train_images"], "aptos2019", SOURCE)
    rows = read_rows(table, ["id_code", "diagnosis"])
    for number, row in enumerate(rows, 2):
        if row["diagnosis"] not in ("0", "1", "2", "3", "4"):
            raise DatasetError(
                f"{table}, line {number}: diagnosis is {row['diagnosis']!r}: want 0 to 4"
            )
    paths = [f"{images.name}/{row['id_code']}.png" for row in rows]
    if rows:
        some_there(folder, paths, where, SOURCE)
    study = options.split == "study"
    return build(
        Listing(
            dataset="aptos2019",
            root=folder.resolve(),
            paths=paths,
            label=np.array([int(row["diagnosis"]) for row in rows], dtype=np.int32),
            classes=CLASSES,
            splits=shuffled_split(len(rows), 0.3) if study else None,
            split_from="the study's: 70/15/15 by image, Random(42)",
            where=where,
            metric="quadratic_kappa",
            normalize=(MEAN, STD),
            note="no patient ids are published: both eyes of a patient may be in two splits",
        ),
        options,
    )
