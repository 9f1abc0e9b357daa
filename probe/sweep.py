"""One store in, results out.

Choose C (or k) on folds of the training rows, refit on all of them, test once. There is a result
for each feature, number of shots and seed; those of a feature with the same number of shots are
fitted together. With outer folds each image is tested once, by a head that the other folds trained,
C chosen within them: nested cross-validation, whose heads are all fitted together too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import ProbeError
from features.manifest import SPLITS, Manifest
from features.store import FeatureStore
from probe import covariates, results
from probe.choose import Fit
from probe.data import load
from probe.exclusion import column_of, excluded, without
from probe.heads import fit_heads
from probe.probing import ProbeOptions, ProbeSettings
from probe.problem import Problem
from probe.score.predictions import check_scoring
from probe.solve.path import HeadProgress
from probe.tested import audit_splits, metric_of
from probe.zero_shot import HEAD, Asked, zero_shot

__all__ = ["ProbeOptions", "probe", "probe_all"]


def probe(path: Path, **given: Any) -> results.Result:
    """Probe a store where the settings ask for one result; see probe_all."""
    [result] = probe_all(path, **given)
    return result


def probe_all(
    path: Path,
    *,
    out: Path,
    settings: ProbeOptions | None = None,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    progress: HeadProgress | None = None,
    fit: Fit = fit_heads,
    text: Asked | None = None,
    columns: Sequence[str] = (),
) -> list[results.Result]:
    """Probe a store and return a result per feature, number of shots and seed.

    Writes heads, predictions and lines of results.jsonl into `out`. fit solves linear heads, in
    this process or over rows that others hold. text: the prompts of a zero-shot head. columns of
    the manifest make three results of each: of columns alone, of the image, of both, on the same
    folds and test images; the last has what the image adds. Raises StoreError for a store that
    can't be read, ProbeError for labels or options that no head can be fitted to.
    """
    asked = settings or ProbeOptions()
    resolved = asked.resolve()
    _check(resolved, text, columns)
    found: list[results.Result] = []
    alone: dict[int | None, list[results.Result]] = {}  # of columns, by shots
    with FeatureStore.open(path) as store:
        whole = store.manifest()
        manifest, exclude = _used(whole, resolved)
        resolved = replace(resolved, exclude=exclude)
        metric = metric_of(manifest, asked.metric)
        outer = resolved.outer is not None
        leaks = audit_splits(store, manifest, strict=asked.strict_splits, outer=outer)
        made = zero_shot(store, manifest, text, asked.feature) if text else None
        for feature in [made.feature] if made else _features(store, asked.feature):
            how = (resolved.uncertain, resolved.device)
            data = load(store, manifest, feature, *how, outer=outer)
            tested = np.ones(len(data.rows), dtype=bool) if outer else ~data.train
            check_scoring(manifest, data.rows[tested], data.y[tested], resolved)
            problem = Problem(
                store=store,
                manifest=manifest,
                metric=metric,
                feature=feature,
                data=data,
                settings=resolved,
                audit=leaks,
                out=out,
                provenance={"command": command, "versions": dict(versions or {})},
                text=made,
                left_out=excluded(whole, exclude),
            )
            for shots in resolved.shots:
                if columns and shots not in alone:
                    alone[shots] = problem.beside(columns, image=False).run(shots, fit, progress)
                    found += alone[shots]
                found += problem.run(shots, fit, progress)
                if columns:
                    both = problem.beside(columns, image=True)
                    found += both.run(shots, fit, progress, over=alone[shots])
    return found


def _check(settings: ProbeSettings, text: Asked | None, columns: Sequence[str]) -> None:
    """Raise ProbeError for prompts or columns that don't go with the head."""
    if (settings.head == HEAD) != (text is not None):
        raise ProbeError("prompts (--prompts) and --head zero-shot go together: give both, or none")
    if columns:
        covariates.check_settings(settings)


def _used(manifest: Manifest, settings: ProbeSettings) -> tuple[Manifest, tuple[str, ...]]:
    """Return a manifest without the images that are excluded, and what excludes them.

    Where each value of a column is a fold, images without a value are excluded too: they may be of
    any.
    """
    exclude, column = settings.exclude, settings.outer
    if isinstance(column, str) and column != "subject":
        nameless = (column_of(manifest, column) == "") & np.isin(manifest.split, SPLITS)
        exclude = (*exclude, f"{column}=") if nameless.any() else exclude
    return without(manifest, exclude), exclude


def _features(store: FeatureStore, asked: str | None) -> list[str]:
    """Return the feature asked for, the store's default, or with "all" every vector in it."""
    if asked != "all":
        return [asked or store.default_feature]
    return [name for name, shape in store.features.items() if len(shape) == 1]
