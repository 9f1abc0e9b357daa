"""What leaks between splits, and which labels contradict each other.

Found are subjects in more than one split, images identical in their bytes or in their pixels, and
images whose features nearly point the same way. A group of images leaks where it lies in more than
one split; near-duplicates are a suspicion, and are listed apart. Images in no split are left out.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from os import cpu_count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.manifest import SPLITS, Manifest
from features.workers import ImageRecipe, Loaded, Workers

BLOCK = 2048  # images on a side of a block of cosines: 16 MB
SHOWN = 1000  # near-duplicate pairs that are kept, the most alike first
THRESHOLD = 0.99
AHEAD = 64  # images that are asked for before the first is waited for


@dataclass(frozen=True)
class Group:
    """Images that belong together: by subject, bytes, pixels, or features ("near")."""

    kind: str
    name: str  # the subject, or the first hex digits of the hash
    images: list[str]
    splits: list[str]
    labels: list[Any]
    cosine: float | None = None

    @property
    def leaks(self) -> bool:
        """Say whether the group lies in more than one split."""
        return len(set(self.splits)) > 1

    @property
    def conflicts(self) -> bool:
        """Say whether its images have different labels."""
        return any(label != self.labels[0] for label in self.labels)


@dataclass(frozen=True)
class Audit:
    """What was found in a data set. `checked` names what was looked for."""

    dataset: str
    images: dict[str, int]  # per split
    subjects_known: bool
    split_from: str
    checked: list[str]
    subjects: list[Group] = field(default_factory=list)  # those in more than one split
    bytes: list[Group] = field(default_factory=list)  # identical images, wherever they are
    pixels: list[Group] = field(default_factory=list)  # likewise, of different bytes
    near: list[Group] = field(default_factory=list)  # pairs
    bad: dict[str, str] = field(default_factory=dict)  # path -> why it can't be read
    n_near: int = 0  # how many pairs there are; `near` holds SHOWN at most

    @property
    def leaks(self) -> list[Group]:
        """The subjects and identical images that are in more than one split."""
        return [g for g in [*self.subjects, *self.bytes, *self.pixels] if g.leaks]

    @property
    def conflicts(self) -> list[Group]:
        """Identical images with different labels."""
        return [g for g in [*self.bytes, *self.pixels] if g.conflicts]

    def line(self) -> str:
        """Say it in one line."""
        identical = [g for g in self.bytes + self.pixels if g.leaks]
        parts = [
            f"{len(found)} {what if len(found) == 1 else what + 's'}"
            for what, found in (("subject", self.subjects), ("identical image", identical))
            if found
        ]
        verb = "is" if len(self.leaks) == 1 else "are"
        unknown = "" if self.subjects_known else "; no subjects are known, so they are not checked"
        contrary = len(self.conflicts)
        also = "; 1 group of identical images has contrary labels" if contrary else ""
        if contrary > 1:
            also = f"; {contrary} groups of identical images have contrary labels"
        if parts:
            said = f"the splits leak: {' and '.join(parts)} {verb} in more than one of them"
            return f"{said}{also}{unknown}"
        shared = [name for kind, name in SHARED.items() if kind in self.checked]
        if not shared:
            return f"nothing was looked at that could leak between splits{unknown}"
        *first, last = (f"no {name}" for name in shared)
        none = f"{', '.join(first)} and {last}" if first else last
        return f"no leak found: the splits share {none}{also}{unknown}"

    def advice(self) -> list[str]:
        """Say what to do about what was found, a sentence each."""
        said = []
        drawn = self.split_from.startswith("drawn")
        if self.subjects:
            said.append(
                "Subjects: extract again with --split drawn, which keeps the images of a subject "
                "together, or correct the table's splits."
            )
        if any(g.leaks for g in self.bytes + self.pixels):
            said.append(
                "Identical images: keep one of each group: leave the others out, or give them the "
                f"split none in the table{' (or all of a group one subject)' * drawn}."
            )
        if self.conflicts:
            said.append(
                "Contrary labels: at least one label of each group is wrong; correct it, or leave "
                "the group out."
            )
        if not self.subjects_known:
            said.append(
                "Subjects: if some images are of one patient, name the column by --subject-col (or "
                "take --subject-from-dicom), so that they stay together and this is checked."
            )
        if self.leaks or self.conflicts:
            said.append(
                "Then extract and probe again. New labels, subjects and splits need no new "
                "features; of fewer images, give the store another --name."
            )
        return said

    def to_json(self) -> dict[str, Any]:
        """Return the audit as JSON values, with `leaks` and `conflicts` counted."""
        kinds = {k: [vars(g) for g in getattr(self, k)] for k in _KINDS}
        counts = {"leaks": len(self.leaks), "conflicts": len(self.conflicts)}
        return vars(self) | kinds | counts | {"line": self.line()}


SHARED = {"subjects": "subject", "bytes": "identical file", "pixels": "identical pixels"}
_KINDS = ("subjects", "bytes", "pixels", "near")


def audit(
    manifest: Manifest,
    *,
    hashes: Sequence[str] | None = None,
    pixel_hashes: Sequence[str] | None = None,
    features: NDArray[np.floating[Any]] | None = None,
    usable: NDArray[np.bool_] | None = None,
    bad: Mapping[int, str] | None = None,
    threshold: float = THRESHOLD,
) -> Audit:
    """Look for leaks and contradictions.

    Parameters
    ----------
    hashes, pixel_hashes : (N,) of each image's bytes and decoded pixels; "" where not known.
    features : (N, D); rows that are not usable mean nothing.
    usable : (N,), default all: others are in no group.
    bad : row -> reason of images that can't be read, which are in no group either.
    threshold : of the cosine of features, centred on their mean, for near-duplicates.
    """
    used = np.isin(manifest.split, SPLITS)
    if usable is not None:
        used &= usable
    bad = bad or {}
    used[list(bad)] = False
    known = manifest.has_subjects
    subjects = _groups(manifest, "subject", manifest.subject, used) if known else []
    same = _groups(manifest, "bytes", hashes, used) if hashes is not None else []
    pixels = _groups(manifest, "pixels", pixel_hashes, used) if pixel_hashes is not None else []
    seen = {frozenset(group.images) for group in same}
    near: list[Group] = []
    n_near = 0
    if features is not None:
        near, n_near = _near(manifest, features, used, threshold, hashes)
    return Audit(
        dataset=manifest.dataset,
        images={s: int((manifest.split[used] == s).sum()) for s in SPLITS if s in manifest.split},
        subjects_known=known,
        split_from=manifest.split_from,
        checked=[
            *(["subjects"] if known else []),
            *(["bytes"] if hashes is not None else []),
            *(["pixels"] if pixel_hashes is not None else []),
            *([f"features (cosine >= {threshold:g})"] if features is not None else []),
        ],
        subjects=[group for group in subjects if group.leaks],
        bytes=same,
        pixels=[group for group in pixels if frozenset(group.images) not in seen],
        near=near,
        n_near=n_near,
        bad={str(manifest.path[row]): reason for row, reason in bad.items()},
    )


def hash_images(
    manifest: Manifest,
    *,
    window: tuple[float, float] | None = None,
    frame: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], list[str], dict[int, str]]:
    """Return hashes of each image's bytes and of its decoded pixels, and row -> why it is bad."""
    loaded: list[Loaded] = []
    waiting: deque[Future[Loaded]] = deque()
    recipe = ImageRecipe((), window=window, frame=frame, hash_pixels=True)
    with Workers(recipe, min(cpu_count() or 1, max(1, len(manifest)))) as workers:
        for i in range(len(manifest) + AHEAD):
            if i < len(manifest):
                waiting.append(workers.load(manifest.file(i), ()))
            if waiting and i >= AHEAD:
                loaded.append(waiting.popleft().result())
                if progress:
                    progress(len(loaded), len(manifest))
    return (
        ["" if image.reason else image.hash for image in loaded],
        ["" if image.reason else image.pixels for image in loaded],
        {i: image.reason for i, image in enumerate(loaded) if image.reason},
    )


