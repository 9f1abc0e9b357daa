"""Files at URLs: what is asked of a pathlib.Path, answered by fsspec; and reading either safely.

s3://bucket/a.png, gs://..., https://...: what PROTOCOLS names, of that which fsspec has an
implementation of. Others are refused: some start programs (hdfs:// asks hadoop), some open what
else they are told to. fsspec is imported when a URL is opened, not before.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from features.errors import DatasetError
from features.files import TooLargeError, open_regular, read_regular

REMOTE = ("abfs", "abfss", "adl", "az", "ftp", "gcs", "gs", "hf", "http", "https", "oci", "oss",
          "r2", "s3", "s3a", "sftp", "smb", "ssh", "webdav", "webhdfs")  # fmt: skip
LOCAL = ("file", "local")
PROTOCOLS = frozenset([*REMOTE, *LOCAL, "memory"])
STEP = 1 << 22  # bytes that are asked for at once where a size isn't known
CHANGED = ("mtime", "LastModified", "last_modified", "updated", "created")  # as stores call it


@dataclass(frozen=True)
class Stat:
    """Size in bytes, and time of the last change (0 where the server doesn't say)."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class Url:
    """A file or a folder at a URL."""

    url: str

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    def __truediv__(self, name: str) -> Url:
        """Return what lies below."""
        return Url(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Return the last part."""
        return posixpath.basename(self.url.rstrip("/"))

    @property
    def stem(self) -> str:
        """Return the last part without its suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """Return what the name ends in: .png."""
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> Url:
        """Return the folder it lies in."""
        return Url(posixpath.dirname(self.url.rstrip("/")))

    def resolve(self) -> Url:
        """Return the URL, which is absolute."""
        return self

    def is_file(self) -> bool:
        """Say whether a file is there."""
        return bool(self._system().isfile(self.url))

    def is_dir(self) -> bool:
        """Say whether a folder is there."""
        return bool(self._system().isdir(self.url))

    def open(self, mode: str = "r", **options: Any) -> Any:
        """Open the URL; a local one must be a regular file, see files.open_regular."""
        if self._protocol() in LOCAL:
            return open_regular(self._path(), mode, **options)
        return self._system().open(self.url, mode, **options)

    def read(self, most: int) -> tuple[bytes, Stat]:
        """Return what is in the file, and size and time as they were before.

        Raises TooLargeError for more than `most` bytes, whatever the server says of its size.
        """
        if self._protocol() in LOCAL:
            data, local = read_regular(self._path(), most)
            return data, Stat(local.st_size, local.st_mtime_ns)
        status = self.stat()
        if status.st_size > most:
            raise TooLargeError(self, status.st_size)
        if status.st_size and self._protocol() not in ("http", "https"):
            data = bytes(self._system().cat_file(self.url, start=0, end=status.st_size))
        else:  # a size that isn't known, or a server that may send more than it was asked for
            with self._system().open(self.url, "rb") as file:
                parts, left = [], most + 1
                while left > 0 and (part := file.read(min(left, STEP))):
                    parts.append(part)
                    left -= len(part)
            data = b"".join(parts)
        if len(data) > most:
            raise TooLargeError(self, len(data))
        return data, status

    def stat(self) -> Stat:
        """Return size and time. Raises OSError."""
        info = self._system().info(self.url)
        when = next((info[name] for name in CHANGED if info.get(name)), 0)
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        seconds = when.timestamp() if isinstance(when, datetime) else float(when)
        return Stat(int(info.get("size") or 0), round(seconds * 1e9))

    def walk(self) -> list[str]:
        """Return the files below, relative to here."""
        system = self._system()
        top = system._strip_protocol(self.url).rstrip("/")
        return [file.removeprefix(top).lstrip("/") for file in system.find(self.url)]

    def _protocol(self) -> str:
        return self.url.partition("://")[0].lower()

    def _path(self) -> Path:
        """Return where a local one lies."""
        return Path(self._system()._strip_protocol(self.url))

    def _system(self) -> Any:
        """Return fsspec's file system for the URL; it keeps one per protocol."""
        import fsspec

        protocol = self._protocol()
        if protocol not in PROTOCOLS:
            raise DatasetError(
                f"{self.url}: {protocol}:// is not read: want one of "
                f"{', '.join(sorted([*REMOTE, *LOCAL]))}"
            )
        try:
            return fsspec.filesystem(protocol)
        except (ImportError, ValueError) as error:
            raise DatasetError(f"{self.url}: {protocol}:// can't be read here: {error}") from None


Location = Path | Url


def locate(text: str) -> Location:
    """Return a path, or what lies at a URL."""
    return Url(text) if "://" in text else Path(text)


def read(path: Location, most: int) -> tuple[bytes, Stat]:
    """Return what is in a file, and size and time as they were before it was read.

    Only files are opened, and never more than `most` bytes are read: see files.read_regular. Raises
    OSError, of which TooLargeError and NotRegularError are kinds.
    """
    if isinstance(path, Url):
        return path.read(most)
    data, status = read_regular(path, most)
    return data, Stat(status.st_size, status.st_mtime_ns)


def opened(path: Location, mode: str = "rb", **how: Any) -> Any:
    """Return a file opened for reading; NotRegularError for a device, pipe or socket."""
    return path.open(mode, **how) if isinstance(path, Url) else open_regular(path, mode, **how)
