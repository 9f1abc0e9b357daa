"""Choose a head's C, or its number of neighbours, on folds of the training rows; then fit on all.

Nothing in here is given a test row. A subset is one training set: all rows, or a few per class.
Subsets are fitted in one batch: head group (subset, 0) is the refit, (subset, f + 1) leaves out
fold f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.errors import ProbeError
from probe import splits
from probe.data import Features
from probe.heads import Head, Heads, fit_heads
from probe.score import metrics
from probe.solve.knn import vote
from probe.solve.least_squares import fit as solve
from probe.solve.path import HeadProgress

MAX_LOG_ODDS = 1 << 26  # numbers of held-out log-odds kept at once: 512 MB


Fit = Callable[..., Heads]  # fit_heads, or one that has others hold the rows
HeldOut = tuple[NDArray[Any], NDArray[np.float64]]  # y (n,) or (n, L), log-odds (n, K)


@dataclass(frozen=True)
class TrainingSet:
    """Training rows as an ascending index (m,), the folds of them, and the seed that drew them.

    weight (m,): how much each row counts in linear heads, and in what chooses their C; else alike.
    """

    rows: NDArray[np.int64]
    folds: splits.Folds
    seed: int
    shots: int | None = None
    weight: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Selection:
    """What a training set led to: log_odds turns X (N, D) into (N, K).

    C is None where no strength was chosen, head where neighbours vote. `folds` is what was chosen
    by, as results.jsonl has it; `note` says what differs from what was asked. held_out gives labels
    and log-odds of every row that a fold held out, by the head that was fitted without that fold.
    """

    log_odds: Callable[[torch.Tensor], torch.Tensor]
    head: Head | None
    C: float | None
    folds: dict[str, Any]
    converged: bool
    note: str
    held_out: Callable[[], HeldOut]


def linear(
    features: Features,
    y: NDArray[Any],
    subsets: Sequence[TrainingSet],
    *,
    C: Sequence[float],
    classes: Sequence[str],
    metric: metrics.Metric,
    tol: float,
    device: str,
    progress: HeadProgress | None = None,
    fit: Fit = fit_heads,
) -> list[Selection]:
    """Fit every strength on every fold of every subset in one call, and choose; y (n,) or (n, L).

    A subset of F folds makes F + 1 weightings of the rows: all of them first, then each without one
    fold.
    """
    used = np.unique(np.concatenate([subset.rows for subset in subsets]))
    groups: list[NDArray[np.float32]] = []  # weights (m,) of each head group
    first = []  # the group of each subset's refit
    for subset in subsets:
        positions = np.searchsorted(used, subset.rows)
        first.append(len(groups))
        for kept in [np.ones(len(positions), dtype=bool), *~subset.folds.held_out]:
            groups.append(np.zeros(len(used), dtype=np.float32))
            groups[-1][positions[kept]] = 1 if subset.weight is None else subset.weight[kept]
    heads = fit(
        features.take(used).source(),
        torch.from_numpy(y[used]),
        C=C,
        n_classes=len(classes),
        weights=torch.from_numpy(np.stack(groups)),
        tol=tol,
        device=device,
        progress=progress,
    )
    return [
        _chosen(heads, group, features.take(subset.rows), y[subset.rows], subset, classes, metric)
        for group, subset in zip(first, subsets, strict=True)
    ]


def _chosen(
    heads: Heads,
    group: int,
    features: Features,
    y: NDArray[Any],
    subset: TrainingSet,
    classes: Sequence[str],
    metric: metrics.Metric,
) -> Selection:
    """Choose a subset's C on its folds; y (m,) or (m, L); `group` is the refit's head group."""
    held_out = subset.folds.held_out
    scores = np.full((len(heads.C), len(held_out)), np.nan)
    width = len(classes)
    for f, held in enumerate(held_out):
        step = max(1, MAX_LOG_ODDS // (int(held.sum()) * width))
        for j in range(0, len(scores), step):
            of_fold = heads.select(slice(j, j + step), group + f + 1)
            parts = [of_fold.log_odds(X.to(heads.coef.device)) for X in _chunks(features, held)]
            weight = None if subset.weight is None else subset.weight[None, held]
            scores[j : j + step, f] = scores_of(metric, y[held], torch.cat(parts, 1), weight)

    def losses(j: int) -> list[float]:
        """Return the log-loss of strength j on each fold."""
        weights = [None if subset.weight is None else subset.weight[None, h] for h in held_out]
        return [
            scores_of(loss, y[held], of_rows(f, held, j)[None], weights[f])[0]
            for f, held in enumerate(held_out)
        ]

    def of_rows(f: int, held: NDArray[np.bool_], j: int | None = None) -> torch.Tensor:
        one = best if j is None else j
        chosen = heads.select(slice(one, one + 1), group + f + 1)
        parts = [chosen.log_odds(X.to(heads.coef.device))[0] for X in _chunks(features, held)]
        return torch.cat(parts)

    # Without folds, scikit-learn's default C = 1, or what was tried next to it.
    best = int(heads.C.log().abs().argmin())
    loss = metrics.METRICS[metric.task, "log_loss"]
    if len(held_out):
        best = best_of(scores, metric, int(held_out.sum()), losses)
    head = heads.head(classes, best, group)
    groups = slice(group, group + 1 + len(held_out))  # the refit's, then each fold's
    converged = heads.converged[:, groups]
    unconverged = int((~converged).sum())

    return Selection(
        log_odds=head.log_odds,
        head=head,
        C=float(heads.C[best]),
        folds={
            "kind": subset.folds.kind,
            "C": heads.C.tolist(),
            "scores": jsonable(scores),
            "converged": converged[:, 1:].all(2).tolist(),
            "gap": heads.gap[:, groups][:, 1:].amax(2).tolist(),
        },
        converged=bool(converged.all()),
        note=f"{unconverged} of {converged.numel()} heads did not converge" if unconverged else "",
        held_out=lambda: held_out_rows(of_rows, y, subset, width),
    )


@dataclass(frozen=True)
class _Voters:
    """Training rows (n, D) that vote for the classes of others, by votes (n, K)."""

    features: Features
    votes: torch.Tensor
    temperature: float
    device: str

    def log_odds(self, X: torch.Tensor, *, k: int) -> torch.Tensor:
        """Return the log-odds (m, K) of rows X (m, D) by the votes of all training rows."""
        votes = self.votes.to(self.device)
        chunks, temperature = self.features.chunks(), self.temperature
        return vote(chunks, votes, X.to(self.device), k=[k], temperature=temperature)[0]

    def of_held_out(self, held: NDArray[np.bool_], k: Sequence[int]) -> torch.Tensor:
        """Return log-odds (J, m, K) of rows that a mask (n,) holds out, by the others' votes."""
        votes = self.votes[torch.from_numpy(~held)].to(self.device)
        X = torch.cat(list(_chunks(self.features, held))).to(self.device)
        return vote(_chunks(self.features, ~held), votes, X, k=k, temperature=self.temperature)


