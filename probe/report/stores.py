"""What a report takes from stores, where they are still there: a map, the audit, bad images.

A store is used where it still has the features that the result was made from. Where it was labelled
or split anew since, the labels are those that the result's predictions have, of the test images
alone. Shapes: N images, n of them on the map, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from features.manifest import NO_LABEL, NO_SPLIT, NOT_STATED, PRESENT, Manifest
from probe.draw.charts import Axis, Points
from probe.draw.drawing import printable
from probe.draw.tables import Table
from probe.identity import is_of, made_by
from probe.report.gather import Entry

if TYPE_CHECKING:
    from features.store import FeatureStore

POINTS = 1500  # images of a map; the test split comes first, of the others some are drawn
VALUES = 8  # of a fact that have a colour of their own
OTHER = "other"
WITHOUT = ": there is no map of its features, and no small copy of an image"


@dataclass(frozen=True)
class StoreView:
    """What was found in an entry's store."""

    path: Path
    map: Points | None
    bad: Table
    manifest: Manifest
    source: dict[str, NDArray[Any]]
    usable: NDArray[np.bool_]
    dicom: dict[str, Any]  # how DICOM was decoded
    anew: bool = False  # it has other labels or splits now than the result


def look(entry: Entry, stem: str, *, private: bool) -> tuple[StoreView | None, str]:
    """Return what an entry's store says, and a remark where it isn't as it was.

    There is no StoreView where it is gone, damaged or another one.
    """
    from features.store import DONE, FeatureStore

    if entry.identity.settings.get("image") is False:  # of columns alone
        return None, ""
    path, name = _find(entry), entry.result.store
    if path is None:
        return None, f"{name} is not there any more{WITHOUT}"
    if not entry.identity.extraction:
        return None, f"the result doesn't say what {name} was when it was made{WITHOUT}"
    try:
        with FeatureStore.open(path) as store:
            manifest, done, source = store.manifest(), store.done, store.source()
            if entry.result.feature not in store.features or not made_by(store, entry.identity):
                return None, f"{name} was made from something else since{WITHOUT}"
            remark = ""
            if anew := not is_of(store, manifest, entry.identity):
                remark = _relabelled(entry, manifest)
                manifest = _as_tested(entry, manifest)
            return StoreView(
                anew=anew,
                path=path,
                map=_map(store, manifest, done == DONE, entry, stem, private),
                bad=_bad(store, manifest, stem, private),
                manifest=manifest,
                source=source,
                usable=done == DONE,
                dicom=store.fingerprint.get("image", {}).get("dicom", {}),
            ), remark
    except (StoreError, OSError):
        return None, f"{name} can't be read{WITHOUT}"


def _relabelled(entry: Entry, manifest: Manifest) -> str:
    """Say that a store has other labels or splits now, and which command gives these back."""
    r = entry.result
    what = "labels" if manifest.split_digest() == r.split_digest else "splits or labels"
    columns = [one and f"column {printable(one)}" for one in (manifest.label_from, r.label_from)]
    now, then = columns if len({*columns}) > 1 else ("", "")
    said = f" ({now or 'others'}; this result is of {then or 'others'})" if now or then else ""
    back = f". To give it these labels again: {r.labelled_by}" if r.labelled_by else ""
    shown = "its map shows the test images alone, with the labels of this result"
    shown = shown if entry.predictions else "there is no map of its features"
    return f"the store {r.store} has other {what} now than this result{said}: {shown}{back}"


def _as_tested(entry: Entry, manifest: Manifest) -> Manifest:
    """Return a manifest with the labels of a result's predictions; other images are in no split."""
    said, N = entry.predictions, len(manifest)
    split = np.full(N, NO_SPLIT, dtype=np.array(["train", NO_SPLIT]).dtype)
    if said is None:
        return replace(manifest, split=split)
    known = {name: k for k, name in enumerate(said.ids)}
    places = [(row, known.get(name)) for row, name in enumerate(manifest.id.tolist())]
    rows, at = np.array([p for p in places if p[1] is not None], dtype=np.int64).reshape(-1, 2).T
    split[rows] = "test"
    empty = NO_LABEL if said.labels.ndim == 1 else NOT_STATED
    label = np.full((N, *said.labels.shape[1:]), empty, dtype=np.int32)
    label[rows] = np.nan_to_num(said.labels[at], nan=empty)
    return replace(manifest, split=split, label=label, classes=tuple(said.classes))


def _find(entry: Entry) -> Path | None:
    """Return a store's place: as the command had it, or beside the results folder."""
    given = Path(entry.store)
    places = (given, entry.folder / given, entry.folder.parent / given)
    return next((place for place in places if place.is_file()), None)


def audit_table(stored: StoreView, stem: str, *, private: bool) -> tuple[str, Table]:
    """Return the audit's line, and its groups of images that leak or contradict each other."""
    from features.audit import audit

    hashes = stored.source["hash"].tolist()
    found = audit(stored.manifest, hashes=hashes, usable=stored.usable)
    groups = [*found.subjects, *found.bytes]
    rows = [
        [
            "same subject" if g.kind == "subject" else "same bytes",
            "/".join(dict.fromkeys(g.splits)),
            "yes" if g.leaks else "no",
            "contrary" if g.conflicts and g.kind != "subject" else "",
            len(g.images) if private else printable(", ".join(g.images)),
        ]
        for g in groups
    ]
    names = ["what", "splits", "leaks", "labels", "images"]
    return found.line(), Table(f"{stem}-audit", "What the audit found", names, rows)


