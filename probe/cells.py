"""A cell: one backbone on one data set in one scenario, with its settings. It knows how to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from features.backbones import Backbone, Fit, load_backbone
from features.effects import with_effect
from features.manifest import Manifest, digest
from features.plan import ExtractionSettings, store_path
from features.urls import Location
from probe import sweep
from probe.probing import ProbeOptions
from probe.results import Result
from probe.solve.path import HeadProgress
from probe.train import checkpoints, finetune
from probe.train.training import Say
from probe.train.tuned import feature_of

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std


@dataclass(frozen=True)
class Cell(ABC):
    """What is computed, all of it: a worker elsewhere needs nothing else. See its two kinds."""

    manifest: Manifest
    backbone: str
    scenario: str
    extraction: ExtractionSettings
    features: Path  # where stores are
    out: Path  # where results go
    weights: str | None = None
    image_size: int | None = None
    fit: Fit | None = None  # None is the backbone's own
    normalize: Statistics | None = None  # None is the backbone's own
    rows: str = ""  # digest_of(manifest), for the fingerprint

    @property
    def name(self) -> str:
        """Return what a person calls it."""
        return f"{self.manifest.dataset} x {self.backbone}, {self.scenario}"

    @property
    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """Return the settings of its heads."""

    @property
    def store(self) -> Path:
        """Return where its features are."""
        return store_path(self.features, self.manifest.dataset, self.backbone)

    def wanted(self, backbone: Backbone) -> set[str]:
        """Return the features that must be extracted for it beside those that are asked for."""
        return set()

    @abstractmethod
    def run(
        self, about: Mapping[str, Any], heads: HeadProgress | None, epochs: Say
    ) -> list[Result]:
        """Compute it, its features being there, and write its results."""

    def load(self) -> Backbone:
        """Return the backbone, anew each time: training changes it."""
        found = load_backbone(self.backbone, self.weights, self.image_size, self.fit)
        return found.normalised_by(*self.normalize) if self.normalize else found

    def fingerprint(self) -> str:
        """Return a digest of all that its numbers depend on."""
        return digest(
            {
                "rows": self.rows,
                "backbone": [self.backbone, self.weights, _stat(_weights_file(self.weights))],
                "image": [self.image_size, self.normalize, *((self.fit,) if self.fit else ())],
                "extraction": with_effect(replace(self.extraction, batch_size=None)),
                "scenario": self.scenario,
                "heads": [with_effect(settings) for settings in self.settings],
                "version": version("medprobe"),
            }
        )


@dataclass(frozen=True, kw_only=True)
class ProbeCell(Cell):
    """A cell whose heads the sweep solves."""

    probing: ProbeOptions

    @property
    def settings(self) -> tuple[ProbeOptions, ...]:
        """Return the settings of its heads."""
        return (self.probing,)

    def run(
        self, about: Mapping[str, Any], heads: HeadProgress | None, epochs: Say
    ) -> list[Result]:
        """Probe the store."""
        return sweep.probe_all(
            self.store,
            out=self.out,
            settings=self.probing,
            command=str(about.get("command", "")),
            versions=about.get("versions", {}),
            progress=heads,
        )


@dataclass(frozen=True, kw_only=True)
class TrainCell(Cell):
    """A cell whose heads, or whole models, are trained: with one of `runs` for each seed."""

    runs: tuple[finetune.TrainSettings, ...]

    @property
    def name(self) -> str:
        """Return what a person calls it, with what is not as usual in its training."""
        return " ".join([super().name, *self.runs[0].name.split()[1:]])

    @property
    def settings(self) -> tuple[finetune.TrainSettings, ...]:
        """Return the settings of its heads."""
        return self.runs

    def wanted(self, backbone: Backbone) -> set[str]:
        """Return the layers that linear heads read, which start from their probe."""
        return {
            feature_of(backbone, tokens=False, drop_last=one.drop_last)
            for one in self.runs
            if one.head == "linear" and one.init == "probe" and one.drop_last
        }

    def run(
        self, about: Mapping[str, Any], heads: HeadProgress | None, epochs: Say
    ) -> list[Result]:
        """Train with each seed, on the store where the backbone stays as it is."""
        found = []
        for settings in self.runs:
            how: dict[str, Any] = {
                "out": self.out, "settings": settings, "say": epochs, "about": about
            }  # fmt: skip
            if self.scenario.startswith("unfrozen"):
                found.append(finetune.finetune(self.store, self.load(), **how))
            else:
                found.append(finetune.train_on_store(self.store, **how))
        return found


def digest_of(manifest: Manifest) -> str:
    """Return a digest of a manifest's rows, labels, splits, and its files' sizes and times."""
    columns = {"subject": manifest.subject, "label": manifest.label, **manifest.columns}
    return digest(
        [
            *(manifest.dataset, manifest.digest(), manifest.split_digest(), manifest.metric),
            list(manifest.classes),
            {name: values.tolist() for name, values in columns.items()},
            [_stat(manifest.file(row)) for row in range(len(manifest))],
        ]
    )


def _stat(path: Location | None) -> list[int]:
    """Return size and time of a file; nothing where there is none."""
    try:
        found = path.stat() if path else None
    except OSError:
        found = None
    return [found.st_size, found.st_mtime_ns] if found else []


def _weights_file(weights: str | None) -> Path | None:
    if weights is None or weights == "random":
        return None
    path = Path(weights)
    if not path.is_dir():
        return path
    best = path / checkpoints.FOLDER / checkpoints.BEST
    if best.is_file():
        return best
    # The folder of a model's repository: any change of it shows in its newest file.
    files = [file for file in path.iterdir() if file.is_file()]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)
