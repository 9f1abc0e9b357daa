"""The penalised loss of many heads over rows that lie in the memory of several processes.

Everything in objective.py is a sum over rows. Each worker holds a block of the rows (block.py); the
driver runs the solver on a RemoteObjective that adds up the workers' values, gradients and Hessian
products, and adds the penalty itself. What is one number per row stays where the row is: of the
curvature the driver has a RemoteCurvature, which says where it lies.

Shapes as in objective.py; block w has the rows offsets[w] to offsets[w + 1] of the driver's order.
"""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError
from torch import Tensor

from features.cluster import LONELY, Cluster, as_one_line, reason
from features.errors import ClusterError
from probe.block import Block, HeadSelection, Location
from probe.heads import Heads, fit_heads
from probe.solve.coordinates import Units
from probe.solve.head_set import HeadSet
from probe.solve.losses import Sigmoid
from probe.solve.objective import OverHeads, Point
from probe.solve.rows import LocalRows
from probe.solve.sources import Source, power_of_two_scale, representable

MAX_TRIES = 3  # of a fit whose workers are lost
MIN_BLOCK_ROWS = 1024  # for fewer a worker is not worth its messages, of about 10 ms each


class LostError(ClusterError):
    """A worker is gone, and with it the rows that it held."""


class Lease:
    """A curvature that workers hold, for as long as somebody refers to it."""


class RemoteCurvature:
    """The curvature of heads that workers hold: which evaluation's (H,), and which head there (H,).

    It is indexed and written to by head, as the tensor (H, K, N) would be.
    """

    def __init__(self, evaluation: Tensor, head: Tensor, leases: dict[int, Lease]) -> None:
        self.evaluation, self.head = evaluation, head
        self._leases = {n: leases[n] for n in set(evaluation.tolist())}

    def __getitem__(self, heads: Tensor) -> RemoteCurvature:
        """Return the curvature of the heads of an index (H',)."""
        heads = heads.cpu()
        return RemoteCurvature(self.evaluation[heads], self.head[heads], self._leases)

    def __setitem__(self, heads: Tensor, other: RemoteCurvature) -> None:
        """Write another curvature's heads (H') over those of an index (H',)."""
        heads = heads.cpu()
        self.evaluation[heads], self.head[heads] = other.evaluation, other.head
        self._leases |= other._leases

    @property
    def location(self) -> Location:
        """Return what a worker finds it by."""
        return self.evaluation.tolist(), self.head.tolist()


@dataclass(frozen=True)
class RemoteRows:
    """Rows of which the driver has no more than the order, (N,). They are not turned."""

    order: Tensor
    units: Units
    workers: RowWorkers
    offsets: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def width(self) -> int:
        """Return the number of columns, with that of ones."""
        return len(self.units.shift) + 1

    @property
    def in_memory(self) -> bool:
        """Say that a pass asks other processes."""
        return False

    @property
    def rows_per_process(self) -> int:
        """Return how many rows lie in one process, at most."""
        return max(b - a for a, b in itertools.pairwise(self.offsets))

    def __len__(self) -> int:
        """Return N."""
        return len(self.order)

    def to(self, dtype: torch.dtype) -> RemoteRows:
        """Return the rows in another type."""
        return replace(self, dtype=dtype)

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut (..., N) into what belongs to each block."""
        return [values[..., a:b].clone() for a, b in itertools.pairwise(self.offsets)]

    def grams(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the Gram matrix (width, width) of each weighting (N,) of the rows, in float64."""
        if not weights:
            return []
        parts = zip(*(self.split(w) for w in weights), strict=True)
        found = self.workers.each("grams", parts=[(list(part),) for part in parts])
        device = self.order.device
        return [torch.stack(same).sum(0).to(device) for same in zip(*found, strict=True)]

    def take(self, index: Tensor) -> Tensor:
        """Return the rows of an index (R,), (R, width)."""
        out = torch.empty(len(index), self.width, dtype=self.dtype)
        index = index.cpu()
        inside = [(index >= a) & (index < b) for a, b in itertools.pairwise(self.offsets)]
        parts = [
            (index[mine] - a, self.dtype) for mine, a in zip(inside, self.offsets[:-1], strict=True)
        ]
        for mine, found in zip(inside, self.workers.each("take", parts=parts), strict=True):
            out[mine] = found
        return out.to(self.order.device)

    def objective(self, heads: HeadSet) -> RemoteObjective:
        """Return the objective of heads over them; labels and weights go where the rows are."""
        key = str(self.dtype)
        labels: Sequence[Tensor | None] = [None] * self.workers.count
        if isinstance(heads.loss, Sigmoid):
            labels = self.split(heads.loss.labels.cpu())
        held = zip(labels, self.split(heads.weights.cpu()), strict=True)
        self.workers.each("hold", key, self.dtype, parts=list(held))
        return RemoteObjective(heads, self, key)


