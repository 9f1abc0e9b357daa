"""What fit_heads is given, checked and made ready: features, labels, weights, strengths.

Shapes as in heads.py: N images, D features, J strengths, G row weightings, L label columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from features.errors import ProbeError
from probe.solve.sources import InMemory, Source

# Types whose every number float32 holds.
NARROW = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Given:
    """What heads are fitted to, checked.

    features (N, D); labels (N,) of class indices or (N, L) of 1, 0 and NaN; C (J,) float64 and
    weights (G, N) on the device. n_classes is None of label columns.
    """

    features: Source
    labels: Tensor
    C: Tensor
    weights: Tensor
    n_classes: int | None

    @property
    def kind(self) -> str:
        """Return "softmax" of three classes or more, "binary" of two, "sigmoid" of labels."""
        if self.n_classes is None:
            return "sigmoid"
        return "binary" if self.n_classes == 2 else "softmax"


def features(X: Tensor | Source) -> Source:
    """Return features (N, D) as rows of float32, or of float64 where they are, or need it.

    float16, bfloat16, bool and integers become floats that hold them exactly (integers up to
    2^53). Raises ProbeError for what is no table of real numbers.
    """
    if isinstance(X, Tensor):
        if X.ndim != 2 or X.is_complex():
            raise ProbeError(
                f"features of shape {tuple(X.shape)} and type {X.dtype}: want real numbers (N, D)"
            )
        if X.dtype not in (torch.float32, torch.float64):
            X = X.to(torch.float32 if X.dtype in NARROW else torch.float64)
    source: Source = InMemory(X) if isinstance(X, Tensor) else X
    N, D = source.shape
    if not (N and D):
        raise ProbeError(f"features of shape {(N, D)}: want at least one image and one feature")
    return source


def strengths(C: Tensor | Sequence[float], device: torch.device | str) -> Tensor:
    """Return C (J,) in float64. Raises ProbeError where one is not a positive number."""
    checked = torch.as_tensor(C, dtype=torch.float64, device=device)
    if checked.ndim != 1 or not len(checked):
        raise ProbeError("no strength C to fit: want a list of positive numbers, such as [0.1, 1]")
    if len(wrong := checked[~((checked > 0) & checked.isfinite())]):
        raise ProbeError(
            f"C = {float(wrong[0]):g}: want positive numbers; C is the inverse of the penalty, so "
            "for next to none take a large one, such as 1e5"
        )
    return checked


def labels(y: Tensor, N: int, n_classes: int | None) -> int | None:
    """Return the number of classes of class indices y (N,), None of label columns (N, L).

    Raises ProbeError for what is neither, and for fewer than two classes.
    """
    if y.ndim not in (1, 2) or len(y) != N:
        raise ProbeError(f"labels of shape {tuple(y.shape)} for {N} images: want (N,) or (N, L)")
    if y.ndim == 2:
        if not bool(((y == 0) | (y == 1) | y.isnan()).all()):
            raise ProbeError("label columns hold more than 1, 0 and NaN: want one column per label")
        return None
    if y.is_floating_point() and not bool((y == y.round()).all()):
        raise ProbeError("class indices are not whole numbers: want 0, 1, ... K - 1")
    least, most = int(y.min()), int(y.max())
    K = n_classes or most + 1
    if least < 0 or most >= K:
        raise ProbeError(f"class indices run from {least} to {most}: want 0 to {max(K, 1) - 1}")
    if K < 2:
        raise ProbeError("one class is left in the training rows; a head needs at least two")
    return K


def weights(w: Tensor | None, N: int, device: torch.device | str) -> Tensor:
    """Return row weights (G, N), of which the default is one row of ones.

    Raises ProbeError where one is negative or not finite.
    """
    if w is None:
        return torch.ones(1, N, device=device)
    if w.ndim != 2 or w.shape[1] != N:
        raise ProbeError(f"weights of shape {tuple(w.shape)} for {N} images: want (G, N)")
    if not bool((w >= 0).all() & w.isfinite().all()):
        raise ProbeError("a row's weight is negative or not finite: want 0, 1, 2, ... or between")
    w = w.to(device)
    return w if w.is_floating_point() else w.to(torch.float32)
