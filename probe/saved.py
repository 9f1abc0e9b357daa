"""Saved heads: find the one that is meant, read what it says of itself, apply it to rows.

A head is heads.json of the sweep or run.json of training, each with its tensors beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.errors import ProbeError
from features.files import meant
from features.schema import check, fault, read_json
from features.store import FeatureStore
from probe.heads import Head
from probe.results import Result, folder_above, load
from probe.schema import Applied
from probe.score import log_odds
from probe.train import checkpoints, testing
from probe.train.finetune import TrainSettings, build_head
from probe.train.training import Training

RESULTS = "results.jsonl"
LISTED = 20  # heads that an error names
ROWS = 256  # whose features are read at once


def find_head(path: Path, store: Path | None = None) -> Path:
    """Return the heads.json or run.json that is meant: a file, its folder, or a results folder.

    A folder within a results folder stands for the results in it. Of several heads, those count
    that were fitted on the backbone of the store, if one is given. Raises ProbeError where not
    exactly one is left; it names them.
    """
    if not path.exists():
        raise ProbeError(
            f"there is no {path}{meant(path)}: want a saved head, its folder, or a folder of "
            "results"
        )
    if not path.is_dir() and path.name != RESULTS:
        return path
    folder = path if path.is_dir() else path.parent
    for name in ("heads.json", "run.json"):
        if path.is_dir() and (folder / name).is_file():
            return folder / name
    if (folder / "predictions.csv").is_file():
        raise ProbeError(
            f"{path} is a result without a saved head: nearest neighbours have none; probe with a "
            "linear head"
        )
    inside = folder if (folder / RESULTS).is_file() else folder_above(folder)
    if inside is None:
        raise ProbeError(
            f"{path} has no heads.json, run.json or {RESULTS}: want a saved head, its folder, or "
            "the folder of results that `medprobe probe -o` names"
        )
    within, folder = folder, inside
    heads = {
        r.heads: r
        for r in load(folder)
        if r.heads and (folder / r.heads).is_file() and (folder / r.heads).is_relative_to(within)
    }
    if store is not None and len(heads) > 1:
        with FeatureStore.open(store) as opened:
            made = opened.fingerprint["backbone"]
        heads = {
            head: r for head, r in heads.items() if read(folder / head)["backbone"] == made
        } or heads
    if len(heads) == 1:
        return folder / next(iter(heads))
    some = [f"\n  {folder / head}  ({_about(r)})" for head, r in list(heads.items())[:LISTED]]
    more = (
        f"\n  and {len(heads) - LISTED} more: see {folder / RESULTS}"
        if heads and (len(heads) > LISTED)
        else ""
    )
    raise ProbeError(
        f"{path} has {len(heads)} heads: give one of{''.join(some)}{more}"
        if heads
        else f"{path} has no saved head: nearest neighbours have none; probe with a linear head"
    )


def _about(r: Result) -> str:
    """Say in a few words which result a head is of."""
    words = [f"{r.dataset} x {r.backbone}", f"labels {r.label_from}" * bool(r.label_from)]
    words += [f"{r.shots} shots, seed {r.seed}" if r.shots else "", f"{r.metric} {r.value:.3f}"]
    return ", ".join(word for word in words if word)


def read(path: Path) -> dict[str, Any]:
    """Return what a heads.json or run.json says. Raises ProbeError for another file."""
    try:
        about: dict[str, Any] = read_json(path.with_suffix(".json"), Applied)
    except (OSError, ValueError) as error:
        raise ProbeError(
            f"{path} is not a saved head ({error}); want heads.json, or run.json of a training run"
        ) from None
    return about


def row_of(path: Path, scored_by: str = "image") -> tuple[Path, Result] | None:
    """Return the results folder that a head lies in, and its row there; None where there is none.

    Of several rows of one head the one that was scored per `scored_by`, if any.
    """
    folder = folder_above(path)
    if folder is None:
        return None
    inside = path.with_suffix(".json").relative_to(folder).as_posix()
    rows = [r for r in load(folder) if r.heads == inside]
    rows.sort(key=lambda r: r.scored_by == scored_by)
    return (folder, rows[-1]) if rows else None


def check_suits(path: Path, about: Mapping[str, Any], store: FeatureStore) -> None:
    """Raise ProbeError for a store of another backbone than the head's, or without its feature."""
    made, wanted = store.fingerprint["backbone"], about["backbone"]
    differ = [f"{k}: {made.get(k)}, want {wanted[k]}" for k in wanted if made.get(k) != wanted[k]]
    if differ:
        raise ProbeError(f"{store.path} doesn't suit the head {path}: {'; '.join(differ)}")
    if about["feature"] not in store.features:
        raise ProbeError(
            f"{store.path} holds no {about['feature']}, which the head reads: "
            f"found {', '.join(store.features)}"
        )


