"""LogisticSweep: the sweep with scikit-learn's face, for pipelines, clones and metadata routing.

It does what LogisticRegressionCV does with an l2 penalty: the strength with the best mean score on
the folds, refitted on all rows. All strengths and folds are solved in one batch. Sparse rows are
taken and made dense.

Shapes: N rows, D features, K classes, J strengths, F folds.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer, make_scorer
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
from sklearn.utils.validation import (
    _check_method_params,
    _check_sample_weight,
    check_is_fitted,
    validate_data,
)
from torch import Tensor

from probe.heads import Head, Heads, fit_heads

Array = NDArray[Any]
TINY = 1e-300  # of the weight of a class
FINAL = 1e-16  # the gap asked of the head that is kept: about as far as float64 can tell


class Linear(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Linear logits of rows that are known to be good: what folds are scored with.

    coef (K, D) and intercept (K,), or (1, D) and (1,) of two classes; classes (K,).
    """

    def __init__(self, classes: Array, coef: Array, intercept: Array) -> None:
        self.classes_, self.coef_, self.intercept_ = classes, coef, intercept

    def decision_function(self, X: Array) -> Array:
        """Return logits (N, K), or (N,) of the second of two classes."""
        logits = X @ self.coef_.T + self.intercept_
        found: Array = logits[:, 0] if logits.shape[1] == 1 else logits
        return found

    def predict(self, X: Array) -> Array:
        """Return the most probable class of each row, (N,)."""
        logits = self.decision_function(X)
        index = (logits > 0).astype(int) if logits.ndim == 1 else logits.argmax(1)
        predicted: Array = self.classes_[index]
        return predicted

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


