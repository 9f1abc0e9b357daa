"""What tells two results apart, as one value: the only definition of it.

A result's key, its folder, the checkpoint that a run may go on from, `compare` and the report all
use it. Three parts of it have names of their own: `data` is what was tested on, `model` is what was
tested, and shots and seed say which draw of the training images. Settings that change how a score
is presented (its interval, groups, thresholds, a control) or where it is computed are not in it.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from features.errors import ProbeError
from features.files import filename
from features.manifest import SPLITS, Manifest, digest
from probe.exclusion import without

if TYPE_CHECKING:
    from features.store import FeatureStore

UNCERTAIN = ("zeros", "ones", "ignore")  # what -1 may count as

# What names a model, in order; the first is always said, the others where they tell models apart.
PARTS = (
    *("backbone", "weights", "scenario", "head", "feature", "protocol", "scored_by"),
    *("inputs", "shots", "trained_on"),
)
SEPARATOR = " · "  # between the parts of a name, none of which has it in it


@dataclass(frozen=True)
class Identity:
    """All that a result's numbers depend on. Digests are hexadecimal, "" in rows without them.

    split_digest: which image is in which split. labels_digest: what each is labelled as.
    extraction: the store's fingerprint without the list of what else is in it: images, weights,
    how features are made. settings: what else changes the head: strengths, folds, the loop of
    training. Both are JSON values. trained_on: the data set of a head that was tested on another
    one than its own; "" where it was trained on the data set that it is tested on.
    """

    dataset: str
    split_digest: str
    labels_digest: str
    backbone: str
    weights: str  # "published", "file" or "random"
    scenario: str
    head: str
    feature: str
    protocol: str
    metric: str
    scored_by: str
    shots: int | None
    seed: int
    settings: Mapping[str, Any]
    extraction: Mapping[str, Any]
    trained_on: str = ""

    @property
    def digest(self) -> str:
        """Return a hash of all of it, 16 hexadecimal digits."""
        own = () if self.trained_on else ("trained_on",)  # rows of before it are as they were
        return digest({k: v for k, v in asdict(self).items() if k not in own})

    @property
    def inputs(self) -> str:
        """Return what its head reads: the image, columns of the table, or both."""
        names = ", ".join(self.settings.get("columns", ()))
        if not names:
            return "image"
        return f"image + {names}" if self.settings.get("image") else f"{names} alone"

    @property
    def data(self) -> tuple[str, str, str]:
        """Return what it was tested on: results that differ in it can't be compared."""
        return self.dataset, self.split_digest, self.labels_digest

    @property
    def model(self) -> tuple[Hashable, ...]:
        """Return what was tested; results of one model on the same data are its seeds."""
        words = tuple(getattr(self, part) for part in PARTS)
        how = {k: v for k, v in self.extraction.items() if k != "manifest"}
        return (*words, json.dumps([self.settings, how], sort_keys=True))

    @property
    def folder(self) -> Path:
        """Return where its files lie, relative to the results: readable, and like no other's."""
        words = [self.protocol, self.feature.replace("/", "-"), self.metric]
        words += [] if self.shots is None else [f"shots{self.shots}"]
        words += [filename(f"trained-on-{self.trained_on}")] if self.trained_on else []
        words += [f"seed{self.seed}", *([] if self.scored_by == "image" else [self.scored_by])]
        name = filename("_".join(words).replace(" ", "-")) + f"-{self.digest[:10]}"
        return Path(filename(self.dataset), filename(self.backbone), name)


def data_of(
    store: FeatureStore,
    manifest: Manifest,
    uncertain: str,
    *,
    views: bool = False,
    outer: bool = False,
) -> dict[str, Any]:
    """Return the parts of an Identity that a store has: data set, split, labels, features.

    uncertain: what -1 and an empty cell count as, labels being others where it is. views: whether
    stored views are trained on. outer: whether all images are tested in folds, so that it doesn't
    matter which part of a split they are in (tested_whole).
    """
    made = store.fingerprint
    left_out = {"features"} if views else {"features", "views"}
    return {
        "dataset": manifest.dataset,
        "split_digest": tested_whole(manifest) if outer else manifest.split_digest(),
        "labels_digest": _labels_digest(manifest, uncertain),
        "backbone": made["backbone"]["name"],
        "weights": made["backbone"]["weights"],
        "extraction": {k: v for k, v in made.items() if k not in left_out},
    }


