"""Processes that read and decode images, and the threads that wait for them.

Each worker is a process of its own, so that a decoder that crashes on a damaged file takes nothing
with it: the image is tried once more in a new process, then recorded as bad. The parent writes a
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
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from features import augment
from features.dicom import Window
from features.errors import ImageError
from features.images import Transform, decode, read_bytes
from features.urls import Location, locate

COMMAND = (sys.executable, "-c", "from features.workers import main; main()")
TRIES = 2  # of an image that a worker dies on


@dataclass(frozen=True)
class Recipe:
    """What is made of every image: for each transform its crop, then `views` changed ones."""

    transforms: tuple[Transform, ...]
    exact: bool = False
    views: int = 0
    seed: int = 0  # of the views
    window: Window | None = None  # for DICOM, as frame
    frame: int | None = None


@dataclass(frozen=True)
class Loaded:
    """What is known of an image's file, or why the image is bad (then size and time may be 0)."""

    hash: str = ""  # hex SHA-256 of the bytes, also of those that can't be decoded
    size: int = 0
    mtime_ns: int = 0
    reason: str = ""
    seconds: float = 0.0  # that reading and decoding took


def load(path: Location, recipe: Recipe) -> tuple[Loaded, list[NDArray[np.uint8]]]:
    """Read an image; return its facts and, per transform, (1 + views, size, size, 3) pixels."""
    start = time.perf_counter()
    known: dict[str, Any] = {}
    try:
        data = read_bytes(path)
        known = {
            "hash": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "mtime_ns": path.stat().st_mtime_ns,
        }
        pixels = []
        for crop in crops(data, recipe):
            views = [
                augment.augment(crop, augment.generator(recipe.seed, known["hash"], view))
                for view in range(recipe.views)
            ]
            pixels.append(np.stack([np.asarray(image) for image in (crop, *views)]))
    except (ImageError, OSError, MemoryError) as error:
        return Loaded(**known, reason=str(error) or "not enough memory"), []
    return Loaded(**known, seconds=time.perf_counter() - start), pixels


def crops(data: bytes, recipe: Recipe) -> list[Image.Image]:
    """Decode an image's bytes once, and return its crop for each transform. ImageError if bad."""
    side = None if recipe.exact else max(t.resize for t in recipe.transforms)
    decoded = decode(data, side=side, window=recipe.window, frame=recipe.frame)
    return [transform.crop(decoded, exact=recipe.exact) for transform in recipe.transforms]


def main() -> None:
    """Be a worker: a recipe on the first line of standard input, then a path on each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent says
    os.nice(19)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode has a limit
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    sys.stdout = sys.stderr  # what a library prints must not get between the answers
    given = json.loads(requests.readline())
    recipe = Recipe(tuple(Transform(**t) for t in given.pop("transforms")), **given)
    for line in requests:
        loaded, pixels = load(locate(json.loads(line)), recipe)
        answers.write(json.dumps(asdict(loaded)).encode() + b"\n")
        for block in pixels:
            answers.write(np.ascontiguousarray(block).data)
        answers.flush()


class _Process:
    """One worker as its thread sees it."""

    def __init__(self, recipe: Recipe) -> None:
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("MEDPROBE_DEBUG") == "1" else subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
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

    def close(self) -> int:
        """End the process and return its exit status."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            with suppress(BrokenPipeError):
                pipe.close()
        return self.process.wait()


_Request = tuple[Location, Sequence[memoryview], "Future[Loaded]"]


class Workers:
    """A growing set of workers, as a context manager."""

    def __init__(self, recipe: Recipe, count: int) -> None:
        self.recipe = recipe
        self.threads: list[threading.Thread] = []
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._leaving = threading.Event()
        self.grow(count)

    def __enter__(self) -> Self:
        """Return the workers."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let each finish the image in hand, and end."""
        self._leaving.set()
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
            if self._leaving.is_set():
                future.cancel()
                continue
            status = 0
            try:
                for _ in range(TRIES):
                    process = process or _Process(self.recipe)
                    try:
                        future.set_result(process.ask(path, into))
                        break
                    except EOFError:
                        status, process = process.close(), None
                else:
                    future.set_result(Loaded(reason=f"decoding it {_ending(status)}, twice"))
            except Exception as error:  # such as no memory for a new process
                future.set_exception(error)
        if process:
            process.close()


def _ending(status: int) -> str:
    """Say how a process ended: a negative status is the signal that ended it."""
    if status >= 0:
        return f"ended the worker process with status {status}"
    return f"killed the worker process ({signal.Signals(-status).name})"
