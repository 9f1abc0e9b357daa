"""The rows that heads are fitted to, as the solver sees them: centred, scaled, with a one each.

Shapes: N rows of `width` columns, the features' or r of their directions, and a last one of ones
(coordinates.py). `Rows` is what the solver needs to know of them, wherever they lie; `LocalRows`
are those of this process, kept finished in memory or made chunk by chunk of what a file holds.

Within a chunk rows are sorted by class: a segment of one class needs no lookup of each row's own
logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from probe.solve import factors
from probe.solve.coordinates import Basis, Units
from probe.solve.sources import (
    FromStore,
    InMemory,
    Source,
    column_sums,
    power_of_two_scale,
    representable,
    root_sum_squares,
)

FLOAT64_ROWS = 4096  # that are copied to float64 at once
SPAN = 1e-13  # of the largest eigenvalue of X X': directions with less are rounding
# A weighting that uses this share of all rows takes their basis: a basis costs as much as a hundred
# passes of a head, and folds then turn in one matrix product.
SHARED_BASIS_SHARE = 0.6
SHARED_BASIS_ROWS = 10  # per column, below which folds' Gram matrices differ too much for that


class Rows(Protocol):
    """Rows in the solver's order and units, wherever they lie: what is summed over them."""

    @property
    def order(self) -> Tensor:
        """Return which of the caller's rows stands at each place, (N,)."""
        ...

    @property
    def units(self) -> Units:
        """Return what made them of features."""
        ...

    @property
    def width(self) -> int:
        """Return the number of columns, with that of ones."""
        ...

    @property
    def in_memory(self) -> bool:
        """Say whether a pass reads no file and asks no other process."""
        ...

    @property
    def rows_per_process(self) -> int:
        """Return how many rows lie in one process, at most."""
        ...

    def __len__(self) -> int:
        """Return N."""
        ...

    def to(self, dtype: torch.dtype) -> Self:
        """Return the rows in another type."""
        ...

    def take(self, index: Tensor) -> Tensor:
        """Return the rows of an index (R,), (R, width)."""
        ...

    def grams(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return sum_i w_i z_i z_i' (width, width) of each weighting w (N,), in float64."""
        ...


def bases_of(rows: Rows, weights: Tensor) -> tuple[list[Basis], Tensor]:
    """Return bases for weightings (G, N), and which of them each weighting takes, (G,).

    Weightings that use nearly the same rows share one, that of all their rows.
    """
    # Folds leave out a fifth of the rows or so, each row of the rest with the same weight.
    N, D = len(rows), rows.width
    share = (weights > 0).double().mean(1)
    equal = weights.amax(1) == torch.where(weights > 0, weights, torch.inf).amin(1)
    alike = equal & (share >= SHARED_BASIS_SHARE) & (share * N >= SHARED_BASIS_ROWS * D)
    sets = [w for w, like in zip(weights, alike.tolist(), strict=True) if not like]
    basis = torch.cumsum(~alike, 0) - 1
    if alike.any():
        sets = [torch.ones_like(weights[0]), *sets]
        basis = torch.where(alike, 0, basis + 1)
    return [Basis.from_gram(gram) for gram in rows.grams(sets)], basis


@dataclass(frozen=True)
class LocalRows:
    """Rows of this process.

    order (N,): which of the caller's rows stands at each place. row_class (N,): the class of the
    row at each place, or None where rows of all classes may stand together.
    """

    source: Source
    order: Tensor
    row_class: Tensor | None
    units: Units
    device: torch.device
    dtype: torch.dtype = torch.float32
    kept: Tensor | None = None  # (N, width): the finished rows, where they are in memory

    @classmethod
    def from_source(
        cls, source: Source, row_class: Tensor | None, device: torch.device
    ) -> LocalRows:
        """Measure the rows (N, D), in two passes.

        They are sorted by row_class (N,) within a chunk. Raises ProbeError for a row that is not
        finite.
        """
        N, D = source.shape
        if isinstance(source, FromStore) and N < D:  # few: they are turned, which takes them all
            source = InMemory(torch.cat(list(source.chunks())))
        # Shifted by the mean, scaled by the root mean square of all features together: the penalty
        # counts each coefficient alike, so that no feature may have a scale of its own.
        shift = representable(column_sums(source, device) / N, source)
        scale = power_of_two_scale(root_sum_squares(source, shift), N * D)
        rows = cls.in_units(source, row_class, device, Units(shift, scale))
        return rows.loaded() if isinstance(source, InMemory) else rows

    @classmethod
    def in_units(
        cls, source: Source, row_class: Tensor | None, device: torch.device, units: Units
    ) -> LocalRows:
        """Sort the rows of every chunk by their class (N,); nothing is read."""
        N = source.shape[0]
        order = torch.arange(N, device=device)
        if row_class is not None:
            step = source.chunk_rows
            order = torch.cat(
                [i + row_class[i : i + step].argsort(stable=True) for i in range(0, N, step)]
            )
            row_class = row_class[order]
        return cls(source, order, row_class, units, device)

    def loaded(self, *, to_span: bool = True) -> LocalRows:
        """Hold the finished rows; where N < D, and to_span, in the directions that they span.

        With X X' = U S U' these are X' U S^-1/2 (D, r): the right singular vectors of X, by the
        smaller of the two Gram matrices.
        """
        [X] = self.source.chunks()
        X = (X.to(self.device)[self.order] - self.units.shift.to(X.dtype)) / self.units.scale
        directions = None
        if to_span and X.shape[0] < X.shape[1]:
            Y = X.double()
            spectrum, U = factors.eigh(Y @ Y.T)
            keep = spectrum > spectrum[-1] * SPAN
            if not bool(spectrum.isnan().any()):  # else they stay as they are
                directions = Y.T @ (U[:, keep] / spectrum[keep].sqrt())
                X = Y @ directions
        Z = torch.cat([X, X.new_ones(len(X), 1)], 1)
        return replace(self, units=replace(self.units, directions=directions), kept=Z)

    def to(self, dtype: torch.dtype) -> LocalRows:
        """Return the rows with chunks of another type."""
        kept = None if self.kept is None else self.kept.to(dtype)
        return replace(self, dtype=dtype, kept=kept)

    @property
    def width(self) -> int:
        """Return the number of columns, with that of ones."""
        return self.source.shape[1] + 1 if self.kept is None else self.kept.shape[1]

    @property
    def in_memory(self) -> bool:
        """Say whether a pass reads no file."""
        return self.kept is not None

    @property
    def rows_per_process(self) -> int:
        """Return N: all lie here."""
        return len(self)

    def __len__(self) -> int:
        """Return N."""
        return len(self.order)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the place of a chunk's first row, and the chunk (n, width)."""
        if self.kept is not None:
            yield 0, self.kept
            return
        scale = self.units.scale
        start, offset = 0, (-self.units.shift / scale).to(self.dtype)
        for X in self.source.chunks():
            order = self.order[start : start + len(X)] - start
            # Moved before it is sorted and cast: the file's float32 is the least to move.
            X = X.to(self.device).index_select(0, order).to(self.dtype)
            Z = X.new_empty(len(X), X.shape[1] + 1)
            Z[:, -1] = 1
            torch.add(offset, X, alpha=1 / scale, out=Z[:, :-1])  # (x - shift) / scale in one pass
            yield start, Z
            start += len(Z)

    def blocks(self, step: int) -> Iterator[tuple[slice, Tensor, int]]:
        """Yield ranges of at most `step` rows of one class, their rows Z (n, width), and the class.

        Where no class was given it is 0.
        """
        for start, Z in self.chunks():
            for first, last, row_class in self._segments(start, start + len(Z)):
                # Pieces of equal size, about a step each: a short last one costs as a long one.
                pieces = max(1, round((last - first) / step))
                size = -(-(last - first) // pieces)
                for i in range(first, last, size):
                    stop = min(i + size, last)
                    yield slice(i, stop), Z[i - start : stop - start], row_class

    def _segments(self, start: int, stop: int) -> Sequence[tuple[int, int, int]]:
        """Return (first, last, class) of the segments of one class between two places."""
        if self.row_class is None:
            return [(start, stop, 0)]
        part = self.row_class[start:stop]
        classes, counts = part.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        ends = (start + counts.cumsum(0)).tolist()
        return list(zip([start, *ends[:-1]], ends, classes.tolist(), strict=True))

    def in_bf16(self, B: Tensor) -> LocalRows:
        """Return the kept rows times B (width, width), at bfloat16: half the memory, and faster."""
        assert self.kept is not None
        turned = torch.cat(
            [(Z @ B.to(Z.dtype)).to(torch.bfloat16) for Z in torch.split(self.kept, FLOAT64_ROWS)]
        )
        return replace(self, kept=turned, dtype=torch.bfloat16)

    def take(self, index: Tensor) -> Tensor:
        """Return the rows of an index (R,), (R, width)."""
        if self.kept is not None:
            return self.kept[index]
        out = torch.empty(len(index), self.width, dtype=self.dtype, device=self.device)
        for start, Z in self.chunks():
            inside = ((index >= start) & (index < start + len(Z))).nonzero()[:, 0]
            out[inside] = Z[index[inside] - start]
        return out

    def grams(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return sum_i w_i z_i z_i' (width, width) of each weighting w (N,), in float64.

        In float32 the smallest eigenvalues would be off by 1e-7 of the largest.
        """
        D = self.width
        grams = [torch.zeros(D, D, dtype=torch.float64, device=self.device) for _ in weights]
        for start, chunk in self.chunks() if weights else ():
            for i in range(0, len(chunk), FLOAT64_ROWS):
                Z = chunk[i : i + FLOAT64_ROWS]
                for w, gram in zip(weights, grams, strict=True):
                    part = w[start + i : start + i + len(Z)].double()
                    # Rows of weight zero are most where rows are counted out: they are skipped.
                    used = part.nonzero()[:, 0]
                    Y = (Z if len(used) == len(Z) else Z[used]).double()
                    gram.addmm_((Y * part[used, None]).T, Y)
        return grams
