"""A head by least squares in closed form, as big_vision's few-shot evaluator fits it.

google-research/big_vision, big_vision/evaluators/fewshot_lsr.py: features standardised, a column
of BIAS beside them, targets +1 and -1, penalty l2 ||W||^2 on all of it. Shapes: N images, D
features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from features.errors import ProbeError
from probe.solve import factors

BIAS = 100.0  # so large that the intercept is hardly penalised
FLOOR = 1e-5  # added to standard deviations


def fit(X: Tensor, y: Tensor, n_classes: int, *, l2: float) -> tuple[Tensor, Tensor]:
    """Return coef (K, D) and intercept (K,), in the units of X (N, D), of class indices y (N,).

    The smaller of the two systems is solved: D + 1 features, or N images. Raises ProbeError for
    features that are not finite.
    """
    X = X.double()
    if not bool(X.isfinite().all()):
        raise ProbeError("the features hold NaN or infinity; run `medprobe verify` on the store")
    mean, size = X.mean(0), X.std(0, correction=0) + FLOOR
    Z = torch.cat([(X - mean) / size, X.new_full((len(X), 1), BIAS)], 1)  # (N, D + 1)
    Y = 2 * torch.nn.functional.one_hot(y, n_classes).to(Z) - 1  # (N, K)
    N, D = Z.shape
    if N < D:
        W = Z.T @ factors.solve(Z @ Z.T + l2 * torch.eye(N).to(Z), Y)
    else:
        W = factors.solve(Z.T @ Z + l2 * torch.eye(D).to(Z), Z.T @ Y)
    coef = (W[:-1] / size[:, None]).T  # (K, D)
    return coef, BIAS * W[-1] - coef @ mean
