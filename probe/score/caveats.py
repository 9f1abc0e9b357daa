"""When an interval can't be trusted: few subjects, rare classes, or no width at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probe.score.intervals import sides_of

# Of fewer subjects, or fewer of a class (or side of a finding), no interval can be relied on:
# benchmarks/bench_statistics.py
FEW, RARE = 20, 5
SHOWN = 3  # of what there is too few of


def few(
    y: NDArray[Any], subjects: NDArray[Any], classes: Sequence[str], unit: str = "subject"
) -> str:
    """Say of what a test set has too few for its interval to be trusted; "" where of nothing.

    y (N,) or (N, L), subjects (N,). That is fewer than FEW subjects, or fewer than RARE of a class
    that is there, or of a side of a finding that has both.
    """
    shortages = []
    if (count := len(np.unique(subjects))) < FEW:
        shortages.append(f"{count} in all")
    rare = sorted((count, k, side) for k, side, count in sides_of(y, subjects) if count < RARE)
    for count, k, side in rare:
        of = (
            f"of class {classes[k]}" if y.ndim == 1 else f"with{'' if side else 'out'} {classes[k]}"
        )
        shortages.append(f"{count} {of}")
    if not shortages:
        return ""
    more = f" and too few of {len(shortages) - SHOWN} more" if len(shortages) > SHOWN else ""
    shown = ", ".join(shortages[:SHOWN])
    return f"few test {unit}s: {shown}{more}; so few that no 95 % interval can be relied on"


def caveat(low: float, high: float, subjects: int, unit: str = "subject") -> str:
    """Return what to say of an interval without width; "" for others.

    If every answer is correct, so is every resample, and the interval has no width: the bootstrap
    can't tell how wrong other answers may be; the rule of three can (Hanley & Lippman-Hand 1983).
    """
    if low != high:
        return ""
    return (
        f"every resample scores {low:.3f}, so the interval has no width; with {subjects} {unit}s "
        f"an error rate of {min(1, 3 / subjects):.1%} can't be excluded"
    )
