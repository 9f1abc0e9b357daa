"""How a source is to be read; one value from the command line to the reader."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Column names are for csv; seed and test_share for drawing a split where none is given."""

    path_col: str = "path"
    label_col: str = "label"
    subject_col: str = "subject"
    split_col: str = "split"
    label_sep: str | None = None  # splits one cell into several labels
    subject_from_dicom: bool = False  # the patient id of each file's header is its subject
    seed: int = 0
    test_share: float = 0.2
