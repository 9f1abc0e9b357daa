"""What a worker has of a fit over rows that lie in several processes: a block of them.

A block holds its rows and an ordinary LocalObjective of them, without penalty, and answers with
sums over them. Curvature stays here, by the number of the evaluation that gave it: the driver names
it by a location, (evaluations, heads), two lists of H numbers. Shapes as in objective.py; n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from features.memory import COPIES, available
from probe.solve.coordinates import Units
from probe.solve.head_set import HeadSet
from probe.solve.losses import Loss, Sigmoid, Softmax
from probe.solve.objective import LocalObjective, Point
from probe.solve.rows import LocalRows
from probe.solve.sources import FromStore, InMemory, Source, column_sums, root_sum_squares

Location = tuple[list[int], list[int]]  # of curvature: which evaluation's, and which head there
NOWHERE: tuple[Location, Tensor] = ([], []), torch.empty(0)


@dataclass(frozen=True)
class HeadSelection:
    """Which weighting and which column of labels each head has, as in a HeadSet and its loss.

    key: of the worker's objective, by type. group (H,), column (H,) or None of softmax.
    """

    key: str
    group: Tensor
    column: Tensor | None


class Block:
    """What runs on a worker: some of the rows, and the loss over them."""

    rows: LocalRows
    _source: Source

    def __init__(self, device: str, sharing: int) -> None:
        self._device, self._sharing = torch.device(device), sharing
        self._objectives: dict[str, LocalObjective] = {}
        self._curvature: dict[int, Tensor] = {}
        self._last_used = NOWHERE

    def load(self, source: Source) -> Tensor:
        """Read a block's rows (n, D) into memory, where they fit; return their sum, (D,)."""
        n, D = source.shape
        if isinstance(source, FromStore):
            free_bytes = available(self._device) // self._sharing
            source = replace(source, free_bytes=free_bytes)
            if free_bytes >= COPIES * 4 * n * D:
                source = InMemory(torch.cat(list(source.chunks())))
        self._source = source
        return column_sums(source, self._device).cpu()

    def root_sum_squares(self, shift: Tensor) -> float:
        """Return the root of the sum of squares about a shift (D,)."""
        return root_sum_squares(self._source, shift.to(self._device))

    def arrange(self, row_class: Tensor | None, units: Units) -> Tensor:
        """Sort the rows by class (n,) and bring them into units; return their order, (n,)."""
        row_class = None if row_class is None else row_class.to(self._device)
        units = units.to(self._device)
        rows = LocalRows.in_units(self._source, row_class, self._device, units)
        self.rows = rows.loaded(to_span=False) if isinstance(self._source, InMemory) else rows
        return self.rows.order.cpu()

    def hold(self, key: str, dtype: torch.dtype, labels: Tensor | None, weights: Tensor) -> None:
        """Take the labels (L, n), None of softmax, and the weights (G, n) of the rows."""
        self._curvature, self._last_used = {}, NOWHERE
        none = weights.new_empty(0)
        loss: Loss = Softmax()
        if labels is not None:
            loss = Sigmoid(labels.to(self._device), none)
        heads = HeadSet(
            loss=loss,
            weights=weights.to(self._device),
            l2=none,
            group=none,
            bases=[],
            basis=none,
        )
        self._objectives[key] = LocalObjective(heads, self.rows.to(dtype))

    def evaluate(
        self, selection: HeadSelection, theta: Tensor, evaluation: int, alive: set[int]
    ) -> tuple[Tensor, Tensor]:
        """Return value (H,) and gradient (H, K, D) at theta (H, K, D).

        The curvature is kept under the number of this evaluation, beside those still alive.
        """
        point = self._objective(selection)(theta.to(self._device))
        kept = {n: c for n, c in self._curvature.items() if n in alive}
        self._curvature = kept | {evaluation: point.curvature}
        self._last_used = NOWHERE
        return point.value.cpu(), point.gradient.cpu()

    def product(self, selection: HeadSelection, location: Location, V: Tensor) -> Tensor:
        """Return the Hessian times V, (H, K, D)."""
        V = V.to(self._device)
        return self._objective(selection).hessian_product(self._point(location, V), V).cpu()

    def mean_curvature(self, selection: HeadSelection, location: Location) -> Tensor:
        """Return the sum over rows of what one row's curvature is by classes, (H, K, K)."""
        objective = self._objective(selection)
        return objective.mean_curvature(self._point(location, objective.l2)).cpu()

    def curvature(self, location: Location) -> Tensor:
        """Return the curvature of one head, (K, n)."""
        return self._find(location)[0].cpu()

    def grams(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the Gram matrix (D, D) of each weighting (n,) of the rows."""
        return [gram.cpu() for gram in self.rows.grams([w.to(self._device) for w in weights])]

    def take(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the rows of an index (R,), (R, width)."""
        return self.rows.to(dtype).take(index.to(self._device)).cpu()

    def _objective(self, selection: HeadSelection) -> LocalObjective:
        """Return the loss of some heads over the block, without penalty: the driver adds that."""
        whole = self._objectives[selection.key]
        loss, group = whole.heads.loss, selection.group.to(self._device)
        if isinstance(loss, Sigmoid) and selection.column is not None:
            loss = replace(loss, column=selection.column.to(self._device))
        l2 = whole.heads.weights.new_zeros(len(group))
        return replace(whole, heads=replace(whole.heads, loss=loss, l2=l2, group=group))

    def _point(self, location: Location, like: Tensor) -> Point:
        """Return a point of which only the curvature (H, K, n) is known, in the type of `like`."""
        curvature = self._find(location)
        H, K = curvature.shape[:2]
        return Point(like.new_empty(0), like.new_empty(H, K, 0), curvature)

    def _find(self, location: Location) -> Tensor:
        """Return the curvature of heads, (H, K, n), collected once for as long as it is used."""
        if self._last_used[0] != location:
            evaluations, heads = location
            found = [self._curvature[n] for n in evaluations]
            whole = len(set(evaluations)) == 1 and heads == list(range(len(found[0])))
            pairs = zip(found, heads, strict=True)
            view = found[0] if whole else torch.stack([c[h] for c, h in pairs])
            self._last_used = (location, view)
        return self._last_used[1]
