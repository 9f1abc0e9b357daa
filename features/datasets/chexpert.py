"""`chexpert:DIR`: CheXpert, chest radiographs, 14 findings with uncertain ones.

Read from train.csv and valid.csv of CheXpert-v1.0 or CheXpert-v1.0-small: a path such as
CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg, and 1, 0, -1 or nothing per
finding. The folder is the archive's, or the one above it. The subject is the patient in the path.
Frontal and lateral views are both read; --by view tells them apart. --label-col competition reads
five findings.

`--split official` trains on train.csv and tests on valid.csv. Other splits are of train.csv alone,
and the images of valid.csv are in none. `--split study` also takes the study's labels: a row in
which no finding is present gets No Finding.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from features.datasets.build import Listing, build
from features.datasets.labels import state
from features.datasets.options import Options
from features.datasets.tables import need, read_rows, some_there
from features.errors import DatasetError
from features.manifest import NO_SPLIT, PRESENT, Manifest

SOURCE = "https://aimi.stanford.edu/datasets/chexpert-chest-x-rays"
FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
MEAN, STD = (0.503,), (0.292,)
GROUPS = {"Sex": "sex", "Age": "age", "Frontal/Lateral": "view", "AP/PA": "projection"}


def read(folder: Path, options: Options) -> Manifest:
    """Return the manifest. Raises DatasetError for missing files or cells that mean nothing."""
    where = f"chexpert:{folder}"
    top = next((p.parent for p in sorted(folder.glob("CheXpert*/train.csv"))), folder)
    train = need(top, ["train.csv"], "chexpert", SOURCE)
    valid = need(top, ["valid.csv"], "chexpert", SOURCE)
    rows = read_rows(train, ["Path", *FINDINGS])
    n_train = len(rows)
    rows += read_rows(valid, ["Path", *FINDINGS])
    findings = COMPETITION if options.label_col == "competition" else FINDINGS
    label = np.array([_states(row, findings, where) for row in rows], dtype=np.int32)
    label = label.reshape(len(rows), len(findings))
    # The first part of a path names the archive, whatever the folder is called now.
    paths = [row["Path"].split("/", 1)[-1] for row in rows]
    if rows:
        some_there(top, paths, where, SOURCE)
    patients = [_patient(path, where) for path in paths]
    note = "labels are read from reports by a program; -1 is uncertain, an empty cell not mentioned"
    split: list[str] | None = None
    split_from = ""
    if options.split == "study":
        split = _study_split([row["Path"] for row in rows[:n_train]], where)
        split += [NO_SPLIT] * (len(rows) - n_train)
        split_from = "the study's: the first fifth of the sorted rows held out; one patient is cut"
        if "No Finding" in findings:
            label[~(label == PRESENT).any(1), findings.index("No Finding")] = PRESENT
            note += "; rows with no finding present count as No Finding, as in the study"
    elif options.split == "official":
        split = ["train"] * n_train + ["test"] * (len(rows) - n_train)
        split_from = "official: train.csv trains, valid.csv (read by radiologists) tests"
    return build(
        Listing(
            dataset="chexpert",
            root=top.resolve(),
            paths=paths,
            label=label,
            classes=tuple(findings),
            subjects=patients,
            splits=split,
            split_from=split_from,
            unused=None if split else np.arange(len(rows)) >= n_train,
            where=where,
            metric="auroc",
            normalize=(MEAN, STD),
            note=note,
            columns={
                **{name: [row.get(key, "") for row in rows] for key, name in GROUPS.items()},
                "study": [path.rsplit("/", 1)[0] for path in paths],
            },
        ),
        options,
    )


def _states(row: dict[str, str], findings: tuple[str, ...], where: str) -> list[int]:
    states = []
    for name in findings:
        finding = state(row[name])
        if finding is None:
            raise DatasetError(
                f"{where}: {row['Path']} has a finding {row[name]!r}: "
                "want 1, 0, -1 (uncertain) or nothing"
            )
        states.append(finding)
    return states


def _patient(path: str, where: str) -> str:
    match = re.search(r"patient\d+", path)
    if not match:
        raise DatasetError(f"{where}: no patientNNNNN in the path {path}")
    return match.group()


def _study_split(paths: list[str], where: str) -> list[str]:
    """Return the study's split: joanaapa/Foundation-Medical, defaults/datasets.py, CheXpert.

    It sorts the table by Path and cuts it at a row's number in the unsorted table, both ends
    included: one row is in train and test, one in val and test. Here both are in test only.
    """
    n = len(paths)
    cut = int(n * 0.2) + 15
    if cut >= n:
        raise DatasetError(f"{where} has {n} rows in train.csv: too few for the study's split")
    order = sorted(range(n), key=paths.__getitem__)
    rank = {row: k for k, row in enumerate(order)}
    held_out = rank[cut] + 1
    half = rank[held_out // 2]
    return [
        "train" if rank[row] >= held_out else "val" if rank[row] < half else "test"
        for row in range(n)
    ]
