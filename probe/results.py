"""One Result is one row of results.jsonl: a number and everything that leads back to it.

A results folder holds

    results.jsonl                      one line per result, appended, never rewritten
    <dataset>/<backbone>/<run>/        each result's own folder: identity.py names it
        predictions.csv                id, subject, label, predicted, per class p and log-odds
        heads.safetensors, heads.json  the fitted head

A line is written after its files, and files that it replaces are removed after that: whatever stops
a run, every line's files are whole, and its own. (Those of a run of training are replaced in place:
it goes on from its checkpoint.) Paths in a row are relative to the folder, so the
folder can be moved. In predictions.csv of a
multi-label task, `label` and `predicted` become one column per finding: `label:<finding>`
(1, 0 or empty), and `p:<finding>`. Texts that a spreadsheet would run are made
harmless (spreadsheet.py). `log_odds:<class>` follow, from which probabilities next to 1
can be told apart; files of earlier versions have none.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from features.errors import ProbeError
from features.files import append_line, meant, read_lines, sync
from features.lock import writing
from features.schema import parse
from probe.identity import Identity
from probe.predictions import Predictions, columns, read_predictions, write_predictions
from probe.schema import check_result

__all__ = ["Evaluation", "Predictions", "Result", "append", "columns", "frame", "load"]
__all__ += ["read_predictions", "record", "result_of", "write_predictions"]

PATIENCE = 60.0  # seconds until others have written their line
ABANDONED = 3600.0  # seconds after which files of a run that was killed are removed


@dataclass(frozen=True)
class Result:
    """A test score of one head on one store.

    `value` with `ci_low`, `ci_high` (95 %) is the score by `metric`; `metrics` has these three,
    under these names, of every metric of the task, null where it is not defined.
    `folds` says what chose C, k or the epoch; its keys depend on the head (schema.Folds). Of linear
    heads: {"kind", "C" (J,), "scores", "converged", "gap" (J, folds)}.
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
    outer: dict[str, Any] = field(default_factory=dict)  # of outer folds, see schema.Outer
    calibration: dict[str, Any] = field(default_factory=dict)  # see schema.Calibration
    conformal: dict[str, Any] = field(default_factory=dict)  # see schema.Conformal
    history: list[dict[str, Any]] = field(default_factory=list)  # of training, one per epoch
    tuned: dict[str, Any] = field(default_factory=dict)  # {"unfreeze", "drop_last", "init", ...}
    control: dict[str, Any] | None = None  # {"kind": "shuffle", "value", "ci_low", "ci_high", "C"}
    gain: dict[str, Any] = field(default_factory=dict)  # over columns alone, see schema.Gain
    subjects_known: bool = True  # else each image counts as a subject, independent of the others
    labels_digest: str = ""  # of every image's label, and what uncertain ones count as
    settings: dict[str, Any] = field(default_factory=dict)  # what else the head depends on
    extraction: dict[str, Any] = field(default_factory=dict)  # how its features were made
    label_from: str = ""  # the column of the table that labels are from
    positive: str = ""  # of two classes the one that counts as positive
    labelled_by: str = ""  # the command that gave the store its labels and splits
    trained_on: str = ""  # the data set of the head, where it is another than the one tested on
    external: dict[str, Any] = field(default_factory=dict)  # of such a test, see schema.External

    @property
    def edge(self) -> str:
        """Say that the C, or k, that was chosen is at an end of those tried; "" where not."""
        name = "k" if self.head == "knn" else "C"
        tried = sorted(v for v in self.folds.get(name) or () if v is not None)
        chosen = self.folds.get("chosen") if name == "k" else self.C
        no_more = any(" left out: " in note for note in self.notes if note.startswith("k = "))
        if len(tried) < 2 or chosen is None:
            return ""
        for end, word in ((tried[0], "smallest"), (tried[-1], "largest")):
            if no_more and word == "largest":  # a fold has no more images to vote
                continue
            if math.isclose(chosen, end, rel_tol=1e-6):
                return (
                    f"{name} = {chosen:.3g} is the {word} that was tried: others, by --{name}, may "
                    "score higher"
                )
        return ""

    @property
    def tested(self) -> str:
        """Say on what it was tested: "49 test images", or all images in outer folds."""
        one = "" if self.n_test == 1 else "s"
        if self.trained_on:
            return f"{self.n_test} image{one}, by a head that was trained on {self.trained_on}"
        if not self.outer:
            return f"{self.n_test} test image{one}"
        return f"{self.n_test} image{one}, each tested once by a head without its outer fold"

    @property
    def inputs(self) -> str:
        """Return what its head reads: the image, columns of the table, or both."""
        return self.identity.inputs

    @property
    def identity(self) -> Identity:
        """Return what tells it from other results."""
        return Identity(**{f.name: getattr(self, f.name) for f in fields(Identity)})


@dataclass(frozen=True)
class Evaluation:
    """What a Result says of its test predictions, under the names of its fields."""

    task: str
    classes: list[str]
    label_from: str
    labelled_by: str
    positive: str
    metric: str
    value: float
    ci_low: float
    ci_high: float
    metrics: dict[str, dict[str, float | None]]
    n_test: int
    n_subjects_test: int
    subjects_known: bool
    interval: str
    few: str
    outputs: dict[str, dict[str, float | None]]
    reliability: list[dict[str, float]]
    subgroups: list[dict[str, Any]]
    thresholds: dict[str, Any]