def is_of(store: FeatureStore, manifest: Manifest, identity: Identity) -> bool:
    """Say whether a store still has what a result was made from: images, features, labels, split.

    Features that were added to it since then don't count.
    """
    if identity.trained_on:  # labels may be of a table, and are by the names of the head's classes
        return made_by(store, identity)
    try:
        manifest = without(manifest, identity.settings.get("exclude", ()))
    except ProbeError:  # it has another column, or other values, now
        return False
    return (
        made_by(store, identity)
        and identity.split_digest in (manifest.split_digest(), tested_whole(manifest))
        and identity.labels_digest in {_labels_digest(manifest, how) for how in UNCERTAIN}
    )


def made_by(store: FeatureStore, identity: Identity) -> bool:
    """Say whether a store has the images and features that a result was made from."""
    made = store.fingerprint
    return bool(identity.extraction) and all(
        made.get(k) == v for k, v in identity.extraction.items()
    )


def tested_whole(manifest: Manifest) -> str:
    """Return a hash of which images are in a split: outer folds, or other heads, test all."""
    used = np.isin(manifest.split, SPLITS)
    return digest(["outer folds", sorted(manifest.id[used].tolist())])


def _labels_digest(manifest: Manifest, uncertain: str) -> str:
    labels = manifest.labels_digest()
    return digest([labels, uncertain]) if manifest.task == "multilabel" else labels


