"""Log-odds z = log(p / (1 - p)): what a head says, from the head to the metric, in float64.

The convention. Every head says log-odds of N images and K classes or findings, z (N, K): exactly
from its logits, or of its probabilities where it has no logits (then z may be infinite).
Probabilities are made of them where they are wanted: p = expit(z), -log p = softplus(-z). A metric
whose `ranking` is true sees only the order of each class's scores and is given z: probabilities
near 1 are one and the same float, and would tie where log-odds don't. Every other metric is given
p. Whoever has no log-odds gives probabilities to both; the number is the same but for such ties.

Shapes: N images, K classes or L findings, U units (subjects, studies).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

if TYPE_CHECKING:  # a report reads log-odds and loads no torch
    from torch import Tensor

Floats = NDArray[np.float64]


def of_logits(logits: Tensor, link: str) -> Tensor:
    """Return log-odds (..., K), float64, of logits (..., K); link "binary": (..., 1) to (..., 2).

    link is "softmax", "sigmoid" (a logit per finding) or "binary" (one, of the second class). Of a
    softmax z_k is logit_k - logsumexp of the others: for the largest as it stands there, for the
    others, whose p is at most 1/2, log p - log(1 - p), which takes one sum for all of them.
    """
    import torch

    logits = logits.double()
    if link == "sigmoid":
        return logits
    if link == "binary":
        return torch.cat([-logits, logits], -1)
    if logits.shape[-1] == 2:
        return logits - logits.flip(-1)
    top = logits.argmax(-1, keepdim=True)
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    largest = logits.gather(-1, top) - others
    z = logits.log_softmax(-1)
    return z.sub_(z.exp().neg_().log1p_()).scatter_(-1, top, largest)


def of_probabilities(p: NDArray[Any]) -> Floats:
    """Return the log-odds of probabilities (N, K), 0 to 1; those of 0 and 1 are infinite."""
    z: Floats = logit(np.asarray(p, dtype=np.float64))
    return z


def probabilities(z: Floats) -> Floats:
    """Return the probabilities (N, K) of z (N, K); rows of classes sum to 1 as nearly as z says."""
    p: Floats = expit(z)
    return p


def mean(z: Floats, unit: NDArray[np.integer[Any]], units: int) -> Floats:
    """Return the log-odds (U, K) of the mean probability of units; unit (N,) is each image's.

    log of the sum of p less log of the sum of 1 - p: neither end of [0, 1] is rounded to.
    """
    return _log_sums(log_expit(z), unit, units) - _log_sums(log_expit(-z), unit, units)


def largest(z: Floats, unit: NDArray[np.integer[Any]], units: int, *, classes: bool) -> Floats:
    """Return the log-odds (U, K) of each unit's largest probability; of classes, normalised."""
    import torch

    most = np.full((units, z.shape[1]), -np.inf)
    np.maximum.at(most, unit, z)
    if not classes:
        return most
    normalised: Floats = of_logits(torch.from_numpy(log_expit(most)), "softmax").numpy()
    return normalised


def _log_sums(logs: Floats, unit: NDArray[np.integer[Any]], units: int) -> Floats:
    """Return log sum exp (U, K) of the logs (N, K) of each unit's images."""
    most = np.full((units, logs.shape[1]), -np.inf)
    np.maximum.at(most, unit, logs)
    most[np.isneginf(most)] = 0  # nothing to sum: the log of 0 comes out below
    total = np.zeros_like(most)
    np.add.at(total, unit, np.exp(logs - most[unit]))
    with np.errstate(divide="ignore"):
        log_sums: Floats = most + np.log(total)
    return log_sums
