"""LogisticSweep is judged by scikit-learn: its checks, and its LogisticRegressionCV."""

import warnings

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from probe.estimator import LogisticSweep

X, Y = load_iris(return_X_y=True)
CS = [0.001, 0.1, 10.0]


def test_it_passes_scikit_learn_s_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(LogisticSweep(Cs=3, tol=1e-12))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("scoring", [None, "neg_log_loss"])
def test_it_chooses_and_fits_as_logistic_regression_cv(classes, scoring):
    rows = np.isin(Y, range(classes))
    ours = LogisticSweep(CS, cv=4, scoring=scoring, tol=1e-10).fit(X[rows], Y[rows])
    theirs = LogisticRegressionCV(
        Cs=CS,
        cv=4,
        scoring=scoring,
        tol=1e-9,
        max_iter=10000,
        l1_ratios=(0,),
        use_legacy_attributes=False,
    ).fit(X[rows], Y[rows])
    assert ours.C_ == theirs.C_
    np.testing.assert_allclose(ours.scores_, np.squeeze(theirs.scores_).T, atol=1e-4)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-2)
    assert ours.converged_


def test_weights_of_rows_and_classes_are_scikit_learn_s():
    weight = np.random.default_rng(0).integers(1, 4, len(Y)).astype(float)
    ours = LogisticSweep([1.0], class_weight={0: 1, 1: 5, 2: 1}, tol=1e-10).fit(X, Y, weight)
    theirs = LogisticRegressionCV(
        Cs=[1.0],
        class_weight={0: 1, 1: 5, 2: 1},
        tol=1e-9,
        max_iter=10000,
        l1_ratios=(0,),
        use_legacy_attributes=False,
        scoring="accuracy",
    ).fit(X, Y, sample_weight=weight)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)


def test_groups_are_routed_to_the_splitter_through_a_pipeline():
    groups = np.arange(len(Y)) // 10
    with sklearn.config_context(enable_metadata_routing=True):
        cv = GroupKFold(3).set_split_request(groups=True)
        pipeline = make_pipeline(StandardScaler(), clone(LogisticSweep(CS, cv=cv)))
        sweep = pipeline.fit(X, Y, groups=groups)[-1]
        listed = list(GroupKFold(3).split(X, Y, groups))
        alone = LogisticSweep(CS, cv=listed).fit(StandardScaler().fit_transform(X), Y)
        outer = cross_validate(pipeline, X, Y, params={"groups": groups}, cv=3)
    np.testing.assert_array_equal(sweep.scores_, alone.scores_)
    assert outer["test_score"].shape == (3,)


def test_labels_may_be_words_and_one_class_is_refused():
    names = np.array(["setosa", "versicolor", "virginica"])[Y]
    sweep = LogisticSweep(CS).fit(X, names)
    assert set(sweep.predict(X)) == set(names)
    with pytest.raises(ValueError, match="one class"):
        LogisticSweep(CS).fit(X, np.zeros(len(X)))
