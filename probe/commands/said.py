"""What commands print of results: scores, draws, groups, calibration, a test on other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.console import echo
from probe.commands.finetune import about_labels, say_audit, say_notes, say_tuned, tested_in

if TYPE_CHECKING:
    from probe.results import Result

FEW = 1000  # images, of which --outer would test more
SHOWN = 12  # outputs whose calibration is printed


def say_results(results: Sequence[Result], out: Path, *, trained: bool) -> None:
    """Print the results of a store, and on standard error what its audit found."""
    seeds = len({result.seed for result in results}) > 1
    for result in results:
        if trained:
            say_tuned(result, out)
        else:
            say_result(result, out, several=len(results) > 1, seeds=seeds)
    if len(results) > 1 and not trained and results[0].heads:
        echo(f"  heads: in {(out / results[0].heads).parent.parent}")
    if len(results) > 1 and (ends := sum(bool(result.edge) for result in results)):
        name = "k" if results[0].head == "knn" else "C"
        echo(
            f"  {ends} of {len(results)} results have the smallest or the largest {name} that was "
            f"tried: others, by --{name}, may score higher",
            err=True,
        )
    say_draws(results)
    say_audit(results[0])
    say_outer(results[0])


def say_result(result: Result, out: Path, *, several: bool, seeds: bool = False) -> None:
    """Print a result in one line and where its head is, on standard error what must be known."""
    from probe.draw.tables import gained
    from probe.score.groups import uneven

    cell = [result.feature] if several and "columns" not in result.settings else []
    cell += [f"({result.identity.inputs})"] if "columns" in result.settings else []
    cell += [f"{result.shots} shots, seed {result.seed}"] if result.shots else []
    cell += [f"seed {result.seed}"] if result.outer and seeds else []
    chosen = f"C = {result.C:.3g}" if result.C else ""
    if (of_folds := result.outer.get("C")) and result.C:
        chosen += f" ({min(of_folds):.3g} to {max(of_folds):.3g} in the folds)"
    chosen = "nothing trained" if result.head == "zero-shot" else chosen
    for name, key in (("k", "chosen"), ("l2", "l2")):
        chosen = f"{name} = {result.folds[key]:g}" if key in result.folds else chosen
    echo(
        f"{' '.join([f'{result.dataset} x {result.backbone}', *cell])}: "
        f"{result.metric} {result.value:.3f} [{result.ci_low:.3f}, {result.ci_high:.3f}] "
        f"on {tested_in(result)}, {chosen}{about_labels(result)}"
    )
    if result.heads and not several:
        echo(f"  head: {out / result.heads}")
    say_notes(result)
    if result.edge and not several:
        echo(f"  {result.edge}", err=True)
    say_calibration(result)
    if control := result.control:
        echo(
            f"  with shuffled labels: {control['value']:.3f} "
            f"[{control['ci_low']:.3f}, {control['ci_high']:.3f}]"
        )
    if result.gain:
        echo(f"  {gained(result)}")
    if result.few:
        echo(f"  {result.few}", err=True)
    if result.ci_low == result.ci_high:
        echo(f"  {result.notes[-1]}", err=True)
    for group in result.subgroups:
        say_group(result.metric, group, subjects=result.subjects_known)
    if said := uneven(result.subgroups):
        echo(f"  {said}")
    if result.weights == "random":
        echo("  the backbone's weights are random: the score says nothing about it", err=True)
    if not result.converged:
        echo("  not every head converged: see the result's notes and folds", err=True)


def say_draws(results: Sequence[Result]) -> None:
    """Print mean and standard deviation over the seeds of each number of shots, where several."""
    from statistics import mean, stdev

    draws: dict[tuple[str, str], list[float]] = {}
    for result in results:
        what = f"{result.shots} shots" if result.shots else "outer folds" * bool(result.outer)
        read = result.identity.inputs if "columns" in result.settings else result.feature
        draws.setdefault((read, what), []).append(result.value)
    several = len({feature for feature, _ in draws}) > 1
    for (feature, what), values in draws.items():
        if len(values) > 1 and what:
            echo(
                f"  {f'{feature}, ' if several else ''}{what}: {results[0].metric} "
                f"{mean(values):.3f}, sd {stdev(values):.3f} over {len(values)} seeds"
            )


def say_outer(result: Result) -> None:
    """Say on standard error that more images could be tested, where few are and no split is given.

    FEW images: of more a fifth is enough to test, and folds take longer. It isn't the default: the
    numbers of one test split are what others compare with, and what `finetune` can be held against.
    """
    drawn = any(note.startswith("split: drawn") for note in result.notes)
    images = result.n_train + result.n_test
    if drawn and not result.outer and not result.shots and images < FEW and result.n_train:
        echo(
            f"  --outer 5 would test each of the {images} images once, and not {result.n_test} of "
            "them: the interval would be shorter",
            err=True,
        )


def say_calibration(result: Result) -> None:
    """Print how probabilities were recalibrated, and how often prediction sets hold the label."""
    found = result.calibration
    if "method" in found:
        words = []
        for name, title in (("log_loss", "log-loss"), ("ece", "calibration error")):
            was, now = (found[when][name]["value"] for when in ("before", "after"))
            words.append(f"{title} {was:.3f}, now {now:.3f}")
        T = f" {found['temperature']:.3g}" if found.get("temperature") else ""
        echo(f"  recalibrated by {found['method']}{T}: {', '.join(words)}")
    if sets := result.conformal:
        held = sets["coverage"]
        echo(
            f"  sets for {sets['level']:.0%}: hold the label of {held['value']:.3f} "
            f"[{held['ci_low']:.3f}, {held['ci_high']:.3f}] of the images, {sets['size']:.2f} "
            f"classes each"
        )


def say_group(metric: str, group: dict[str, Any], *, subjects: bool) -> None:
    """Print the metric of one group."""
    low, high = group["ci_low"], group["ci_high"]
    score = "not defined"
    if group["value"] is not None:
        score = f"{group['value']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
    echo(
        f"  {group['column']} {group['group']}: {metric} {score}, n = {group['n']}"
        + (f", {group['subjects']} subjects" if subjects else "")
        + (" (few)" if group["small"] else "")
    )


def say_external(result: Result) -> None:
    """Print a test on other data: its score, the drop, thresholds, calibration; notes to stderr."""
    said = result.external
    echo(
        f"{result.dataset} x {result.backbone}, trained on {result.trained_on}: {result.metric} "
        f"{_three(vars(result))} on {result.n_test} images"
        + (f" of {result.n_subjects_test} subjects" if result.subjects_known else "")
    )
    if drop := said.get("drop", {}).get(result.metric):
        echo(
            f"  drop from {result.trained_on}: {_number(drop['home'])} less "
            f"{_number(drop['here'])} is {_three(drop)}"
        )
    for name, t in (result.thresholds.get("outputs") or {}).items():
        rates = [
            f"{rate} {_three(t[rate])}" for rate in ("sensitivity", "specificity") if rate in t
        ]
        echo(f"  {name} at the head's threshold {t['threshold']:.3g}: {', '.join(rates)}")
    for name, c in list(said["calibration"].items())[:SHOWN]:
        echo(
            f"  {name}: {c['observed']:.0f} there, {c['expected']:.1f} expected: ratio "
            f"{_three(c['ratio'])}, calibration intercept {_three(c['intercept'])}"
        )
    if (rest := len(said["calibration"]) - SHOWN) > 0:
        echo(f"  and {rest} more, in the result's line")
    losses = [name for name in ("log_loss", "brier", "ece") if name in said["recalibrated"]]
    echo(
        "  by intercepts fitted here: "
        + ", ".join(
            f"{name} {_number(result.metrics[name]['value'])} -> "
            f"{_number(said['recalibrated'][name])}"
            for name in losses
        )
    )
    for group in result.subgroups:
        say_group(result.metric, group, subjects=result.subjects_known)
    if "drop" not in said:
        echo(f"  no drop: {said['drop_method'].removeprefix('none: ')}", err=True)
    if line := result.audit.get("line"):
        ids = said["shared"].get("ids", [])
        more = ", ..." if len(ids) > 3 else ""
        echo(f"  {line}" + (f": {', '.join(ids[:3])}{more}" if ids else ""), err=True)
    at_home = said["shared"].get("tested_on", {})
    if any(at_home.values()):
        echo(
            f"  {at_home.get('images_of_subjects', 0)} images are of subjects, and "
            f"{at_home['files']} of bytes, that the head was tested on at home: the drop's "
            "interval takes both tests as independent",
            err=True,
        )
    for note in result.notes:
        echo(f"  {note}", err=True)


def _three(score: dict[str, Any]) -> str:
    low, high = score.get("ci_low"), score.get("ci_high")
    ends = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    return f"{_number(score.get('value'))}{ends}"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
