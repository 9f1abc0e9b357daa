"""What the files of a results folder must say, checked where each is read (features/schema.py).

results.jsonl (Result), heads.json, run.json, state.json, cells.jsonl: they may have been edited, or
be of someone else. Lines that earlier versions wrote are fine: what they lack has a default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from features.checks import Fingerprint, Made
from features.schema import above, check, distinct, fault, filled, inside, least, one_path, within

Text = Annotated[str, filled]
Count = Annotated[int, least(0)]
Size = Annotated[float, within(0, 1e12)]
Share = Annotated[float, within(0, 1)]
Value = Annotated[float, within(-1e9, 1e9)] | None
Strength = Annotated[float, above(0), within(0, 1e30)]
Classes = Annotated[list[str], filled, distinct]
Task = Literal["multiclass", "multilabel"]
Name = Annotated[str, lambda text: "" if len(text) <= 1000 else "1,000 characters at most"]


def _layer_and_pool(text: str) -> str:
    return "" if text.count("/") == 1 and not text.startswith("/") else "LAYER/POOL"


Feature = Annotated[str, _layer_and_pool]


class Scored(TypedDict):
    """A score with its interval; null where it is not defined."""

    value: NotRequired[Value]
    ci_low: NotRequired[Value]
    ci_high: NotRequired[Value]


class Folds(TypedDict):
    """What was chosen on what: by C (J,) or k (J,), or an epoch. Lists are (J, folds)."""

    kind: NotRequired[str]
    C: NotRequired[list[Strength]]
    k: NotRequired[list[int]]
    chosen: NotRequired[float | None]
    temperature: NotRequired[float | None]
    l2: NotRequired[float | None]
    scores: NotRequired[list[list[Value]]]
    converged: NotRequired[list[list[bool]]]
    gap: NotRequired[list[list[Value]]]
    epoch: NotRequired[Count]
    score: NotRequired[Value]


class Outer(TypedDict):
    """Of outer folds that tested every image once: what they are, and of each fold (K,) what."""

    kind: NotRequired[Text]
    n: NotRequired[list[Count]]
    values: NotRequired[list[str]]  # of a column, each of which is a fold
    scores: NotRequired[list[Value]]
    C: NotRequired[list[Strength]]
    chosen: NotRequired[list[float]]
    epoch: NotRequired[list[Count]]


class Recalibrated(TypedDict):
    """Of a map that recalibrates log-odds (recalibration.py)."""

    method: NotRequired[Literal["temperature", "platt", "isotonic"]]
    temperature: NotRequired[Annotated[float, above(0)] | None]
    lines: NotRequired[list[list[float]]]
    knots: NotRequired[list[list[list[float]]]]


class Calibration(Recalibrated):
    """And how well calibrated predictions are: before and after it, or as they are."""

    scores: NotRequired[dict[str, Scored]]
    before: NotRequired[dict[str, Scored]]
    after: NotRequired[dict[str, Scored]]


class Sets(TypedDict):
    """Of prediction sets: how often they are to hold the label, and from which probability on."""

    level: NotRequired[Share]
    threshold: NotRequired[Share]


class Conformal(Sets):
    """And how they do."""

    coverage: NotRequired[Scored]
    size: NotRequired[Size]
    empty: NotRequired[Share]
    by_class: NotRequired[list[Share | None]]


class Output(TypedDict):
    """Of one class or finding; of a finding, with the interval of its AUROC."""

    auroc: Share | None
    average_precision: Share | None
    positives: Size | None
    negatives: Size | None
    ci_low: NotRequired[Value]
    ci_high: NotRequired[Value]


class Bin(TypedDict):
    """Of the reliability diagram."""

    low: Share
    high: Share
    images: Annotated[float, within(1, 1e12)]
    confidence: Share
    frequency: Share


class Group(TypedDict):
    """Of images, scored apart."""

    column: str
    group: str
    n: Count
    subjects: Count
    small: bool
    value: Value
    ci_low: Value
    ci_high: Value
    left_out: NotRequired[list[str]]


class Threshold(TypedDict):
    """Of one output."""

    threshold: float | None
    log_odds: NotRequired[float | None]
    positives: NotRequired[Size]
    negatives: NotRequired[Size]
    sensitivity: NotRequired[Scored]
    specificity: NotRequired[Scored]


class Thresholds(TypedDict):
    """And how they were chosen."""

    rule: NotRequired[str]
    chosen_on: NotRequired[str]
    outputs: NotRequired[dict[str, Threshold]]


class Audit(TypedDict):
    """What was found between the splits."""

    line: NotRequired[str]
    leaks: NotRequired[Count]
    conflicts: NotRequired[Count]


class Calibrated(TypedDict):
    """Of one output: how many there are over how many were expected, and the intercept."""

    images: Count
    observed: Size
    expected: Size
    ratio: Scored
    intercept: Scored


class Dropped(Scored):
    """By one metric: what the head scored at home less what it scores here."""

    home: Value
    here: Value


class Shared(TypedDict):
    """Images that are, or whose subjects are, among those the head was trained or tested on."""

    trained_on: NotRequired[dict[str, Count]]
    tested_on: NotRequired[dict[str, Count]]
    ids: NotRequired[list[str]]


class External(TypedDict):
    """Of a test on other data than the head's own (probe/external.py)."""

    head: NotRequired[str]
    part: NotRequired[str]
    split_from: NotRequired[str]
    absent: NotRequired[list[str]]  # of the head's classes
    unknown: NotRequired[dict[str, Count]]  # of the data set's, and of how many images
    calibration: NotRequired[dict[str, Calibrated]]
    recalibrated: NotRequired[dict[str, Value]]
    drop: NotRequired[dict[str, Dropped]]
    drop_method: NotRequired[str]
    shared: NotRequired[Shared]


