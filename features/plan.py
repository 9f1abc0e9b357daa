"""What there is to do for a backbone: a new store, one to be finished, features or images to add.

A store of some of the images that are asked for grows: what is done of them stays, and is in no
batch of what is added.

Features that a complete store hasn't got yet are computed into a store of their own beside it
(<backbone>.adding), with all its promises, and taken in at the end: until then the old store is as
it was, and it can be read.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features import dicom, tuning
from features.backbones import Backbone
from features.devices import PRECISIONS, resolve_precision
from features.effects import without_effect
from features.errors import StaleStoreError, StoreError
from features.files import filename
from features.fingerprint import fingerprint, in_words
from features.layout import VIEWS
from features.manifest import Manifest
from features.parity import Parity, certify
from features.stale import REMEDY, STALE, of_other_images, other_labels, two_roots
from features.store import BAD, DONE, FeatureStore
from features.twins import changed_files, copy_twin, find_twin
from features.workers import ImageRecipe

SHOWN = 5  # how many of a list an error names

Ask = Callable[..., Any]  # (function, *its arguments) -> what it returns


def run_locally(question: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """Answer a question about the device in this process."""
    return question(*args, **given)


@dataclass(frozen=True)
class ExtractionSettings:
    """How to extract. Batch size in images; None chooses it, and the workers, by measurement."""

    layers: str = "last"  # or "all", or a list: "3,7,final"
    pools: tuple[str, ...] = ()  # none is each backbone's default
    tokens: bool = False
    views: int = 0  # augmented views per image, beside the image itself
    view_seed: int = 0
    exact: bool = False  # decode in full, see images.py
    precision: str = "auto"
    batch_size: int | None = None
    workers: int | None = without_effect(None)  # processes that decode
    device: str = without_effect("cpu")
    on_error: str = without_effect("skip")  # or "fail"
    overwrite: str = without_effect("never")  # or "stale", "always"
    window: dicom.Window | None = None  # for DICOM, as frame
    frame: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is asked of one backbone. `missing` features are to be made; `new` is a new store.

    grows: the store is there, and has some of the images. twin: a store under another name that a
    new one is copied from. ask puts a question about the device. parity: the certificate of a new
    store whose model has a library to compare with.
    """

    path: Path
    backbone: Backbone
    precision: str
    shapes: dict[str, tuple[int, ...]]  # of all features that are asked for
    missing: tuple[str, ...]
    new: bool
    fingerprint: dict[str, Any]  # of the store when all is done
    grows: bool = False
    twin: Path | None = None
    ask: Ask = run_locally
    parity: Parity | None = None

    @property
    def adding(self) -> Path:
        """Where features lie that are being added."""
        return self.path.with_suffix(".adding")


def store_path(out: Path, dataset: str, backbone: str) -> Path:
    """Return where a store lies, whatever the two are called."""
    return out / filename(dataset) / f"{filename(backbone)}.h5"


def parts_folder(path: Path) -> Path:
    """Return where the parts of a store lie while it is filled by several workers, see parts.py."""
    return path.with_name(path.name + ".parts")


def plan(
    manifest: Manifest,
    backbone: Backbone,
    out: Path,
    settings: ExtractionSettings,
    ask: Ask = run_locally,
) -> Plan:
    """Compare what is asked with what is there; changes nothing.

    ask puts a question about the device: here, or on a machine that has it. For a new store of a
    model that any name loads, a few images are compared with what its library makes of them, and
    "auto" precision is checked on them. Raises StaleStoreError for a store that was made from
    something else, unless it may be overwritten, and BackboneError for features that are not the
    library's.
    """
    path = store_path(out, manifest.dataset, backbone.spec.name)
    bfloat16 = backbone.spec.bfloat16
    precision = ask(resolve_precision, settings.precision, settings.device, bfloat16=bfloat16)
    names = backbone.select(settings.layers, settings.pools, settings.tokens)
    shapes = {name: backbone.network.features[name] for name in names}
    if settings.views:
        shapes |= {name + VIEWS: (settings.views, *shape) for name, shape in shapes.items()}
    asked = fingerprint(
        manifest,
        backbone,
        list(shapes),
        precision,
        exact=settings.exact,
        views=settings.views,
        seed=settings.view_seed,
        dicom=dicom.applied(manifest.path.tolist(), settings.window, settings.frame),
    )
    parity = _parity(path, asked, manifest, backbone, settings, ask)
    if parity and settings.precision == "auto":
        precision = parity.settled(precision)
        asked["precision"] = precision
    planned = Plan(
        path, backbone, precision, shapes, tuple(shapes), True, asked, False, None, ask, parity
    )
    if settings.overwrite == "always":
        return planned
    if not path.is_file():
        return replace(planned, twin=find_twin(path, manifest, shapes, asked))
    try:
        with FeatureStore.open(path) as store:
            stored, stored_features = store.fingerprint, store.features
            other = store.manifest() if stored["manifest"] != asked["manifest"] else manifest
    except StoreError:
        if settings.overwrite == "never":
            raise
        return planned
    return _compared(planned, stored, stored_features, other, manifest, settings.overwrite)


