"""The penalised loss of many heads over rows that lie in the memory of several processes.

Everything in objective.py is a sum over rows. Each worker holds a block of the rows (block.py); the
driver runs the solver on an objective that adds up the workers' values, gradients and Hessian
products, and adds the penalty itself. What is one number per row stays where the row is: of the
curvature the driver has a `Held`, which says where it lies.

Shapes as in objective.py; block w has the rows offsets[w] to offsets[w + 1] of the driver's order.
"""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError
from torch import Tensor

from features.cluster import LONELY, Cluster, reason, told
from features.errors import ClusterError
from probe.block import Block, Which
from probe.heads import Heads, fit_heads
from probe.solve.objective import Objective, Point
from probe.solve.rows import Rows, Source, rounded, unit

TRIES = 3  # of a fit whose workers are lost
LEAST = 1024  # rows of a block: for fewer a worker is not worth its messages


class LostError(ClusterError):
    """A worker is gone, and with it the rows that it held."""


class Mark:
    """A curvature that workers hold, for as long as somebody refers to it."""


class Held:
    """The curvature of heads, held by the workers: which evaluation's (H,), and which head there.

    It is indexed and written to by head, as the tensor (H, K, N) would be.
    """

    def __init__(self, number: Tensor, head: Tensor, marks: dict[int, Mark]) -> None:
        self.number, self.head = number, head
        self._marks = {n: marks[n] for n in set(number.tolist())}

    def __getitem__(self, heads: Tensor) -> Held:
        """Return the curvature of some heads."""
        heads = heads.cpu()
        return Held(self.number[heads], self.head[heads], self._marks)

    def __setitem__(self, heads: Tensor, other: Held) -> None:
        """Put others' in the place of some heads'."""
        heads = heads.cpu()
        self.number[heads], self.head[heads] = other.number, other.head
        self._marks |= other._marks

    @property
    def place(self) -> tuple[list[int], list[int]]:
        """Return what a worker finds it by."""
        return self.number.tolist(), self.head.tolist()


@dataclass(frozen=True)
class SpreadRows(Rows):
    """Rows of which the driver has no more than the order."""

    team: Team | None = None
    offsets: tuple[int, ...] = ()

    @property
    def together(self) -> int:
        """Return how many rows lie in one process."""
        return max(b - a for a, b in itertools.pairwise(self.offsets))

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut (..., N) into what belongs to each block."""
        return [values[..., a:b].clone() for a, b in itertools.pairwise(self.offsets)]

    def grams(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the Gram matrix of each weighting (N,) of the rows."""
        if not weights or self.team is None:
            return []
        parts = zip(*(self.split(w) for w in weights), strict=True)
        found = self.team.each("grams", parts=[(list(part),) for part in parts])
        return [torch.stack(same).sum(0).to(self.device) for same in zip(*found, strict=True)]

    def take(self, which: Tensor) -> Tensor:
        """Return the rows of an index (R,), (R, width)."""
        assert self.team
        out = torch.empty(len(which), self.width, dtype=self.dtype)
        which = which.cpu()
        inside = [(which >= a) & (which < b) for a, b in itertools.pairwise(self.offsets)]
        parts = [
            (which[here] - a, self.dtype) for here, a in zip(inside, self.offsets[:-1], strict=True)
        ]
        for here, found in zip(inside, self.team.each("take", parts=parts), strict=True):
            out[here] = found
        return out.to(self.device)


