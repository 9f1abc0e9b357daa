"""What commands print of a result: groups of its test images, and a test on other data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from features.console import echo

if TYPE_CHECKING:
    from probe.results import Result

SHOWN = 12  # outputs whose calibration is printed


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
