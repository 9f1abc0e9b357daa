"""Heads of columns of the table, such as age and sex, alone or beside the image's features.

Numbers: the median where there is none, then mean 0 and deviation 1. Texts: the most frequent where
there is none, then a column of 1 and 0 for each value. A column of 1 and 0 says where a value was
missing. All of this is fitted on the rows that a head is trained on, anew for each fold, by
scikit-learn's ColumnTransformer; so each fold has a matrix, and a batch of strengths, of its own.

One penalty weighs both kinds of coefficients. Features of an image come as they are (their scale is
what C means without columns), columns have a variance near 1. Beside an image the block of columns
is therefore multiplied by the root of the total variance of the image's features: one column then
has, before any data, as much say as the whole image. So known covariates are adjusted for, nearly
unpenalised at any C that serves the image (De Bin et al. 2014 compare ways to add many features to
few clinical ones; penalising both alike drowns the few), and the image adds what they don't say.

Shapes: n rows, C columns of the table, P of the coded block, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from features.errors import ProbeError
from features.manifest import Manifest
from probe.choose import Fit, Selection, TrainingSet, best_of, held_out_rows, jsonable, scores_of
from probe.data import Features
from probe.heads import Head, Heads, fit_heads
from probe.pairing import paired_test
from probe.probing import ProbeSettings
from probe.results import Predictions, Result, read_predictions
from probe.score import metrics
from probe.score.groups import MAX_VALUES
from probe.score.predictions import column
from probe.solve.path import HeadProgress
from probe.solve.sources import MIN_CHUNK_ROWS, Source

FAR = 1e15  # times the median distance: a number beyond is no measurement
MOST = 20  # values of a column of texts
# What a result of columns alone is of, whatever store they were read from.
FEATURE = "columns/values"
NO_BACKBONE: dict[str, Any] = {"backbone": "columns", "weights": "published", "extraction": {}}


@dataclass(frozen=True)
class Covariates:
    """Columns of a manifest's rows: table (N, C), numbers or places among `values`, NaN: missing.

    values holds the texts of a column, None of numbers.
    """

    names: tuple[str, ...]
    values: tuple[tuple[str, ...] | None, ...]
    table: NDArray[np.float64]

    def transformer(self) -> ColumnTransformer:
        """Return what codes rows of the table (n, C), to be fitted: (n, P)."""
        numbers = [k for k, values in enumerate(self.values) if values is None]
        texts = [k for k, values in enumerate(self.values) if values is not None]
        scaled = make_pipeline(
            SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()
        )
        one_hot = make_pipeline(
            SimpleImputer(strategy="most_frequent", keep_empty_features=True),
            OneHotEncoder(handle_unknown="ignore", sparse_output=False),
        )
        missing = MissingIndicator(error_on_new=False)
        return ColumnTransformer(
            [
                ("numbers", scaled, numbers),
                ("texts", one_hot, texts),
                ("missing", missing, [*numbers, *texts]),
            ],
            sparse_threshold=0,
        )


def covariates(manifest: Manifest, names: Sequence[str], rows: NDArray[np.integer]) -> Covariates:
    """Return columns at rows (N,) of a manifest. ProbeError for one that a head can't learn from.

    Numbers are a number where they are more than MAX_VALUES, else values like texts: 0 and 1 of a
    sex are no scale.
    """
    values: list[tuple[str, ...] | None] = []
    table = np.full((len(rows), len(names)), np.nan)
    for k, name in enumerate(names):
        given = column(manifest, name, rows)
        known = np.asarray(given != "")
        found = sorted(set(given[known].tolist()))
        numbers = _numbers(given[known]) if len(found) > MAX_VALUES else None
        if numbers is not None:
            table[known, k] = _about_their_median(numbers, f"--with {name}: {manifest.dataset}")
            values.append(None)
            continue
        if len(found) < 2 and (known.all() or not len(found)):
            what = f"has the value {found[0]} in every image" if found else "has no value"
            raise ProbeError(f"--with {name}: {manifest.dataset} {what}: leave it out")
        if len(found) > MOST:
            raise ProbeError(
                f"--with {name}: {len(found)} values, which are not numbers; want at most {MOST}: "
                "join some in the table, or leave it out"
            )
        place = {value: place for place, value in enumerate(found)}
        table[known, k] = [place[value] for value in given[known].tolist()]
        values.append(tuple(found))
    return Covariates(tuple(names), tuple(values), table)


def _about_their_median(numbers: NDArray[np.float64], where: str) -> NDArray[np.float64]:
    """Return numbers (n,) less their median, by their median distance to it.

    What heads read is coded by mean and deviation and so isn't changed by this, and float32, which
    holds seven digits, keeps what tells times or dates apart. ProbeError for one that is too far.
    """
    middle = np.median(numbers)
    with np.errstate(over="ignore"):
        apart = numbers - middle
    distance = np.median(np.abs(apart)) or np.abs(apart).max()
    farthest = int(np.abs(apart).argmax())
    if not abs(apart[farthest]) <= FAR * distance:
        raise ProbeError(
            f"{where} has the value {numbers[farthest]:g}, and the median is {middle:g}: mend "
            "it, or leave the cell empty"
        )
    return np.asarray(apart / distance)


def _numbers(given: NDArray[Any]) -> NDArray[np.float64] | None:
    try:
        numbers = given.astype(np.float64)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


@dataclass(frozen=True)
class WithColumns(Features):
    """Rows of columns (n, C), and of a feature (n, D) after them where `image`: (n, C + D)."""

    columns: Covariates
    table: torch.Tensor
    image: bool

    @property
    def note(self) -> str:
        """Say what a head reads, for a reader of its score."""
        names = ", ".join(self.columns.names)
        if not self.image:
            return f"of the columns {names} alone, without the image"
        return f"of the image and the columns {names}; `predict` has no columns, and no such head"

    def settings(self) -> dict[str, Any]:
        """Return what tells such a head from one of the image alone."""
        return {"columns": list(self.columns.names), "image": self.image}

    @property
    def width(self) -> int:
        """Return C + D, or C."""
        return self.table.shape[1] + (super().width if self.image else 0)

    def source(self) -> Source:
        """Return the rows of the feature (n, D), without columns."""
        own = (self.store, self.feature, self.rows, self.X, self.free_bytes)
        return Features(*own).source()

    def take(self, index: NDArray[Any]) -> WithColumns:
        """Keep the rows of an ascending index or a mask (n,)."""
        own = super().take(index)
        kept = self.table[torch.from_numpy(index)]
        return replace(self, rows=own.rows, X=own.X, table=kept)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield rows (m, C + D), or (m, C), in float32, chunk by chunk."""
        if not self.image:
            yield self.table
            return
        start = 0
        for X in self.source().chunks():
            yield torch.cat([self.table[start : start + len(X)], X.to(torch.float32)], dim=1)
            start += len(X)


