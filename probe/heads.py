"""Fit many penalised logistic-regression heads at once; predict with one; save and load it.

Shapes: N images, D features, J strengths C, G row weightings (folds, subsets), L label columns,
K classes. The objective is scikit-learn's LogisticRegression (l2, free intercept), divided by C
times the sum of weights n: mean loss + l2/2 ||W||^2 with l2 = 1 / (C n). Three or more classes:
softmax. Two, or several labels per image: one sigmoid per label column.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from features.devices import multiplies_bfloat16
from features.errors import ProbeError
from features.files import write_whole
from features.schema import read_json
from probe import schema
from probe.likeness import Seen
from probe.score import log_odds
from probe.solve import fit, inputs
from probe.solve.fit import Engine, FitSettings
from probe.solve.path import HeadProgress
from probe.solve.sources import Source

FORMAT = "medprobe-head"  # of heads.json


@dataclass(frozen=True, repr=False)
class Head:
    """One fitted classifier.

    coef (K, D) and intercept (K,), or (L, D) and (L,) for sigmoids; in the features' units, in
    float32 or float64.
    """

    coef: Tensor
    intercept: Tensor
    classes: tuple[str, ...]
    kind: str  # "softmax", "sigmoid" (one per class), or "binary" (one, of the second class)
    C: float
    seen: Seen | None = None  # what it was trained on, of a head that was loaded and says so

    def __repr__(self) -> str:
        """Return its kind and sizes."""
        return (
            f"Head({self.kind} of {len(self.classes)} classes, {self.coef.shape[1]} features, "
            f"C = {self.C:g})"
        )

    def log_odds(self, X: Tensor) -> Tensor:
        """Return log-odds (N, K) of classes, or of L labels (N, L), float64; see log_odds.py."""
        coef = self.coef.double()
        return log_odds.of_logits(X.to(coef) @ coef.T + self.intercept.double(), self.kind)

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return probabilities (N, K), rows summing to 1, or of L labels (N, L), float64.

        What float32 rounds of logits whose terms cancel costs more than a fit leaves.
        """
        return self.log_odds(X).sigmoid()

    def save(self, path: Path, seen: Seen | None = None, **about: Any) -> None:
        """Write path.safetensors and path.json, each whole; `about` joins the JSON.

        seen: what it was trained on, in both files. Raises OSError.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "coef": self.coef.contiguous().cpu(),
            "intercept": self.intercept.contiguous().cpu(),
        }
        if seen:
            tensors |= seen.tensors()
            about["seen"] = seen.about()
        write_whole(path.with_suffix(".safetensors"), to_bytes(tensors))
        words = {
            "format": FORMAT,
            "version": 1,
            "kind": self.kind,
            "classes": self.classes,
            "C": self.C,
        }
        text = json.dumps(words | about, indent=2)  # ASCII: names of files may be any bytes
        write_whole(path.with_suffix(".json"), (text + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> tuple[Head, dict[str, Any]]:
        """Read what save wrote, from any of its two names; return the head and the JSON."""
        try:
            about = read_json(path.with_suffix(".json"), schema.Head)
            tensors = load_file(path.with_suffix(".safetensors"))
            coef, intercept = tensors["coef"], tensors["intercept"]
            classes = tuple(about["classes"])
            K = 1 if about["kind"] == "binary" else len(classes)
            if about["kind"] == "binary" and len(classes) != 2:
                raise ValueError(f"it has {len(classes)} classes, want 2 of a binary head")
            if coef.ndim != 2 or len(coef) != K or intercept.shape != (K,):
                shapes = tuple(coef.shape), tuple(intercept.shape)
                raise ValueError(
                    f"coef and intercept are of shapes {shapes}, want ({K}, D), ({K},)"
                )
            if not (coef.isfinite().all() and intercept.isfinite().all()):
                raise ValueError("its coefficients are not finite")
            seen = [t for name, t in tensors.items() if name.startswith("seen_")]
            if any(t.shape != coef.shape[1:] or not t.isfinite().all() for t in seen):
                raise ValueError("what it was trained on is not a number per feature")
            head = cls(
                coef,
                intercept,
                classes,
                about["kind"],
                float(about["C"]),
                Seen.of(tensors, about),
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ProbeError(
                f"{path} is not a saved head ({error}); "
                "want heads.json with heads.safetensors beside it"
            ) from None
        return head, about


@dataclass(frozen=True, repr=False)
class Heads:
    """J x G fitted heads of L label columns with K outputs (softmax: L = 1, sigmoids: K = 1).

    coef (J, G, L, K, D), intercept (J, G, L, K): in float64 where rounding to float32 would cost
    more than a share of the tolerance, as with features far from zero; converged, gap, value,
    passes (J, G, L). gap is the estimated distance to the optimum, relative to max(value, 1e-3);
    bound, where asked for, is never less than that distance (certificate.py).
    """

    coef: Tensor
    intercept: Tensor
    C: Tensor
    kind: str
    converged: Tensor
    gap: Tensor
    value: Tensor
    passes: Tensor
    bound: Tensor | None = None

    def __repr__(self) -> str:
        """Return its kind and sizes."""
        J, G, L, K, D = self.coef.shape
        done, all_ = int(self.converged.sum()), self.converged.numel()
        return (
            f"Heads({self.kind}, {J} strengths x {G} groups x {L} labels, {K} outputs of {D} "
            f"features; {done} of {all_} converged, the largest gap {float(self.gap.max()):.1e})"
        )

    def log_odds(self, X: Tensor, group: int = 0) -> Tensor:
        """Return a group's log-odds for X (N, D), float64: (J, N, K), or of L labels (J, N, L)."""
        coef = self.coef[:, group].flatten(1, 2).double()  # (J, L*K, D)
        logits = X.to(coef) @ coef.mT + self.intercept[:, group].flatten(1, 2)[:, None].double()
        return log_odds.of_logits(logits, self.kind)

    def probabilities(self, X: Tensor, group: int = 0) -> Tensor:
        """Return a group's probabilities for X (N, D): (J, N, K), or of L labels (J, N, L)."""
        return self.log_odds(X, group).sigmoid()

    def select(self, j: slice, group: int) -> Heads:
        """Keep some strengths of one group."""
        names = ("coef", "intercept", "converged", "gap", "value", "passes")
        kept = {n: getattr(self, n)[j, group : group + 1] for n in names}
        return replace(self, C=self.C[j], **kept)

    def head(self, classes: Sequence[str], j: int = 0, group: int = 0) -> Head:
        """Return one classifier."""
        coef, intercept = self.coef[j, group].flatten(0, 1), self.intercept[j, group].flatten()
        return Head(coef, intercept, tuple(classes), self.kind, float(self.C[j]))


