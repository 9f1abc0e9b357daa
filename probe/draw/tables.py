"""Say results in words and digits, and tables as CSV, Markdown and LaTeX.

A cell of a table is a text, a number, None or a Scored. CSV has numbers in full, a Scored in three
columns and a fourth for its mark; Markdown and LaTeX have what one reads.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from probe.draw.drawing import printable
from probe.results import Result
from probe.spreadsheet import inert

CAPITALS = {"auc": "AUC", "auroc": "AUROC", "roc": "ROC", "ap": "AP", "f1": "F1", "mcc": "MCC"}
SAID = {  # metrics that are not said as they are written
    "auroc_ovo": "one-vs-one AUROC",
    "brier": "Brier score",
    "ece": "calibration error",
    "f1": "F1",
    "f1_macro": "macro F1",
    "kappa": "Cohen's kappa",
    "sensitivity_at_90": "sensitivity at 90 % specificity",
}
LOSSES = ("log_loss", "brier", "ece")
# results.csv holds every field but these; every other metric follows with three columns.
NOT_IN_CSV = {
    *("metrics", "folds", "task", "classes", "predictions", "heads"),
    *("outputs", "reliability", "subgroups", "thresholds", "audit", "control", "history"),
    *("external", "gain", "outer", "calibration", "conformal"),
}
LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",  # noqa: RUF001
    "–": "--",  # noqa: RUF001
    "×": r"$\times$",  # noqa: RUF001
    "·": r"$\cdot$",
}


@dataclass(frozen=True)
class Scored:
    """A score with its interval, and "best", "tied" (can't be told from the best) or ""."""

    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = ""

    def __str__(self) -> str:
        """Return it as in print: .612 [.514, .703]."""
        return f"{score(self.value)} {interval(self.low, self.high)}".strip()


@dataclass(frozen=True)
class Table:
    """One table: `name` of its files, what it says, and its cells, row by row."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def numeric(self, j: int) -> bool:
        """Say whether a column holds numbers, and so stands to the right."""
        cells = [row[j] for row in self.rows if row[j] is not None]
        return bool(cells) and all(isinstance(c, int | float | Scored) for c in cells)

    def csv(self) -> str:
        """Return it as CSV, numbers in full; no cell is a formula to a spreadsheet."""
        scored = {j for row in self.rows for j, cell in enumerate(row) if isinstance(cell, Scored)}
        marked = {j for row in self.rows for j in scored if getattr(row[j], "mark", "")}

        def ends(j: int) -> tuple[str, ...]:
            more = (" ci_low", " ci_high") if j in scored else ()
            return ("", *more, *((" mark",) if j in marked else ()))

        file = io.StringIO()
        writer = csv.writer(file)
        header = [f"{name}{end}" for j, name in enumerate(self.columns) for end in ends(j)]
        writer.writerow([inert(name) for name in header])
        for row in self.rows:
            cells: list[Any] = []
            for j, cell in enumerate(row):
                parts = (cell,) if j not in scored else _parts(cell)
                cells += [inert(part) for part in parts[: len(ends(j))]]
            writer.writerow(cells)
        return file.getvalue()

    def markdown(self) -> str:
        """Return it as a Markdown table under its caption."""
        header = " | ".join(map(in_markdown, self.columns))
        rule = " | ".join("---:" if self.numeric(j) else "---" for j in range(len(self.columns)))
        rows = [" | ".join(_bold(cell) for cell in row) for row in self.rows]
        lines = [in_markdown(self.caption), "", *(f"| {r} |" for r in (header, rule, *rows))]
        return "\n".join(lines) + "\n"

    def latex(self) -> str:
        """Return it as a LaTeX table in the manner of booktabs, best in bold, tied in italics."""
        sides = "".join("r" if self.numeric(j) else "l" for j in range(len(self.columns)))
        marks = {"best": r"\textbf{%s}", "tied": r"\textit{%s}"}
        rows = [
            [marks.get(getattr(cell, "mark", ""), "%s") % in_latex(in_text(cell)) for cell in row]
            for row in self.rows
        ]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{in_latex(self.caption)}}}",
            rf"\begin{{tabular}}{{{sides}}}",
            r"\toprule",
            " & ".join(map(in_latex, self.columns)) + r" \\",
            r"\midrule",
            *(" & ".join(row) + r" \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def in_text(cell: object) -> str:
    """Return a cell as one reads it."""
    if cell is None:
        return "–"  # noqa: RUF001
    return score(cell) if isinstance(cell, float) else printable(str(cell))


def in_latex(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(LATEX.get(c, c) for c in printable(text))


def p_value(p: float | None) -> str:
    """Return a p as in print: p = .03, p < .001."""
    if p is None:
        return ""
    digits = f"{p:.2f}" if p >= 0.095 else f"{p:.3f}" if p >= 0.0095 else f"{p:.4f}"
    return "p < .001" if p < 0.001 else f"p = {digits.rstrip('0').rstrip('.').removeprefix('0')}"


def _parts(cell: Any) -> tuple[Any, ...]:
    if isinstance(cell, Scored):
        return (cell.value, cell.low, cell.high, cell.mark)
    return ("", "", "", "") if cell is None else (cell, "", "", "")


def _bold(cell: object) -> str:
    text = in_markdown(in_text(cell))
    return {"best": f"**{text}**", "tied": f"*{text}*"}.get(getattr(cell, "mark", ""), text)


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
    if name in SAID:
        return SAID[name]
    return " ".join(CAPITALS.get(word.lower(), word) for word in name.replace("_", " ").split())


def gained(result: Result) -> str:
    """Say what the image adds to columns alone, with interval and p; "" where that isn't known."""
    g = result.gain
    if not g:
        return ""
    less = ", less is better" if result.metric in LOSSES else ""
    return (
        f"the image adds {signed(g['value'])} {interval(g['ci_low'], g['ci_high'])} to the "
        f"{in_words(result.metric)} of {g['over']} alone, {score(g['alone'])} ({p_value(g['p'])}, "
        f"{g['test']}{less})"
    )


def signed(value: float | None) -> str:
    """Return a difference as in print, with its sign: +.034, -.012."""
    return f"+{score(value)}" if value is not None and value > 0 else score(value)


def csv_table(results: Sequence[Result]) -> str:
    """Return results as CSV, numbers in full.

    A text that a spreadsheet would run as a formula gets an apostrophe in front.
    """
    columns = [field.name for field in fields(Result) if field.name not in NOT_IN_CSV]
    names = sorted({name for result in results for name in result.metrics})
    header = columns + [f"{name}{end}" for name in names for end in ("", "_ci_low", "_ci_high")]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(inert(name) for name in header)
    for result in results:
        row = asdict(result) | {"notes": "; ".join(result.notes)}
        row = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()}
        rest = [
            result.metrics.get(name, {}).get(key)
            for name in names
            for key in ("value", "ci_low", "ci_high")
        ]
        writer.writerow([*(inert(row[name]) for name in columns), *rest])
    return file.getvalue()


def in_markdown(text: object) -> str:
    """Return text that Markdown shows as it is, on one line, within a table cell."""
    plain = printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"([\\`*\[\]|~$])", r"\\\1", plain)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", plain)
