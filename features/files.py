"""Names of files, opening only what is one, and writing each whole whatever stops the program.

`filename` makes any text one safe part of a path: whatever a table, a store or a model is called,
nothing is written outside the folder that was asked for. `open_regular` opens files, and never
waits for a pipe or a terminal. `drafting`, `replacing` and `append_line` leave a file as it was,
or as it should be, and nothing between.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def meant(path: Path | str) -> str:
    """Return which paths may be meant by one that isn't there, as " (did you mean x?)"; else "".

    Its parts are followed as far as they lead; where one is not there, by names like it.
    """
    path = Path(path)
    found = [Path(path.anchor)]
    for part in path.parts[1 if path.anchor else 0 :]:
        step: list[Path] = []
        for folder in found:
            if (folder / part).exists():
                step.append(folder / part)
                continue
            with suppress(OSError):
                there = [one.name for one in folder.iterdir()]
                step += [folder / name for name in difflib.get_close_matches(part, there, 3)]
        found = step
    names = sorted(map(str, found))[:3]
    return f" (did you mean {' or '.join(names)}?)" if names else ""


class NotRegularError(OSError):
    """Not a file: a device, a pipe, a socket, a terminal."""


class TooLargeError(OSError):
    """A file of more bytes than are to be read; `found` says how many it has."""

    def __init__(self, path: object, size: int) -> None:
        super().__init__(errno.EFBIG, "the file is too large", str(path))
        self.size = size


def open_regular(path: Path, mode: str = "rb", **how: Any) -> IO[Any]:
    """Open a file, or what a link leads to, for reading: never a device, pipe, socket or terminal.

    mode and how are those of open. It never waits, neither to open nor for data that may come.
    Raises NotRegularError, and OSError as open does.
    """
    return open(path, mode, opener=lambda name, _: _open(path), **how)


def read_regular(path: Path, most: int) -> tuple[bytes, os.stat_result]:
    """Return what is in a file, and size and time as they were before it was read.

    Raises TooLargeError for more than `most` bytes, without reading them, and what open_regular
    raises. A file that grows meanwhile is read as far as it went at first.
    """
    descriptor = _open(path)
    try:
        status = os.fstat(descriptor)
        if status.st_size > most:
            raise TooLargeError(path, status.st_size)
        parts, left = [], status.st_size
        while left and (part := os.read(descriptor, min(left, 1 << 30))):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts), status


def _open(path: Path) -> int:
    """Return the descriptor of a file opened for reading."""
    status = path.stat()
    if stat.S_ISREG(status.st_mode):  # opening a device may already do something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            return descriptor
        os.close(descriptor)
    raise _not_regular(path, status)


def _not_regular(path: Path, status: os.stat_result) -> OSError:
    if stat.S_ISDIR(status.st_mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return NotRegularError(errno.EINVAL, "a device, pipe or socket, not a file", str(path))


@contextmanager
def drafting(path: Path) -> Iterator[Path]:
    """Yield another name to write a file under; when all is written it takes its place.

    What writes it forces it to disk. Raises OSError, after which the file is as before.
    """
    draft = path.with_name(path.name + ".part")
    try:
        yield draft
        draft.replace(path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, reason(error), str(path)) from None
        raise
    sync(path.parent)


@contextmanager
def replacing(path: Path, mode: str = "wb", **how: Any) -> Iterator[IO[Any]]:
    """Open a file to write as `drafting` does, and force it to disk.

    mode and how are those of Path.open. Raises OSError, after which the file is as before.
    """
    with drafting(path) as draft, draft.open(mode, **how) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def reason(error: OSError) -> str:
    """Return in a few words why a file can't be read or written: No space left on device."""
    return os.strerror(error.errno) if error.errno else " ".join(str(error).split())


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
