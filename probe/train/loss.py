"""The loss that training minimises: cross-entropy of a batch, weighted by class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


def loss_of(logits: Tensor, y: NDArray[Any], class_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of losses of logits (B, K), and the weights' sum.

    y (B,) class index: cross-entropy weighted by class. y (B, L) of 1, 0 and NaN: binary
    cross-entropy of each label that is there.
    """
    target, w = torch.from_numpy(y).to(class_weights.device), weights_of(y, class_weights)
    if target.ndim == 1:
        each = F.cross_entropy(logits.float(), target, reduction="none")
    else:
        each = F.binary_cross_entropy_with_logits(
            logits.float(), target.nan_to_num(0).float(), reduction="none"
        )
    return (each * w).sum(), w.sum()


def weights_of(y: NDArray[Any], class_weights: Tensor) -> Tensor:
    """Return the weight of each loss: (B,) of classes, or (B, L), zero where there is no label."""
    target = torch.from_numpy(y).to(class_weights.device)
    return class_weights[target] if target.ndim == 1 else (~target.isnan() * class_weights).float()


def class_weights(y: NDArray[Any], outputs: int, balance: str) -> Tensor:
    """Return a weight per class (K,): n / (K n_k) with balance "weights", else 1.

    y has the training labels, (n,) class index or (n, L): of findings each weighs 1.
    """
    if balance != "weights" or y.ndim == 2:
        return torch.ones(outputs)
    counts = np.bincount(y, minlength=outputs)
    weights = len(y) / (outputs * np.maximum(counts, 1))
    return torch.from_numpy(weights).float()
