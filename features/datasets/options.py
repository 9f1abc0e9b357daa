"""How a source is to be read; one value from the command line to the reader."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Column names are for csv; seed and test_share for drawing a split where none is given."""

    name: str | None = None  # of the data set, instead of its own
    path_col: str = "path"
    label_col: str = "label"
    subject_col: str = "subject"
    split_col: str = "split"
    label_sep: str | None = None  # splits one cell into several labels
    keep_na: bool = False  # whether NA, None and their like are classes and subjects, not missing
    labelled: bool = True  # whether labels are wanted; to predict, folder and csv need none
    # whether a head of other data tests all of it: a split may be there, and none is drawn
    whole: bool = False
    subject_from_dicom: bool = False  # the patient id of each file's header is its subject
    merge: tuple[str, ...] = ()  # "new=old+old": classes that become one
    classes: tuple[str, ...] = ()  # all of them, in their order; none leaves the source's
    # default: what the source gives, else drawn; drawn: by subject, whatever is given; study: the
    # split of the study that Medprobe follows, with its faults; official: the publisher's own.
    split: str = "default"
    seed: int = 0
    val_share: float = 0.0
    test_share: float = 0.2
    limit: int | None = None  # so many images, drawn by the seed: see limit.py
    test_fold: tuple[int, int] | None = None  # (i, k): test on part i, from 1, of k equal ones
    command: str = ""  # the command line that says all this; "" where there is none