def neighbours(
    features: Features,
    y: NDArray[Any],
    subsets: Sequence[TrainingSet],
    *,
    k: Sequence[int],
    temperature: float,
    classes: Sequence[str],
    metric: metrics.Metric,
    device: str,
) -> list[Selection]:
    """Score every k on every fold of every subset, y (n,) or (n, L); the best k votes with all.

    A k is left out where it is more than the rows that vote, on a fold or in all. Raises ProbeError
    where none is left.
    """
    selections = []
    for subset in subsets:
        tried, note = _usable(k, subset)
        labels, held_out = y[subset.rows], subset.folds.held_out
        votes = torch.from_numpy(np.eye(len(classes))[labels] if y.ndim == 1 else labels)
        voters = _Voters(features.take(subset.rows), votes, temperature, device)
        scores = np.full((len(tried), len(held_out)), np.nan)
        for f, held in enumerate(held_out):
            scores[:, f] = scores_of(metric, labels[held], voters.of_held_out(held, tried))
        best = int(tried[best_of(scores, metric)]) if len(held_out) else min(tried)

        def of_rows(
            _: int, held: NDArray[np.bool_], voters: _Voters = voters, best: int = best
        ) -> torch.Tensor:
            return voters.of_held_out(held, [best])[0]

        selections.append(
            Selection(
                log_odds=partial(voters.log_odds, k=best),
                head=None,
                C=None,
                folds={
                    "kind": subset.folds.kind,
                    "k": list(tried),
                    "chosen": best,
                    "temperature": temperature,
                    "scores": jsonable(scores),
                },
                converged=True,
                note=note,
                held_out=partial(held_out_rows, of_rows, labels, subset, len(classes)),
            )
        )
    return selections


def _usable(k: Sequence[int], subset: TrainingSet) -> tuple[list[int], str]:
    """Return the k that are not more than the rows that vote, and a note on those that are."""
    most = min([len(subset.rows), *(int((~held).sum()) for held in subset.folds.held_out)])
    usable = [count for count in k if count <= most]
    over = ", ".join(str(count) for count in k if count > most)
    where = "on a fold" if len(subset.folds.held_out) else "in all"
    if not usable:
        raise ProbeError(
            f"k = {over}: more neighbours than the {most} training images that vote {where}; want "
            "a smaller --k"
        )
    return usable, f"k = {over} left out: {most} training images vote {where}" if over else ""


