"""Processes that read and decode images, and the threads that wait for them.

Each worker is a process of its own, so that a decoder that crashes on a damaged file takes nothing
with it: the image is tried once more in a new process, alone, then recorded as bad. Alone, because
the system may have ended the worker for want of memory that others took. An image gets so much
address space and no more (limits.py), and where memory runs out nevertheless, the system is told to
end workers before anything else. The parent writes a
request (one line of JSON) to the worker's standard input and reads the answer from its standard
output: one line of JSON, then the raw pixels, which go straight into the batch. One thread per
worker does that, waiting without the interpreter's lock.

Workers yield to the forward pass (nice 19): on a CPU both need the same cores, and a forward pass
that loses one of them for a moment waits with all the others. They end when the parent does,
however it ends, because their input does.

No torch here: a worker starts in a fifth of a second and takes 60 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from features import augment, limits
from features.dicom import Window
from features.errors import DatasetError, ImageError
from features.images import Decoded, Transform, bands, decode, read_file
from features.interpreters import environment
from features.reasons import Reason, bad, explain, megabytes
from features.urls import Location, locate

COMMAND = (sys.executable, "-c", "from features.workers import main; main()")


@dataclass(frozen=True)
class ImageRecipe:
    """What is made of every image: for each transform its crop, then `views` changed ones."""

    transforms: tuple[Transform, ...]
    exact: bool = False
    views: int = 0
    seed: int = 0  # of the views
    window: Window | None = None  # for DICOM, as frame
    frame: int | None = None
    hash_pixels: bool = False  # of the whole image, in RGB


@dataclass(frozen=True)
class Loaded:
    """What is known of an image's file, or why the image is bad (then size and time may be 0).

    reason is of reasons.Reason; remark of reasons.Remark, of an image that is good.
    """

    hash: str = ""  # hex SHA-256 of the bytes, also of those that can't be decoded
    size: int = 0
    mtime_ns: int = 0
    reason: str = ""
    remark: str = ""
    pixels: str = ""  # hex SHA-256 of the size and the pixels, where the recipe wants it
    seconds: float = 0.0  # that reading and decoding took


def load(path: Location, recipe: ImageRecipe) -> tuple[Loaded, list[NDArray[np.uint8]]]:
    """Read an image; return its facts and, per transform, (1 + views, size, size, 3) pixels."""
    start = time.perf_counter()
    known: dict[str, Any] = {}
    try:
        data, stat = read_file(path)
        known = {
            "hash": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "mtime_ns": stat.st_mtime_ns,
        }
        decoded = _decoded(data, recipe)
        known["pixels"] = hash_pixels(decoded.image) if recipe.hash_pixels else ""
        pixels = []
        for crop in _crops(decoded, recipe):
            views = [
                augment.augment(crop, augment.generator(recipe.seed, known["hash"], view))
                for view in range(recipe.views)
            ]
            pixels.append(np.stack([np.asarray(image) for image in (crop, *views)]))
    except ImageError as error:
        return Loaded(**known, reason=str(error)), []
    except MemoryError:
        reason = bad(Reason.MEMORY, most=megabytes(limits.memory()))
        return Loaded(**known, reason=str(reason)), []
    except DatasetError as error:  # a URL of a kind that is not read
        explain(error)
        return Loaded(**known, reason=str(bad(Reason.URL))), []
    return Loaded(**known, remark=decoded.remark, seconds=time.perf_counter() - start), pixels


def crops(data: bytes, recipe: ImageRecipe) -> list[Image.Image]:
    """Decode an image's bytes once, and return its crop for each transform. ImageError if bad."""
    return _crops(_decoded(data, recipe), recipe)


def _decoded(data: bytes, recipe: ImageRecipe) -> Decoded:
    side = None if recipe.exact or recipe.hash_pixels else max(t.resize for t in recipe.transforms)
    return decode(data, side=side, window=recipe.window, frame=recipe.frame)


def hash_pixels(image: Image.Image) -> str:
    """Return the hex SHA-256 of an image's size and its pixels in RGB."""
    digest = hashlib.sha256(repr(image.size).encode())
    for _, band in bands(image):
        digest.update(band.convert("RGB").tobytes())
    return digest.hexdigest()


def _crops(decoded: Decoded, recipe: ImageRecipe) -> list[Image.Image]:
    return [transform.crop(decoded, exact=recipe.exact) for transform in recipe.transforms]


