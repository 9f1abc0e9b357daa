"""How much one image may cost: the size of its file, its pixels, and the memory to decode it.

MEDPROBE_IMAGE_MEMORY (in megabytes, 2000 where it isn't set) is the most that one image may take,
its file in memory, its pixels and all copies of them together. It is kept three times: a file is
not read beyond half of it; what a header declares is counted before anything is decoded; and where
images are decoded by worker processes, the system refuses a worker more address space than this
beyond its own, whatever a decoder does.

No torch here: the processes that decode import this module and must start quickly.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress

from features.errors import MedprobeError
from features.reasons import Reason, bad, megabytes

NAME = "MEDPROBE_IMAGE_MEMORY"
DEFAULT_MEGABYTES, MIN_MEGABYTES = 2000, 200
PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
RESERVE = 64_000_000  # of the limit, for what no header says: tables, libraries, the crop


def memory() -> int:
    """Return how many bytes one image may cost. Raises MedprobeError for a wrong setting."""
    text = os.environ.get(NAME) or str(DEFAULT_MEGABYTES)
    if not text.isascii() or not text.isdigit() or int(text) < MIN_MEGABYTES:
        raise MedprobeError(f"{NAME} is {text!r}: want whole megabytes, {MIN_MEGABYTES} or more")
    return int(text) * 1_000_000


def file_size() -> int:
    """Return how many bytes an image's file may have."""
    return memory() // 2


def inflated_size() -> int:
    """Return how many bytes a deflated DICOM file may inflate to."""
    return memory() // 4


def check(cost: float) -> None:
    """Raise ImageError for an image that would take so many bytes, if that is too much."""
    if cost > (most := memory()) - RESERVE:
        raise bad(Reason.COST, found=megabytes(cost + RESERVE), most=megabytes(most))


class AddressSpace:
    """How much this process may take; where the system says what it has (Linux)."""

    def __init__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        self._page = resource.getpagesize()
        self._most, self._set = memory(), 0
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._statm = -1

    def limit(self) -> None:
        """Let the process take as much as one image may beyond what it has now, and no more.

        A lower limit that was there before stays.
        """
        if self._statm < 0:
            return
        used = int(os.pread(self._statm, 32, 0).split(b" ", 1)[0]) * self._page
        soft, hard = self._before
        limits = [n for n in (used + self._most, soft, hard) if n != resource.RLIM_INFINITY]
        if min(limits) != self._set:
            self._set = min(limits)
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_AS, (self._set, hard))
