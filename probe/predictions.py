"""predictions.csv: what a head said of each test image, written and read back to the bit."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.files import open_regular, replacing
from probe.score.folded import Scores
from probe.score.log_odds import of_probabilities
from probe.score.metrics import Metric, scores_for
from probe.spreadsheet import inert, original

FOLD = "fold"  # the last column, of predictions by the heads of several outer folds


@dataclass(frozen=True)
class Predictions:
    """What a head said of each test image.

    labels: (N,) class index for a multiclass task, (N, L) of 1, 0 and NaN for a multilabel one.
    probabilities: (N, K), rows summing to 1, or (N, L), each in [0, 1].
    log_odds: what the probabilities were made of (log_odds.py); None is made of them.
    fold: (N,) the outer fold whose head gave each row; None where one head gave all.
    """

    ids: Sequence[str]
    subjects: Sequence[str]
    labels: NDArray[Any]
    probabilities: NDArray[np.floating[Any]]
    classes: Sequence[str]
    log_odds: NDArray[np.float64] = None  # type: ignore[assignment]  # never None once made
    fold: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        """Fill in the log-odds."""
        if self.log_odds is None:
            object.__setattr__(self, "log_odds", of_probabilities(self.probabilities))

    def scores(self, metric: Metric) -> Scores:
        """Return what the metric takes, (N, K): where it ranks, with the folds to rank within."""
        if not metric.ranking:
            return self.probabilities
        return scores_for(metric, self.log_odds, self.fold)

    def take(self, rows: NDArray[np.int64]) -> Predictions:
        """Return the predictions of some rows (n,), in that order."""
        return replace(
            self,
            ids=[self.ids[i] for i in rows],
            subjects=[self.subjects[i] for i in rows],
            labels=self.labels[rows],
            probabilities=self.probabilities[rows],
            log_odds=self.log_odds[rows],
            fold=None if self.fold is None else self.fold[rows],
        )


def columns(classes: Sequence[str]) -> list[str]:
    """Return the names of the columns of what was said of each class."""
    return [f"p:{c}" for c in classes] + [f"log_odds:{c}" for c in classes]


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions.csv, whole or not at all; numbers are read back as the same float64."""
    many = predictions.labels.ndim == 2
    header = ["id", "subject"]
    header += [f"label:{c}" for c in predictions.classes] if many else ["label", "predicted"]
    header += columns(predictions.classes)
    folds = predictions.fold
    header += [] if folds is None else [FOLD]

    def rows() -> Iterable[list[str]]:
        for i, (id_, subject) in enumerate(zip(predictions.ids, predictions.subjects, strict=True)):
            p, z, y = (
                part[i]
                for part in (predictions.probabilities, predictions.log_odds, predictions.labels)
            )
            if many:
                said = ["" if np.isnan(v) else str(int(v)) for v in y]
            else:
                said = [predictions.classes[y], predictions.classes[int(p.argmax())]]
            words = map(inert, (id_, subject, *said))
            last = [] if folds is None else [str(int(folds[i]))]
            yield [*words, *map(repr, p.tolist()), *map(repr, z.tolist()), *last]

    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # names may be bytes
    with replacing(path, "w", **how) as file:
        csv.writer(file).writerow(header)
        csv.writer(file).writerows(rows())


def read_predictions(path: Path) -> Predictions:
    """Read what write_predictions wrote; ProbeError for a file that isn't there or isn't that."""
    try:
        how = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        with open_regular(path, "r", **how) as file:
            header, *rows = list(csv.reader(file))
        if not rows:
            raise ValueError("no rows")
        first = next((k for k, name in enumerate(header) if name.startswith("p:")), None)
        if first is None:
            raise ValueError("no column p:<class>")
        classes = [name.removeprefix("p:") for name in header[first:] if name.startswith("p:")]
        K = len(classes)
        numbers = np.array([[float(v) for v in row[first : first + 2 * K]] for row in rows])
        whole = header[first : first + 2 * K] == columns(classes)
        folded = header[first + 2 * K :] == [FOLD]
        labels: NDArray[Any]
        if header[2] == "label":
            index_of = {name: k for k, name in enumerate(classes)}
            labels = np.array([index_of[original(row[2])] for row in rows], dtype=np.int64)
        else:
            labels = np.array([[float(v) if v else np.nan for v in row[2:first]] for row in rows])
        return Predictions(
            ids=[original(row[0]) for row in rows],
            subjects=[original(row[1]) for row in rows],
            labels=labels,
            probabilities=numbers[:, :K],
            classes=classes,
            log_odds=numbers[:, K:] if whole else of_probabilities(numbers[:, :K]),
            fold=np.array([int(row[first + 2 * K]) for row in rows]) if folded else None,
        )
    except KeyError as error:
        raise ProbeError(
            f"{path} holds no predictions ({error} is no class of its columns p:<class>): run "
            "`medprobe probe` again"
        ) from None
    except (OSError, ValueError, IndexError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ProbeError(
            f"{path} holds no predictions ({reason}): run `medprobe probe` again"
        ) from None
