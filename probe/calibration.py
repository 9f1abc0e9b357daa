"""Do probabilities mean what they say? Reliability bins and the expected calibration error.

Shapes: N images, K classes, L findings, B weightings. Of classes, the confidence is the largest
probability, and it is right where that class is the label (Guo et al. 2017, On Calibration of
Modern Neural Networks). Of a finding, it is the finding's probability. Bins are of equal width; a
value on an edge is in the lower bin, as in scikit-learn's calibration_curve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from probe.ranking import totals

Array: TypeAlias = Any
BINS = 15


def _claims(y: Array, p: Array) -> list[tuple[Array, Array]]:
    """Return confidence (n,) and whether it was right (n,) with NaN for not known, per output."""
    if y.ndim == 2:
        return [(p[:, k], y[:, k]) for k in range(p.shape[1])]
    return [(p.max(1), (p.argmax(1) == y).astype(float))]


def _bin(confidence: Array) -> Array:
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)


def expected_error(y: Array, p: Array) -> Callable[[Array], Array]:
    """Return a function of weights (B, N): the mean over bins of |confidence - frequency|, (B,).

    Of findings, the mean over them; one without a known image is left out.
    """
    outputs = []
    for confidence, right in _claims(y, p):
        known = ~np.isnan(right)
        one_hot = np.eye(BINS)[_bin(confidence)] * known[:, None]  # (N, bins)
        gap = np.where(known, confidence - right, 0)[:, None] * one_hot
        outputs.append((totals(gap), totals(known.astype(float)[:, None])))

    def scorer(weights: Array) -> Array:
        with np.errstate(invalid="ignore"):
            errors = np.stack(
                [abs(gap(weights)).sum(1) / known(weights)[:, 0] for gap, known in outputs], axis=1
            )
            there = ~np.isnan(errors)
            return np.where(there, errors, 0).sum(1) / there.sum(1)

    return scorer


def reliability(y: Array, p: Array) -> list[dict[str, float]]:
    """Return per bin that holds any: low, high, images, mean confidence and frequency of right.

    Of findings, all of them together.
    """
    confidence, right = (np.concatenate(parts) for parts in zip(*_claims(y, p), strict=True))
    confidence, right = confidence[~np.isnan(right)], right[~np.isnan(right)]
    place = _bin(confidence)
    return [
        {
            "low": k / BINS,
            "high": (k + 1) / BINS,
            "images": int((place == k).sum()),
            "confidence": float(confidence[place == k].mean()),
            "frequency": float(right[place == k].mean()),
        }
        for k in np.unique(place).tolist()
    ]