def _compared(
    planned: Plan,
    stored: dict[str, Any],
    stored_features: dict[str, tuple[int, ...]],
    other: Manifest,
    manifest: Manifest,
    overwrite: str,
) -> Plan:
    """Return the plan of a store that is there, made from `stored` of the images of `other`.

    Raises StaleStoreError where it was made from something else, and may not be overwritten.
    """
    asked, shapes, path = planned.fingerprint, planned.shapes, planned.path
    united = asked | {"features": sorted(shapes | stored_features)}
    if "views" not in asked and "views" in stored:
        united["views"] = stored["views"]
    grows, has_all = _is_part(other, manifest), _is_part(manifest, other)
    now = stored | {"manifest": united["manifest"]} if grows else stored
    differ = in_words(_for_comparison(now, united), _for_comparison(united, now))
    if not differ:
        missing = tuple(name for name in shapes if name not in stored_features)
        return replace(planned, missing=missing, new=False, fingerprint=united, grows=grows)
    if overwrite == "never":
        images = all(line.startswith("images") for line in differ)
        remedy = of_other_images(other, manifest, has_all=has_all) if images else REMEDY
        raise StaleStoreError(f"{path} was made from something else: {'; '.join(differ)}. {remedy}")
    return planned


def _parity(
    path: Path,
    asked: Mapping[str, Any],
    manifest: Manifest,
    backbone: Backbone,
    settings: ExtractionSettings,
    ask: Ask,
) -> Parity | None:
    """Return the certificate of a store that is there, or one that is made for a new one."""
    if backbone.library is None:
        return None
    if settings.overwrite != "always" and path.is_file():
        with suppress(StoreError), FeatureStore.open(path) as store:
            same = ("backbone", "image", "normalize")
            if all(store.fingerprint.get(part) == asked[part] for part in same):
                return Parity(**store.parity) if store.parity else None
    reduced = asked["precision"] if settings.precision == "auto" else "float32"
    recipe = ImageRecipe((), window=settings.window, frame=settings.frame)
    found: Parity = ask(certify, backbone, manifest, recipe, settings.device, reduced)
    found.say(backbone.spec.name, reduced, exact=settings.exact)
    return found


def _is_part(some: Manifest, whole: Manifest) -> bool:
    """Say whether a manifest has all images of another under the same paths, and more."""
    if len(some) >= len(whole):
        return False
    path = dict(zip(whole.id.tolist(), whole.path.tolist(), strict=True))
    both = zip(some.id.tolist(), some.path.tolist(), strict=True)
    return all(path.get(name) == file for name, file in both)


