"""Nearest neighbours by cosine similarity, for several k at once, in blocks of a matrix product.

As DINO votes (Caron et al. 2021, arXiv:2104.14294; facebookresearch/dinov2, dinov2/eval/knn.py):
each of the k nearest training images votes for its class with exp(similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BLOCK = 1 << 23  # similarities at once: 32 MB


@torch.no_grad()
def vote(
    train: Iterable[Tensor], y: Tensor, X: Tensor, *, k: Sequence[int], temperature: float
) -> Tensor:
    """Return probabilities of X (N, D) for each k, (J, N, K).

    Parameters
    ----------
    train : chunks of the training rows, (M, D) in all.
    y : what each training row votes for: (M, K), one-hot for classes; or for findings 1, 0 and NaN
        for no vote. Rows of one-hot votes sum to 1, findings are each in [0, 1].

    A finding on which none of the k neighbours votes is 0.5.
    """
    most = min(max(k), len(y))
    best = X.new_full((len(X), most), -torch.inf)
    place = torch.zeros(len(X), most, dtype=torch.long, device=X.device)
    X = torch.nn.functional.normalize(X, dim=1)
    start = 0
    for chunk in train:
        T = torch.nn.functional.normalize(chunk.to(X), dim=1)
        step = max(1, BLOCK // len(T))
        for i in range(0, len(X), step):
            rows = slice(i, i + step)
            near = X[rows] @ T.T
            value, where = near.topk(min(most, len(T)), dim=1)
            value, order = torch.cat([best[rows], value], 1).topk(most, dim=1)
            place[rows] = torch.cat([place[rows], where + start], 1).gather(1, order)
            best[rows] = value
        start += len(T)
    weight = ((best - best[:, :1]) / temperature).exp()[..., None]  # (N, most, 1)
    known = ~y.isnan()
    votes = (weight * y.nan_to_num(0).to(X)[place]).cumsum(1)  # (N, most, K)
    cast = (weight * known.to(X)[place]).cumsum(1)
    share = torch.where(cast > 0, votes / cast, 0.5)
    return torch.stack([share[:, min(one, most) - 1] for one in k])
