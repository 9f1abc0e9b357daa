"""`ddsm:DIR`: mammograms of DDSM, in either of two forms.

As the study's lists: ddsm_raw_image_lists/{train,val,test}.txt name images below ddsm_raw/, whose
names begin with normal, benign or cancer. The task is normal against the rest; --label-col
pathology keeps the three apart. The subject is the case: the name without side and view.

As CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv and DICOM files. The task is benign
against malignant, an image with several lesions being malignant if one is; the subject is the
patient. `--split official` is its own, which shares patients between the mass and calc halves.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from features.datasets.build import Listing, build
from features.datasets.options import Options
from features.datasets.tables import need, read_rows, some_there
from features.errors import DatasetError
from features.manifest import Manifest

SOURCE = "http://www.eng.usf.edu/cvprg/mammography/database.html"
CBIS_SOURCE = "https://www.cancerimagingarchive.net/collection/cbis-ddsm/"
MEAN, STD = (0.286,), (0.267,)
PREFIXES = ("normal", "benign", "cancer")
TABLES = [
    f"{lesion}_case_description_{part}_set.csv"
    for lesion in ("mass", "calc")
    for part in ("train", "test")
]
PATHOLOGY = {"BENIGN": 0, "BENIGN_WITHOUT_CALLBACK": 0, "MALIGNANT": 1}
SIDE = re.compile(r"[ ._-](LEFT|RIGHT)[ ._-].*$", re.IGNORECASE)


def read(folder: Path, options: Options) -> Manifest:
    """Return the manifest. Raises DatasetError for missing files and names that say nothing."""
    if any((folder / name).is_file() for name in TABLES):
        return _cbis(folder, options)
    return _lists(folder, options)


def _lists(folder: Path, options: Options) -> Manifest:
    where = f"ddsm:{folder}"
    if options.split == "official":
        raise DatasetError(f"{where} has no official split: --split study is that of its lists")
    lists = need(folder, ["ddsm_raw_image_lists"], "ddsm", SOURCE)
    need(folder, ["ddsm_raw"], "ddsm", SOURCE)
    paths, splits, labels = [], [], []
    for split in ("train", "val", "test"):
        for line in need(lists, [f"{split}.txt"], "ddsm", SOURCE).read_text("utf-8").splitlines():
            if not (name := line.strip()):
                continue
            prefix = Path(name).name.split("_")[0].lower()
            if prefix not in PREFIXES:
                raise DatasetError(
                    f"{where}: {split}.txt names {name}: want a file name that begins with "
                    "normal_, benign_ or cancer_"
                )
            paths.append(f"ddsm_raw/{name}")
            splits.append(split)
            labels.append(PREFIXES.index(prefix))
    if paths:
        some_there(folder, paths, where, SOURCE)
    cases = [SIDE.sub("", Path(path).stem) for path in paths]
    uncut = sum(case == Path(path).stem for case, path in zip(cases, paths, strict=True))
    three = options.label_col == "pathology"
    return build(
        Listing(
            dataset="ddsm",
            root=folder.resolve(),
            paths=paths,
            label=np.minimum(np.array(labels, dtype=np.int32), 2 if three else 1),
            classes=PREFIXES if three else ("normal", "benign or cancer"),
            subjects=cases,
            splits=splits,
            split_from="the study's lists",
            where=where,
            metric="auroc",
            normalize=(MEAN, STD),
            note=f"{uncut} names have no side, and count as a case each" if uncut else "",
        ),
        options,
    )


def _cbis(folder: Path, options: Options) -> Manifest:
    where = f"ddsm:{folder}"
    images: dict[str, dict[str, str]] = {}
    for name in TABLES:
        table = need(folder, [name], "ddsm", CBIS_SOURCE)
        for row in read_rows(table, ["patient_id", "pathology", "image file path"]):
            if row["pathology"] not in PATHOLOGY:
                raise DatasetError(
                    f"{table}: pathology is {row['pathology']!r}: want {', '.join(PATHOLOGY)}"
                )
            key = row["image file path"].split("/")[0]  # Mass-Training_P_00001_LEFT_CC
            image = images.setdefault(
                key,
                {
                    "file": row["image file path"],
                    "subject": row["patient_id"],
                    "label": "0",
                    "split": "test" if "_test_" in name else "train",
                    "kind": name.split("_")[0],
                    "view": row.get("image view", ""),
                    "side": row.get("left or right breast", ""),
                    "density": row.get("breast_density") or row.get("breast density", ""),
                },
            )
            image["label"] = str(max(int(image["label"]), PATHOLOGY[row["pathology"]]))
    rows = list(images.values())
    paths = [_cbis_path(folder, image["file"]) for image in rows]
    if paths:
        some_there(folder, paths, where, CBIS_SOURCE)
    return build(
        Listing(
            dataset="ddsm",
            root=folder.resolve(),
            paths=paths,
            label=np.array([int(image["label"]) for image in rows], dtype=np.int32),
            classes=("benign", "malignant"),
            subjects=[image["subject"] for image in rows],
            splits=[image["split"] for image in rows] if options.split == "official" else None,
            split_from="official: the collection's, whose mass and calc halves share patients",
            where=where,
            metric="auroc",
            normalize=(MEAN, STD),
            note="CBIS-DDSM: benign against malignant, no normal mammograms",
            columns={key: [i[key] for i in rows] for key in ("kind", "view", "side", "density")},
        ),
        options,
    )


def _cbis_path(folder: Path, named: str) -> str:
    """Return where an image of the tables lies.

    The tables name 000000.dcm; the archive's downloader writes 1-1.dcm into folders of its own
    names below the image's, which alone is the same.
    """
    if (folder / named).is_file():
        return named
    for top in (folder, folder / "CBIS-DDSM"):
        files = sorted((top / named.split("/")[0]).rglob("*.dcm"))
        if len(files) == 1:
            return files[0].relative_to(folder).as_posix()
        if files:
            raise DatasetError(
                f"{top / named.split('/')[0]} holds {len(files)} DICOM files: want the one of the "
                "whole mammogram"
            )
    return named
