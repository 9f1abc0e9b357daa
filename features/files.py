"""Names of files, and writing them so that each is whole whatever stops the program.

`filename` makes any text one safe part of a path: whatever a table, a store or a model is called,
nothing is written outside the folder that was asked for. `replacing` and `append_line` leave a file
as it was, or as it should be, and nothing between.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

FORBIDDEN = frozenset('/\\:*?"<>|')  # on some system or other
LONGEST = 100  # bytes of a name: file systems take 255, and suffixes are added


def filename(text: str) -> str:
    """Return a text as one part of a path: the text itself where it may be a file's name.

    Characters that a name can't have become dashes, dots and blanks at the ends go, and a long
    text is cut and gets a hash of the whole, so that "", ".." and "/etc" are harmless.
    """
    kept = "".join(c if c.isprintable() and c not in FORBIDDEN else "-" for c in text).strip(". ")
    data = kept.encode("utf-8")
    if len(data) > LONGEST:
        whole = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        kept = data[: LONGEST - 9].decode("utf-8", "ignore").strip(". ") + f"-{whole}"
    return kept or "-"


@contextmanager
def replacing(path: Path, mode: str = "wb", **how: Any) -> Iterator[IO[Any]]:
    """Open a file to write under another name; when all is written it takes its place.

    mode and how are those of Path.open. Raises OSError, after which the file is as before.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open(mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises OSError, after which it is as before."""
    with replacing(path) as file:
        file.write(data)


def append_line(path: Path, line: str) -> None:
    """Add one line of ASCII to a file, whole or not at all. Raises OSError; the file is as before.

    The caller holds the right to write. Half a line at the end, left by a power cut or a full disk,
    is removed with a warning.
    """
    new = not path.exists()
    with path.open("ab+", buffering=0) as file:  # no buffer that is written again when it closes
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        if end and not (before := file.read()).endswith(b"\n"):
            end = before.rfind(b"\n") + 1
            file.truncate(end)
            warnings.warn(
                f"{path} ended in half a line, of a run that was stopped: it was removed",
                stacklevel=2,
            )
        rest = line.encode("ascii") + b"\n"
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise
    if new:
        sync(path.parent)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a file that append_line fills, without half a line at its end.

    That half is said in a warning, and left where it is. Raises OSError.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    *lines, rest = text.split("\n")
    if rest.strip():
        warnings.warn(
            f"{path} ends in half a line, of a run that was stopped: it is left out", stacklevel=2
        )
    return lines


def sync(path: Path) -> None:
    """Push a file, or the names in a folder, to the disk, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a system that opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # a file system that has nothing to push
        pass
    finally:
        os.close(descriptor)
