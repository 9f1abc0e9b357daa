"""Workers on other machines, by Ray.

A `Cluster` is connected to; it answers what its machines are like, and gives pools of workers. A
`Pool` is actors that take items from one queue. What a lost worker had in hand is given to another,
and another worker is asked for in its place, which comes when there is room: so a run goes on with
the machines that are left, and takes in those that join.

An error of a worker reaches the driver as it was raised there, without Ray's traces.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # says nothing to anybody about the user
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as later versions do

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from features.errors import ClusterError, MedprobeError
from features.interpreters import elsewhere
from features.plan import ExtractionSettings

LOSSES = 3  # workers that may be lost at one row
LOOK = 0.2  # seconds between two looks at how far the workers are, for up to CROWD of them
CROWD = 100
JOIN = 5.0  # seconds between two looks for room for more workers
LONELY = 60.0  # seconds without any worker after which that is said


@dataclass(frozen=True)
class Share:
    """What a worker takes of a machine."""

    cpus: float
    gpus: float

    def times(self, resources: dict[str, float]) -> int:
        """Return how many workers a machine has room for."""
        fits = [resources.get("CPU", 0) / self.cpus] if self.cpus else []
        fits += [resources.get("GPU", 0) / self.gpus] if self.gpus else []
        return int(min(fits) + 1e-9)


class Cluster:
    """A connection to a Ray cluster, as a context manager.

    address: None for one on this machine, found or started; "auto" for one that is found here, or
    HOST:PORT. gpus: of a worker; None for one where the cluster has any and the device may be cuda.
    cpus: of a worker; None for one, or for as many as there are per GPU.
    """

    def __init__(
        self,
        address: str | None,
        *,
        gpus: float | None = None,
        cpus: float | None = None,
        device: str = "auto",
    ) -> None:
        self._mine = not ray.is_initialized()
        if self._mine:
            _connect(address)
        machines = self._machines()
        if gpus is None:
            gpus = float(device != "cpu" and any(m.get("GPU") for m in machines))
        if cpus is None:
            having = [m for m in machines if m.get("GPU")] if gpus else []
            of_gpus = (m.get("CPU", 0) * gpus // m["GPU"] for m in having)
            cpus = float(max(1, min(of_gpus, default=1)))
        self.share = Share(cpus, gpus)
        self.device = "cuda" if gpus else "cpu"
        each = (f"{m.get('CPU', 0):g} CPUs {m.get('GPU', 0):g} GPUs" for m in machines)
        resources = ", ".join(each)
        if not self.room():
            self.close()
            raise ClusterError(
                f"no machine of the cluster has room for a worker of {cpus:g} CPUs and {gpus:g} "
                f"GPUs: found {resources or 'none'}; see --num-cpus-per-worker and "
                "--num-gpus-per-worker"
            )
        if device == "cuda" and not gpus:
            self.close()
            raise ClusterError(f"--device cuda, and workers without a GPU: found {resources}")

    def __enter__(self) -> Self:
        """Return the cluster."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster."""
        self.close()

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._mine:
            ray.shutdown()

    def room(self) -> int:
        """Return how many workers the machines there now have room for."""
        return sum(self.share.times(m) for m in self._machines())

    def most_on_one(self) -> int:
        """Return how many workers the largest machine has room for."""
        return max(self.share.times(m) for m in self._machines())

    def settle(self, settings: ExtractionSettings) -> ExtractionSettings:
        """Return settings of an extraction as they are for workers here."""
        workers = settings.workers or max(1, int(self.share.cpus))
        return replace(settings, device=self.device, workers=workers)

    def ask(self, question: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """Return what a function returns on a machine with a worker's resources."""
        task = ray.remote(num_cpus=self.share.cpus, num_gpus=self.share.gpus)(question)
        try:
            return ray.get(task.remote(*args, **given))
        except RayError as error:
            raise as_one_line(error) from None

    def pool(self, actor_class: type, *args: Any) -> Pool:
        """Return workers that are each a kind(*args) in a process of its own."""
        return Pool(self, actor_class, args)

    @staticmethod
    def _machines() -> list[dict[str, float]]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _hush() -> None:
    """Keep from standard output, where results go, the pages that Ray prints of a lost machine."""
    from ray._private import worker

    if os.environ.get("MEDPROBE_DEBUG") != "1" and hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def _connect(address: str | None) -> None:
    _hush()
    path = elsewhere()
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"PYTHONPATH": path}} if path else None,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "here" if address == "auto" else f"at {address}"
        raise ClusterError(
            f"no Ray cluster is reached {where}: {str(error).splitlines()[0]} "
            "Start one with `ray start --head`, or leave --address out"
        ) from None


