"""What a worker has of a fit over rows that lie in several processes: a block of them.

A block holds its rows and an ordinary Objective of them, without penalty, and answers with sums
over them. Curvature stays here, by the number of the evaluation that gave it. Shapes as in
objective.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from features.memory import COPIES, available
from probe.solve.objective import Objective, Point
from probe.solve.rows import Rows, Source, Stored, Whole, size, total

NOTHING: tuple[Any, Tensor] = (), torch.empty(0)


@dataclass(frozen=True)
class Which:
    """Which weighting and which column of labels each head has, as in an Objective."""

    key: str  # of the worker's objective, by type
    group: Tensor
    column: Tensor | None


class Block:
    """What runs on a worker: some of the rows, and the loss over them."""

    rows: Rows
    _source: Source

    def __init__(self, device: str, sharing: int) -> None:
        self._device, self._sharing = torch.device(device), sharing
        self._objectives: dict[str, Objective] = {}
        self._curvature: dict[int, Tensor] = {}
        self._view = NOTHING  # the one that was used last

    def load(self, source: Source) -> Tensor:
        """Read a block's rows into memory, where they fit; return their sum."""
        N, D = source.shape
        if isinstance(source, Stored):
            room = available(self._device) // self._sharing
            source = replace(source, room=room)
            if room >= COPIES * 4 * N * D:
                source = Whole(torch.cat(list(source.chunks())))
        self._source = source
        return total(source, self._device).cpu()

    def size(self, shift: Tensor) -> float:
        """Return the root of the sum of squares about a shift."""
        return size(self._source, shift.to(self._device))

    def arrange(self, kind: Tensor | None, shift: Tensor, scale: float) -> Tensor:
        """Sort the rows by class and bring them into units; return their order."""
        kind = None if kind is None else kind.to(self._device)
        shift = shift.to(self._device)
        rows = Rows.in_units(self._source, kind, self._device, shift, scale)
        self.rows = rows.keep(all_rows=False) if isinstance(self._source, Whole) else rows
        return self.rows.order.cpu()

    def hold(self, key: str, dtype: torch.dtype, y: Tensor | None, weights: Tensor) -> None:
        """Take the labels and weights of the rows."""
        self._curvature, self._view = {}, NOTHING
        none = weights.new_empty(0)
        self._objectives[key] = Objective(
            rows=self.rows.to(dtype),
            y=None if y is None else y.to(self._device),
            weights=weights.to(self._device),
            bases=[],
            l2=none,
            group=none,
            basis=none,
        )

    def evaluate(
        self, which: Which, theta: Tensor, number: int, alive: set[int]
    ) -> tuple[Tensor, Tensor]:
        """Return value (H,) and gradient (H, K, D); keep the curvature, and those still alive."""
        point = self._objective(which)(theta.to(self._device))
        kept = {n: c for n, c in self._curvature.items() if n in alive}
        self._curvature = kept | {number: point.curvature}
        self._view = NOTHING
        return point.value.cpu(), point.gradient.cpu()

    def product(self, which: Which, place: tuple[list[int], list[int]], V: Tensor) -> Tensor:
        """Return the Hessian times V, (H, K, D)."""
        V = V.to(self._device)
        return self._objective(which).hessian_product(self._point(place, V), V).cpu()

    def mean_curvature(self, which: Which, place: tuple[list[int], list[int]]) -> Tensor:
        """Return the sum over rows of what one row's curvature is by classes, (H, K, K)."""
        objective = self._objective(which)
        return objective.mean_curvature(self._point(place, objective.weights)).cpu()

    def curvature(self, place: tuple[list[int], list[int]]) -> Tensor:
        """Return the curvature of one head, (K, n)."""
        return self._find(place)[0].cpu()

    def grams(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the Gram matrix of each weighting (n,) of the rows."""
        return [gram.cpu() for gram in self.rows.grams([w.to(self._device) for w in weights])]

    def take(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        """Return some rows, (R, width)."""
        return self.rows.to(dtype).take(which.to(self._device)).cpu()

    def _objective(self, which: Which) -> Objective:
        whole = self._objectives[which.key]
        column = None if which.column is None else which.column.to(self._device)
        group = which.group.to(self._device)
        return replace(whole, l2=whole.weights.new_zeros(len(group)), group=group, column=column)

    def _point(self, place: tuple[list[int], list[int]], like: Tensor) -> Point:
        """Return a point of which only the curvature is known."""
        curvature = self._find(place)
        H, K = curvature.shape[:2]
        return Point(like.new_empty(0), like.new_empty(H, K, 0), curvature)

    def _find(self, place: tuple[list[int], list[int]]) -> Tensor:
        """Return the curvature of heads, (H, K, n), collected once for as long as it is used."""
        if self._view[0] != place:
            numbers, heads = place
            found = [self._curvature[n] for n in numbers]
            whole = len(set(numbers)) == 1 and heads == list(range(len(found[0])))
            pairs = zip(found, heads, strict=True)
            view = found[0] if whole else torch.stack([c[h] for c, h in pairs])
            self._view = (place, view)
        return self._view[1]
