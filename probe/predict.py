"""Apply what was fitted, heads.json of the sweep or run.json of training, to a store or to images.

Images are extracted first, as those were that the head was fitted on, with the tuned weights where
the backbone was trained.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.backbones import Backbone, load_backbone
from features.errors import ProbeError, StaleStoreError
from features.extract import ExtractionReport, ImageProgress, extract
from features.fingerprint import decoding, transform_of
from features.manifest import Manifest
from features.plan import ExtractionSettings
from features.store import DONE, PENDING, FeatureStore
from probe import saved
from probe.likeness import SHARE
from probe.results import columns
from probe.score import log_odds
from probe.score.thresholds import limit_of
from probe.spreadsheet import inert

NOT_YET = "not computed yet: `medprobe extract` goes on with it"
DAMAGED = "its features in the store are damaged: see `medprobe verify`"
SHOWN = 3  # images that a remark names


@dataclass(frozen=True)
class Predicted:
    """A CSV table of N images, and row -> reason of those that have no answer."""

    table: str
    images: int
    without: dict[int, str]
    rule: str = ""  # by which classes are called, and by which they could be
    unlike: tuple[str, ...] = ()  # ids of images unlike those of training, the farthest off first

    @property
    def damaged(self) -> int:
        """Return how many images have no answer because the store is damaged."""
        return sum(reason == DAMAGED for reason in self.without.values())

    def remark(self) -> str:
        """Say how many images are unlike those of training; "" where no more than is usual."""
        if len(self.unlike) <= (1 - SHARE) * self.images:
            return ""
        more = ", ..." if len(self.unlike) > SHOWN else ""
        verb = "is" if len(self.unlike) == 1 else "are"
        return (
            f"{len(self.unlike)} of {self.images} images {verb} unlike the head's training images "
            f"(by their features, farther off than {SHARE:.0%} of these), and what is said of them "
            f"may mean nothing: {', '.join(self.unlike[:SHOWN])}{more}"
        )

    def line(self) -> str:
        """Say how many have no answer, and why."""
        counts = Counter(self.without.values()).most_common(3)
        why = ", ".join(f"{reason} ({n})" for reason, n in counts)
        more = "" if len(set(self.without.values())) <= 3 else ", ..."
        return (
            f"{len(self.without)} of {self.images} images have no answer: {why}{more}; "
            "their rows give the reason"
        )


def predict(head_path: Path, store_path: Path, *, at_threshold: bool = False) -> Predicted:
    """Return a table: id, predicted (of a multiclass head), p and log-odds per class, `reason`.

    Every image of the store has a row, in its order. `reason` says why one has no answer: it can't
    be read, or its features were not computed yet, or they are damaged in the store. `predicted` is
    the class of the largest p. at_threshold: before `reason`, what the report's thresholds call:
    `call`, one of two classes, or `call:<finding>`, 1 or 0. Raises ProbeError where the store was
    made by another backbone or other weights than the head, or the head has no thresholds.
    """
    about = saved.read(head_path)
    thresholds = _thresholds(head_path, about, wanted=at_threshold)
    with FeatureStore.open(store_path) as store:
        saved.check_suits(head_path, about, store)
        done = store.done
        rows = np.flatnonzero(done == DONE)
        reader = saved.Reader(store, about["feature"], rows)
        z = saved.apply(head_path, about, reader) if len(rows) else np.empty((0, 0))
        without = store.bad() | dict.fromkeys(np.flatnonzero(done == PENDING).tolist(), NOT_YET)
        without |= dict.fromkeys(reader.damaged, DAMAGED)
        answers = dict(zip(reader.whole, z, strict=True))
        ids, single = store.manifest().id, about["task"] == "multiclass"
        calls = thresholds if at_threshold else {}
        table = _table(ids, answers, without, about["classes"], calls, single=single)
        rule = "" if at_threshold else _rule(about, thresholds)
        unlike = tuple(
            str(ids[row]) for row in sorted(reader.unlike, key=reader.unlike.__getitem__)
        )
        return Predicted(table, len(ids), without, rule, unlike)


def _backbone_of(head_path: Path, about: Mapping[str, Any], weights: str | None) -> Backbone:
    """Return the backbone that a head was fitted on, with its weights and its transform."""
    made = about.get("features", {})
    if not ({"image", "normalize", "precision"} <= set(made) and "size" in made["image"]):
        raise ProbeError(
            f"{head_path} was saved by an earlier version, which didn't say how images are "
            "prepared: give it a store of `medprobe extract` instead"
        )
    if about.get("scenario", "").startswith("unfrozen"):
        weights = str(head_path.parent)
    elif weights is None and about["backbone"]["weights"] == "file":
        raise ProbeError(
            f"{head_path} was fitted on a backbone with weights of a file: name it by --weights"
        )
    elif about["backbone"]["weights"] == "random":
        weights = "random"
    transform = transform_of(made)
    fit = (transform.fit, transform.resize)
    backbone = load_backbone(about["backbone"]["name"], weights, transform.size, fit)
    return replace(backbone, transform=transform)


def _thresholds(path: Path, about: Mapping[str, Any], *, wanted: bool) -> dict[str, float]:
    """Return the log-odds from which each finding, or the second class, is called.

    Raises ProbeError where there are none and they are wanted.
    """
    found = about.get("thresholds", {}).get("outputs") or {}
    if wanted and not found:
        many = about["task"] == "multiclass" and len(about["classes"]) > 2
        why = "more than two classes" if many else "none: probe again with this version"
        raise ProbeError(f"{path} has no threshold to call by: it has {why}; leave --threshold out")
    return {name: limit_of(t) for name, t in found.items() if t["threshold"] is not None}


def _rule(about: Mapping[str, Any], thresholds: Mapping[str, float]) -> str:
    """Say by which rule classes are called, and by which they could be."""
    if about["task"] == "multilabel":
        said = "no finding is called"
        more = "--threshold adds call:<finding>, by the report's thresholds"
        return f"{said}: {more}" if thresholds else said
    said = "predicted is the class of the largest p"
    if not thresholds:
        return said
    [(name, z)] = thresholds.items()
    p = float(log_odds.probabilities(np.array(z)))
    return (
        f"{said}; the report's threshold calls {name} where p:{name} is {p:.3g} or more: "
        "--threshold adds that as the column call"
    )


def predict_images(
    head_path: Path,
    manifest: Manifest,
    *,
    features: Path,
    weights: str | None = None,
    device: str = "cpu",
    progress: ImageProgress | None = None,
    tell: Callable[[ExtractionReport], None] = lambda _: None,
    at_threshold: bool = False,
) -> Predicted:
    """Extract a manifest's images into a store of the folder `features`; return as predict does.

    A store that is there keeps its labels. tell is told what became of it.
    weights: of the backbone, where they are neither the published nor tuned ones. Raises
    ProbeError where they are wanted and not given.
    """
    about = saved.read(head_path)
    _thresholds(head_path, about, wanted=at_threshold)
    store = extract_for(
        *(head_path, about, manifest),
        features=features,
        weights=weights,
        device=device,
        progress=progress,
        tell=tell,
    )
    return predict(head_path, store, at_threshold=at_threshold)


def extract_for(
    head_path: Path,
    about: Mapping[str, Any],
    manifest: Manifest,
    *,
    features: Path,
    weights: str | None = None,
    device: str = "cpu",
    progress: ImageProgress | None = None,
    tell: Callable[[ExtractionReport], None] = lambda _: None,
) -> Path:
    """Extract a manifest's images as those were that a head was fitted on; return the store."""
    backbone = _backbone_of(head_path, about, weights)
    made = about["features"]
    layer, pool = about["feature"].split("/")
    try:
        [report] = extract(
            manifest,
            [backbone],
            out=features,
            settings=ExtractionSettings(
                layers="last" if layer == "final" else layer,
                pools=() if pool == "tokens" else (pool,),
                tokens=pool == "tokens",
                **decoding(made),
                precision=made["precision"],
                device=device,
            ),
            progress=progress,
            relabel=False,
        )
    except StaleStoreError as error:
        reason = str(error).partition(". ")[0]
        raise ProbeError(
            f"{reason}. Give the images another --name, or another folder by --features"
        ) from None
    tell(report)
    return report.store


def _table(
    ids: NDArray[Any],
    answers: Mapping[int, NDArray[np.float64]],
    without: Mapping[int, str],
    classes: list[str],
    thresholds: Mapping[str, float],
    *,
    single: bool,
) -> str:
    """Return the table of N ids; answers are log-odds (K,) by row, without reasons by row.

    thresholds: log-odds by which findings, or the second class, are called.
    """
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    calls = ["call"] if single and thresholds else [f"call:{name}" for name in thresholds]
    header = [*(["predicted"] if single else []), *columns(classes), *calls]
    writer.writerow(["id", *header, "reason"])
    for row, id_ in enumerate(ids.tolist()):
        if row in without:
            writer.writerow([inert(id_), *[""] * len(header), inert(without[row])])
            continue
        z = answers[row]
        p = log_odds.probabilities(z)
        most_probable = [inert(classes[int(p.argmax())])] if single else []
        called = [int(z[classes.index(name)] >= t) for name, t in thresholds.items()]
        words = [inert(classes[k]) for k in called] if single else called
        numbers = map(repr, [*p.tolist(), *z.tolist()])
        writer.writerow([inert(id_), *most_probable, *numbers, *words, ""])
    return table.getvalue()