def main() -> None:
    """Be a worker: a recipe on the first line of standard input, then a path on each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent says
    os.nice(19)
    with suppress(OSError):  # what is ended first where memory runs out (Linux)
        Path("/proc/self/oom_score_adj").write_bytes(b"1000")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode has a limit
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    sys.stdout = sys.stderr  # what a library prints must not get between the answers
    given = json.loads(requests.readline())
    recipe = ImageRecipe(tuple(Transform(**t) for t in given.pop("transforms")), **given)
    space = limits.AddressSpace()
    for line in requests:
        space.limit()
        loaded, pixels = load(locate(json.loads(line)), recipe)
        answers.write(json.dumps(asdict(loaded)).encode() + b"\n")
        for block in pixels:
            answers.write(np.ascontiguousarray(block).data)
        answers.flush()


class _Process:
    """One worker as its thread sees it."""

    def __init__(self, recipe: ImageRecipe) -> None:
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("MEDPROBE_DEBUG") == "1" else subprocess.DEVNULL,
            env=environment(),
        )
        self.send(asdict(recipe))

    def send(self, value: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(value).encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, path: Location, into: Sequence[memoryview]) -> Loaded:
        """Return an image's facts and fill its pixels in; EOFError if the process has ended."""
        answers = self.process.stdout
        assert answers
        try:
            self.send(str(path))
        except BrokenPipeError:
            raise EOFError from None
        line = answers.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        loaded = Loaded(**json.loads(line))
        for view in () if loaded.reason else into:
            if answers.readinto(view) < len(view):  # type: ignore[attr-defined]
                raise EOFError
        return loaded

    def kill(self) -> None:
        """End the process at once, whatever it does."""
        self.process.kill()

    def close(self) -> int:
        """End the process and return its exit status."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with suppress(BrokenPipeError):
                pipe.close()
        return self.process.wait()


_Request = tuple[Location, Sequence[memoryview], "Future[Loaded]"]


class _SharedLock:
    """Who decodes: any number at once, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy, self._alone = 0, False

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Wait until it may be done, and have it done; alone, nobody else does meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            if alone:
                self._alone = True
                self._changed.wait_for(lambda: not self._busy)
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._alone = self._alone and not alone
                self._changed.notify_all()


class Workers:
    """A growing set of workers, as a context manager."""

    def __init__(self, recipe: ImageRecipe, count: int) -> None:
        limits.memory()  # a wrong setting is said here, not by every worker
        self.recipe = recipe
        self.threads: list[threading.Thread] = []
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._leaving = threading.Event()
        self._turns = _SharedLock()
        self._busy: set[_Process] = set()  # that have an image in hand
        self.grow(count)

    def __enter__(self) -> Self:
        """Return the workers."""
        return self

    def __exit__(self, *_: object) -> None:
        """End them. Nobody waits for an image that is still in hand: it may never come."""
        self._leaving.set()
        for process in list(self._busy):
            process.kill()
        for _thread in self.threads:
            self._requests.put(None)
        for thread in self.threads:
            thread.join()

    def grow(self, count: int) -> None:
        """See that there are at least so many."""
        while len(self.threads) < count:
            thread = threading.Thread(target=self._serve, name="decode", daemon=True)
            self.threads.append(thread)
            thread.start()

    def load(self, path: Location, into: Sequence[memoryview]) -> Future[Loaded]:
        """Have an image read; its pixels go `into` one block of bytes per transform."""
        future: Future[Loaded] = Future()
        self._requests.put((path, into, future))
        return future

    def _serve(self) -> None:
        process: _Process | None = None
        while (request := self._requests.get()) is not None:
            path, into, future = request
            status = 0
            try:
                for alone in (False, True):
                    with self._turns.take(alone=alone):
                        if self._leaving.is_set():
                            future.cancel()
                            break
                        process = process or _Process(self.recipe)
                        try:
                            future.set_result(self._ask(process, path, into))
                            break
                        except EOFError:
                            status, process = process.close(), None
                else:
                    future.set_result(Loaded(reason=str(_ended(status))))
            except Exception as error:  # such as no memory for a new process
                future.set_exception(error)
        if process:
            process.close()

    def _ask(self, process: _Process, path: Location, into: Sequence[memoryview]) -> Loaded:
        self._busy.add(process)
        try:
            if self._leaving.is_set():
                process.kill()
            return process.ask(path, into)
        finally:
            self._busy.discard(process)


def _ended(status: int) -> ImageError:
    """Say how a process ended: a negative status is the signal that ended it."""
    if status >= 0:
        return bad(Reason.ENDED, number=status)
    return bad(Reason.KILLED, number=-status)