def least_squares(
    features: Features,
    y: NDArray[Any],
    subsets: Sequence[TrainingSet],
    *,
    l2: float,
    classes: Sequence[str],
    metric: metrics.Metric,
) -> list[Selection]:
    """Fit one head per subset in closed form; folds only report.

    y (n,). Raises ProbeError for several findings per image, y (n, L).
    """
    if y.ndim == 2:
        raise ProbeError(
            "least squares takes one class per image: this data set has several labels"
        )
    selections = []
    for subset in subsets:
        X = torch.cat(list(features.take(subset.rows).chunks()))
        labels = torch.from_numpy(y[subset.rows])

        def fitted(rows: torch.Tensor, X: torch.Tensor = X, y: torch.Tensor = labels) -> Head:
            coef, intercept = solve(X[rows], y[rows], len(classes), l2=l2)
            return Head(coef, intercept, tuple(classes), "softmax", 1 / (2 * l2))

        kept = [torch.from_numpy(~held) for held in subset.folds.held_out]
        of_folds = [fitted(rows) for rows in kept]
        held_out = [h.log_odds(X[~rows]) for h, rows in zip(of_folds, kept, strict=True)]
        scores = [
            scores_of(metric, labels[~rows].numpy(), z[None])[0]
            for rows, z in zip(kept, held_out, strict=True)
        ]
        head = fitted(torch.ones(len(X), dtype=torch.bool))

        def of_rows(
            f: int, held: NDArray[np.bool_], held_out: list[torch.Tensor] = held_out
        ) -> torch.Tensor:
            return held_out[f]

        selections.append(
            Selection(
                log_odds=head.log_odds,
                head=head,
                C=None,
                folds={
                    "kind": subset.folds.kind,
                    "l2": l2,
                    "scores": jsonable(np.array(scores)[None]),
                },
                converged=True,
                note="",
                held_out=partial(held_out_rows, of_rows, y[subset.rows], subset, len(classes)),
            )
        )
    return selections


def scores_of(
    metric: metrics.Metric,
    y: NDArray[Any],
    z: torch.Tensor,
    weight: NDArray[np.float64] | None = None,
) -> list[float]:
    """Return the metric of each of J heads' log-odds (J, n, K), rows weighted (1, n) or alike."""
    heads = z.cpu().numpy()
    return [float(metrics.evaluate_log_odds(metric, y, head, weight)[0]) for head in heads]


def held_out_rows(
    of_rows: Callable[[int, NDArray[np.bool_]], torch.Tensor],
    y: NDArray[Any],
    subset: TrainingSet,
    width: int,
) -> HeldOut:
    """Return labels (M,) or (M, L) and log-odds (M, K) of the rows that folds held out, in order.

    of_rows(f, mask) gives the log-odds of the rows of a mask by the head of fold f; y (m,), (m, L).
    """
    zs = [np.empty((0, width))]
    zs += [of_rows(f, held).cpu().numpy() for f, held in enumerate(subset.folds.held_out)]
    ys = [y[:0], *(y[held] for held in subset.folds.held_out)]
    return np.concatenate(ys), np.concatenate(zs)


def _chunks(features: Features, mask: NDArray[np.bool_]) -> Any:
    """Return chunks (n, D) of the rows of a mask."""
    return features.take(mask).chunks()


def best_of(
    scores: NDArray[np.float64],
    metric: metrics.Metric,
    images: int = 0,
    losses: Callable[[int], list[float]] | None = None,
) -> int:
    """Return the index of the best mean over folds, of scores (J, F), F folds.

    Where several are as good, it is the one of the least log-loss: scores within 1 / images of the
    best, which one held-out image more or less would change. Accuracy alone takes the first of
    them, whose penalty is the strongest and whose probabilities say far too little. losses(j) gives
    the log-loss of index j on each fold, images is how many were held out; without them the first
    of equals is taken. Raises ProbeError where no score is defined.
    """
    if len(scores) == 1:
        return 0
    defined = ~np.isnan(scores)
    if not defined.any():
        raise ProbeError(
            f"{metric.name} is not defined on any fold: use fewer folds or another --metric"
        )
    mean = np.where(defined, scores, 0).sum(1) / np.maximum(defined.sum(1), 1)
    mean[~defined.any(1)] = np.nan
    best = metrics.best_of(metric, mean)
    if losses is None or not metric.higher:
        return best
    near = np.flatnonzero(mean >= mean[best] - 1 / images - 1e-12)
    if len(near) == 1:
        return best
    return int(near[np.argmin([np.mean(losses(j)) for j in near.tolist()])])


def jsonable(scores: NDArray[np.float64]) -> list[list[float | None]]:
    """Return scores (J, F) as lists, None where they are not defined."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in scores]
