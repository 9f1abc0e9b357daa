"""LogisticSweep: the sweep with scikit-learn's face, for pipelines, clones and metadata routing.

It does what LogisticRegressionCV does with an l2 penalty: the strength with the best mean score on
the folds, refitted on all rows. All strengths and folds are solved in one batch. Sparse rows are
taken and made dense.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import check_scoring
from sklearn.model_selection import check_cv
from sklearn.utils import compute_class_weight
from sklearn.utils.metadata_routing import (
    MetadataRouter,
    MethodMapping,
    _raise_for_params,
    _routing_enabled,
    process_routing,
)
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from probe.heads import Heads, fit_heads

Array = NDArray[Any]


class LogisticSweep(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Logistic regression whose C is chosen by cross-validation, every C and fold solved at once.

    Parameters
    ----------
    Cs : strengths as in scikit-learn; a number of them is spread evenly over log C, 1e-6 to 1e5.
    cv : folds: a number, a splitter or an iterable of (train, test); a number is stratified.
    scoring : what chooses, as in scikit-learn; None is accuracy. Of equals the smallest C is taken.
    class_weight : None, "balanced" or a dict of class to weight.
    tol : the gap to the optimum, relative to max(objective, 1e-3), under which a head is done.
    device : where to compute, "cpu" or "cuda".

    Attributes
    ----------
    C_ : the strength that was chosen. Cs_ : (J,) those tried, ascending.
    scores_ : (J, F) of each on each fold. converged_ : whether every head reached tol.
    coef_ (K, D) and intercept_ (K,), or (1, D) and (1,) of two classes. classes_ : (K,).
    """

    def __init__(
        self,
        Cs: Any = 45,
        *,
        cv: Any = 5,
        scoring: Any = None,
        class_weight: Any = None,
        tol: float = 1e-6,
        device: str = "cpu",
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.class_weight = class_weight
        self.tol = tol
        self.device = device

    def __sklearn_tags__(self) -> Any:
        """Say that sparse rows are taken."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None, **params: Any) -> Self:
        """Choose C and fit. `params` go where metadata routing sends them: groups to the splitter.

        Raises ValueError for labels of a single class.
        """
        _raise_for_params(params, self, "fit")
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], accept_sparse="csr")
        X = X.toarray() if issparse(X) else X  # type: ignore[attr-defined]
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"LogisticSweep needs samples of at least 2 classes; the data hold one class: "
                f"{self.classes_[0]!r}"
            )
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64)
        if self.class_weight is not None:
            weight = (
                weight * compute_class_weight(self.class_weight, classes=self.classes_, y=y)[index]
            )
        to_splitter, to_scorer = self._routed(sample_weight, params)
        parts = list(check_cv(self.cv, y, classifier=True).split(X, y, **to_splitter))
        weights = np.tile(weight, (len(parts) + 1, 1))
        for row, (train, _) in zip(weights[1:], parts, strict=True):
            row[np.setdiff1d(np.arange(len(y)), train)] = 0

        self.Cs_ = np.sort(
            10 ** np.linspace(-6, 5, self.Cs)
            if isinstance(self.Cs, (int, np.integer))
            else np.asarray(self.Cs, dtype=np.float64)
        )
        heads = fit_heads(
            torch.from_numpy(np.ascontiguousarray(X)),
            torch.from_numpy(index),
            C=self.Cs_.tolist(),
            n_classes=len(self.classes_),
            weights=torch.from_numpy(weights),
            tol=self.tol,
            device=self.device,
        )
        self.scores_ = np.array(
            [
                [self._score_of(heads, j, f, X[test], y[test], test, to_scorer) for j in self._js]
                for f, (_, test) in enumerate(parts)
            ]
        ).T
        self._take(heads, best := int(self.scores_.mean(1).argmax()), 0)
        self.C_ = float(self.Cs_[best])
        self.converged_ = bool(heads.converged.all())
        return self

    @property
    def _js(self) -> range:
        return range(len(self.Cs_))

    def _take(self, heads: Heads, j: int, group: int) -> None:
        head = heads.head([str(c) for c in self.classes_], j, group)
        self.coef_ = head.coef.double().cpu().numpy()
        self.intercept_ = head.intercept.double().cpu().numpy()

    def _score_of(
        self,
        heads: Heads,
        j: int,
        fold: int,
        X: Array,
        y: Array,
        test: Array,
        to_scorer: dict[str, Any],
    ) -> float:
        """Return the score of strength j on a fold's held-out rows."""
        self._take(heads, j, fold + 1)
        if self.scoring is None and not to_scorer:
            return float((self.predict(X) == y).mean())
        mine = {name: np.asarray(value)[test] for name, value in to_scorer.items()}
        return float(check_scoring(self, self.scoring or "accuracy")(self, X, y, **mine))

    def _routed(
        self, sample_weight: Array | None, params: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what metadata routing sends to the splitter and to the scorer."""
        if not _routing_enabled():
            return {}, {}
        given = params if sample_weight is None else params | {"sample_weight": sample_weight}
        routed = process_routing(self, "fit", **given)
        return routed.splitter.split, routed.scorer.score

    def get_metadata_routing(self) -> MetadataRouter:
        """Return who asks for what: the splitter's split and the scorer's score."""
        return (
            MetadataRouter(owner=self)
            .add_self_request(self)
            .add(
                splitter=check_cv(self.cv, classifier=True),
                method_mapping=MethodMapping().add(caller="fit", callee="split"),
            )
            .add(
                scorer=check_scoring(self, self.scoring or "accuracy"),
                method_mapping=MethodMapping().add(caller="fit", callee="score"),
            )
        )

    def decision_function(self, X: Array) -> Array:
        """Return logits (N, K), or (N,) of the second of two classes."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False, accept_sparse="csr")
        logits = X @ self.coef_.T + self.intercept_
        found: Array = logits[:, 0] if logits.shape[1] == 1 else logits
        return found

    def predict(self, X: Array) -> Array:
        """Return the most probable class of each row, (N,)."""
        logits = self.decision_function(X)
        index = (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(1)
        said: Array = self.classes_[index]
        return said

    def predict_log_proba(self, X: Array) -> Array:
        """Return logarithms of probabilities, (N, K)."""
        logits = torch.from_numpy(self.decision_function(X))
        if logits.ndim == 1:
            p: Array = torch.nn.functional.logsigmoid(torch.stack([-logits, logits], 1)).numpy()
        else:
            p = logits.log_softmax(1).numpy()
        return p

    def predict_proba(self, X: Array) -> Array:
        """Return probabilities, (N, K), rows summing to 1."""
        return np.exp(self.predict_log_proba(X))