class Epoch(TypedDict):
    """Of training; `value` is by the metric on the images that were held out."""

    epoch: Count
    train_loss: NotRequired[Value]
    value: Value
    lr: NotRequired[float]
    seconds: NotRequired[float]


class Tuned(TypedDict):
    """What was trained."""

    unfreeze: NotRequired[str]
    drop_last: NotRequired[Count]
    init: NotRequired[str]
    head_size: NotRequired[str]
    head_weights: NotRequired[str | None]


class Gain(TypedDict):
    """Of image and columns over the columns alone, on the same test images: paired, with p."""

    over: NotRequired[str]
    alone: NotRequired[Value]
    value: NotRequired[Value]
    ci_low: NotRequired[Value]
    ci_high: NotRequired[Value]
    p: NotRequired[Share]
    test: NotRequired[str]


class Control(TypedDict):
    """The score of heads that were fitted to shuffled labels."""

    kind: str | None
    C: NotRequired[float | None]
    value: Value
    ci_low: Value
    ci_high: Value


NESTED: dict[str, Any] = {  # fields of a Result, beyond their own hints
    "dataset": Name,
    "backbone": Name,
    "weights": Literal["published", "file", "random"],
    "feature": Feature,
    "value": Annotated[float, within(-1e9, 1e9)],
    "ci_low": Annotated[float, within(-1e9, 1e9)],
    "ci_high": Annotated[float, within(-1e9, 1e9)],
    "seed": Count,
    "metrics": dict[str, Scored],
    "C": Strength | None,
    "folds": Folds,
    "outer": Outer,
    "calibration": Calibration,
    "conformal": Conformal,
    "task": Task,
    "classes": Classes,
    "n_train": Count,
    "n_test": Count,
    "n_bad": Count,
    "n_subjects_test": Count,
    "store": Annotated[str, one_path],
    "predictions": Annotated[str, inside],
    "heads": Annotated[str, inside],
    "seconds": Annotated[float, least(0)],
    "outputs": dict[str, Output],
    "reliability": list[Bin],
    "subgroups": list[Group],
    "thresholds": Thresholds,
    "audit": Audit,
    "external": External,
    "shots": Annotated[int, least(1)] | None,
    "history": list[Epoch],
    "tuned": Tuned,
    "control": Control | None,
    "gain": Gain,
}


def check_result(value: Any, kind: type) -> None:
    """Raise ValueError for a line of results.jsonl that is no Result (`kind`)."""
    check(value, kind)
    for name, hint in NESTED.items():
        if name in value:
            check(value[name], hint, name)
    _alike(value["folds"])
    epochs = [record["epoch"] for record in value.get("history", ())]
    if epochs != sorted(set(epochs)):
        raise ValueError("history has epochs that don't follow each other")


def _alike(folds: dict[str, Any]) -> None:
    """Check that scores have a row per strength, and as many folds in each."""
    scores = folds.get("scores", [])
    wanted = {"C": len(scores), "k": len(scores), "converged": len(scores), "gap": len(scores)}
    for name, length in wanted.items():
        found = len(folds.get(name) or ()) or length
        if found != length:
            raise fault(f"folds.{name}", folds[name], f"{length} of them, one for each of scores")
    for name in ("scores", "converged", "gap"):
        rows = folds.get(name, [])
        if len({len(row) for row in [*scores, *rows]}) > 1:
            raise ValueError(f"folds.{name} has rows of several lengths, want one for each fold")


class Head(TypedDict):
    """A heads.json, for what is read of it."""

    format: Literal["medprobe-head"]
    kind: Literal["softmax", "sigmoid", "binary"]
    classes: Classes
    C: Strength | None
    unit: NotRequired[bool]


class SeenImages(TypedDict):
    """What a head was trained on, for telling what is unlike it."""

    usual: Annotated[float, within(0, 1e12)]
    images: Count


class Applied(TypedDict):
    """A heads.json or a run.json, for applying it."""

    format: Literal["medprobe-head", "medprobe-finetuned"]
    task: Task
    backbone: Made
    feature: Feature
    classes: Classes
    scenario: NotRequired[str]
    features: NotRequired[Fingerprint]
    settings: NotRequired[dict[str, Any]]
    thresholds: NotRequired[Thresholds]
    calibration: NotRequired[Recalibrated]
    conformal: NotRequired[Sets]
    seen: NotRequired[SeenImages]


class State(TypedDict):
    """A checkpoint's state.json."""

    epoch: Count
    history: list[Epoch]
    identity: NotRequired[dict[str, Any]]


class Logged(TypedDict):
    """A line of cells.jsonl."""

    fingerprint: Text
    status: Literal["done", "failed"]
    dataset: NotRequired[str]
    backbone: NotRequired[str]
    scenario: NotRequired[str]
    reason: NotRequired[str]
    results: NotRequired[list[str]]
    seconds: NotRequired[float]
    created: NotRequired[str]