def _for_comparison(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a fingerprint without the names of features, and views that only it has."""
    return {k: v for k, v in one.items() if k != "features" and (k != "views" or k in other)}


def begin(
    planned: Plan, manifest: Manifest, settings: ExtractionSettings, *, relabel: bool = True
) -> list[FeatureStore]:
    """Return the stores that are to be filled, open for writing: the main one, then one to add.

    Brings labels up to date if asked to relabel, and marks rows to be done again whose images have
    changed. Raises StaleStoreError for those unless they may be overwritten.
    """
    if planned.twin:
        _copy(planned, planned.twin, manifest)
    elif planned.new:
        _create(planned.path, planned, planned.missing, planned.fingerprint, manifest, settings)
    stores = [FeatureStore.open(planned.path, write=True)]
    try:
        if planned.grows:
            _grow(stores[0], planned, manifest, settings, _batch_size(planned, manifest, settings))
        if planned.new or not planned.missing:
            planned.adding.unlink(missing_ok=True)
        else:
            stores.append(_open_adding(planned, manifest, settings, stores[0].batch_size))
        for store in stores:
            check_sources(store, manifest, settings)
            if relabel:
                _update_labels(store, manifest)
    except BaseException:
        for store in stores:
            store.close()
        raise
    return stores


def _grow(
    store: FeatureStore,
    planned: Plan,
    manifest: Manifest,
    settings: ExtractionSettings,
    batch_size: int,
) -> None:
    """Have a store take in the other images of a manifest, if its own are as they were."""
    check_sources(store, manifest.take(manifest.rows_of(store.manifest())), settings)
    images = {"manifest": planned.fingerprint["manifest"]}
    store.grow(manifest, store.fingerprint | images, batch_size)


def _open_adding(
    planned: Plan, manifest: Manifest, settings: ExtractionSettings, batch_size: int
) -> FeatureStore:
    """Return the store of features to be added: one that was begun, or a new one."""
    asked = planned.fingerprint | {"features": sorted(planned.missing)}
    if planned.adding.is_file():
        store = FeatureStore.open(planned.adding, write=True)
        grown = store.fingerprint | {"manifest": asked["manifest"]}
        if grown == asked and _is_part(store.manifest(), manifest):
            _grow(store, planned, manifest, settings, batch_size)
        if store.fingerprint == asked:
            return store
        store.close()
    _create(planned.adding, planned, planned.missing, asked, manifest, settings, batch_size)
    return FeatureStore.open(planned.adding, write=True)


def _copy(planned: Plan, twin: Path, manifest: Manifest) -> None:
    shutil.rmtree(parts_folder(planned.path), ignore_errors=True)
    shapes, made = planned.shapes, planned.fingerprint
    default = _default_feature(planned, tuple(shapes))
    parity = asdict(planned.parity) if planned.parity else None
    copy_twin(twin, planned.path, manifest, shapes, made, default_feature=default, parity=parity)


def _default_feature(planned: Plan, names: tuple[str, ...]) -> str:
    default = planned.backbone.spec.default_feature
    return default if default in names else names[0]


def _create(
    path: Path,
    planned: Plan,
    names: tuple[str, ...],
    made_from: Mapping[str, Any],
    manifest: Manifest,
    settings: ExtractionSettings,
    batch_size: int | None = None,
) -> None:
    shutil.rmtree(parts_folder(path), ignore_errors=True)  # of a store that was here before
    FeatureStore.create(
        path,
        manifest,
        {name: planned.shapes[name] for name in names},
        fingerprint=made_from,
        default_feature=_default_feature(planned, names),
        parity=asdict(planned.parity) if planned.parity else None,
        batch_size=batch_size or _batch_size(planned, manifest, settings),
    )


def _batch_size(planned: Plan, manifest: Manifest, settings: ExtractionSettings) -> int:
    about = (planned.backbone, planned.precision, settings.device, len(manifest))
    return settings.batch_size or int(planned.ask(_tuned, *about))


def _tuned(backbone: Backbone, precision: str, device: str, images: int) -> int:
    dtype = PRECISIONS[precision]
    if images >= tuning.WORTHWHILE:
        backbone.to(device, dtype)
    return tuning.batch_size(backbone, device, dtype, images)


def check_sources(store: FeatureStore, manifest: Manifest, settings: ExtractionSettings) -> None:
    """See that no image has changed since it was read.

    See twins.changed_files for how they are compared. Bad images are tried again. A changed one is
    an error, or with overwrite="stale" computed anew, and with it what has its old or new bytes:
    which row of several is computed, and which copied, may be another now.
    """
    done, source = store.done, store.source()
    changed = changed_files(store, manifest)
    if changed and settings.overwrite == "never":
        names = ", ".join(manifest.path[list(changed)[:SHOWN]])
        raise StaleStoreError(
            f"{store.path}: {len(changed)} images have changed "
            f"since their features were computed ({names}). "
            f"{two_roots(store.manifest(), manifest) or STALE}"
        )
    bytes_of = [*changed.values(), *source["hash"][list(changed)]]
    again: NDArray[np.bool_] = (done == BAD) | (done == DONE) & np.isin(source["hash"], bytes_of)
    if again.any():
        store.forget(np.flatnonzero(again))


def _update_labels(store: FeatureStore, manifest: Manifest) -> None:
    """Bring labels, subjects, splits and other columns up to date; the features stay."""
    old = store.manifest()
    names = ("label", "subject", "split")
    same = all(np.array_equal(getattr(old, name), getattr(manifest, name)) for name in names)
    same &= old.columns.keys() == manifest.columns.keys() and all(
        np.array_equal(old.columns[name], values) for name, values in manifest.columns.items()
    )
    same &= all(
        getattr(old, name) == getattr(manifest, name)
        for name in (
            *("classes", "root", "split_from", "metric", "note", "label_from", "order_from"),
        )
    )
    if not same:
        store.relabel(manifest)
        if store.path.suffix == ".h5" and (change := other_labels(old, manifest)):
            warnings.warn(
                f"{store.path} has new labels: {change}. No feature is computed again, and earlier "
                "results stay as they are; --name keeps a store of each",
                stacklevel=4,
            )
