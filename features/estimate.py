"""What an extraction will take: rows, bytes, and seconds by a short measurement.

Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from features import tuning
from features.backbones import Backbone
from features.devices import PRECISIONS
from features.layout import row_bytes
from features.manifest import Manifest
from features.plan import ExtractionSettings, plan
from features.store import PENDING, FeatureStore
from features.workers import ImageRecipe, load

SAMPLE = 16  # images that are decoded, evenly spread over the manifest


@dataclass(frozen=True)
class Estimate:
    """One store: what is in it when done, and what is to be done for that.

    bytes_needed is of the features still to be made; seconds are of their forward passes alone.
    twin: the store that they are copied from, if any.
    """

    store: Path
    backbone: str
    precision: str
    images: int
    to_do: int
    features: list[str]
    bytes_needed: int
    seconds: float
    twin: Path | None = None


def estimate(
    manifest: Manifest, backbones: Sequence[Backbone], *, out: Path, settings: ExtractionSettings
) -> tuple[list[Estimate], float]:
    """Return an estimate per backbone, and the seconds that decoding takes all cores.

    Raises what `extract` would raise of stores that were made from something else.
    """
    planned = [plan(manifest, backbone, out, settings) for backbone in backbones]
    estimates = []
    for p in planned:
        to_do = len(manifest)
        if p.twin or (not p.new and not p.missing):
            with FeatureStore.open(p.twin or p.path) as store:
                to_do -= int((store.done != PENDING).sum())
        dtype, device = PRECISIONS[p.precision], settings.device
        seconds = 0.0
        if to_do:
            p.backbone.to(device, dtype)
            size = settings.batch_size or tuning.DEFAULT[device.partition(":")[0]]
            size = min(size, len(manifest))
            each = tuning.seconds_per_image(p.backbone, device, dtype, size)
            seconds = each * to_do * (1 + settings.views)
        estimates.append(
            Estimate(
                store=p.path,
                backbone=p.backbone.spec.name,
                precision=p.precision,
                images=len(manifest),
                to_do=to_do,
                features=sorted(p.shapes),
                bytes_needed=sum(
                    row_bytes(n, p.shapes[n]) for n in (p.shapes if p.grows else p.missing)
                )
                * len(manifest),
                seconds=seconds,
                twin=p.twin,
            )
        )
    most = max((e.to_do for e in estimates), default=0)
    return estimates, _seconds_to_decode(manifest, backbones, settings) * most if most else 0.0


def _seconds_to_decode(
    manifest: Manifest, backbones: Sequence[Backbone], settings: ExtractionSettings
) -> float:
    """Return seconds per image with all workers."""
    transforms = tuple(dict.fromkeys(backbone.transform for backbone in backbones))
    recipe = ImageRecipe(
        transforms,
        settings.exact,
        settings.views,
        settings.view_seed,
        settings.window,
        settings.frame,
    )
    rows = np.unique(np.linspace(0, len(manifest) - 1, SAMPLE).astype(int))
    seconds = [load(manifest.file(i), recipe)[0].seconds for i in rows]
    return float(np.mean(seconds)) / (settings.workers or os.cpu_count() or 1)