@dataclass(frozen=True)
class Reader:
    """Rows of a feature, read in batches; which of them were whole, damaged, unlike others."""

    store: FeatureStore
    feature: str
    rows: NDArray[np.int64]
    whole: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    unlike: dict[int, float] = field(default_factory=dict)  # row -> minus how far it is off

    @property
    def shape(self) -> tuple[int, ...]:
        """Return that of a row."""
        return self.store.features[self.feature]

    def batches(self) -> Iterator[Tensor]:
        """Yield float32 (n, ...) of the rows that are whole."""
        for i in range(0, len(self.rows), ROWS):
            rows = self.rows[i : i + ROWS]
            values, wrong = self.store.examine(self.feature, rows)
            good = ~np.isin(rows, wrong)
            self.whole.extend(rows[good].tolist())
            self.damaged.extend(wrong.tolist())
            yield torch.from_numpy(values[good].astype(np.float32))


def apply(path: Path, about: Mapping[str, Any], reader: Reader) -> NDArray[np.float64]:
    """Return a head's log-odds of a reader's rows that are whole, (n, K).

    about is what `read` returned. Raises ProbeError for features of another shape than the head's.
    """
    said = _trained if about["format"] == testing.FORMAT else _solved
    return said(path, about, reader)


def _solved(path: Path, about: Mapping[str, Any], reader: Reader) -> NDArray[np.float64]:
    """Return a linear head's log-odds, (n, K)."""
    head, _ = Head.load(path)
    if reader.shape != head.coef.shape[1:]:
        raise ProbeError(
            f"{path} takes {head.coef.shape[1]} numbers of {reader.feature}: "
            f"the store's are of shape {reader.shape}"
        )
    parts = []
    for x in reader.batches():
        parts.append(head.log_odds(x))
        if head.seen:
            rows = reader.whole[len(reader.whole) - len(x) :]
            far = zip(rows, head.seen.beyond(x).tolist(), strict=True)
            reader.unlike.update({row: -times for row, times in far if times > 1})
    z: NDArray[np.float64] = torch.cat(parts).numpy()
    return z


@torch.no_grad()
def _trained(path: Path, about: Mapping[str, Any], reader: Reader) -> NDArray[np.float64]:
    """Return a trained head's log-odds, (n, K)."""
    given = dict(about.get("settings", {}))
    try:
        check(given, TrainSettings, "settings")
        training = Training(**given.get("training", {}))
        settings = TrainSettings(**given | {"by": (), "training": training})
        if settings.head not in ("linear", "deit"):
            raise fault("settings.head", settings.head, "'linear' or 'deit'")
        if len(reader.shape) != (1 if settings.head == "linear" else 2):
            raise ValueError(f"{about['feature']} is of shape {reader.shape}")
        head = build_head(settings, reader.shape, len(about["classes"]), weights="random").eval()
        state = checkpoints.load_best(path.parent / checkpoints.FOLDER)
        mine = {k.removeprefix("head."): v for k, v in state.items() if not k.startswith("trunk.")}
        head.load_state_dict(mine if any(k.startswith("trunk.") for k in state) else state)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ProbeError(f"{path} doesn't fit its checkpoint ({reason}): copy both again") from None
    logits = [head(x).double() for x in reader.batches()]
    kind = "softmax" if about["task"] == "multiclass" else "sigmoid"
    z: NDArray[np.float64] = log_odds.of_logits(torch.cat(logits), kind).numpy()
    return z
