"""What a store must be before anything of it is used: attributes, datasets, values.

Its file may be damaged, or made by someone else. Each fault is one line of a StoreError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np

from features.checksums import MARKS, STRUCTURE, size_of
from features.columns import Extent
from features.errors import StoreError
from features.manifest import NO_LABEL, NO_SPLIT, NOT_STATED, PRESENT, SPLITS, Manifest
from features.schema import check, distinct, fault, filled, least, one_path, parse

NEXT = "copy it again, or compute it anew with `medprobe extract ... --overwrite always`"
DEPTHS = {"features": (2, 3), "views": (3, 4)}  # dimensions of a dataset

Text = Annotated[str, filled]
Count = Annotated[int, least(0)]


class Made(TypedDict):
    """What the fingerprint says of the backbone."""

    name: str
    weights: Literal["published", "file", "random"]
    architecture: NotRequired[str]
    weights_digest: NotRequired[str]
    configuration: NotRequired[str]


class Dicom(TypedDict):
    """How DICOM was decoded: `window` is "header", or centre and width."""

    window: NotRequired[Literal["header"] | list[float]]
    frame: NotRequired[Literal["middle"] | int]


class Image(TypedDict):
    """How images were prepared."""

    size: NotRequired[Annotated[int, least(1)]]
    resize: NotRequired[Annotated[int, least(1)]]
    interpolation: NotRequired[str]
    fit: NotRequired[Literal["crop", "squash", "pad"]]
    fill: NotRequired[list[int]]
    corner: NotRequired[Literal["round", "floor"]]
    decode: NotRequired[str]
    dicom: NotRequired[Dicom]


class Normalize(TypedDict):
    """How pixels were scaled, per channel."""

    mean: list[float]
    std: list[float]


class Fingerprint(TypedDict):
    """What fingerprint.py makes; stores of earlier versions have less."""

    backbone: Made
    image: NotRequired[Image]
    normalize: NotRequired[Normalize]
    precision: NotRequired[str]
    features: NotRequired[list[str]]
    views: NotRequired[dict[str, Any]]
    manifest: NotRequired[dict[str, Any]]
    versions: NotRequired[dict[str, str]]


class ParityFields(TypedDict):
    """What parity.py measures; numbers are null that were not."""

    feature: str
    images: Count
    cosine: float | None
    fast: float | None
    pixels: float | None
    within: float | None
    reduced: dict[str, float] | None


class Root(TypedDict):
    """Attributes of the file."""

    fingerprint: Text
    parity: NotRequired[Text]
    default_feature: Text
    batch_size: Annotated[int, least(1)]


class About(TypedDict):
    """Attributes of /manifest."""

    dataset: str
    root: Annotated[str, one_path]
    task: Literal["multiclass", "multilabel"]
    classes: Text
    split_from: str
    metric: str
    note: str
    label_from: NotRequired[str]
    order_from: NotRequired[str]
    labelled_by: NotRequired[str]
    checksum: Count


def check_store(
    path: Path,
    attributes: Mapping[str, Any],
    about: Mapping[str, Any],
    extents: Mapping[str, Extent],
    features: Sequence[str],
) -> None:
    """Raise StoreError for a store whose attributes or datasets aren't as docs/format.md says.

    extents: of its datasets; features: names of those that are some.
    """
    try:
        check(dict(attributes), Root, "")
        check(parse(attributes["fingerprint"]), Fingerprint, "fingerprint")
        if "parity" in attributes:
            check(parse(attributes["parity"]), ParityFields, "parity")
        check(dict(about), About, "")
        check(parse(about["classes"]), Annotated[list[str], distinct], "classes")
        _check_extents(extents, path.stat().st_size)
        default = attributes["default_feature"]
        if features and default not in features:
            raise fault("default_feature", default, f"one of {', '.join(features)[:80]}")
    except ValueError as error:
        raise StoreError(f"{path} is not a whole store: {error}; {NEXT}") from None


def _check_extents(extents: Mapping[str, Extent], size: int) -> None:
    """Check that every dataset is there, of its type, of N rows, and within the file."""
    if "done" not in extents:
        raise ValueError("it has no /done")
    n = extents["done"][1][0] if extents["done"][1] else 0
    wanted: dict[str, tuple[str, tuple[int, ...]]]
    wanted = {"done": ("u1", (1,)), "reason": ("S", (1,)), "checksums/source": ("<u4", (1,))}
    wanted |= {f"manifest/{name}": ("S", (1,)) for name in ("id", "path", "subject", "split")}
    wanted |= {"manifest/label": ("<i4", (1, 2)), "manifest/hash": ("S", (1,))}
    wanted |= {f"manifest/{name}": ("<i8", (1,)) for name in ("size", "mtime_ns")}
    for name in extents:
        group, _, rest = name.partition("/")
        if group in DEPTHS:
            wanted[name] = ("<f2" if rest.endswith("/tokens") else "<f4", DEPTHS[group])
            wanted[f"checksums/{name}"] = ("<u4", (1,))
        elif name.startswith("manifest/columns/"):
            wanted[name] = ("S", (1,))
    wanted |= {"manifest/taken": ("u1", (1,))} if "manifest/taken" in extents else {}
    if MARKS in extents or STRUCTURE in extents:
        wanted |= {MARKS: ("<u4", (1,)), STRUCTURE: ("<u4", (1,))}
    for name, (dtype_name, depths) in wanted.items():
        if name not in extents:
            raise ValueError(f"it has no /{name} of its own")
        _, shape, dtype = extents[name]
        rows = 1 if name == STRUCTURE else n
        fits = dtype.kind == "S" if dtype_name == "S" else dtype == np.dtype(dtype_name)
        if not fits or len(shape) not in depths or shape[0] != rows or not all(shape):
            raise ValueError(
                f"/{name} is {dtype} of shape {shape}, "
                f"want {'text' if dtype_name == 'S' else dtype_name} of {rows} rows"
            )
    _check_apart(extents, size)


def _check_apart(extents: Mapping[str, Extent], size: int) -> None:
    """Check that datasets lie in the file, and share no byte."""
    end, before = 0, ""
    for offset, name, length in sorted(
        (offset, name, size_of(shape, dtype)) for name, (offset, shape, dtype) in extents.items()
    ):
        if offset < end:
            raise ValueError(f"/{name} and /{before} share bytes")
        end, before = offset + length, name
        if end > size:
            raise ValueError(f"/{name} ends at byte {end}, the file at {size}")


def check_manifest(path: Path, manifest: Manifest, task: str) -> None:
    """Raise StoreError for labels that no class has, splits that are none."""
    label, classes = manifest.label, len(manifest.classes)
    low, high = (NO_LABEL, classes - 1) if label.ndim == 1 else (NOT_STATED, PRESENT)
    wrong = ""
    if task != manifest.task or (label.ndim == 2 and label.shape[1] != classes):
        wrong = f"labels of shape {label.shape} for a {task} task of {classes} classes"
    elif len(label) and not low <= label.min() <= label.max() <= high:
        odd = label.max() if label.max() > high else label.min()
        wrong = f"label {odd} is none of {low} to {high}"
    elif odd := set(np.unique(manifest.split).tolist()) - {*SPLITS, NO_SPLIT}:
        wrong = f"split {min(odd)!r} is none of {', '.join((*SPLITS, NO_SPLIT))}"
    elif any("\0" in name for name in (*manifest.path.tolist(), str(manifest.root))):
        wrong = "a path holds a zero byte"
    if wrong:
        raise StoreError(f"{path} is not a whole store: {wrong}; {NEXT}")


def leads_out(name: str) -> bool:
    """Say whether a data set's name is a path: no command makes such a store."""
    return name in (".", "..") or any(c in name for c in "/\\\0")
