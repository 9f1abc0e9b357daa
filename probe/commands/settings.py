"""What options of probing, scoring and training mean: settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from probe import elsewhere, probing
    from probe.train import finetune
    from probe.zero_shot import Asked


# Options that training.Training, and an appended DeiT, have under the same names.
LOOP = (
    *("epochs", "batch_size", "accumulate", "checkpointing", "lr", "weight_decay", "warmup"),
    *("schedule", "clip", "layer_decay", "patience", "balance", "mixed"),
)
DEIT = ("head_size", "head_weights")


def scoring_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the scoring options but the seeds, by the names of Scoring and of settings."""
    names = ("metric", "uncertain", "bootstrap", "interval", "by", "aggregate", "unit", "threshold")
    if given["unit"] != "subject" and given["aggregate"] is None:
        raise click.UsageError(
            f"--unit {given['unit']} joins nothing: give --aggregate mean or max"
        )
    return {name: given[name] for name in (*names, "strict_splits")}


def probing_of(given: dict[str, Any], **more: Any) -> probing.ProbeOptions:
    """Return what to probe, and how."""
    from features.devices import resolve_device
    from probe.probing import ProbeOptions

    names = (
        "feature",
        "temperature",
        "folds",
        "repeats",
        "calibrate",
        "conformal",
        "control",
        "seeds",
        "seed",
    )
    more |= {"leave_out": given.get("leave_out"), "exclude": parse_exclude(given.get("exclude"))}
    return ProbeOptions(
        C=parse_strengths(given["strengths"]),
        k=parse_counts(given["neighbours"], "--k"),
        shots=parse_shots(given["shots"]),
        outer=parse_outer(given["outer"]),
        device=resolve_device(given["device"]),
        **{name: given[name] for name in names},
        **scoring_of(given),
        **more,
    )


def external_of(given: dict[str, Any]) -> elsewhere.ExternalOptions:
    """Return how a head is tested on other data, of a command's options."""
    from probe.elsewhere import ExternalOptions

    if given["unit"] != "subject" and given["aggregate"] is None:
        raise click.UsageError(
            f"--unit {given['unit']} joins nothing: give --aggregate mean or max"
        )
    same = ("metric", "uncertain", "bootstrap", "interval", "by", "aggregate", "unit", "seed")
    return ExternalOptions(
        **{name: given[name] for name in same},
        part=given.get("part", "all"),
        names=parse_classes(given["names"]),
        home=given.get("home"),
        leave_shared_out=given["leave_shared_out"],
    )


def prompts_of(given: dict[str, Any]) -> Asked | None:
    """Return what a zero-shot head is made of; None for others. Raises UsageError."""
    from probe.zero_shot import HEAD, Asked

    if HEAD not in (given["head"], given["protocol"]):
        for name in ("prompts", "weights"):
            if given[name] is not None:
                raise click.UsageError(
                    f"--{name} goes with --head zero-shot: give that, or leave it out"
                )
        return None
    if given["prompts"] is None:
        raise click.UsageError(
            "--head zero-shot wants --prompts FILE: a line `class: prompt` for every class"
        )
    return Asked(given["prompts"], given["weights"])


def training_of(given: dict[str, Any], seed: int, **more: Any) -> finetune.TrainSettings:
    """Return what to train, and how, with one seed."""
    from features.devices import resolve_device
    from probe.train.finetune import TrainSettings
    from probe.train.training import Training

    training = Training(
        **{name: given[name] for name in LOOP},
        augment=not given["no_augment"],
        tensorboard=str(given["tensorboard"]) if given["tensorboard"] else None,
        device=resolve_device(given["device"]),
        seed=seed,
    )
    rest = {name: given[name] for name in DEIT} | scoring_of(given)
    rest["outer"] = parse_outer(given["outer"])
    return TrainSettings(**rest, **more, seed=seed, training=training)


def seeds_of(given: dict[str, Any]) -> range:
    """Return the seeds of runs."""
    return range(given["seed"], given["seed"] + (given["seeds"] or 1))


def refuse_seeds(settings: probing.ProbeOptions) -> None:
    """Raise UsageError where --seeds asks for draws, and there is nothing to draw."""
    if settings.seeds is not None and settings.resolve().shots == (None,):
        raise click.UsageError(
            "--seeds draws training images, and all are taken: give --shots, such as --shots 1,4, "
            "or leave --seeds out (--seed deals the folds)"
        )


def parse_strengths(text: str | None) -> tuple[float, ...] | None:
    """Return the values of --C."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < v < float("inf") for v in values):
        raise click.BadParameter(
            f"{text!r}: want positive numbers with commas between them", param_hint="--C"
        )
    return values


def parse_counts(text: str | None, option: str) -> tuple[int, ...] | None:
    """Return the values of --k: whole numbers from 1 on."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(
            f"{text!r}: want whole numbers from 1 on with commas between them", param_hint=option
        )
    return tuple(dict.fromkeys(int(part) for part in parts))


def parse_columns(text: str | None) -> tuple[str, ...]:
    """Return the values of --with: names with commas between them."""
    if text is None:
        return ()
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(names):
        raise click.BadParameter(
            f"{text!r}: want columns with commas between them, such as age,sex", param_hint="--with"
        )
    return names


def parse_outer(text: str | None) -> int | str | None:
    """Return the value of --outer."""
    if text is None or text == "subject":
        return text
    if not text.isdecimal() or int(text) < 2:
        raise click.BadParameter(
            f"{text!r}: want a number of folds, 2 or more, or subject", param_hint="--outer"
        )
    return int(text)


def parse_exclude(words: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the values of --exclude, each COLUMN=VALUE."""
    for word in words or ():
        if not word.partition("=")[0] or "=" not in word:
            raise click.BadParameter(f"{word!r}: want COLUMN=VALUE", param_hint="--exclude")
    return tuple(words or ())


def parse_classes(words: Sequence[str]) -> dict[str, str]:
    """Return the values of --class, class of the data -> head's."""
    found = {}
    for word in words:
        theirs, equals, ours = word.partition("=")
        if not (theirs and equals and ours):
            raise click.BadParameter(f"{word!r}: want THEIRS=HEAD'S", param_hint="--class")
        found[theirs] = ours
    return found


def parse_shots(text: str | None) -> tuple[int | None, ...] | None:
    """Return the values of --shots, None for all."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    few = parse_counts(",".join(p for p in parts if p != "all") or None, "--shots") or ()
    return (*few, None) if "all" in parts else few