def differences(one: Identity, other: Identity) -> list[str]:
    """Return what differs between two identities, as in "seed: 0, now 1"."""
    a, b = flat(asdict(one)), flat(asdict(other))
    return [f"{k}: {a.get(k)}, now {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested JSON objects as one, with names such as `image.size`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def data_names(identities: Sequence[Identity], label_from: Sequence[str] = ()) -> list[str]:
    """Return a name of what each was tested on: the data set, and which of several ones it is.

    One data set with two splits, or two sets of labels, is two: numbers on one say nothing about
    those on the other. Labels are named by their columns, which `label_from` has of each identity,
    where these tell them apart; else by the start of their digest.
    """
    known: dict[str, set[tuple[str, str, str]]] = {}
    columns: dict[tuple[str, str], set[str]] = {}  # data set, digest of labels -> their columns
    for k, one in enumerate(identities):
        known.setdefault(one.dataset, set()).add(one.data)
        column = label_from[k] if label_from else ""
        columns.setdefault((one.dataset, one.labels_digest), set()).add(column)
    parts, schemes = _parts(identities), _schemes(identities)
    names = []
    for one in identities:
        labels = {digest: columns[one.dataset, digest] for _, _, digest in known[one.dataset]}
        name = _data_name(one, known[one.dataset], _named(labels), parts)
        names.append(f"{name}, {_scheme(one)}" if len(schemes.get(one.data, ())) > 1 else name)
    return names


def _schemes(identities: Sequence[Identity]) -> dict[tuple[str, str, str], set[str]]:
    """Return by which outer folds the same images are tested, where folds test them.

    More folds train on more images, so that results of one model by several of them are not several
    models: each is a test of its own.
    """
    schemes: dict[tuple[str, str, str], set[str]] = {}
    for one in identities:
        if "outer" in one.settings and not one.trained_on:
            schemes.setdefault(one.data, set()).add(_scheme(one))
    return schemes


def _scheme(one: Identity) -> str:
    outer = None if one.trained_on else one.settings.get("outer")
    if outer is None:
        return "all images"
    return f"{outer} outer folds" if isinstance(outer, int) else f"each {outer} left out"


def _parts(identities: Sequence[Identity]) -> dict[str, str]:
    """Return in words what the split digests are of that are of no split: all images."""
    folds = {o.split_digest for o in identities if "outer" in o.settings and not o.trained_on}
    whole = {o.split_digest for o in identities if o.trained_on and o.settings.get("part") == "all"}
    return dict.fromkeys(folds, "outer folds") | dict.fromkeys(whole, "all images")


def _named(labels: Mapping[str, set[str]]) -> dict[str, str]:
    """Return {digest: column} where each set of labels has one, another one; else nothing."""
    named = {digest: next(iter(found)) for digest, found in labels.items() if len(found) == 1}
    apart = len(named) == len(labels) == len(set(named.values()))
    return named if apart and all(named.values()) else {}


def _data_name(
    one: Identity,
    known: set[tuple[str, str, str]],
    columns: Mapping[str, str],
    parts: Mapping[str, str],
) -> str:
    split = parts.get(one.split_digest, f"split {one.split_digest[:6] or 'unknown'}")
    labels = f"labels {columns.get(one.labels_digest, one.labels_digest[:6]) or 'unknown'}"
    words = [
        word
        for word, place in ((split, 1), (labels, 2))
        if len({other[place] for other in known}) > 1
    ]
    return f"{one.dataset} ({', '.join(words)})" if words else one.dataset


def model_names(identities: Sequence[Identity]) -> list[str]:
    """Return a name of each one's model, as in "dinov2 · frozen, linear · protocol paper"."""
    return [in_one(parts) for parts in model_parts(identities)]


def in_one(parts: Mapping[str, str]) -> str:
    """Return the parts of a model's name as one text."""
    return SEPARATOR.join(parts.values())


def model_parts(identities: Sequence[Identity], *, settings: bool = True) -> list[dict[str, str]]:
    """Return what names each one's model: its backbone, and as much as tells models apart.

    Keys are of PARTS, in their order; each value says what it is of. A part that takes several
    values where those before it are alike is said of all models of that backbone; what a head was
    trained on, wherever it is another data set than the one that it is tested on. Models that are
    alike in all parts, on the same data, get what else differs, of their settings or of how their
    features were made, under the key "settings"; not where `settings` is false.
    """
    said: dict[str, list[str]] = {}
    for backbone in {one.backbone for one in identities}:
        mine = [one for one in identities if one.backbone == backbone]
        said[backbone] = ["backbone"]
        for part in PARTS[1:]:
            alike: dict[tuple[Any, ...], set[str]] = {}
            for one in mine:
                key = tuple(getattr(one, p) for p in said[backbone])
                alike.setdefault(key, set()).add(str(getattr(one, part)))
            several = any(len(values) > 1 for values in alike.values())
            reads_columns = part == "inputs" and any(one.inputs != "image" for one in mine)
            elsewhere = part == "trained_on" and any(one.trained_on for one in mine)
            if several or reads_columns or elsewhere:
                said[backbone].append(part)
    words = [{part: _word(one, part) for part in said[one.backbone]} for one in identities]
    named = [{part: word for part, word in parts.items() if word} for parts in words]
    if not settings:
        return named
    same: dict[tuple[Any, ...], list[Identity]] = {}
    for parts, one in zip(named, identities, strict=True):
        same.setdefault((in_one(parts), one.data), []).append(one)
    rest = [
        _rest(one, same[in_one(parts), one.data])
        for parts, one in zip(named, identities, strict=True)
    ]
    return [
        parts | ({"settings": ", ".join(words)} if words else {})
        for parts, words in zip(named, rest, strict=True)
    ]


def in_scenario(scenario: str) -> str:
    """Return a scenario as one says it: "frozen, linear"."""
    return scenario.replace("-", ", ", 1)


def _word(one: Identity, part: str) -> str:
    """Return a part of an identity in words that say what it is."""
    value = getattr(one, part)
    if part == "shots":
        return "all images" if value is None else f"{value} shot{'s' * (value != 1)}"
    words = {
        "weights": {"file": "weights from a file"}.get(value, f"{value} weights"),
        "scenario": in_scenario(str(value)),
        "head": f"{value} head",
        "protocol": f"protocol {value}",
        "scored_by": f"per {value}",
        "trained_on": f"trained on {value}" * bool(value),
    }
    return words.get(part, str(value))


def _rest(one: Identity, alike: Sequence[Identity]) -> list[str]:
    """Say what else tells an identity from others of the same name on the same data."""
    mine, others = _all(one), [_all(other) for other in alike]
    varying = [
        key
        for key in sorted({key for other in others for key in other})
        if len({json.dumps(other.get(key)) for other in others}) > 1
    ]
    return [f"{key} {_short(mine.get(key))}" for key in varying]


def _all(one: Identity) -> dict[str, Any]:
    how = {k: v for k, v in one.extraction.items() if k != "manifest"}
    # Other outer folds are another test, and are named with the data.
    settings = {k: v for k, v in one.settings.items() if k != "outer"}
    return flat(settings) | flat(how)


def _short(value: Any) -> str:
    """Return a setting in a word: a long list by its ends and its length."""
    if isinstance(value, list | tuple):
        some = [_short(v) for v in value]
        return ",".join(some) if len(some) < 4 else f"{some[0]}..{some[-1]} ({len(some)})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)[:12]