@dataclass(frozen=True)
class RemoteObjective(OverHeads):
    """H penalised losses over rows that workers hold, under a key."""

    heads: HeadSet
    rows: RemoteRows
    key: str

    @property
    def bf16(self) -> None:
        """Say that no rows are at bfloat16: a message takes longer than a product."""
        return

    def select(self, heads: Tensor) -> RemoteObjective:
        """Keep the heads of an index (H',)."""
        return replace(self, heads=self.heads.select(heads))

    def __call__(self, theta: Tensor) -> Point:
        """Evaluate all heads at theta (H, K, D)."""
        workers = self.rows.workers
        number, lease = workers.lease()
        alive = set(workers.leases)
        found = workers.each("evaluate", self._selection, theta.cpu(), number, alive)
        value, gradient = self.heads.penalty(theta), self.heads.penalty_gradient(theta)
        for one, part in found:
            value += one.to(value.device)
            gradient += part.to(gradient.device)
        every = torch.arange(len(theta))
        curvature = RemoteCurvature(torch.full_like(every, number), every, {number: lease})
        return Point(value, gradient, curvature)

    @property
    def _selection(self) -> HeadSelection:
        """Return what workers must know of the heads."""
        column = self.heads.loss.column
        return HeadSelection(
            self.key, self.heads.group.cpu(), None if column is None else column.cpu()
        )

    def hessian_product(self, point: Point, V: Tensor) -> Tensor:
        """Return the Hessian at a point times V, both (H, K, D)."""
        out = self.heads.penalty_gradient(V)
        location = point.curvature.location
        for part in self.rows.workers.each("product", self._selection, location, V.cpu()):
            out += part.to(out.device)
        return out

    def mean_curvature(self, point: Point) -> Tensor:
        """Return sum_i w_i C_i, (H, K, K) in float64; of softmax without the diag(p) part."""
        location = point.curvature.location
        found = self.rows.workers.each("mean_curvature", self._selection, location)
        return torch.stack(found).sum(0).to(self.l2.device)

    def curvature_of(self, point: Point, head: int) -> Tensor:
        """Return the curvature of one head at all rows, (K, N)."""
        evaluations, heads = point.curvature.location
        location = [evaluations[head]], [heads[head]]
        found = self.rows.workers.each("curvature", location)
        return torch.cat(found, 1).to(self.l2.device)


class RowWorkers:
    """Workers that hold the rows of one fit after the other, as a context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._workers: list[Any] = []
        self._numbers = itertools.count()
        self.leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()

    def __enter__(self) -> Self:
        """Return the workers themselves: they start with the first fit."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        self._leave()

    @property
    def count(self) -> int:
        """Return how many workers there are."""
        return len(self._workers)

    def fit_heads(self, X: Tensor | Source, y: Tensor, **given: Any) -> Heads:
        """Fit heads to X (N, D), y (N,) as heads.fit_heads does; anew where a worker is lost."""
        for _ in range(MAX_TRIES - 1):
            try:
                return fit_heads(X, y, engine=self, **given)
            except LostError as error:
                warnings.warn(f"{error}; beginning again with those that are there", stacklevel=2)
        return fit_heads(X, y, engine=self, **given)

    def rows(
        self, source: Source, row_class: Tensor | None, device: torch.device
    ) -> LocalRows | RemoteRows:
        """Deal the rows of a source (N, D) into blocks and have each measured.

        row_class (N,) as in LocalRows.from_source. Fewer rows than columns stay in this process.
        """
        N, D = source.shape
        if max(D, MIN_BLOCK_ROWS) > N:
            return LocalRows.from_source(source, row_class, device)
        self._gather(min(self._cluster.room(), N // MIN_BLOCK_ROWS))
        edges = np.linspace(0, N, len(self._workers) + 1).astype(int).tolist()
        pairs = list(itertools.pairwise(edges))
        sums = self.each("load", parts=[(source.part(a, b),) for a, b in pairs])
        shift = representable(torch.stack(sums).sum(0) / N, source)
        root = math.hypot(*self.each("root_sum_squares", shift))
        units = Units(shift, power_of_two_scale(root, N * D))
        classes = [None if row_class is None else row_class[a:b].cpu() for a, b in pairs]
        orders = self.each("arrange", parts=[(part, units) for part in classes])
        order = torch.cat([a + order for a, order in zip(edges[:-1], orders, strict=True)])
        return RemoteRows(order.to(device), units.to(device), self, tuple(edges))

    def lease(self) -> tuple[int, Lease]:
        """Return a new number for a curvature, and what keeps it alive."""
        number, lease = next(self._numbers), Lease()
        self.leases[number] = lease
        return number, lease

    def each(
        self, method: str, *common: Any, parts: Sequence[tuple[Any, ...]] | None = None
    ) -> list[Any]:
        """Call a method of every worker, with what is common and what is each one's part."""
        sent = [ray.put(value) if isinstance(value, Tensor) else value for value in common]
        own: Sequence[tuple[Any, ...]] = parts or [()] * len(self._workers)
        calls = [
            getattr(worker, method).remote(*sent, *part)
            for worker, part in zip(self._workers, own, strict=True)
        ]
        try:
            return list(ray.get(calls))
        except RayActorError as error:
            self._leave()
            raise LostError(f"a worker was lost, and the rows it held: {reason(error)}") from None
        except RayError as error:
            raise as_one_line(error) from None

    def _leave(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def _gather(self, count: int) -> None:
        """See that there are so many workers, once the cluster has room for them."""
        share = self._cluster.share
        for _ in range(count - len(self._workers)):
            worker = (
                ray.remote(Block)
                .options(num_cpus=share.cpus, num_gpus=share.gpus)
                .remote(self._cluster.device, self._cluster.most_on_one())
            )
            self._workers.append(worker)
        begun = [worker.__ray_ready__.remote() for worker in self._workers]
        if ray.wait(begun, num_returns=len(begun), timeout=LONELY)[1]:
            warnings.warn("waiting for room: others are using the cluster", stacklevel=2)
