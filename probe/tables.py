"""Say results in words and digits: scores, intervals, names, and the rows of results.csv."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from probe.drawing import printable
from probe.results import Result

CAPITALS = {"auc": "AUC", "auroc": "AUROC", "roc": "ROC", "ap": "AP", "f1": "F1", "mcc": "MCC"}
FORMULA = tuple("=+-@\t\r＝＋－＠")  # noqa: RUF001 (what a spreadsheet takes for a formula's start)
# results.csv holds every field but these; every other metric follows with three columns.
NOT_IN_CSV = {
    *("metrics", "folds", "task", "classes", "predictions", "heads"),
    *("outputs", "reliability", "subgroups", "thresholds", "audit", "control"),
}


def score(value: float | None) -> str:
    """Return a score with three decimals: .612, −.034, 1.000; a dash where it is undefined."""
    if value is None or not np.isfinite(value):
        return "–"  # noqa: RUF001
    digits = f"{abs(value):.3f}"
    sign = "−" if value < 0 and float(digits) else ""  # noqa: RUF001
    return sign + digits.removeprefix("0" if digits.startswith("0.") else "")


def interval(low: float | None, high: float | None) -> str:
    """Return an interval as [.514, .703]; nothing where it is undefined."""
    return "" if low is None or high is None else f"[{score(low)}, {score(high)}]"


def power(C: float | None) -> str:
    """Return a strength in short form: 10⁻³, 0.316, 1, 3.16 × 10⁻⁶."""
    if C is None:
        return "–"  # noqa: RUF001
    if not (C > 0 and math.isfinite(C)):
        return str(C)
    digits = f"{C:.2e}"
    mantissa, exponent = digits.split("e")
    raised = "10" + "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(d)] if d != "-" else "⁻" for d in str(int(exponent)))
    if float(mantissa) == 1:
        return f"{C:.3g}" if abs(int(exponent)) < 3 else raised
    if -3 < int(exponent) < 4:
        return f"{float(digits):.10g}"
    return f"{float(mantissa):g} × {raised}"  # noqa: RUF001


def in_words(name: str) -> str:
    """Return a metric's name as one says it: "quadratic kappa", "mean AUROC"."""
    return " ".join(CAPITALS.get(word.lower(), word) for word in name.replace("_", " ").split())


def csv_table(results: Sequence[Result]) -> str:
    """Return results as CSV, numbers in full.

    A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    columns = [field.name for field in fields(Result) if field.name not in NOT_IN_CSV]
    names = sorted({name for result in results for name in result.metrics})
    header = columns + [f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(_inert(name) for name in header)
    for result in results:
        row = {
            **asdict(result),
            "notes": "; ".join(result.notes),
            "versions": json.dumps(result.versions),
        }
        rest = [
            result.metrics.get(name, {}).get(key)
            for name in names
            for key in ("value", "ci_low", "ci_high")
        ]
        writer.writerow([*(_inert(row[name]) for name in columns), *rest])
    return file.getvalue()


def in_markdown(text: object) -> str:
    """Return text that Markdown shows as it is, on one line, within a table cell."""
    plain = printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"([\\`*\[\]|~$])", r"\\\1", plain)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)


def _inert(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
