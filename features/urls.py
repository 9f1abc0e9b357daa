"""Files at URLs: what is asked of a pathlib.Path, answered by fsspec.

s3://bucket/a.png, gs://..., https://...: whatever fsspec has an implementation of. It is imported
when a URL is opened, not before.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from features.errors import DatasetError

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
        """Return it opened."""
        return self._system().open(self.url, mode, **options)

    def read_bytes(self) -> bytes:
        """Return what is in the file. Raises OSError, FileNotFoundError among them."""
        return bytes(self._system().cat_file(self.url))

    def stat(self) -> Stat:
        """Return size and time. Raises OSError."""
        found = self._system().info(self.url)
        when = next((found[name] for name in CHANGED if found.get(name)), 0)
        if isinstance(when, str):
            when = datetime.fromisoformat(when)
        seconds = when.timestamp() if isinstance(when, datetime) else float(when)
        return Stat(int(found.get("size") or 0), round(seconds * 1e9))

    def walk(self) -> list[str]:
        """Return the files below, relative to here."""
        system = self._system()
        top = system._strip_protocol(self.url).rstrip("/")
        return [file.removeprefix(top).lstrip("/") for file in system.find(self.url)]

    def _system(self) -> Any:
        """Return fsspec's file system for the URL; it keeps one per protocol."""
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            return fsspec.filesystem(protocol)
        except (ImportError, ValueError) as error:
            raise DatasetError(f"{self.url}: {protocol}:// can't be read here: {error}") from None


Location = Path | Url


def locate(text: str) -> Location:
    """Return a path, or what lies at a URL."""
    return Url(text) if "://" in text else Path(text)