def result_of(identity: Identity, evaluation: Evaluation, **rest: Any) -> Result:
    """Return a Result of what it is of, how it scored, and the rest of its fields."""
    said = {
        one.name: getattr(part, one.name) for part in (identity, evaluation) for one in fields(part)
    }
    return Result(**said, **rest)


def record(
    out: Path, result: Result, predictions: Predictions, head: Callable[[Path], None] | None = None
) -> Result:
    """Write a result: its files into a new folder, then its line; return it with their paths.

    `head` saves the fitted head into a folder, as heads.json. What an earlier result of the same
    identity left is removed last. Raises ProbeError where the files can't be written; what was
    there stays as it was.
    """
    final = out / result.identity.folder
    new = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        new.chmod(final.parent.stat().st_mode)
        write_predictions(new / "predictions.csv", predictions)
        if head:
            head(new)
        for file in (*new.iterdir(), new):
            sync(file)
        with writing(out / ".results", patience=PATIENCE):
            before = [p for p in _folders_of(final) if p != new]
            free = _free(final)
            new.rename(free)
            new, inside = free, free.relative_to(out).as_posix()
            result = replace(
                result,
                predictions=f"{inside}/predictions.csv",
                heads=f"{inside}/heads.json" if head else "",
            )
            _append(out, result)
            for folder in before:
                shutil.rmtree(folder, ignore_errors=True)
    except BaseException as error:
        if new:
            shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(out, error) from None
        raise
    return result


def unwritable(out: Path, error: OSError) -> ProbeError:
    """Return the error of results that can't be written."""
    return ProbeError(
        f"{out}: results can't be written ({error.strerror or error}); earlier ones are as they "
        "were. Make room, or give another -o, and run the same command again"
    )


def _folders_of(final: Path) -> list[Path]:
    """Return the folders of an identity: complete ones, and those of runs killed long ago."""
    there = [p for p in final.parent.glob(f"{_literal(final.name)}*") if p.is_dir()]
    whole = [p for p in there if p.name[len(final.name) :].lstrip("-").isdecimal() or p == final]
    begun = final.parent.glob(f".{_literal(final.name)}.*")
    return whole + [p for p in begun if time.time() - p.stat().st_mtime > ABANDONED]


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _free(final: Path) -> Path:
    """Return the first of NAME, NAME-2, NAME-3, ... that is not there."""
    free, number = final, 1
    while free.exists():
        number += 1
        free = final.with_name(f"{final.name}-{number}")
    return free


def append(folder: Path, result: Result) -> None:
    """Add one line to folder/results.jsonl, whole or not at all.

    Raises ProbeError where it can't be written; the file is then as it was.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder / ".results", patience=PATIENCE):  # on a cluster several may write
            _append(folder, result)
    except OSError as error:
        raise unwritable(folder, error) from None


def _append(folder: Path, result: Result) -> None:
    # ASCII: no separator of Unicode breaks a line.
    append_line(folder / "results.jsonl", json.dumps(asdict(result), allow_nan=False))


def load(source: Path | str) -> list[Result]:
    """Read the results of a folder or a .jsonl file; of two of one identity the later one stands.

    Half a line at the end, of a run that was stopped, is left out with a warning.
    """
    source = Path(source)
    path = source / "results.jsonl" if source.is_dir() else source
    if not path.is_file():
        raise ProbeError(_no_results(source, path))
    found: dict[str, Result] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            value = parse(line)
            check_result(value, Result)
            result = Result(**value)
            found[result.identity.digest] = result
        except ValueError as error:
            raise ProbeError(
                f"{path}, line {number} is not a result: {error}; remove that line"
            ) from None
    return list(found.values())


def folder_above(path: Path) -> Path | None:
    """Return the results folder that a path lies in; None where it lies in none."""
    above = path.absolute().parents
    return next((p for p, q in zip(path.parents, above, strict=False) if _holds(q)), None)


def _holds(folder: Path) -> bool:
    return (folder / "results.jsonl").is_file()


def _no_results(source: Path, path: Path) -> str:
    """Say what to do where no results.jsonl is."""
    if not source.exists():
        return (
            f"no results at {source}{meant(source)}: run `medprobe probe STORE -o {source}` first"
        )
    if folder := folder_above(source):
        return f"{source} is a part of the results folder {folder}: give {folder}"
    if source.is_dir() and (below := sorted(source.glob("*/results.jsonl"))):
        some = ", ".join(str(one.parent) for one in below[:3])
        return f"{source} has no results.jsonl, but folders in it have: give {some}"
    return f"no results at {path}: run `medprobe probe STORE -o {source}` first"


def frame(source: Path | str) -> Any:
    """Return the results of a folder or a .jsonl file as a pandas DataFrame, one row each.

    Columns are those of Result. In place of `metrics` each of its numbers has one, such as
    `metrics.auroc.value` and `metrics.auroc.ci_low`. Raises ProbeError where pandas is missing.
    """
    found = load(source)
    try:
        pandas = import_module("pandas")
    except ModuleNotFoundError:
        raise ProbeError(
            "a DataFrame needs pandas: pip install 'medprobe[tables]', or take results.load"
        ) from None
    rows = []
    for result in found:
        row = asdict(result)
        for metric, numbers in row.pop("metrics").items():
            row |= {f"metrics.{metric}.{name}": value for name, value in numbers.items()}
        rows.append(row)
    return pandas.DataFrame(rows)