def check_settings(settings: ProbeSettings) -> None:
    """Raise ProbeError for settings of a head that doesn't read columns."""
    if settings.head != "linear" or settings.protocol.l2 is not None:
        what = "least squares" if settings.head == "linear" else f"a {settings.head} head"
        raise ProbeError(f"--with goes with logistic regression, not with {what}: leave one out")
    if not settings.C:
        raise ProbeError(
            f"protocol {settings.protocol.name} has a C for a number of features: give --C, or "
            "leave --with out"
        )


def gain(
    metric: metrics.Metric,
    said: Predictions,
    over: Result,
    folder: Path,
    settings: ProbeSettings,
) -> dict[str, Any]:
    """Return what a result says of predictions held against those of columns alone, `over`.

    It is in the metric's own direction of numbers, with the paired interval and p of `compare`.
    """
    theirs = read_predictions(folder / over.predictions)
    found = paired_test(metric, [said], [theirs], n=settings.bootstrap, seed=settings.seed)
    return {
        "over": ", ".join(over.settings["columns"]),
        "alone": over.value,
        **{name: getattr(found, name) for name in ("value", "ci_low", "ci_high", "p", "test")},
    }


def with_columns(features: Features, given: Covariates, *, image: bool) -> WithColumns:
    """Return columns (n, C) beside features (n, D), or without them."""
    table = torch.from_numpy(given.table.astype(np.float32))
    parts = (features.store, features.feature, features.rows, features.X, features.free_bytes)
    return WithColumns(*parts, columns=given, table=table, image=image)


@dataclass(frozen=True)
class Design:
    """How rows (n, C + D) become what a head reads, (n, P + D); fitted on training rows.

    scale multiplies the P coded columns.
    """

    coder: ColumnTransformer
    C: int
    P: int
    scale: float

    def __call__(self, X: torch.Tensor) -> torch.Tensor:
        """Return rows (n, P + D) in float32."""
        coded = self.coder.transform(X[:, : self.C].numpy()) * self.scale
        block = torch.from_numpy(np.asarray(coded, dtype=np.float32))
        return torch.cat([block, X[:, self.C :]], dim=1)


def design(features: WithColumns) -> Design:
    """Fit the coding of columns, and their scale beside an image, on training rows (n, C + D)."""
    table = features.table.numpy()
    coder = features.columns.transformer().fit(table)
    P = coder.transform(table[:1]).shape[1]
    scale = math.sqrt(_total_variance(features)) if features.image else 1.0
    return Design(coder, table.shape[1], P, scale or 1.0)


def _total_variance(features: WithColumns) -> float:
    """Return the sum of the variances of the image's features, in two passes over (n, D)."""
    n, total = len(features), 0.0
    mean = torch.zeros(features.width - features.table.shape[1], dtype=torch.float64)
    for X in features.source().chunks():
        mean += X.double().sum(0) / n
    for X in features.source().chunks():
        total += float((X.double() - mean).square().sum()) / n
    return total