def _bad(store: FeatureStore, manifest: Manifest, stem: str, private: bool) -> Table:
    """Return bad images with their reasons; of private ones how many there are of each kind."""
    bad = store.bad()
    if private:  # a reason may quote what stands in a file
        rows: list[list[Any]] = [[len(bad)]] if bad else []
        return Table(f"{stem}-bad", "Bad images, left out", ["images"], rows)
    rows = [[printable(str(manifest.id[i])), printable(reason)] for i, reason in bad.items()]
    return Table(f"{stem}-bad", "Bad images, left out", ["image", "reason"], rows)


# --- the map --------------------------------------------------------------------------------------


def _map(
    store: FeatureStore,
    manifest: Manifest,
    usable: NDArray[np.bool_],
    entry: Entry,
    stem: str,
    private: bool,
) -> Points | None:
    """Lay out the usable (N,) images by their features; None for fewer than three."""
    rows = _drawn(manifest, usable)
    if len(rows) < 3:
        return None
    X = store.read(entry.result.feature, rows).astype(np.float64)
    X = X.mean(1) if X.ndim == 3 else X  # of tokens, as the mean feature is
    facts = {"label": _labels(manifest, rows), "split": manifest.split[rows].tolist()}
    if not private and manifest.has_subjects:
        facts["subject"] = manifest.subject[rows].tolist()
    facts |= _outcome(entry, manifest, rows)
    of_all = "" if len(rows) == int(usable.sum()) else f" of {int(usable.sum())}"
    return Points(
        name=f"{stem}-map",
        title="Map of the features",
        alt=f"Map of {len(rows)}{of_all} images by their features, coloured by label.",
        layouts=_layouts(X),
        facts={name: _coded(values) for name, values in facts.items()},
        ids=() if private else [printable(str(i)) for i in manifest.id[rows]],
        dataset=entry.result.dataset,
        caption=f"{len(rows)}{of_all} images, one point each; near means alike to the backbone.",
    )


def _drawn(manifest: Manifest, usable: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return rows of the map (n,), ascending, POINTS at most: of the test split, then others."""
    rng = np.random.default_rng(0)
    test = usable & (manifest.split == "test")
    others = usable & ~test & (manifest.split != NO_SPLIT)
    order = np.concatenate([rng.permutation(np.flatnonzero(part)) for part in (test, others)])
    kept = order[:POINTS]
    if test.sum() > POINTS * 0.7 and others.any():  # leave room for what was trained on
        few = order[test.sum() :][: POINTS - int(POINTS * 0.7)]
        kept = np.concatenate([order[: POINTS - len(few)], few])
    return np.sort(kept)


def _layouts(X: NDArray[np.float64]) -> dict[str, tuple[Axis, Axis, list[float], list[float]]]:
    """Return places of X (n, D) by PCA, and by UMAP where it is installed."""
    from sklearn.decomposition import PCA

    found = PCA(2, svd_solver="randomized", random_state=0).fit(X)
    first, second = (f"{share:.0%} of the variance" for share in found.explained_variance_ratio_)
    axes = Axis(f"component 1, {first}"), Axis(f"component 2, {second}")
    layouts = {"PCA": (*axes, *found.transform(X).T.tolist())}
    try:
        from umap import UMAP
    except ImportError:
        return layouts
    near = UMAP(n_neighbors=min(15, len(X) - 1), random_state=0, n_jobs=1).fit_transform(X)
    return layouts | {"UMAP": (Axis("UMAP 1"), Axis("UMAP 2"), *near.T.tolist())}


def _labels(manifest: Manifest, rows: NDArray[np.int64]) -> list[str]:
    """Return the class of each row (n,), or its findings, in words."""
    label = manifest.label[rows]
    if label.ndim == 1:
        return [manifest.classes[k] if k >= 0 else "no label" for k in label]
    named = [np.flatnonzero(row == PRESENT) for row in label]
    return [" + ".join(manifest.classes[k] for k in there) or "none" for there in named]


def _outcome(entry: Entry, manifest: Manifest, rows: NDArray[np.int64]) -> dict[str, list[str]]:
    """Return whether each row (n,) was called right; nothing where none of them was scored."""
    said = entry.predictions
    if said is None:
        return {}
    if said.labels.ndim == 1:
        wrong = said.probabilities.argmax(1) != said.labels
    else:
        known, called = ~np.isnan(said.labels), said.probabilities >= 0.5
        wrong = (known & (called != (said.labels == 1))).any(1)
    known = dict(zip(said.ids, wrong.tolist(), strict=True))
    words = {True: "wrong", False: "right", None: "not tested"}
    found = [words[known.get(str(i))] for i in manifest.id[rows]]
    return {"error": found} if set(found) - {"not tested"} else {}


def _coded(values: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the values and each image's place among them; the rarest are one, OTHER."""
    counts = Counter(values)
    kept = [value for value, _ in counts.most_common(VALUES)]
    names = sorted(kept) if len(counts) <= VALUES else [*kept, OTHER]
    place = {value: k for k, value in enumerate(names)}
    codes = [place.get(value, len(names) - 1) for value in values]
    return [printable(str(name)) for name in names], codes
