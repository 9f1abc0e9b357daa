"""The rows that heads are fitted to, as the solver sees them, in memory or read block by block.

Shapes: N rows, D features. Rows are centred, scaled to unit mean square, and get a last column of
ones. Where N < D they are turned into the at most N directions that they span: the optimum has no
part outside these, because its gradient there is l2 W.

Rows come in chunks, which may be read anew for every pass. Within a chunk they are sorted by class:
a segment of one class needs no lookup of each row's own logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.errors import ProbeError
from probe.solve import factors

CHUNK_BYTES = 32 << 20  # of rows that are read at once
AT_ONCE = 4096  # in float64
SHARES = 48  # of the memory that is left, one for a chunk, of which about five copies are alive
SIZES = 1e-60, 1e60  # of features: their squares, and a penalty that undoes them, are numbers


class Source(Protocol):
    """Raw features (N, D), handed out as chunks of at most `step` rows in a fixed order."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, D)."""
        ...

    @property
    def step(self) -> int:
        """Return the rows of a chunk; the last may have fewer."""
        ...

    def chunks(self) -> Iterator[Tensor]:
        """Yield (n, D) float32 from the first row on."""
        ...

    def part(self, start: int, stop: int) -> Source:
        """Return some of the rows, for another process."""
        ...


@dataclass(frozen=True)
class Whole:
    """Features that are in memory."""

    X: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, D)."""
        return self.X.shape[0], self.X.shape[1]

    @property
    def step(self) -> int:
        """Return N: one chunk holds all."""
        return len(self.X)

    def chunks(self) -> Iterator[Tensor]:
        """Yield all rows at once."""
        yield self.X

    def part(self, start: int, stop: int) -> Whole:
        """Return some of the rows, in memory of their own."""
        return Whole(self.X[start:stop].clone())


@dataclass(frozen=True)
class Stored:
    """Features that stay in a file, read chunk by chunk.

    read(slice) returns rows of the file, (n, D); rows (N,) are those wanted, ascending.
    """

    read: Callable[[slice], NDArray[np.floating]]
    rows: NDArray[np.integer]
    width: int
    room: int  # bytes of memory that are left

    @property
    def shape(self) -> tuple[int, int]:
        """Return (N, D)."""
        return len(self.rows), self.width

    @property
    def step(self) -> int:
        """Return how many rows keep a chunk within CHUNK_BYTES, or within its share of the room."""
        return max(256, min(CHUNK_BYTES, self.room // SHARES) // (4 * self.width))

    def chunks(self) -> Iterator[Tensor]:
        """Yield the wanted rows, in the order of the file."""
        for i in range(0, len(self.rows), self.step):
            yield self._chunk(self.rows[i : i + self.step])

    def part(self, start: int, stop: int) -> Stored:
        """Return some of the rows, in the same file."""
        return replace(self, rows=self.rows[start:stop])

    def _chunk(self, part: NDArray[np.integer]) -> Tensor:
        """Read some wanted rows: a slice where they are dense in it, piece by piece elsewhere."""
        if part[-1] - part[0] + 1 == len(part):
            whole = self.read(slice(int(part[0]), int(part[-1]) + 1))
            return torch.from_numpy(np.require(whole, np.float32, ["C", "W"]))
        out = np.empty((len(part), self.width), dtype=np.float32)
        start = 0
        while start < len(part):
            near = int(np.searchsorted(part, part[start] + self.step))
            first, last = int(part[start]), int(part[near - 1])
            out[start:near] = self.read(slice(first, last + 1))[part[start:near] - first]
            start = near
        return torch.from_numpy(out)


@dataclass(frozen=True)
class Rows:
    """Rows in the solver's order and units.

    order (N,): which of the caller's rows stands at each place. kind (N,): the class of the row at
    each place, or None where rows of all classes may stand together.
    """

    source: Source
    order: Tensor
    kind: Tensor | None
    shift: Tensor  # (D,) float64
    scale: float  # a power of two, so that scaling rounds nothing
    turn: Tensor | None  # (D, r)
    device: torch.device
    dtype: torch.dtype = torch.float32
    kept: Tensor | None = None  # (N, r+1): the finished rows, where they are in memory

    @classmethod
    def of(cls, source: Source, kind: Tensor | None, device: torch.device) -> Rows:
        """Measure the rows, in two passes. Raises ProbeError for one that is not finite."""
        N, D = source.shape
        if isinstance(source, Stored) and N < D:
            source = Whole(torch.cat(list(source.chunks())))
        shift = rounded(total(source, device) / N, source)
        rows = cls.in_units(source, kind, device, shift, unit(size(source, shift), N * D))
        return rows.keep() if isinstance(source, Whole) else rows

    @classmethod
    def in_units(
        cls,
        source: Source,
        kind: Tensor | None,
        device: torch.device,
        shift: Tensor,
        scale: float,
    ) -> Rows:
        """Sort the rows of every chunk by class."""
        N = source.shape[0]
        order = torch.arange(N, device=device)
        if kind is not None:
            step = source.step
            order = torch.cat(
                [i + kind[i : i + step].argsort(stable=True) for i in range(0, N, step)]
            )
        return cls(
            source=source,
            order=order,
            kind=None if kind is None else kind[order],
            shift=shift,
            scale=scale,
            turn=None,
            device=device,
        )

    def keep(self, *, all_rows: bool = True) -> Rows:
        """Hold the finished rows; if they are all, turned into the directions that N < D span."""
        [X] = self.source.chunks()
        X = (X.to(self.device)[self.order] - self.shift.to(X.dtype)) / self.scale
        turn = None
        if all_rows and X.shape[0] < X.shape[1]:
            Y = X.double()
            spectrum, U = factors.eigh(Y @ Y.T)
            keep = spectrum > spectrum[-1] * 1e-13
            if not bool(spectrum.isnan().any()):  # else they stay as they are
                turn = Y.T @ (U[:, keep] / spectrum[keep].sqrt())  # (D, r), orthonormal columns
                X = Y @ turn
        Z = torch.cat([X, X.new_ones(len(X), 1)], 1)
        return replace(self, turn=turn, kept=Z)

    def to(self, dtype: torch.dtype) -> Rows:
        """Return the rows with chunks of another type."""
        kept = None if self.kept is None else self.kept.to(dtype)
        return replace(self, dtype=dtype, kept=kept)

    @property
    def width(self) -> int:
        """Return the number of columns, with that of ones."""
        return (self.source.shape[1] if self.kept is None else self.kept.shape[1] - 1) + 1

    @property
    def at_hand(self) -> bool:
        """Say whether a pass reads no file and asks no other machine."""
        return self.kept is not None

    @property
    def together(self) -> int:
        """Return how many rows lie in one process."""
        return len(self)

    def __len__(self) -> int:
        """Return N."""
        return len(self.order)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the place of a chunk's first row, and the chunk (n, width)."""
        if self.kept is not None:
            yield 0, self.kept
            return
        start, down = 0, (-self.shift / self.scale).to(self.dtype)
        for X in self.source.chunks():
            order = self.order[start : start + len(X)] - start
            X = X.to(self.device).index_select(0, order).to(self.dtype)
            Z = X.new_empty(len(X), X.shape[1] + 1)
            Z[:, -1] = 1
            torch.add(down, X, alpha=1 / self.scale, out=Z[:, :-1])
            yield start, Z
            start += len(Z)

    def in_bf16(self, B: Tensor) -> Rows:
        """Return the kept rows times B (width, r), at bfloat16: half the memory, and far faster."""
        assert self.kept is not None
        turned = torch.cat(
            [(Z @ B.to(Z.dtype)).to(torch.bfloat16) for Z in torch.split(self.kept, AT_ONCE)]
        )
        return replace(self, kept=turned, dtype=torch.bfloat16)

    def take(self, which: Tensor) -> Tensor:
        """Return the rows of an index (R,), (R, width)."""
        if self.kept is not None:
            return self.kept[which]
        out = torch.empty(len(which), self.width, dtype=self.dtype, device=self.device)
        for start, Z in self.chunks():
            here = ((which >= start) & (which < start + len(Z))).nonzero()[:, 0]
            out[here] = Z[which[here] - start]
        return out

    def grams(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return the Gram matrix (width, width) of each weighting (N,) of the rows, in float64."""
        D = self.width
        grams = [torch.zeros(D, D, dtype=torch.float64, device=self.device) for _ in weights]
        for start, chunk in self.chunks() if weights else ():
            for i in range(0, len(chunk), AT_ONCE):
                Z = chunk[i : i + AT_ONCE]
                for w, gram in zip(weights, grams, strict=True):
                    here = w[start + i : start + i + len(Z)].double()
                    used = here.nonzero()[:, 0]
                    Y = (Z if len(used) == len(Z) else Z[used]).double()
                    gram.addmm_((Y * here[used, None]).T, Y)
        return grams

    def blocks(self, step: int) -> Iterator[tuple[slice, Tensor, int]]:
        """Yield ranges of at most `step` rows of one class, their rows Z (n, width), and the class.

        Where no class was given it is 0.
        """
        for start, Z in self.chunks():
            for first, last, kind in self._segments(start, start + len(Z)):
                pieces = max(1, round((last - first) / step))
                size = -(-(last - first) // pieces)
                for i in range(first, last, size):
                    stop = min(i + size, last)
                    yield slice(i, stop), Z[i - start : stop - start], kind

    def _segments(self, start: int, stop: int) -> Sequence[tuple[int, int, int]]:
        if self.kind is None:
            return [(start, stop, 0)]
        kinds, counts = self.kind[start:stop].unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
        ends = (start + counts.cumsum(0)).tolist()
        return list(zip([start, *ends[:-1]], ends, kinds.tolist(), strict=True))

    def squares(self, gram: Tensor) -> Tensor:
        """Return the mean square of each feature in the units of X, (D,), from a Gram matrix.

        gram (width, width) is the mean of z z' over some weighting of the rows z.
        """
        mean, spread = gram[-1, :-1], gram[:-1, :-1].diagonal()
        if self.turn is not None:
            mean = self.turn @ mean
            spread = (self.turn @ gram[:-1, :-1] * self.turn).sum(1)
        mean, spread = self.scale * mean, self.scale**2 * spread
        return self.shift.square() + 2 * self.shift * mean + spread

    def back(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return coef (..., D) and intercept (...) in the units of X, from theta (..., r+1)."""
        coef = theta[..., :-1] / self.scale
        if self.turn is not None:
            coef = coef @ self.turn.T
        return coef, theta[..., -1] - coef @ self.shift


def total(source: Source, device: torch.device) -> Tensor:
    """Return the sum of the rows, (D,) float64. Raises ProbeError for one that is not finite."""
    out = torch.zeros(source.shape[1], dtype=torch.float64, device=device)
    for X in source.chunks():
        part = X.to(device).sum(0, dtype=torch.float64)
        if not part.isfinite().all():
            raise ProbeError(
                "the features hold NaN or infinity; run `medprobe verify` on the store"
            )
        out += part
    return out


def rounded(shift: Tensor, source: Source) -> Tensor:
    """Return a shift as rows have it, so that subtracting it and adding it back is the same."""
    dtype = source.X.dtype if isinstance(source, Whole) else torch.float32
    return shift.to(dtype).double()


def size(source: Source, shift: Tensor) -> float:
    """Return the root of the sum of squares of all numbers less their column's shift (D,)."""
    found = 0.0
    for X in source.chunks():
        X = X.to(shift.device)
        X = X - shift.to(X.dtype)
        top = float(X.abs().amax()) if X.numel() else 0.0
        if top > 0:  # squared as shares of the largest, which neither overflow nor vanish
            share = float((X / top).square().sum(dtype=torch.float64))
            found = math.hypot(found, top * math.sqrt(share))
    return found


def unit(size: float, count: int) -> float:
    """Return the root mean square of so many numbers as a power of two, from their `size`.

    Raises ProbeError for features that float64 can't penalise.
    """
    size /= math.sqrt(max(count, 1))
    if size == 0:
        return 1.0
    if not SIZES[0] < size < SIZES[1]:
        raise ProbeError(
            f"the features are {size:.0e} in size about their mean (root mean square), where "
            f"{SIZES[0]:g} to {SIZES[1]:g} can be fitted: scale them"
        )
    return 2.0 ** round(math.log2(size))