@dataclass(frozen=True)
class Coded:
    """A source (probe/solve/sources.py) of rows as a design makes them, (n, P + D)."""

    features: WithColumns
    design: Design

    @property
    def shape(self) -> tuple[int, int]:
        """Return (n, P + D)."""
        return len(self.features), self.features.width - self.design.C + self.design.P

    @property
    def chunk_rows(self) -> int:
        """Return the rows of a chunk."""
        return max(self.features.source().chunk_rows, MIN_CHUNK_ROWS)

    def chunks(self) -> Iterator[torch.Tensor]:
        """Yield (m, P + D) float32 from the first row on."""
        yield from map(self.design, self.features.chunks())

    def part(self, start: int, stop: int) -> Source:
        """Return the rows from start to before stop."""
        return Coded(self.features.take(np.arange(start, stop)), self.design)


def linear(
    features: WithColumns,
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
    """Choose C on folds of every subset as choose.linear does; y (n,) or (n, L).

    Columns are coded anew in each fold, and all strengths of a fold are solved together.
    """
    how: dict[str, Any] = {"C": C, "tol": tol, "device": device, "progress": progress}
    how |= {"fit": fit, "n_classes": len(classes)}
    selections = []
    for subset in subsets:
        own, labels = features.take(subset.rows), y[subset.rows]
        held_out = subset.folds.held_out
        whole = fitted(own, labels, **how)
        of_folds = [fitted(own.take(~held), labels[~held], **how) for held in held_out]
        scores = np.full((len(whole[1].C), len(held_out)), np.nan)
        for f, (held, (coding, heads)) in enumerate(zip(held_out, of_folds, strict=True)):
            z = torch.cat([heads.log_odds(coding(X)) for X in own.take(held).chunks()], 1)
            scores[:, f] = scores_of(metric, labels[held], z)
        selections.append(_selection(whole, of_folds, scores, own, labels, subset, classes, metric))
    return selections


def fitted(
    features: WithColumns, y: NDArray[Any], *, fit: Fit, n_classes: int, **how: Any
) -> tuple[Design, Heads]:
    """Return the coding of training rows (n, C + D), and a head of each strength, on the CPU."""
    coding = design(features)
    source: Any = Coded(features, coding)
    if not features.image or features.X is not None:
        source = torch.cat(list(source.chunks()))
    heads = fit(source, torch.from_numpy(y), n_classes=n_classes, **how)
    names = ("coef", "intercept", "C", "converged", "gap", "value", "passes")
    return coding, replace(heads, **{name: getattr(heads, name).cpu() for name in names})


def _selection(
    whole: tuple[Design, Heads],
    of_folds: Sequence[tuple[Design, Heads]],
    scores: NDArray[np.float64],
    features: WithColumns,
    y: NDArray[Any],
    subset: TrainingSet,
    classes: Sequence[str],
    metric: metrics.Metric,
) -> Selection:
    """Return what scores (J, F) of the folds' heads chose; y (n,) or (n, L)."""
    coding, heads = whole
    held_out = subset.folds.held_out
    loss = metrics.METRICS[metric.task, "log_loss"]

    def said(one: Head, code: Callable[[torch.Tensor], torch.Tensor], X: torch.Tensor) -> Any:
        return one.log_odds(code(X.cpu().to(torch.float32)))

    def of_rows(f: int, held: NDArray[np.bool_], j: int | None = None) -> torch.Tensor:
        code, mine = of_folds[f][0], of_folds[f][1].head(classes, best if j is None else j)
        return torch.cat([said(mine, code, X) for X in features.take(held).chunks()])

    def losses(j: int) -> list[float]:
        """Return the log-loss of strength j on each fold."""
        return [
            scores_of(loss, y[held], of_rows(f, held, j)[None])[0]
            for f, held in enumerate(held_out)
        ]

    best = int(heads.C.log().abs().argmin())
    if len(of_folds):
        best = best_of(scores, metric, int(held_out.sum()), losses)
    head: Head = heads.head(classes, best)
    converged = torch.stack([one.converged.flatten(1).all(1) for _, one in (whole, *of_folds)], 1)
    gap = [one.gap.flatten(1).amax(1).tolist() for _, one in of_folds]
    unconverged = int((~converged).sum())

    return Selection(
        log_odds=partial(said, head, coding),
        head=None,  # one that `predict` can apply would want the columns too
        C=float(heads.C[best]),
        folds={
            "kind": subset.folds.kind,
            "C": heads.C.tolist(),
            "scores": jsonable(scores),
            "converged": converged[:, 1:].tolist(),
            "gap": [list(row) for row in zip(*gap, strict=True)] or [[] for _ in heads.C],
        },
        converged=unconverged == 0,
        note=f"{unconverged} of {converged.numel()} heads did not converge" if unconverged else "",
        held_out=lambda: held_out_rows(of_rows, y, subset, len(classes)),
    )