@dataclass(frozen=True)
class SpreadObjective(Objective):
    """H penalised losses over rows that workers hold."""

    team: Team | None = None
    key: str = ""

    def __call__(self, theta: Tensor) -> Point:
        """Evaluate all heads at theta (H, K, D)."""
        assert self.team
        number, mark = self.team.mark()
        alive = set(self.team.marks)
        found = self.team.each("evaluate", self.which, theta.cpu(), number, alive)
        value = 0.5 * self.l2.double() * theta[..., :-1].double().square().sum((1, 2))
        gradient = self.penalised(theta)
        for one, pull in found:
            value += one.to(value.device)
            gradient += pull.to(gradient.device)
        every = torch.arange(len(theta))
        curvature = Held(torch.full_like(every, number), every, {number: mark})
        return Point(value, gradient, curvature)  # type: ignore[arg-type]

    @property
    def which(self) -> Which:
        """Return what workers must know of the heads."""
        column = None if self.column is None else self.column.cpu()
        return Which(self.key, self.group.cpu(), column)

    def hessian_product(self, point: Point, V: Tensor) -> Tensor:
        """Return the Hessian at a point times V, both (H, K, D)."""
        assert self.team
        out = self.penalised(V)
        for part in self.team.each("product", self.which, place_of(point), V.cpu()):
            out += part.to(out.device)
        return out

    def mean_curvature(self, point: Point) -> Tensor:
        """Return sum_i w_i (diag(p_i) - p_i p_i') without its diagonal, (H, K, K) in float64."""
        assert self.team
        found = self.team.each("mean_curvature", self.which, place_of(point))
        return torch.stack(found).sum(0).to(self.l2.device)

    def curvature_of(self, point: Point, head: int) -> Tensor:
        """Return the curvature of one head at all rows, (K, N)."""
        assert self.team
        numbers, heads = place_of(point)
        found = self.team.each("curvature", ([numbers[head]], [heads[head]]))
        return torch.cat(found, 1).to(self.l2.device)


def place_of(point: Point) -> tuple[list[int], list[int]]:
    """Return where workers find a point's curvature."""
    held: Any = point.curvature
    assert isinstance(held, Held)
    return held.place


class Team:
    """Workers that hold the rows of one fit after the other, as a context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._workers: list[Any] = []
        self._numbers = itertools.count()
        self.marks: weakref.WeakValueDictionary[int, Mark] = weakref.WeakValueDictionary()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        self._leave()

    def fit_heads(self, X: Tensor | Source, y: Tensor, **given: Any) -> Heads:
        """Fit heads as heads.fit_heads does; from the start where a worker is lost meanwhile."""
        for _ in range(TRIES - 1):
            try:
                return fit_heads(X, y, engine=self, **given)
            except LostError as error:
                warnings.warn(f"{error}; beginning again with those that are there", stacklevel=2)
        return fit_heads(X, y, engine=self, **given)

    def rows(self, source: Source, kind: Tensor | None, device: torch.device) -> Rows:
        """Deal the rows into blocks and have each measured, as Rows.of does.

        Fewer rows than columns stay in this process.
        """
        N, D = source.shape
        if max(D, LEAST) > N:
            return Rows.of(source, kind, device)
        self._gather(min(self._cluster.room(), N // LEAST))
        edges = np.linspace(0, N, len(self._workers) + 1).astype(int).tolist()
        pairs = list(itertools.pairwise(edges))
        sums = self.each("load", parts=[(source.part(a, b),) for a, b in pairs])
        shift = rounded(torch.stack(sums).sum(0) / N, source)
        scale = unit(math.hypot(*self.each("size", shift)), N * D)
        kinds = [None if kind is None else kind[a:b].cpu() for a, b in pairs]
        orders = self.each("arrange", parts=[(k, shift, scale) for k in kinds])
        order = torch.cat([a + order for a, order in zip(edges[:-1], orders, strict=True)])
        order = order.to(device)
        return SpreadRows(
            source=source,
            order=order,
            kind=None if kind is None else kind[order],
            shift=shift.to(device),
            scale=scale,
            turn=None,
            device=device,
            team=self,
            offsets=tuple(edges),
        )

    def objective(self, rows: Rows, **parts: Any) -> Objective:
        """Return the objective over such rows; labels and weights go where the rows are."""
        if not isinstance(rows, SpreadRows):
            return Objective(rows=rows, **parts)
        key = str(rows.dtype)
        y, weights = parts["y"], parts["weights"]
        ys = [None] * len(self._workers) if y is None else rows.split(y.cpu())
        held = zip(ys, rows.split(weights.cpu()), strict=True)
        self.each("hold", key, rows.dtype, parts=list(held))
        return SpreadObjective(rows=rows, team=self, key=key, **parts)

    def mark(self) -> tuple[int, Mark]:
        """Return a new number for a curvature, and what keeps it alive."""
        number, mark = next(self._numbers), Mark()
        self.marks[number] = mark
        return number, mark

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
            raise told(error) from None

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
