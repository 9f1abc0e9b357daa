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
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from features.devices import multiplies_bfloat16
from features.errors import ProbeError
from features.schema import read_json
from probe import schema
from probe.score import log_odds
from probe.solve import inputs
from probe.solve.certificate import certify
from probe.solve.gap import FLOOR
from probe.solve.objective import ABSENT_INTERCEPT, Objective
from probe.solve.path import Progress, RegularizationPath, batch_size
from probe.solve.preconditioner import bases_of
from probe.solve.rows import Rows, Source

FORMAT = "medprobe-head"  # of heads.json
SURE = 40.0  # a logit whose loss, 4e-18, counts as none
SINGLE = 1e-7  # the smallest relative gap that float32 is asked for
EPS = 2.0**-24  # what rounding to float32 changes in a number, at most
SPARED = 0.1  # of the tolerance that rounding heads to float32 may take
RANGE = 1e-25, 1e25  # of penalties that float32 is given: their products with weights are numbers
SMALL = 1 << 19  # products in a head's logits up to which a bound in float64 costs little
LARGE = 1 << 20  # numbers in the rows from which products at bfloat16 are faster
PRODUCTS = 16  # that a head takes: turning the rows costs as much as one of D outputs


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

    def save(self, path: Path, **about: Any) -> None:
        """Write path.safetensors and path.json; `about` joins the JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "coef": self.coef.contiguous().cpu(),
            "intercept": self.intercept.contiguous().cpu(),
        }
        save_file(tensors, path.with_suffix(".safetensors"))
        words = {
            "format": FORMAT,
            "version": 1,
            "kind": self.kind,
            "classes": self.classes,
            "C": self.C,
        }
        text = json.dumps(words | about, indent=2)  # ASCII: names of files may be any bytes
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")

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
            head = cls(coef, intercept, classes, about["kind"], float(about["C"]))
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


class Engine(Protocol):
    """Where rows lie and sums over them are made."""

    def rows(self, source: Source, kind: Tensor | None, device: torch.device) -> Rows:
        """Return the rows, as Rows.of does."""
        ...

    def objective(self, rows: Rows, **parts: Any) -> Objective:
        """Return the objective over such rows, as Objective does."""
        ...


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
    progress: Progress | None = None,
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
    order = inputs.strengths(C, device)
    K = inputs.labels(y, source.shape[0], n_classes)
    w = inputs.weights(weights, source.shape[0], device)
    kind = "sigmoid" if K is None else "binary" if K == 2 else "softmax"
    softmax = kind == "softmax"
    y = y.to(device) if K is None else y.to(device, torch.int64)
    rows = (engine.rows if engine else Rows.of)(
        source, y if softmax else None, torch.device(device)
    )
    y, w = y[rows.order], w[:, rows.order]
    labels = None if softmax else y.reshape(len(y), -1).T.double()  # (L, N)
    strengths, back = torch.unique(order, return_inverse=True)  # ascending

    # Head (j, g, l). Row weights: one row per group, or per group and label if labels are missing.
    J, G, L = len(strengths), len(w), 1 if labels is None else len(labels)
    j, g, label = (
        t.flatten().to(device)
        for t in torch.meshgrid(torch.arange(J), torch.arange(G), torch.arange(L), indexing="ij")
    )
    known = w.double()[:, None]
    if labels is not None:
        known = known * ~labels.isnan()  # (G, L, N)
    total = known.sum(2)
    if not (total > 0).all():
        raise ProbeError(
            "a fold or a label has no training row left: use fewer folds, or drop the label"
        )
    l2 = 1 / (strengths[j] * total[g, label] * rows.scale**2)
    K = K if K and softmax else 1  # outputs of a head
    counts = torch.zeros(G, K, dtype=torch.float64, device=device)
    if softmax:
        counts.index_add_(1, y, w.double())
    present = counts > 0
    bases, basis = bases_of(rows, w)
    bf16_rows, outputs = None, J * G * L * K
    if (
        rows.at_hand
        and len(bases) == 1
        and min(len(rows), PRODUCTS * outputs) >= rows.width
        and len(rows) * rows.width >= LARGE
        and multiplies_bfloat16(str(device))
    ):
        bf16_rows = rows.in_bf16(bases[0].B)

    def objective(dtype: torch.dtype) -> Objective:
        return (engine.objective if engine else Objective)(
            rows=rows.to(dtype),
            y=None if labels is None else labels.nan_to_num(0).to(dtype),
            weights=(known / total[..., None]).flatten(0, 1).to(dtype),
            bases=[one.to(dtype) for one in bases],
            l2=l2.to(dtype),
            group=g * L + label,
            basis=basis[g],
            column=None if labels is None else label,
            present=present if softmax and not bool(present.all()) else None,
            bf16_rows=bf16_rows,
        )

    theta = torch.zeros(J, G * L, K, rows.width, device=device)
    if labels is None:
        theta[..., -1] = torch.where(present, (counts / total).log(), ABSENT_INTERCEPT)
    else:
        share = (known * labels.nan_to_num(0)).sum(2) / total  # (G, L)
        theta[..., -1] = share.logit().clamp(-SURE, SURE).view(1, G * L, 1)
    path = RegularizationPath(strengths.log10().tolist(), theta)
    small = rows.at_hand and len(rows) * rows.width * K <= SMALL
    single = bool(((l2 > RANGE[0]) & (l2 < RANGE[1])).all())
    if single:
        path.solve(objective(torch.float32), tol=max(tol, SINGLE), progress=progress)
        if small and tol >= SINGLE:
            path.check(objective(torch.float64), tol=tol)
    if not single or tol < SINGLE or not path.converged.all():
        path.theta, exact = path.theta.double(), objective(torch.float64)
        if softmax:  # what rounding moved all classes by: no step of the solver goes there
            path.theta = exact.centred(path.theta.flatten(0, 1)).view_as(path.theta)
        if tol < SINGLE:  # float32 can't tell how near it came
            path.gap[:] = torch.inf
        path.solve(exact, tol=tol, bounded=small, progress=progress)
    if unconverged := int((~path.converged).sum()):
        warnings.warn(
            f"{unconverged} of {path.converged.numel()} heads did not reach a relative gap of "
            f"{tol:g}; the worst is at {float(path.gap.max()):.1e}",
            ConvergenceWarning,
            stacklevel=2,
        )
    bound = _bounds(objective(torch.float64), path.theta).view(J, G, L) if certified else None
    theta = path.theta.double()
    if softmax:
        theta[..., -1] = torch.where(present, theta[..., -1], -SURE)
        theta = theta - theta.mean(2, keepdim=True)
        theta[..., :-1] *= present[..., None]  # a class that is not there has no coefficients
    coef, intercept = rows.back(torch.unflatten(theta, 1, (G, L))[back])
    shaped = {
        n: torch.unflatten(getattr(path, n), 1, (G, L))[back]
        for n in ("converged", "gap", "value", "passes")
    }
    # A logit is a sum of terms of this mean square; each is rounded, and half of p (1 - p) <= 1 / 4
    # times the square of what that makes of the logit is what the objective gains.
    size = (coef.square() @ rows.squares(bases[0].gram) + intercept.square()).sum(3)
    lost = EPS**2 / 8 * size > SPARED * tol * shaped["value"].clamp_min(FLOOR)
    kept = torch.float64 if tol < SINGLE or bool(lost.any()) else torch.float32
    return Heads(
        coef=coef.to(kept),
        intercept=intercept.to(kept),
        C=order,
        kind=kind,
        bound=None if bound is None else bound[back],
        **shaped,
    )


def _bounds(objective: Objective, theta: Tensor) -> Tensor:
    """Return the certificate of every head, (J * B,), of theta (J, B, K, D)."""
    theta = theta.double()
    flat, step = theta.flatten(0, 1), batch_size(objective, theta)
    parts = torch.split(torch.arange(len(flat), device=theta.device), step)
    return torch.cat([certify(objective.select(part), flat[part]) for part in parts])
