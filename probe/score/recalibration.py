"""Make probabilities mean what they say: a map of log-odds, fitted to what was held out.

Fitted to predictions of images that the head was not trained on (out of fold), it is applied to
others. Shapes: N images, K classes, L findings; y (N,) class index or (N, L) of 1, 0, NaN; z (N, K)
or (N, L) log-odds (log_odds.py).

temperature: softmax(log p / T), or expit(z / T) of findings; one T for all (Guo et al. 2017, On
    Calibration of Modern Neural Networks). No order of an image's classes changes.
platt: expit(a z + b) of the second of two classes, or of each finding (Platt 1999), with his
    targets (N+ + 1) / (N+ + 2) and 1 / (N- + 2), so that separated images give no infinite slope.
isotonic: the growing function of z that fits best (Zadrozny & Elkan 2002), of two classes or each
    finding; within [1 / (n + 2), (n + 1) / (n + 2)], as n images show no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, logsumexp

from features.errors import ProbeError
from probe.score import log_odds

METHODS = ("temperature", "platt", "isotonic")
LARGEST = 35.0  # of |z|: beyond, a probability is 0 or 1 in float64
SPAN = 10.0  # of log T: from 1 / 22,000 to 22,000


@dataclass(frozen=True)
class Recalibration:
    """A fitted map: T; slope and intercept per output; or knots (z, p) per output."""

    method: str
    temperature: float | None = None
    lines: tuple[tuple[float, float], ...] = ()  # a, b
    knots: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()

    def __call__(self, z: NDArray[np.float64], *, classes: bool) -> NDArray[np.float64]:
        """Return recalibrated log-odds of z (N, K), of the K classes of an image or of findings."""
        if self.temperature is not None:
            return _tempered(z, self.temperature, classes=classes)
        if classes:
            second = self._output(0, z[:, 1])
            return np.stack([-second, second], axis=1)
        return np.stack([self._output(k, z[:, k]) for k in range(z.shape[1])], axis=1)

    def _output(self, k: int, z: NDArray[np.float64]) -> NDArray[np.float64]:
        z = np.clip(z, -LARGEST, LARGEST)
        if self.method == "platt":
            a, b = self.lines[k]
            return a * z + b
        x, p = (np.array(part) for part in self.knots[k])
        return log_odds.of_probabilities(np.interp(z, x, p))

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        said: dict[str, Any] = {"method": self.method}
        if self.temperature is not None:
            said["temperature"] = self.temperature
        if self.lines:
            said["lines"] = [list(line) for line in self.lines]
        if self.knots:
            said["knots"] = [[list(x), list(p)] for x, p in self.knots]
        return said

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Recalibration:
        """Return what to_json made."""
        knots = tuple((tuple(x), tuple(p)) for x, p in said.get("knots", ()))
        lines = tuple((float(a), float(b)) for a, b in said.get("lines", ()))
        return cls(said["method"], said.get("temperature"), lines, knots)


def fit(method: str, y: NDArray[Any], z: NDArray[np.float64]) -> Recalibration:
    """Return the map that fits held-out labels y and log-odds z best.

    Raises ProbeError for a method that the task hasn't got, or nothing to fit it to.
    """
    if not len(y):
        raise ProbeError(
            "nothing was held out that --calibrate could be fitted to: give --folds, or a val split"
        )
    if method == "temperature":
        return Recalibration(method, _temperature(y, z))
    if y.ndim == 1 and z.shape[1] != 2:
        raise ProbeError(
            f"--calibrate {method} is for two classes or for findings, and there are {z.shape[1]} "
            "classes: take temperature"
        )
    outputs = [(y, z[:, 1])] if y.ndim == 1 else [(y[:, k], z[:, k]) for k in range(y.shape[1])]
    if method == "platt":
        return Recalibration(method, lines=tuple(_line(*output) for output in outputs))
    return Recalibration(method, knots=tuple(_steps(*output) for output in outputs))


def _tempered(z: NDArray[np.float64], T: float, *, classes: bool) -> NDArray[np.float64]:
    if not classes or z.shape[1] == 2:
        return z / T  # of two classes log p_2 - log p_1 = z_2
    import torch

    logits = log_expit(z) / T  # log p, up to what a softmax takes away
    tempered: NDArray[np.float64] = log_odds.of_logits(torch.from_numpy(logits), "softmax").numpy()
    return tempered


def _temperature(y: NDArray[Any], z: NDArray[np.float64]) -> float:
    z = np.clip(z, -LARGEST, LARGEST)
    logits = log_expit(z)

    def loss(log_T: float) -> float:
        T = np.exp(log_T)
        if y.ndim == 1:
            own = logits[np.arange(len(y)), y] / T
            return float(np.mean(logsumexp(logits / T, axis=1) - own))
        return float(np.nanmean(-log_expit(np.where(y == 1, z, -z) / T) + 0 * y))

    found = minimize_scalar(loss, bounds=(-SPAN, SPAN), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x))


def _line(truth: NDArray[Any], z: NDArray[np.float64]) -> tuple[float, float]:
    """Return a and b of expit(a z + b), truth (N,) and z (N,); the line itself of one side only."""
    known = ~np.isnan(truth)
    t, z = truth[known] == 1, np.clip(z[known], -LARGEST, LARGEST)
    if t.all() or not t.any():
        return 1.0, 0.0
    target = np.where(t, (t.sum() + 1) / (t.sum() + 2), 1 / ((~t).sum() + 2))

    def loss(line: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        # The cross-entropy softplus(u) - target u of u = a z + b, and its gradient.
        u = line[0] * z + line[1]
        off = expit(u) - target
        return float(np.sum(-log_expit(-u) - target * u)), np.array([off @ z, off.sum()])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-8})
    return float(found.x[0]), float(found.x[1])


def _steps(
    truth: NDArray[Any], z: NDArray[np.float64]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the knots of the isotonic regression of truth (N,) on z (N,)."""
    from sklearn.isotonic import IsotonicRegression

    known = ~np.isnan(truth)
    t, z = truth[known], np.clip(z[known], -LARGEST, LARGEST)
    least = 1 / (len(t) + 2)
    if not len(t):
        return (0.0,), (0.5,)
    found = IsotonicRegression(out_of_bounds="clip").fit(z, t)
    p = np.clip(found.y_thresholds_, least, 1 - least)
    return tuple(found.X_thresholds_.tolist()), tuple(p.tolist())
