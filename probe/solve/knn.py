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
    """Return log-odds of X (N, D) for each k, (J, N, K), float64: of the votes for and against.

    Parameters
    ----------
    train : chunks of the training rows, (M, D) in all.
    y : what each training row votes for: (M, K), one-hot for classes; or for findings 1, 0 and NaN
        for no vote.

    They are infinite where all votes agree, and 0 of a finding on which none of the k votes.
    """
    most = min(max(k), len(y))
    best = X.new_full((len(X), most), -torch.inf)
    index = torch.zeros(len(X), most, dtype=torch.long, device=X.device)
    X = torch.nn.functional.normalize(X, dim=1)
    start = 0
    for chunk in train:
        T = torch.nn.functional.normalize(chunk.to(X), dim=1)
        step = max(1, BLOCK // len(T))
        for i in range(0, len(X), step):
            rows = slice(i, i + step)
            similarity = X[rows] @ T.T  # cosines (n, m): both have length 1
            value, nearest = similarity.topk(min(most, len(T)), dim=1)
            # The best of those so far and of this chunk: memory is (N, most), not (N, M).
            value, order = torch.cat([best[rows], value], 1).topk(most, dim=1)
            index[rows] = torch.cat([index[rows], nearest + start], 1).gather(1, order)
            best[rows] = value
        start += len(T)
    y, counts = y.double(), [min(one, most) - 1 for one in k]
    out = y.new_empty(len(k), len(X), y.shape[1])
    step = max(1, BLOCK // (most * y.shape[1]))
    for rows in (slice(i, i + step) for i in range(0, len(X), step)):
        # exp(s / T) over exp(s_max / T): log-odds stay, and nothing overflows at T = 0.07.
        weight = ((best[rows] - best[rows, :1]).double() / temperature).exp()[..., None]
        votes = y[index[rows]]  # (n, most, K)
        # Sums over the first k neighbours, of votes for and votes against; NaN votes for neither.
        both = [(weight * side.nan_to_num(0)).cumsum(1)[:, counts] for side in (votes, 1 - votes)]
        z = both[0].log() - both[1].log()
        out[:, rows] = torch.where(both[0] + both[1] > 0, z, 0).transpose(0, 1)
    return out
