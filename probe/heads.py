"""Fit many penalised logistic-regression heads at once; predict with one; save and load it.

Shapes: N images, D features, J strengths C, G row weightings (folds, subsets), L label columns,
K classes. The objective is scikit-learn's LogisticRegression (l2, free intercept), divided by C
times the sum of weights n: mean loss + l2/2 ||W||^2 with l2 = 1 / (C n). Three or more classes:
softmax. Two, or several labels per image: one sigmoid per label column.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from features.devices import multiplies_bfloat16
from features.errors import ProbeError
from probe import log_odds
from probe.certificate import certify
from probe.objective import Objective
from probe.path import Path as Strengths
from probe.path import Progress, batch_size
from probe.preconditioner import bases_of
from probe.rows import Rows, Source, Whole

FORMAT = "medprobe-head"  # of heads.json
SURE = 40.0  # a logit whose loss, 4e-18, counts as none
SINGLE = 1e-7  # the smallest relative gap that float32 is asked for
LARGE = 1 << 20  # numbers in the rows from which products at bfloat16 are faster
PRODUCTS = 16  # that a head takes: turning the rows costs as much as one of D outputs


@dataclass(frozen=True, repr=False)
class Head:
    """One fitted classifier.

    coef (K, D) and intercept (K,), or (L, D) and (L,) for sigmoids; in the features' units.
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
        """Return probabilities (N, K), rows summing to 1, or of L labels (N, L), float64."""
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
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            tensors = load_file(path.with_suffix(".safetensors"))
            head = cls(
                tensors["coef"],
                tensors["intercept"],
                tuple(about["classes"]),
                about["kind"],
                about["C"],
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ProbeError(
                f"{path} is not a saved head ({error}); "
                "want heads.json with heads.safetensors beside it"
            ) from None
        return head, about


@dataclass(frozen=True, repr=False)
class Heads:
    """J x G fitted heads of L label columns with K outputs (softmax: L = 1, sigmoids: K = 1).

    coef (J, G, L, K, D), intercept (J, G, L, K); converged, gap, value, passes (J, G, L). gap is
    the estimated distance to the optimum, relative to max(value, 1e-3); bound, where asked for, is
    never less than that distance (certificate.py).
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
    kind: str | None = None,
) -> Heads:
    """Fit a head for every strength C (J,) and every weighting of the rows (G, N).

    Parameters
    ----------
    X : (N, D), finite; any scale and offset; or a Source that reads it block by block.
    y : (N,) class index, or (N, L) of 1, 0 and NaN (left out of that label's loss).
    n_classes : K for class indices, when not all are present in y.
    weights : (G, N); 0 leaves the row out, 2 counts it twice; default one group of ones.
    tol : the gap, (objective - optimum) / max(objective, 1e-3), under which a head is done.
        float32 does the work and float64 finishes what float32 can't: heads it left unconverged,
        or all of them when tol < 1e-7.
    certified : also bound each head's gap, in about four passes in float64.
    progress : called with heads done, heads in all, and the passes of the batch at work.
    engine : holds the rows, where that isn't this process (cluster.py); `certified` is not for it.
    kind : of Heads; default by y, and "softmax" has two classes fitted by softmax as well.

    A class without a row in a group has its optimum at infinity. There it gets no coefficients and
    an intercept of -40, and the others are fitted as if they were all.

    Raises ProbeError where no head can be fitted.
    """
    y = y.to(device)
    if certified and engine:
        raise ProbeError("a certified gap is computed in one process: leave the engine out")
    K = 1 if y.ndim == 2 else n_classes or int(y.max()) + 1
    kind = kind or ("sigmoid" if y.ndim == 2 else "binary" if K == 2 else "softmax")
    if y.ndim == 1 and K < 2:
        raise ProbeError("one class is left in the training rows; a head needs at least two")
    softmax = kind == "softmax"
    if softmax and not (there := _present(y, weights, K)).all():
        how: dict[str, Any] = {"certified": certified, "device": device, "engine": engine}
        return _by_classes(
            partial(fit_heads, X, C=C, tol=tol, progress=progress, **how), y, weights, there
        )
    source: Source = Whole(X) if isinstance(X, Tensor) else X
    rows = (engine.rows if engine else Rows.of)(
        source, y if softmax else None, torch.device(device)
    )
    y = y[rows.order]
    labels = None if softmax else y.reshape(len(y), -1).T.double()  # (L, N)
    w = torch.ones(1, len(y), device=device) if weights is None else weights.to(device)
    w = w[:, rows.order]
    order = torch.as_tensor(C, dtype=torch.float64, device=device)
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
    bases, basis = bases_of(rows, w)
    half, outputs = None, J * G * L * (K if softmax else 1)
    if (
        rows.at_hand
        and len(bases) == 1
        and min(len(rows), PRODUCTS * outputs) >= rows.width
        and len(rows) * rows.width >= LARGE
        and multiplies_bfloat16(str(device))
    ):
        half = rows.half(bases[0].B)

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
            half=half,
        )

    theta = torch.zeros(J, G * L, K if softmax else 1, rows.width, device=device)
    if labels is not None:  # a label that is always there, or never, has its optimum at infinity
        share = (known * labels.nan_to_num(0)).sum(2) / total  # (G, L)
        theta[..., -1] = share.logit().clamp(-SURE, SURE).view(1, G * L, 1)
    path = Strengths(strengths.log10().tolist(), theta)
    path.solve(objective(torch.float32), tol=max(tol, SINGLE), progress=progress)
    if tol < SINGLE or not path.converged.all():
        path.theta = path.theta.double()
        if softmax:  # what rounding moved all classes by: no step of the solver goes there
            path.theta -= path.theta.mean(2, keepdim=True)
        if tol < SINGLE:  # float32 can't tell how near it came
            path.gap[:] = torch.inf
        path.solve(objective(torch.float64), tol=tol, progress=progress)
    if loose := int((~path.converged).sum()):
        warnings.warn(
            f"{loose} of {path.converged.numel()} heads did not reach a relative gap of {tol:g}; "
            f"the worst is at {float(path.gap.max()):.1e}",
            ConvergenceWarning,
            stacklevel=2,
        )
    bound = None
    if certified:
        exact, flat = objective(torch.float64), path.theta.flatten(0, 1).double()
        step = batch_size(exact, path.theta.double())
        parts = [torch.arange(i, min(i + step, len(flat))) for i in range(0, len(flat), step)]
        bound = torch.cat([certify(exact.select(part), flat[part]) for part in parts])
        bound = torch.unflatten(bound.view(J, G * L), 1, (G, L))[back]
    coef, intercept = rows.back(torch.unflatten(path.theta.double(), 1, (G, L))[back])
    kept = torch.float64 if tol < SINGLE else torch.float32
    shaped = {
        n: torch.unflatten(getattr(path, n), 1, (G, L))[back]
        for n in ("converged", "gap", "value", "passes")
    }
    return Heads(
        coef=coef.to(kept), intercept=intercept.to(kept), C=order, kind=kind, bound=bound, **shaped
    )


def _present(y: Tensor, weights: Tensor | None, K: int) -> Tensor:
    """Return which classes of y (N,) have a row in each group of weights (G, N), (G, K)."""
    used = torch.ones(1, len(y)) > 0 if weights is None else weights.cpu() > 0
    return torch.stack([used[:, y.cpu() == k].any(1) for k in range(K)], 1)


def _by_classes(
    fit: Callable[..., Heads], y: Tensor, weights: Tensor | None, there: Tensor
) -> Heads:
    """Fit groups with the same classes together, `there` (G, K), over these classes only."""
    weights = torch.ones(1, len(y)) if weights is None else weights
    whole: dict[str, Any] = {}
    for mine in torch.unique(there, dim=0):
        groups, classes = (there == mine).all(1).nonzero()[:, 0], mine.nonzero()[:, 0]
        if not len(classes):
            raise ProbeError("a fold has no training row left: use fewer folds")
        place = torch.zeros(len(mine), dtype=torch.long)
        place[classes] = torch.arange(len(classes))
        alone = len(classes) == 1  # a label that is never there: no coefficients, no loss
        some = fit(
            place.to(y)[y],
            weights=weights[groups.to(weights.device)],
            n_classes=max(2, len(classes)),
            kind="binary" if alone else "softmax",
        )
        for name, value in vars(some).items():
            if name in ("C", "kind") or value is None:
                continue
            if name in ("coef", "intercept"):  # (J, G, L, K, ...)
                value = torch.zeros_like(value) if alone else value
                gone = torch.full_like(value[:, :, :, :1], 0 if name == "coef" else -SURE)
                value = torch.cat([value, gone], 3)[:, :, :, torch.where(mine, place, -1)]
            empty = value.new_empty(value.shape[0], len(there), *value.shape[2:])
            whole.setdefault(name, empty)[:, groups.to(value.device)] = value
    return replace(some, **whole)
