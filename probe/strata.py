"""A column as strata: which images have which value, and training sets balanced against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.manifest import NO_LABEL
from probe.choose import TrainingSet
from probe.score.association import balancing, empty_pair
from probe.score.groups import grouped
from probe.trials import Trial

ENOUGH = 10  # subjects that a value must have: two for each of five outer folds
MOST = 20  # values of a column


@dataclass(frozen=True)
class Values:
    """A column's values, of those images that have one: codes (N,), NO_LABEL of others; names."""

    codes: NDArray[np.int64]
    names: tuple[str, ...]
    quartiles: bool
    why: str = ""

    @property
    def known(self) -> NDArray[np.bool_]:
        """Return which images (N,) have a value that is looked at."""
        return np.asarray(self.codes != NO_LABEL)


def values_of(given: NDArray[Any], subject: NDArray[Any], unit: str = "subject") -> Values:
    """Return the values (N,) of a column that have ENOUGH subjects (N,), or why it can't be used.

    A column of more than MAX_VALUES numbers is cut into quartiles, as the groups of --by are.
    """
    names = grouped(given)
    found = sorted(set(names.tolist()) - {""})
    many = {name: len(np.unique(subject[names == name])) for name in found}
    kept = tuple(name for name in found if many[name] >= ENOUGH)
    place = {name: k for k, name in enumerate(kept)}
    codes = np.array([place.get(name, NO_LABEL) for name in names.tolist()], dtype=np.int64)
    quartiles = not np.array_equal(names, given)
    why = ""
    if not found:
        why = "no image has a value of it"
    elif len(found) == 1:
        why = f"every image has the same value, {found[0]}" * bool((names != "").all())
        why = why or f"every image that has a value has the same one, {found[0]}"
    elif len(kept) < 2:
        own = max(many.values()) == 1
        each = f"each of its {len(found)} values is of one {unit}"
        few = f"of its {len(found)} values, {len(kept) or 'none'} has {ENOUGH} {unit}s or more"
        why = f"{each if own else few}, so that it can't be learnt from other {unit}s"
    elif len(kept) > MOST:
        why = f"it has {len(kept)} values, more than {MOST}: join some of them in the table"
    return Values(codes, kept, quartiles, why)


def counted_only(trial: Trial, counted: NDArray[np.bool_]) -> list[TrainingSet]:
    """Return a trial's sets without the whole one, with weights of 1 where counted (N,), else 0."""
    return [
        replace(subset, weight=counted[subset.rows].astype(np.float64))
        for subset in trial.training_sets[1:]
    ]


def empty(
    subset: TrainingSet, outcome: NDArray[np.int64], codes: NDArray[np.int64]
) -> tuple[int, int] | None:
    """Return an outcome and a value that a training set has, on no image together; else None."""
    rows = subset.rows[subset.weight > 0] if subset.weight is not None else subset.rows
    return empty_pair(outcome[rows], codes[rows])


def worth_of(subset: TrainingSet) -> float:
    """Return how many images of weight 1 tell as much as a set's weighted ones (Kish 1965)."""
    w = np.ones(len(subset.rows)) if subset.weight is None else subset.weight
    return float(w.sum() ** 2 / (w**2).sum())


def balanced(
    subset: TrainingSet, outcome: NDArray[np.int64], codes: NDArray[np.int64]
) -> TrainingSet:
    """Return a training set with weights that make outcome and codes, (N,), independent in it."""
    weight = np.zeros(len(subset.rows))
    counted = np.ones(len(weight), dtype=bool) if subset.weight is None else subset.weight > 0
    rows = subset.rows[counted]
    weight[counted] = balancing(outcome[rows], codes[rows])
    return replace(subset, weight=weight)