def _label(manifest: Manifest, row: int) -> Any:
    label = manifest.label[row]
    if manifest.label.ndim == 2:
        return label.tolist()
    return manifest.classes[label] if label >= 0 else None


def _group(manifest: Manifest, kind: str, name: str, rows: Sequence[int], **more: Any) -> Group:
    return Group(
        kind=kind,
        name=name,
        images=[str(manifest.path[i]) for i in rows],
        splits=[str(manifest.split[i]) for i in rows],
        labels=[_label(manifest, i) for i in rows],
        **more,
    )


def _groups(
    manifest: Manifest, kind: str, keys: Sequence[str] | NDArray[Any], used: NDArray[np.bool_]
) -> list[Group]:
    """Return the groups of two or more images with one of the keys (N,), of those used (N,).

    "" is no key.
    """
    rows = defaultdict(list)
    for i in np.flatnonzero(used).tolist():
        if keys[i]:
            rows[str(keys[i])].append(i)
    return [
        _group(manifest, kind, key if kind == "subject" else key[:12], members)
        for key, members in rows.items()
        if len(members) > 1
    ]


def _near(
    manifest: Manifest,
    features: NDArray[np.floating[Any]],
    used: NDArray[np.bool_],
    threshold: float,
    hashes: Sequence[str] | None,
) -> tuple[list[Group], int]:
    """Return pairs of used images with a cosine of at least `threshold`, and how many there are.

    features (N, D), used (N,). Two images of the same bytes are not among them. Memory: one block
    of BLOCK x BLOCK cosines.
    """
    rows = np.flatnonzero(used)
    X = features[rows].astype(np.float32)
    X -= X.mean(0)
    length = np.linalg.norm(X, axis=1, keepdims=True)
    X /= np.where(length > 0, length, 1)
    own = np.arange(len(manifest)).astype(str)
    content = own if hashes is None else np.where(np.asarray(hashes) == "", own, hashes)
    pairs: list[tuple[float, int, int]] = []
    count = 0
    for a in range(0, len(X), BLOCK):
        for b in range(a, len(X), BLOCK):
            cosine = X[a : a + BLOCK] @ X[b : b + BLOCK].T
            i, j = np.nonzero(cosine >= threshold)
            first, second = rows[a + i], rows[b + j]
            keep = np.flatnonzero((first < second) & (content[first] != content[second]))
            count += len(keep)
            keep = keep[np.argsort(-cosine[i[keep], j[keep]], kind="stable")[:SHOWN]]
            nearest = (
                cosine[i[keep], j[keep]].tolist(),
                first[keep].tolist(),
                second[keep].tolist(),
            )
            pairs += zip(*nearest, strict=True)
        pairs = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:SHOWN]
    return [
        _group(manifest, "near", "", (i, j), cosine=round(value, 5)) for value, i, j in pairs
    ], count
