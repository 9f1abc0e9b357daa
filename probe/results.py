"""One Result is one row of results.jsonl: a number and everything that leads back to it.

A results folder holds

    results.jsonl                      one line per result, appended, never rewritten
    <dataset>/<backbone>/<run>/
        predictions.csv                id, subject, label, predicted, one probability per class
        heads.safetensors, heads.json  the fitted head

Paths in a row are relative to the folder, so the folder can be moved. In predictions.csv of a
multi-label task, `label` and `predicted` become one column per finding: `label:<finding>`
(1, 0 or empty), and `p:<finding>`.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import ProbeError
from features.lock import writing

PATIENCE = 60.0  # seconds until others have written their line


@dataclass(frozen=True)
class Result:
    """A test score of one head on one store.

    `value` with `ci_low`, `ci_high` (95 %) is the score by `metric`; `metrics` has these three,
    under these names, of every metric of the task, null where it is not defined.
    `folds` is what C was chosen by: {"kind", "C" (J,), "scores", "converged", "gap" (J, folds)}.
    """

    dataset: str
    backbone: str
    weights: str  # "published", "file" or "random"
    scenario: str
    head: str
    feature: str
    protocol: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    metrics: dict[str, dict[str, float | None]]
    C: float | None  # None for a head without one
    folds: dict[str, Any]
    task: str  # "multiclass" or "multilabel"
    classes: list[str]
    n_train: int
    n_test: int
    n_bad: int
    n_subjects_test: int
    seed: int
    split_digest: str
    store: str
    store_fingerprint: str
    predictions: str
    heads: str
    converged: bool
    seconds: float
    command: str
    versions: dict[str, str]
    created: str  # UTC, ISO 8601
    notes: list[str] = field(default_factory=list)
    interval: str = "percentile bootstrap by subject"  # what ci_low and ci_high are
    few: str = ""  # of what the test has too few for any interval to hold its 95 %
    scored_by: str = "image"  # or "subject (mean)", "study (max)", ...
    outputs: dict[str, dict[str, float | None]] = field(default_factory=dict)  # per class, finding
    reliability: list[dict[str, float]] = field(default_factory=list)  # bins of probability
    subgroups: list[dict[str, Any]] = field(default_factory=list)  # the metric per group, --by
    thresholds: dict[str, Any] = field(default_factory=dict)  # {"rule", "chosen_on", "outputs"}
    audit: dict[str, Any] = field(default_factory=dict)  # {"line", "leaks", "conflicts"}
    shots: int | None = None  # training images per class; None for all
    history: list[dict[str, Any]] = field(default_factory=list)  # of training, one per epoch
    tuned: dict[str, Any] = field(default_factory=dict)  # {"unfreeze", "drop_last", "init", ...}
    control: dict[str, Any] | None = None  # {"kind": "shuffle", "value", "ci_low", "ci_high", "C"}


def append(folder: Path, result: Result) -> None:
    """Add one line to folder/results.jsonl, whole or not at all as far as a reader can tell."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(
        asdict(result), allow_nan=False
    )  # ASCII: no separator of Unicode breaks a line
    others = writing(folder / ".results", patience=PATIENCE)  # on a cluster several may write
    with others, (folder / "results.jsonl").open("a", encoding="ascii") as file:
        file.write(line + "\n")


def load(source: Path) -> list[Result]:
    """Read the results of a folder or a .jsonl file; of two rows for a cell the later one stands.

    A cell is (dataset, backbone, weights, scenario, head, feature, protocol, metric, shots, seed,
    scored_by).
    """
    path = source / "results.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise ProbeError(f"no results at {path}: run `medprobe probe STORE -o {source}` first")
    cells: dict[tuple[Any, ...], Result] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ProbeError(
                f"{path}, line {number} is not a result: {error}; remove that line"
            ) from None
        key: tuple[Any, ...] = (
            result.dataset,
            result.backbone,
            result.weights,
            result.scenario,
            result.head,
        )
        key += (result.feature, result.protocol, result.metric, result.shots)
        cells[(*key, result.seed, result.scored_by)] = result
    return list(cells.values())


@dataclass(frozen=True)
class Predictions:
    """What a head said of each test image.

    labels: (N,) class index for a multiclass task, (N, L) of 1, 0 and NaN for a multilabel one.
    probabilities: (N, K), rows summing to 1, or (N, L), each in [0, 1].
    """

    ids: Sequence[str]
    subjects: Sequence[str]
    labels: NDArray[Any]
    probabilities: NDArray[np.floating[Any]]
    classes: Sequence[str]


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write predictions.csv; numbers keep all digits of float32."""
    many = predictions.labels.ndim == 2
    header = ["id", "subject"]
    header += [f"label:{c}" for c in predictions.classes] if many else ["label", "predicted"]
    header += [f"p:{c}" for c in predictions.classes]

    def rows() -> Iterable[list[str]]:
        for i, (id_, subject) in enumerate(zip(predictions.ids, predictions.subjects, strict=True)):
            p, y = predictions.probabilities[i], predictions.labels[i]
            if many:
                said = ["" if np.isnan(v) else str(int(v)) for v in y]
            else:
                said = [predictions.classes[y], predictions.classes[int(p.argmax())]]
            yield [id_, subject, *said, *(f"{v:.9g}" for v in p)]

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(header)
        csv.writer(file).writerows(rows())


def read_predictions(path: Path) -> Predictions:
    """Read what write_predictions wrote; ProbeError for a file that isn't there or isn't that."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file))
        if not rows:
            raise ValueError("no rows")
        first = header.index(next(name for name in header if name.startswith("p:")))
        classes = [name.removeprefix("p:") for name in header[first:]]
        labels: NDArray[Any]
        if header[2] == "label":
            place = {name: k for k, name in enumerate(classes)}
            labels = np.array([place[row[2]] for row in rows], dtype=np.int64)
        else:
            labels = np.array([[float(v) if v else np.nan for v in row[2:first]] for row in rows])
        return Predictions(
            ids=[row[0] for row in rows],
            subjects=[row[1] for row in rows],
            labels=labels,
            probabilities=np.array([[float(v) for v in row[first:]] for row in rows]),
            classes=classes,
        )
    except (OSError, ValueError, KeyError, IndexError, StopIteration, csv.Error) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        )
        raise ProbeError(
            f"{path} holds no predictions ({reason}): run `medprobe probe` again"
        ) from None
