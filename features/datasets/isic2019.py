"""`isic2019:DIR`: ISIC 2019, dermoscopy, 8 kinds of skin lesion.

Read from ISIC_2019_Training_GroundTruth.csv, ISIC_2019_Training_Metadata.csv and the images in
ISIC_2019_Training_Input/ or train/. A subject is a lesion where lesion_id is given, else an image.
A row of UNK (or of no class) has no label: it is extracted and never scored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from features.datasets.build import Listing, build
from features.datasets.options import Options
from features.datasets.tables import need, read_rows, shuffled_split, some_there
from features.errors import DatasetError
from features.manifest import NO_LABEL, Manifest

SOURCE = "https://challenge.isic-archive.com/data/#2019"
CODES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
MEAN = (0.66776717, 0.52960888, 0.52434725)
STD = (0.22381877, 0.20363036, 0.21538623)
GROUPS = ("sex", "age_approx", "anatom_site_general")
SPLIT_FROM = "the study's: 80/10/10 by image, Random(42); images of a lesion are in several"


def read(folder: Path, options: Options) -> Manifest:
    """Return the manifest. Raises DatasetError for missing files or a row of two classes."""
    where = f"isic2019:{folder}"
    truth = need(folder, ["ISIC_2019_Training_GroundTruth.csv"], "isic2019", SOURCE)
    about = need(folder, ["ISIC_2019_Training_Metadata.csv"], "isic2019", SOURCE)
    images = need(folder, ["ISIC_2019_Training_Input", "train"], "isic2019", SOURCE)
    if (images / images.name).is_dir():  # as some programs unpack it
        images = images / images.name
    rows = read_rows(truth, ["image", *CODES])
    extra = {row["image"]: row for row in read_rows(about, ["image", "lesion_id"])}
    label = np.full(len(rows), NO_LABEL, dtype=np.int32)
    for i, row in enumerate(rows):
        ones = [k for k, code in enumerate(CODES) if float(row[code] or 0) == 1]
        if len(ones) > 1:
            several = ", ".join(CODES[k] for k in ones)
            raise DatasetError(f"{truth}: {row['image']} is {several}: want one class per image")
        if ones:
            label[i] = ones[0]
    names = [row["image"] for row in rows]
    image_folder = images.relative_to(folder).as_posix()
    paths = [f"{image_folder}/{name}.jpg" for name in names]
    if rows:
        some_there(folder, paths, where, SOURCE)
    lesion = [extra.get(name, {}).get("lesion_id") or name for name in names]
    unlabelled = int((label == NO_LABEL).sum())
    study = options.split == "study"
    return build(
        Listing(
            dataset="isic2019",
            root=folder.resolve(),
            paths=paths,
            label=label,
            classes=CODES,
            subjects=lesion,
            splits=shuffled_split(len(rows), 0.2) if study else None,
            split_from=SPLIT_FROM,
            where=where,
            metric="balanced_accuracy",
            normalize=(MEAN, STD),
            note=f"{unlabelled} images of no known class are not scored" if unlabelled else "",
            columns={
                group.removesuffix("_general").removesuffix("_approx"): [
                    extra.get(name, {}).get(group, "") for name in names
                ]
                for group in GROUPS
            },
        ),
        options,
    )
