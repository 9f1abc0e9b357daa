"""The errors a user can meet, as one small tree; cli.py prints them as one or two lines.

MedprobeError             the work can't go on; the message says what, found, wanted, next step
├── DatasetError          a source of images or labels that can't be read as asked
│   └── MissingImagesError  none of its images is there: a fault found, exit code 1
├── ImageError            one image that can't be decoded (recorded as bad, never fatal by default)
├── BackboneError         an unknown backbone, or weights that don't fit it
├── StoreError            a store that is missing, damaged or incomplete
│   ├── StoreLockedError  another process is writing to it
│   └── StaleStoreError   it was made from something else; the message names what differs
├── ClusterError          other machines that can't be reached, or were lost
└── ProbeError            labels, splits or options that no head can be fitted to
    └── ContradictedError   a result whose predictions don't score what its row says
"""


class MedprobeError(Exception):
    """The root: everything Medprobe raises on purpose."""


class DatasetError(MedprobeError):
    """A source of images or labels can't be read as asked."""


class MissingImagesError(DatasetError):
    """None of the images of a source is there."""


class ImageError(MedprobeError):
    """One image can't be decoded."""


class BackboneError(MedprobeError):
    """An unknown backbone, or weights that don't fit it."""


class StoreError(MedprobeError):
    """A store is missing, damaged or incomplete."""


class StoreLockedError(StoreError):
    """Another process is writing to the store."""


class StaleStoreError(StoreError):
    """The store was made from something else than what is asked for."""


class ClusterError(MedprobeError):
    """Other machines can't be reached, or were lost."""


class ProbeError(MedprobeError):
    """No head can be fitted to these labels, splits or options."""


class ContradictedError(ProbeError):
    """A result's predictions don't score what its row says; `differ` says what differs."""

    def __init__(self, message: str, differ: str) -> None:
        super().__init__(message)
        self.differ = differ