@torch.no_grad()
def fit_heads(
    X: Tensor | Source,
    y: Tensor,
    *,
    C: Tensor | Sequence[float],
    n_classes: int | None = None,
    weights: Tensor | None = None,
    tol: float = 1e-6,
    certified: bool = False,
    device: torch.device | str = "cpu",
    progress: HeadProgress | None = None,
    engine: Engine | None = None,
) -> Heads:
    """Fit a head for every strength C (J,) and every weighting of the rows (G, N).

    Parameters
    ----------
    X : (N, D), finite numbers of any type, scale and offset; or a Source that reads it block by
        block.
    y : (N,) class index, or (N, L) of 1, 0 and NaN (left out of that label's loss).
    n_classes : K for class indices, when not all are present in y.
    weights : (G, N); 0 leaves the row out, 2 counts it twice; default one group of ones.
    tol : the gap, (objective - optimum) / max(objective, 1e-3), under which a head is done.
        float32 does the work and float64 finishes what float32 can't: heads it left unconverged,
        or whose gap it can't bound where rows are few, or all of them when tol < 1e-7.
    certified : also bound each head's gap, in about four passes in float64.
    progress : called with heads done, heads in all, and the passes of the batch at work.
    engine : holds the rows, where that isn't this process (cluster.py); `certified` is not for it.

    A class without a row in a group has its optimum at infinity. There it gets no coefficients and
    an intercept of -40, and the others are fitted as if they were all.

    Raises ProbeError where no head can be fitted.
    """
    if certified and engine:
        raise ProbeError("a certified gap is computed in one process: leave the engine out")
    source = inputs.features(X)
    N = source.shape[0]
    given = inputs.Given(
        features=source,
        C=inputs.strengths(C, device),
        n_classes=inputs.labels(y, N, n_classes),
        labels=y,
        weights=inputs.weights(weights, N, device),
    )
    fast_bf16 = multiplies_bfloat16(str(device))
    settings = FitSettings(tol, certified, torch.device(device), fast_bf16)
    problem = fit.prepare(given, settings, engine)
    path = fit.solve(problem, tol, progress)
    if unconverged := int((~path.converged).sum()):
        warnings.warn(
            f"{unconverged} of {path.converged.numel()} heads did not reach a relative gap of "
            f"{tol:g}; the worst is at {float(path.gap.max()):.1e}",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Heads(C=given.C, kind=given.kind, **vars(fit.unpack(problem, path, settings)))
