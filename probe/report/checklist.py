"""A checklist for the paper: what TRIPOD+AI and CLAIM ask, filled in where the results know it.

Headings are those of TRIPOD+AI (Collins et al. 2024, BMJ 385:e078378) and of CLAIM (Tejani et al.
2024, Radiology: Artificial Intelligence); item numbers are in the papers. What only the authors
know is left open.
"""

from __future__ import annotations

from collections.abc import Sequence

from probe.draw.tables import interval, score
from probe.report.verdict import Column
from probe.results import Result

OPEN = "…"


def checklist(columns: Sequence[Column]) -> str:
    """Return the checklist of each column's best result, as Markdown."""
    lines = [
        "# Reporting checklist",
        "",
        "Items of TRIPOD+AI (2024) and CLAIM (2024) that the results can fill in; `…` is for you.",
        "Not all items of either list stand here: those about title, abstract, funding and ethics",
        "don't.",
    ]
    for column in columns:
        lines += ["", f"## {_cell(column.dataset)}: {_cell(column.best.entry.model)}", ""]
        lines += ["| item (TRIPOD+AI) | section of CLAIM | from the results |", "|---|---|---|"]
        lines += [
            f"| {item} | {section} | {_cell(said)} |" for item, section, said in _items(column)
        ]
    return "\n".join(lines) + "\n"


def _items(column: Column) -> list[tuple[str, str, str]]:
    r = column.shown
    metrics = {r.metric: f"{r.metric} {score(r.value)} {interval(r.ci_low, r.ci_high)}"}
    for name, m in sorted(r.metrics.items()):
        if m.get("value") is not None:
            said = f"{name} {score(m['value'])} {interval(m.get('ci_low'), m.get('ci_high'))}"
            metrics.setdefault(name, said)
    return [
        ("Data: source, dates", "Data", f"{r.dataset}; {OPEN}"),
        ("Participants: setting, eligibility", "Data", OPEN),
        ("Participants: images, subjects", "Data", _size(r)),
        ("Missing data", "Data", f"{r.n_bad} images could not be read; {OPEN}"),
        ("Outcome", "Reference standard", _outcome(r)),
        ("Data preparation, predictors", "Data; model", _preparation(r)),
        ("Sample size", "Data", OPEN),
        ("Training versus evaluation", "Data partitions", _split(r)),
        ("Leaks between the parts", "Data partitions", str(r.audit.get("line", OPEN))),
        ("Model specification", "Model", _model(r)),
        ("Analytical methods: training, choice", "Training", _training(r)),
        ("Class imbalance", "Training", OPEN),
        ("Analytical methods: intervals", "Evaluation", r.interval),
        ("Model performance", "Results", "; ".join(metrics.values())),
        ("Model performance: calibration", "Evaluation", _calibration(r)),
        ("Model output: thresholds", "Evaluation", _thresholds(r)),
        ("Fairness: performance by group", "Results", _groups(r)),
        ("Comparison of models", "Evaluation", column.corrected or OPEN),
        ("Evaluation on other data", "Evaluation", OPEN),
        ("Failures", "Results", f"the surest mistakes stand in the report; {OPEN}"),
        ("Open science: code, model, data", "Other information", _available(r)),
        ("Limitations, usability", "Discussion", OPEN),
    ]


def _size(r: Result) -> str:
    subjects = f" of {r.n_subjects_test} subjects" if r.subjects_known else "; subjects not known"
    return f"{r.n_train} trained on; {r.tested}{subjects}"


def _outcome(r: Result) -> str:
    column = f"column {r.label_from}; " if r.label_from else ""
    positive = f"; {r.positive} is positive" if r.positive else ""
    return f"{column}{', '.join(r.classes)}{positive}; {OPEN}"


def _preparation(r: Result) -> str:
    image = r.extraction.get("image") if r.extraction else None
    return f"{r.feature} of {r.backbone}; {image}" if image else f"{r.feature} of {r.backbone}"


def _split(r: Result) -> str:
    return next((note for note in r.notes if note.startswith("split: ")), OPEN)


def _model(r: Result) -> str:
    return f"{r.backbone}, {r.weights} weights; {r.scenario}; {r.head} head"


def _training(r: Result) -> str:
    chosen = f"C = {r.C:.3g}" if r.C else ""
    kind = r.folds.get("kind", "")
    return "; ".join(word for word in (f"protocol {r.protocol}", str(kind), chosen) if word)


def _calibration(r: Result) -> str:
    scores = r.calibration.get("after") or r.calibration.get("scores") or {}
    said = [
        f"{name.replace('_', ' ')} {m['value']:.2f}"
        for name, m in scores.items()
        if m.get("value") is not None
    ]
    return "; ".join(said) or OPEN


def _thresholds(r: Result) -> str:
    found = r.thresholds.get("outputs") or {}
    if not found:
        return OPEN
    return f"{r.thresholds.get('rule')}, chosen on {r.thresholds.get('chosen_on')}"


def _groups(r: Result) -> str:
    said = [
        f"{g['column']} {g['group']} {score(g['value'])} (n = {g['n']})"
        for g in r.subgroups
        if g["value"] is not None
    ]
    return "; ".join(said) or OPEN


def _available(r: Result) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in sorted(r.versions.items()))
    return f"`{r.command}`; {versions}; {OPEN}"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
