"""The right to write to a store: one process at a time."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from features.errors import StoreError, StoreLockedError
from features.files import reason


@contextmanager
def writing(path: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the right to write to a store; a second writer's StoreLockedError says who holds it.

    That is raised after waiting for `patience` seconds. The lock is the operating system's and ends
    with the process, however it ends. Raises StoreError where nothing can be written.
    """
    holder = path.with_suffix(".holder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire(timeout=patience, poll_interval=0.2)
    except Timeout:
        who = holder.read_text().strip() if holder.is_file() else "another process"
        raise StoreLockedError(
            f"{path} is being written by {who}: wait for it, or stop it; nothing was changed"
        ) from None
    except OSError as error:
        raise StoreError(
            f"{path.parent}: nothing can be written there ({reason(error)}); nothing was changed. "
            "Make room, or choose another folder"
        ) from None
    try:
        with suppress(OSError):  # a full disk: what is at work will say so
            holder.write_text(
                f"process {os.getpid()} on {socket.gethostname()} "
                f"since {datetime.now(UTC).isoformat(timespec='seconds')} "
                f"({' '.join(sys.argv)[:200]})\n",
                errors="surrogateescape",
            )
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()
