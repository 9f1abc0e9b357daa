"""The cells that the options of `medprobe run` ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from features.arguments import (
    extraction_of,
    options_of,
    say_random,
)
from features.console import (
    echo,
)
from features.parsing import parse_fit, parse_normalize, weights_of
from probe.commands.config import tables_of
from probe.commands.settings import probing_of, refuse_seeds, seeds_of, training_of

if TYPE_CHECKING:
    from probe.cells import Cell


SCENARIOS = ["frozen-linear", "frozen-deit", "unfrozen-linear", "unfrozen-deit"]
# What the study's protocol sets, where nothing else is said. In the loop every epoch augments anew;
# heads on stored features get as many views instead.
STUDY = {"image_size": 224, "fit": "squash:256"}  # params.json: Resize (256, 256), CenterCrop 224
STUDY |= {"init": "random", "epochs": 100, "lr": 1e-4, "weight_decay": 1e-5}
STUDY |= {"schedule": "constant", "batch_size": 64, "clip": 1.0, "layer_decay": 1.0, "views": 4}


def cells_of(given: dict[str, Any]) -> list[Cell]:
    """Return the cells of a command's arguments: by data set, then backbone, then scenario."""
    from features.datasets import open_dataset
    from features.devices import resolve_device
    from probe.cells import digest_of

    if given["protocol"] == "study":
        study = STUDY | ({"mixed": "fp16"} if resolve_device(given["device"]) == "cuda" else {})
        given = given | {k: v for k, v in study.items() if _is_default(k)}
    backbones, weights = weights_of(given["backbones"], given["weights"])
    say_random(weights)
    named: dict[str, Any] = {}
    cells = []
    for place, dataset in enumerate(given["datasets"]):
        before = given["datasets"][:place].count(dataset)
        mine = given | _of_dataset(dataset, before, given)
        read = (dataset, options_of(mine))
        manifest = open_dataset(*read)
        other = named.setdefault(manifest.dataset, read)
        if other != read:
            raise click.UsageError(
                f"{other[0]} and {dataset} are both called {manifest.dataset}: "
                "give one a `name` of its own, in a table of CONFIG"
            )
        rows = digest_of(manifest)
        for backbone in backbones:
            for scenario in given["scenarios"] or SCENARIOS:
                cells += [
                    kind(
                        manifest=manifest,
                        rows=rows,
                        backbone=backbone,
                        scenario=scenario,
                        extraction=extraction_of(mine),
                        features=given["stores"],
                        out=given["out"],
                        weights=weights[backbone],
                        image_size=given["image_size"],
                        fit=parse_fit(given["fit"]),
                        normalize=parse_normalize(mine["normalize"], manifest),
                        **heads,
                    )
                    for kind, heads in _heads(scenario, mine)
                ]
    return cells


def _of_dataset(dataset: str, before: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return what holds for one data set: by the file, or by the study's protocol.

    The file may have several tables with one source; `before` of them were asked for.
    The study's is the data set's own mean and std, and the study's split of it, where there are.
    """
    from features.datasets import SOURCES

    tables = click.get_current_context().meta.get(tables_of(dataset), [])
    told: dict[str, Any] = tables[before] if before < len(tables) else {}
    source = SOURCES.get(dataset.partition(":")[0])
    if given["protocol"] != "study" or source is None:
        return told
    own = {"normalize": "dataset", "split": "study"} if "study" in source.splits else {}
    if not own:
        echo(
            f"{dataset} has no statistics or split of the study: the backbone's own normalisation "
            "and the data set's split are taken",
            err=True,
        )
    return {name: value for name, value in own.items() if _is_default(name)} | told


def _heads(scenario: str, given: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Return the kind of a scenario's cells and the settings of their heads.

    There are several in unfrozen scenarios: one for each depth that is asked.
    """
    from probe.cells import ProbeCell, TrainCell

    study = given["protocol"] == "study"
    if scenario == "frozen-linear" and not study:
        probing = probing_of(given, protocol=given["protocol"])
        if {*given["scenarios"]} == {"frozen-linear"}:  # other scenarios run once per seed
            refuse_seeds(probing)
        return [(ProbeCell, {"probing": probing})]
    kept = {"protocol": "study" if study else "finetune", "head": scenario.split("-")[1]}
    depths: list[dict[str, Any]] = [{"unfreeze": "none", "init": "random"}]
    if scenario.startswith("unfrozen"):
        depths = [
            {"unfreeze": unfreeze, "drop_last": drop, "init": given["init"]}
            for unfreeze in given["unfreeze"].split(",")
            for drop in _numbers(given["drop_last"])
        ]
    runs = [
        tuple(training_of(given, seed, **kept, **depth) for seed in seeds_of(given))
        for depth in depths
    ]
    return [(TrainCell, {"runs": one}) for one in runs]


def _numbers(text: str) -> list[int]:
    parts = str(text).split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise click.BadParameter(
            f"{text!r}: want whole numbers with commas between them", param_hint="--drop-last"
        )
    return [int(part) for part in parts]


def _is_default(name: str) -> bool:
    """Say whether neither the command line nor a file gave an option."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.DEFAULT
