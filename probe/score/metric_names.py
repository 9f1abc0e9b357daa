"""What else a metric is called: scikit-learn's scorers and what people say, each the same number.

A row carries our name. scikit-learn's `neg_` scorers are losses with their sign turned round, so
that more is better; here the loss itself stands, and less is better.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

ALIASES = {
    "acc": "accuracy",
    "ap": "average_precision",
    "auc": "auroc",
    "auroc_ovr": "auroc",
    "roc_auc": "auroc",
    "roc_auc_ovr": "auroc",
    "roc_auc_ovo": "auroc_ovo",
    "bacc": "balanced_accuracy",
    "brier_score_loss": "brier",
    "neg_brier_score": "brier",
    "cohen_kappa": "kappa",
    "cohen_kappa_score": "kappa",
    "macro_f1": "f1_macro",
    "matthews_corrcoef": "mcc",
    "neg_log_loss": "log_loss",
    "qwk": "quadratic_kappa",
    "quadratic_weighted_kappa": "quadratic_kappa",
}
OF_FINDINGS = {"f1_macro": "f1"}  # of several findings per image F1 is their mean anyway


def resolve(name: str, names: Collection[str]) -> str | None:
    """Return which of the names is meant, whatever its case, hyphens or alias; None for none."""
    normalised = name.strip().lower().replace("-", "_").replace(" ", "_")
    for table in ({}, ALIASES, OF_FINDINGS):
        if normalised not in names:
            normalised = table.get(normalised, normalised)
    return normalised if normalised in names else None


def list_from(name: str, names: Collection[str]) -> str:
    """Return the names in order, those that are nearest to what was written first."""
    known = {alias: ours for alias, ours in (ALIASES | OF_FINDINGS).items() if ours in names}
    known |= {ours: ours for ours in names}
    near = get_close_matches(name.lower().replace("-", "_"), known, n=3)
    first = list(dict.fromkeys(known[close] for close in near))
    rest = ", ".join(sorted(set(names) - set(first)))
    return f"did you mean {' or '.join(first)}? Others: {rest}" if first else f"want one of {rest}"