@dataclass
class Pool:
    """Actors of one kind, as a context manager."""

    cluster: Cluster
    actor_class: type
    args: tuple[Any, ...]
    _starting: dict[Any, Any] = field(default_factory=dict)  # what says it is ready -> actor
    _idle: list[Any] = field(default_factory=list)
    _busy: dict[Any, tuple[Any, Any]] = field(default_factory=dict)  # result -> actor, item
    _asked: dict[Any, Any] = field(default_factory=dict)  # answer -> actor
    _answers: dict[Any, Any] = field(default_factory=dict)  # actor -> its last answer
    _joined: float = 0.0  # when it was last looked for room
    _last_asked: float = 0.0  # when the workers were last asked

    def __enter__(self) -> Self:
        """Send to the object store what every worker is made of, once."""
        self.args = tuple(ray.put(arg) for arg in self.args)
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        for actor in self._actors():
            ray.kill(actor)

    def room(self) -> int:
        """Return how many workers there may be."""
        return self.cluster.room()

    def run(
        self,
        method: str,
        items: Sequence[Any],
        *,
        stop: Callable[[], bool] = lambda: False,
        tick: Callable[[], None] = lambda: None,
        in_hand: Callable[[Any], tuple[Any, str]],
        keep_going: bool = False,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield (item, what a worker's method returned for it) as they come in.

        tick is called a few times a second. Once stop says so, workers are told to stop, and no
        further item is begun. in_hand(item) tells a row and what is there in words: ClusterError is
        raised where LOSSES workers were lost at one row. With keep_going errors are yielded
        instead, as what was returned.
        """
        waiting, losses = deque(items), Counter[Any]()
        alone, stopping = time.monotonic(), False
        while waiting or self._busy:
            if stop() and not stopping:
                stopping = True
                waiting.clear()
                self._stop_workers()
                continue
            self._join(len(waiting) + len(self._busy))
            self._hand_out(method, waiting)
            ready, _ = ray.wait([*self._busy, *self._starting], timeout=LOOK)
            for ref in ready:
                if ref in self._starting:
                    self._begun(ref)
                    continue
                item, result = self._receive(ref)
                if isinstance(result, RayActorError):
                    row, where = in_hand(item)
                    losses[row] += not result.preempted
                    if losses[row] < LOSSES:
                        waiting.appendleft(item)
                        continue
                    result = _too_many_lost(where, result)
                if isinstance(result, Exception) and not keep_going:
                    raise result
                yield item, result
            if self._busy or self._idle:
                alone = time.monotonic()
            elif time.monotonic() - alone > LONELY:
                warnings.warn("no worker is left: waiting for machines to join", stacklevel=2)
                alone = float("inf")
            tick()

    def asked(self, method: str) -> list[Any]:
        """Return what the busy workers last answered to a method, without waiting for them."""
        busy = [actor for actor, _ in self._busy.values()]
        waiting = set(self._asked.values())
        if time.monotonic() - self._last_asked > LOOK * max(1.0, len(busy) / CROWD):
            self._last_asked = time.monotonic()
            for actor in busy:
                if actor not in waiting:
                    self._asked[getattr(actor, method).remote()] = actor
        for ref in ray.wait([*self._asked], num_returns=len(self._asked), timeout=0)[0]:
            actor = self._asked.pop(ref)
            try:
                self._answers[actor] = ray.get(ref)
            except RayError:  # it is lost, and `run` will hear of it
                continue
        return [self._answers[actor] for actor in busy if actor in self._answers]

    def _actors(self) -> list[Any]:
        busy = [actor for actor, _ in self._busy.values()]
        return [*self._starting.values(), *self._idle, *busy]

    def _join(self, wanted: int) -> None:
        """See that there are as many workers as there is room and work for."""
        if self._joined and time.monotonic() - self._joined < JOIN:
            return
        self._joined = time.monotonic()
        for _ in range(min(self.room(), wanted) - len(self._actors())):
            share = self.cluster.share
            actor: Any = (
                ray.remote(self.actor_class)
                .options(num_cpus=share.cpus, num_gpus=share.gpus, max_concurrency=2)
                .remote(*self.args)
            )
            self._starting[actor.__ray_ready__.remote()] = actor

    def _stop_workers(self) -> None:
        for actor, _ in self._busy.values():
            actor.stop.remote()

    def _hand_out(self, method: str, waiting: deque[Any]) -> None:
        """Give each idle worker the next item, as long as there are some."""
        while waiting and self._idle:
            actor, item = self._idle.pop(), waiting.popleft()
            self._busy[getattr(actor, method).remote(item)] = actor, item

    def _receive(self, ref: Any) -> tuple[Any, Any]:
        """Return an item, and what its worker returned or raised: RayActorError if it was lost."""
        actor, item = self._busy.pop(ref)
        try:
            result = ray.get(ref)
        except RayActorError as error:
            self._lost(actor)
            return item, error
        except RayError as error:
            result = as_one_line(error)
        self._idle.append(actor)
        return item, result

    def _begun(self, ref: Any) -> None:
        actor = self._starting.pop(ref)
        try:
            ray.get(ref)
        except RayActorError as error:
            self._lost(actor)
            if error.actor_init_failed:  # its own fault: the next would end the same way
                raise ClusterError(f"a worker can't start: {reason(error)}") from None
        except RayError as error:
            raise as_one_line(error) from None
        else:
            self._idle.append(actor)

    def _lost(self, actor: Any) -> None:
        """Make sure that a lost worker is gone, and ask for another."""
        ray.kill(actor)
        self._joined = 0.0


def _too_many_lost(where: str, error: RayActorError) -> ClusterError:
    return ClusterError(
        f"{LOSSES} workers were lost at {where}: {reason(error)}. What is stored "
        "stays; look at what is there, or give workers more memory "
        "(--num-cpus-per-worker)"
    )


def as_one_line(error: RayError) -> Exception:
    """Return what went wrong on a worker as an error of one or two lines."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MedprobeError):
        return type(cause)(str(cause))
    return ClusterError(f"a worker failed: {type(cause).__name__}: {reason(cause)}")


def reason(error: BaseException) -> str:
    """Return what Ray says of a lost worker, or a failed one, in one sentence."""
    lines = str(error).strip().splitlines()
    if getattr(error, "actor_init_failed", False):  # a trace: its last line is the error
        return lines[-1].strip()
    text = lines[-1] if isinstance(error, RayActorError) else lines[0]
    return text.partition("exit detail: ")[2].partition(". ")[0] or text.partition(". ")[0]