class LogisticSweep(Linear):
    """Logistic regression whose C is chosen by cross-validation, every C and fold solved at once.

    Parameters
    ----------
    Cs : strengths as in scikit-learn; a number of them is spread evenly over log C, 1e-6 to 1e5.
    cv : folds: a number, a splitter or an iterable of (train, test); a number is stratified.
    scoring : what C is chosen by, and what `score` returns, as in scikit-learn; None is accuracy.
        Of several best the smallest C is taken. Folds where it is not a number are left out of the
        mean.
    refit : whether the chosen C is fitted to all rows. If not, coef_, intercept_ and C_ are the
        means, over the folds, of each fold's best.
    class_weight : None, "balanced" or a dict of class to weight.
    tol : the gap to the optimum, relative to max(objective, 1e-3), under which a head is done. The
        head that is kept goes on in float64 as far as that can tell.
    device : where to compute, "cpu" or "cuda".

    Attributes
    ----------
    C_ : the strength that was chosen. Cs_ : (J,) those tried, ascending.
    scores_ : (J, F) of each on each fold. converged_ : whether every head reached tol.
    coefs_paths_ : (F, 1, J, K, D + 1), or (F, 1, J, 1, D + 1) of two classes: the folds' heads, the
        intercept last; the axis of one is where LogisticRegressionCV has its l1 ratios. Its own
        precision is the solver's.
    n_iter_ : (F, 1, J) passes over the rows that each took.
    coef_ (K, D) and intercept_ (K,), or (1, D) and (1,) of two classes. classes_ : (K,).

    What differs from LogisticRegressionCV(use_legacy_attributes=False): scores_ has strengths
    first, and no axis of l1 ratios; Cs_ is sorted; n_iter_ counts passes, not iterations.
    """

    def __init__(
        self,
        Cs: Any = 45,
        *,
        cv: Any = 5,
        scoring: Any = None,
        refit: bool = True,
        class_weight: Any = None,
        tol: float = 1e-6,
        device: str = "cpu",
    ) -> None:
        self.Cs = Cs
        self.cv = cv
        self.scoring = scoring
        self.refit = refit
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

        sample_weight (N,) weighs rows in the fits and, as in LogisticRegressionCV, in the folds'
        scores: always without metadata routing, with it where the scorer asks for it. Raises
        ValueError for labels of a single class, and for Cs that are no positive numbers.
        """
        _raise_for_params(params, self, "fit")
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], accept_sparse="csr")
        X = X.toarray() if issparse(X) else X  # type: ignore[attr-defined]
        check_classification_targets(y)
        self.Cs_ = strengths_of(self.Cs)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"LogisticSweep needs samples of at least 2 classes; the data hold one class: "
                f"{self.classes_[0]!r}"
            )
        to_splitter, to_scorer = self._routed("fit", sample_weight, params)
        parts = list(check_cv(self.cv, y, classifier=True).split(X, y, **to_splitter))
        weight = self._weight(X, index, sample_weight)
        left = np.zeros((len(parts), len(y)))
        for row, (train, _) in zip(left, parts, strict=True):
            row[train] = weight[train]

        rows, labels = torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(index)
        heads = self._solve(rows, labels, self.Cs_, left, self.tol)
        scores = np.array(
            [
                self._scores(heads, f, X[test], y[test], _some(to_scorer, X, test))
                for f, (_, test) in enumerate(parts)
            ]
        )  # (F, J)
        self.scores_, self.converged_ = scores.T, bool(heads.converged.all())
        coef, intercept = heads.coef.flatten(2, 3), heads.intercept.flatten(2, 3)  # (J, F, K, D)
        paths = torch.cat([coef, intercept[..., None]], -1).swapaxes(0, 1)
        self.coefs_paths_ = paths.cpu().numpy()[:, None]
        self.n_iter_ = heads.passes.amax(2).T.cpu().numpy()[:, None]
        self._choose(scores)
        if self.refit:
            self._last(rows, labels, weight)
        return self

    def _choose(self, scores: Array) -> None:
        """Set C_, and without a refit the means of the folds' best heads, from scores (F, J)."""
        known = ~np.isnan(scores)
        if not known.any():
            raise ValueError(
                f"scoring {self.scoring!r} is not a number on any fold: "
                "take fewer folds, or another scoring"
            )
        if self.refit:
            count = known.sum(0)
            total = np.where(known, scores, 0).sum(0) * (len(scores) / np.maximum(count, 1))
            self.C_ = float(self.Cs_[np.where(count, total, -np.inf).argmax()])
            return
        fold = np.flatnonzero(known.any(1))
        best = np.where(known, scores, -np.inf)[fold].argmax(1)
        self.C_ = float(self.Cs_[best].mean())
        mean = self.coefs_paths_[fold, 0, best].mean(0, dtype=np.float64)
        self.coef_, self.intercept_ = mean[:, :-1], mean[:, -1]

    def _solve(self, X: Tensor, y: Tensor, C: Array, weights: Array, tol: float) -> Heads:
        """Fit heads to X (N, D) and y (N,) for C (J,) and row weights (G, N)."""
        return fit_heads(
            X,
            y,
            C=C.tolist(),
            n_classes=len(self.classes_),
            weights=torch.from_numpy(weights),
            tol=tol,
            device=self.device,
        )

    def _last(self, X: Tensor, y: Tensor, weight: Array) -> None:
        """Fit the chosen C to all rows X (N, D), y (N,), weight (N,), to the last digit.

        Then a row of weight 2 gives what the row twice gives.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            heads = self._solve(X, y, np.array([self.C_]), weight[None], min(self.tol, FINAL))
        if not (gap := float(heads.gap.max())) <= self.tol:
            self.converged_ = False
            warnings.warn(
                f"the head of C = {self.C_:g} did not reach a relative gap of {self.tol:g}: "
                f"it is at {gap:.1e}",
                ConvergenceWarning,
                stacklevel=3,
            )
        head = heads.head(self._names)
        self.coef_, self.intercept_ = _arrays(head)

    def _weight(self, X: Array, index: Array, sample_weight: Array | None) -> Array:
        """Return what each row counts for, (N,): its own weight times its class's."""
        weight: Array = _check_sample_weight(sample_weight, X, dtype=np.float64).copy()
        if isinstance(self.class_weight, str) and self.class_weight == "balanced":
            total = np.bincount(index, weight)
            weight *= (total.sum() / (len(total) * np.maximum(total, TINY)))[index]
        elif self.class_weight is not None:
            y = self.classes_[index]
            weight *= compute_class_weight(self.class_weight, classes=self.classes_, y=y)[index]
        return weight

    def _scores(
        self, heads: Heads, fold: int, X: Array, y: Array, params: dict[str, Any]
    ) -> list[float]:
        """Return the score of every strength on a fold's held-out rows."""
        score = _with_labels(self._scorer(), self.classes_)
        found = []
        for j in range(len(self.Cs_)):
            head = heads.head(self._names, j, fold)
            found.append(float(score(Linear(self.classes_, *_arrays(head)), X, y, **params)))
        return found

    def score(self, X: Array, y: Array, sample_weight: Array | None = None, **params: Any) -> float:
        """Return the score by `scoring` of X (N, D), y (N,); `params` are routed to the scorer."""
        _raise_for_params(params, self, "score")
        _, to_scorer = self._routed("score", sample_weight, params)
        return float(self._scorer()(self, X, y, **to_scorer))

    @property
    def _names(self) -> list[str]:
        return [str(name) for name in self.classes_]

    def _scorer(self) -> Any:
        return get_scorer("accuracy" if self.scoring is None else self.scoring)

    def _routed(
        self, method: str, sample_weight: Array | None, params: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what goes to the splitter, and to the scorer: without routing the weights."""
        given = params if sample_weight is None else params | {"sample_weight": sample_weight}
        if not _routing_enabled():
            return {}, given
        routed = process_routing(self, method, **given)
        return routed.splitter.get("split", {}), routed.scorer.score

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
                scorer=self._scorer(),
                method_mapping=MethodMapping()
                .add(caller="fit", callee="score")
                .add(caller="score", callee="score"),
            )
        )

    def decision_function(self, X: Array) -> Array:
        """Return logits (N, K), or (N,) of the second of two classes."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False, accept_sparse="csr")
        return super().decision_function(X)


def strengths_of(Cs: Any) -> Array:
    """Return the strengths of Cs, (J,), ascending. Raises ValueError where they are none."""
    if isinstance(Cs, (int, np.integer)) and not isinstance(Cs, bool) and Cs > 0:
        return 10 ** np.linspace(-6, 5, int(Cs))
    try:
        words = any(isinstance(C, (str, bytes)) for C in np.ravel(Cs).tolist())
        found = np.empty(0) if words else np.sort(np.asarray(Cs, dtype=np.float64))
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.ndim != 1 or not len(found) or not ((found > 0) & np.isfinite(found)).all():
        raise ValueError(
            f"Cs is {Cs!r}: want a whole number of strengths, such as 45, "
            "or a list of positive ones, such as [0.01, 1, 100]"
        )
    return found


def _arrays(head: Head) -> tuple[Array, Array]:
    """Return coef and intercept in float64."""
    return head.coef.double().cpu().numpy(), head.intercept.double().cpu().numpy()


def _some(params: dict[str, Any], X: Array, rows: Array) -> dict[str, Any]:
    """Return what belongs to some rows of X of what is given per row."""
    return dict(_check_method_params(X, params=params, indices=rows))


def _with_labels(scorer: Any, classes: Array) -> Any:
    """Return a scorer that knows all classes: as in scikit-learn, a fold's rows may lack some."""
    function = getattr(scorer, "_score_func", None)
    takes = inspect.signature(function).parameters if function else {}
    if "labels" not in takes:
        return scorer
    labels = {"labels": classes}
    if len(classes) == 2 and "pos_label" in takes:
        labels["pos_label"] = classes[-1]
    return make_scorer(
        function,
        greater_is_better=scorer._sign == 1,
        response_method=scorer._response_method,
        **(labels | scorer._kwargs),
    )
