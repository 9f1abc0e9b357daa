"""How to probe: the settings as they are asked for, and with nothing left open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from features.effects import without_effect
from features.errors import ProbeError
from probe import protocols
from probe.data import Features
from probe.protocols import Protocol
from probe.score.predictions import (
    Scoring,
)


@dataclass(frozen=True)
class ProbeOptions(Scoring):
    """How to probe, as asked. None takes the protocol's, the store's or the task's own."""

    protocol: str = "dinov2-logreg"
    head: str | None = None  # linear, knn or zero-shot
    feature: str | None = None  # "all": every vector in the store
    metric: str | None = None
    C: tuple[float, ...] | None = None
    k: tuple[int, ...] | None = None
    temperature: float | None = None
    folds: int | None = None
    shots: tuple[int | None, ...] | None = None  # training images per class; None in it: all
    seeds: int | None = None  # draws of each number of shots
    outer: int | str | None = None  # folds that each test once, or "subject": one per subject
    repeats: int | None = None  # deals of the outer folds
    calibrate: str | None = None  # recalibration.METHODS, fitted to what folds held out
    conformal: float | None = None  # how often prediction sets are to hold the label
    leave_out: str | None = None  # a column each value of which is an outer fold, such as site
    exclude: tuple[str, ...] = ()  # COLUMN=VALUE: images that are neither trained on nor tested
    control: str | None = None  # "shuffle": fit to shuffled labels as well
    uncertain: str = "zeros"  # what -1 and an empty cell count as: zeros, ones (-1 only), ignore
    strict_splits: bool = without_effect(False)  # refuse splits that leak
    device: str = without_effect("cpu")
    tol: float = 1e-6

    def resolve(self) -> ProbeSettings:
        """Return the settings with the protocol's values where none is given.

        Raises ProbeError where the protocol has none for the head.
        """
        protocol = protocols.find(self.protocol)
        head = self.head or protocol.head
        if head != protocol.head and self.protocol != ProbeOptions.protocol:
            raise ProbeError(f"protocol {protocol.name} has a {protocol.head} head, not {head}")
        if protocol.trained:
            raise ProbeError(
                f"protocol {protocol.name} trains its head by epochs: see probe.train.finetune"
            )
        if self.C and (protocol.l2 is not None or protocol.per_size is not None):
            raise ProbeError(f"protocol {protocol.name} has its own penalty: leave --C out")
        if head == "knn" and self.C:
            raise ProbeError("a knn head has no strengths: leave --C out, or take --head linear")
        if head != "knn" and (self.k or self.temperature):
            raise ProbeError("--k and --temperature are of --head knn: leave them out")
        if head == "zero-shot":
            protocol = protocols.find(head)
            self._check_untrained()
        outer = self._outer_folds()
        shots, seeds = self._draws(protocol, outer)
        by = self.by  # each value that is left out is scored apart
        if self.leave_out and self.leave_out != "subject" and self.leave_out not in by:
            by = (*by, self.leave_out)
        if head == "knn":
            protocol = protocols.find("knn") if protocol.head != "knn" else protocol
        scoring = {one.name: getattr(self, one.name) for one in fields(Scoring)}
        scoring["by"] = by
        return ProbeSettings(
            **scoring,
            protocol=protocol,
            head=head,
            C=tuple(sorted(self.C or protocol.C)),
            k=tuple(sorted(self.k or protocol.k)),
            temperature=self.temperature or protocol.temperature,
            folds=self.folds or protocol.folds,
            shots=shots,
            seeds=seeds,
            outer=outer,
            calibrate=self.calibrate,
            conformal=self.conformal,
            exclude=self.exclude,
            control=self.control or "",
            uncertain=self.uncertain,
            device=self.device,
            tol=self.tol,
        )

    def _draws(
        self, protocol: Protocol, outer: int | str | None
    ) -> tuple[tuple[int | None, ...], int]:
        """Return the numbers of shots, and of draws of each, or of deals of the outer folds."""
        shots, seeds = self.shots or protocol.shots, self.seeds or protocol.seeds
        if outer is None:
            if self.repeats:
                raise ProbeError("--repeats deals outer folds anew: give --outer too")
            return shots, seeds
        if shots != (None,):
            raise ProbeError(
                "--shots draws training images, and --outer trains on all but a fold: leave one"
                " of them out"
            )
        if self.repeats and not isinstance(outer, int):
            raise ProbeError(
                f"--repeats deals outer folds anew, and each {outer} is a fold of its own: "
                "leave --repeats out"
            )
        return shots, self.repeats or 1

    def _outer_folds(self) -> int | str | None:
        """Return the outer folds asked for: a number, "subject", or another column."""
        if self.leave_out is None:
            return self.outer
        for name in ("outer", "repeats"):
            if getattr(self, name) is not None:
                raise ProbeError(
                    f"--leave-out makes the outer folds, one for each value: leave --{name} out"
                )
        return self.leave_out

    def _check_untrained(self) -> None:
        """Raise ProbeError for settings of training, where there is none."""
        names = ("C", "folds", "shots", "seeds", "outer", "repeats", "leave_out", "control")
        for name in names:
            if getattr(self, name) is not None:
                raise ProbeError(
                    f"a zero-shot head is not trained: leave --{name.replace('_', '-')} out, or "
                    "take --head linear"
                )


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(Scoring):
    """How to probe, with nothing left open; ProbeOptions keeps feature, metric, strict_splits."""

    protocol: Protocol
    head: str
    C: tuple[float, ...]  # empty where the protocol's strengths depend on the size of a problem
    k: tuple[int, ...]
    temperature: float
    folds: int
    shots: tuple[int | None, ...]
    seeds: int  # draws of shots, or deals of outer folds
    outer: int | str | None  # None: the test split tests; a text is a column, each value a fold
    calibrate: str | None
    conformal: float | None
    exclude: tuple[str, ...]
    control: str  # "" for none
    uncertain: str
    device: str
    tol: float

    def _optional(self) -> dict[str, Any]:
        """Return what changes predictions only where it is asked for."""
        asked = {"outer": self.outer, "calibrate": self.calibrate, "exclude": list(self.exclude)}
        return {name: value for name, value in asked.items() if value}

    def strengths(self, features: Features, classes: Sequence[str]) -> tuple[float, ...]:
        """Return the C to try on features (N, D) of K classes."""
        return self.C or self.protocol.of_size(features.width, len(classes))

    def of_head(self, C: Sequence[float]) -> dict[str, Any]:
        """Return what changes the head beyond an Identity's own fields; C are those tried."""
        if self.head == "knn":
            tried: dict[str, Any] = {"k": list(self.k), "temperature": self.temperature}
        else:
            tried = {"C": list(C), "tol": self.tol}
        return tried | {"folds": self.folds} | self._optional()
