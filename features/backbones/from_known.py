"""A backbone by a name of the table known.py: its route, and what its authors say beside it."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

from features.backbones import base
from features.backbones.base import Backbone
from features.backbones.download import fetch
from features.backbones.known import KNOWN, ROUTES, Build, Known, Shape
from features.errors import BackboneError
from features.files import meant
from features.images import Transform

LOCAL = {"timm": "local-dir:", "openclip": "local-dir:", "hf": ""}


def load_any(name: str, weights: str | None, image_size: int | None, **more: Any) -> Backbone:
    """Load any model of a library, named LIBRARY:NAME. more: as the library's loader takes it."""
    is_there(weights)
    library, _, rest = name.partition(":")
    loaded: Backbone = import_module(ROUTES[library]).load_any(rest, weights, image_size, **more)
    return loaded


def load_known(name: str, weights: str | None, image_size: int | None) -> Backbone:
    """Load a backbone of the table as NAME or NAME@REVISION.

    weights: None for the published ones, "random", a file of the whole model, or a folder in the
    layout of its repository. Raises BackboneError; of a gated one it names the page where access is
    asked for and the variable of the token.
    """
    row = KNOWN[name.partition("@")[0]]
    is_there(weights)
    try:
        route, file = route_of(row, name.partition("@")[2], weights)
        more = {"build": row.build} if row.build != Build() else {}
        found = load_any(route, file, image_size, **more)
    except BackboneError as error:
        lacking = row.gated and weights in (None, "random") and "can't be" in str(error)
        if not lacking:
            raise
        raise BackboneError(
            f"{error}. Access to {row.name} is asked for on {row.page}; then set the variable "
            f"HF_TOKEN to your token, or give what you have: -m {row.name}="
            f"{'FILE' if row.file else 'FOLDER'}"
        ) from None
    if row.shape and weights and Path(weights).is_dir():
        _check_shape(found, row, row.shape, weights)
    return _as_its_authors(found, row, name, base.origin_of(weights))


def is_there(weights: str | None) -> None:
    """Raise BackboneError for weights of a file or folder that isn't there.

    Before a library is asked for the model, which may first look for its configuration elsewhere.
    """
    if weights not in (None, "random") and not Path(str(weights)).exists():
        raise BackboneError(f"weights {weights}: there is no such file or folder{meant(weights)}")


def _check_shape(found: Backbone, row: Known, want: Shape, folder: str) -> None:
    """Raise BackboneError for a folder of another model than the row's, as far as shapes tell."""
    spec, library = found.spec, row.route.partition(":")[0]
    width = found.network.features.get(row.feature or spec.default_feature, (0,))[0]
    pairs = {  # what it is called: what the folder's model has, what the row says
        "class": (spec.family, f"{want.kind}..." if want.kind else ""),
        "width of features": (width, want.width),
        "layers": (spec.layers, want.layers),
        "patch": (spec.patch, want.patch),
    }
    for what, (has, wanted) in pairs.items():
        fits = has == wanted or (what == "class" and str(has).startswith(want.kind))
        if wanted and not fits:
            raise BackboneError(
                f"{folder} holds another model than {row.name}: its {what} is {has}, want "
                f"{wanted}. Name it by what it is: -m {library}:{LOCAL[library]}{folder}"
            )


def route_of(row: Known, revision: str, weights: str | None) -> tuple[str, str | None]:
    """Return the model to load, and the weights to give it."""
    library = row.route.partition(":")[0]
    if row.file:
        if weights is None:
            weights = str(_fetched(row, revision))
        elif revision:
            raise BackboneError(f"{row.name}@{revision}: --weights says which ones, not a revision")
        return row.route, weights
    if weights and Path(weights).is_dir():
        if revision:
            raise BackboneError(
                f"{row.name}@{revision}={weights}: a folder has no revisions: leave @{revision} out"
            )
        return f"{library}:{LOCAL[library]}{weights}", None
    return row.route + (f"@{revision}" if revision else ""), weights


def _fetched(row: Known, revision: str) -> Path:
    """Return the published file of a model that is a file only."""
    if not row.repository:
        raise BackboneError(
            f"{row.name}'s weights are a file that can't be fetched from here: get it from "
            f"{row.page} and give it with --weights FILE"
        )
    part = f"/resolve/{quote(revision or 'main', safe='')}/"
    with base.loading(row.name, f"Get its file from {row.page} and give it with --weights FILE"):
        return fetch(row.file.replace("/resolve/main/", part), row.name)


def _as_its_authors(found: Backbone, row: Known, name: str, weights: str) -> Backbone:
    """Return a backbone with the name, preparation and feature that the table has for it."""
    feature = row.feature or found.spec.default_feature
    spec = replace(
        found.spec,
        **{"name": name, "licence": row.licence, "source": row.page, **row.pixels},
        default_feature=feature,
        feature_dim=found.network.features[feature][0],
    )
    transform = _prepared(found, row) if row.pixels else found.transform
    return replace(found, spec=spec, transform=transform, weights=weights)


def _prepared(found: Backbone, row: Known) -> Transform:
    """Return the authors' transform; at another size than the model's own in proportion."""
    own, size = found.spec.input_size, found.transform.size
    changed = replace(found.transform, **row.pixels)
    return replace(changed, resize=round(changed.resize * size / own))
