"""LogisticSweep is judged by scikit-learn: its checks, and its LogisticRegressionCV."""

import inspect
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import get_scorer
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import (
    check_estimator,
    check_sample_weight_equivalence_on_dense_data,
    check_sample_weight_equivalence_on_sparse_data,
)

from probe.estimator import LogisticSweep

X, Y = load_iris(return_X_y=True)
CS = [0.001, 0.1, 10.0]


def test_it_passes_scikit_learn_s_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(LogisticSweep(Cs=3, tol=1e-12))


def reference(Cs, **given):
    given = {"scoring": "accuracy", "tol": 1e-9, "max_iter": 10000} | given
    return LogisticRegressionCV(Cs=Cs, l1_ratios=(0,), use_legacy_attributes=False, **given)


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


@pytest.mark.parametrize("Cs", [45, 3, [1e5]])
@pytest.mark.parametrize(
    "check",
    [check_sample_weight_equivalence_on_dense_data, check_sample_weight_equivalence_on_sparse_data],
)
def test_a_weight_is_a_repeated_row_at_the_default_tolerance(check, Cs):
    check("LogisticSweep", LogisticSweep(Cs))


@pytest.mark.parametrize("asked", [None, True, False])
def test_weights_reach_the_folds_scores_as_in_logistic_regression_cv(asked):
    for seed in range(40):
        r = np.random.default_rng(seed)
        n, K = 60, 2 + seed % 2
        X = r.normal(size=(n, 4))
        y = np.argmax(X[:, :K] + 1.5 * r.normal(size=(n, K)), 1)
        scoring = ["accuracy", "neg_log_loss", "balanced_accuracy"][seed % 3]
        how = {"cv": StratifiedKFold(3, shuffle=True, random_state=1)}
        how["class_weight"] = [None, "balanced", {k: k + 1 for k in range(K)}][seed % 3]
        if asked is not None:
            with sklearn.config_context(enable_metadata_routing=True):
                scoring = get_scorer(scoring).set_score_request(sample_weight=asked)
        weight = r.choice([0, 1, 8.0], n)
        with sklearn.config_context(enable_metadata_routing=asked is not None):
            ours, theirs = (
                model([1e-3, 0.1, 1, 10], scoring=scoring, tol=1e-9, **how).fit(
                    X, y, sample_weight=weight
                )
                for model in (LogisticSweep, reference)
            )
        assert ours.C_ == theirs.C_, seed
        np.testing.assert_allclose(ours.scores_, theirs.scores_[:, 0].T, atol=1e-4)


def test_weights_that_no_scorer_asked_for_are_refused_as_by_logistic_regression_cv():
    with sklearn.config_context(enable_metadata_routing=True):
        for model in (LogisticSweep, reference):
            with pytest.raises(UnsetMetadataPassedError, match="sample_weight"):
                model(CS).fit(X, Y, sample_weight=np.ones(len(Y)))


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_paths_and_a_mean_of_folds_are_scikit_learn_s(classes, refit):
    rows = np.isin(Y, range(classes))
    ours = LogisticSweep(CS, cv=4, refit=refit, tol=1e-10).fit(X[rows], Y[rows])
    theirs = reference(CS, cv=4, refit=refit).fit(X[rows], Y[rows])
    assert pytest.approx(theirs.C_) == ours.C_
    assert ours.coefs_paths_.shape == theirs.coefs_paths_.shape
    assert ours.n_iter_.shape == theirs.n_iter_.shape
    assert (ours.n_iter_ > 0).all()
    np.testing.assert_allclose(ours.coefs_paths_, theirs.coefs_paths_, atol=1e-2)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-4)


def with_a_rare_class(seed, width):
    """80 rows of five classes, one with a single row."""
    r = np.random.default_rng(seed)
    y = r.choice(4, 80)
    y[7] = 4
    X = r.normal(size=(80, width))
    X[:, :5] += np.eye(5)[y]
    return X, y


@pytest.mark.parametrize("width", [20, 200])
def test_a_class_of_one_image_is_warned_of_and_fitted(width):
    X, y = with_a_rare_class(2, width)
    Cs = np.logspace(-3, 1, 5)
    with pytest.warns(UserWarning, match="least populated class in y has only 1") as said:
        sweep = LogisticSweep(45, cv=5).fit(X, y)
    assert len(said) == 1  # no head failed to converge
    assert sweep.converged_
    with pytest.warns(UserWarning, match="least populated"):
        ours = LogisticSweep(Cs, cv=5, tol=1e-10).fit(X, y)
        theirs = reference(Cs, cv=5).fit(X, y)
        losses = LogisticSweep(Cs, cv=5, scoring="neg_log_loss").fit(X, y).scores_
    assert ours.C_ == theirs.C_
    np.testing.assert_array_equal(ours.scores_, theirs.scores_[:, 0].T)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)
    fits, judge = ours.coefs_paths_, theirs.coefs_paths_
    np.testing.assert_allclose(fits[..., :-1], judge[..., :-1], atol=1e-3)  # but for an intercept
    assert np.isfinite(losses).all()


def test_a_fit_to_a_table_says_nothing_of_names_and_scores_by_its_scoring():
    table = pd.DataFrame(X, columns=["a", "b", "c", "d"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep = LogisticSweep(CS, scoring="neg_log_loss").fit(table, Y)
        said = sweep.score(table, Y)
    assert list(sweep.feature_names_in_) == ["a", "b", "c", "d"]
    assert said == get_scorer("neg_log_loss")(sweep, table, Y)
    weight = np.random.default_rng(0).random(len(Y))
    weighted = get_scorer("neg_log_loss")(sweep, table, Y, sample_weight=weight)
    assert sweep.score(table, Y, sample_weight=weight) == weighted != said
    by_hand = LogisticSweep(CS).fit(X, Y)
    assert by_hand.score(X, Y) == (by_hand.predict(X) == Y).mean()
    with sklearn.config_context(enable_metadata_routing=True):
        asking = get_scorer("neg_log_loss").set_score_request(sample_weight=True)
        routed = LogisticSweep(CS, scoring=asking).fit(table, Y, sample_weight=np.ones(len(Y)))
        assert routed.score(table, Y, sample_weight=weight) == weighted


@pytest.mark.parametrize(
    "Cs",
    [1.0, 0, -3, True, [0, 1], [-1, 1], [], [np.nan], [np.inf], "abc", ["1", "2"], [[1.0]], None],
)
def test_strengths_that_are_none_are_refused_in_words(Cs):
    with pytest.raises(ValueError, match=r"Cs is .*: want a whole number of strengths, such as 45"):
        LogisticSweep(Cs).fit(X, Y)


def test_folds_without_a_score_are_left_out_of_the_choice():
    order = np.argsort(Y[:100], kind="stable")  # two classes: the first fold holds one of them
    folds = [
        (np.delete(order, slice(0, 20)), order[:20]),
        *StratifiedKFold(3).split(X[:100], Y[:100]),
    ]
    with pytest.warns(UserWarning, match="Only one class"):
        sweep = LogisticSweep(CS, cv=folds, scoring="roc_auc").fit(X[:100], Y[:100])
    assert np.isnan(sweep.scores_[:, 0]).all()
    rest = LogisticSweep(CS, cv=folds[1:], scoring="roc_auc").fit(X[:100], Y[:100])
    assert sweep.C_ == rest.C_
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="not a number on any fold"):
        LogisticSweep(CS, cv=folds[:1], scoring="roc_auc").fit(X[:100], Y[:100])


def test_its_parameters_are_logistic_regression_cv_s_and_it_can_be_pickled():
    ours = inspect.signature(LogisticSweep).parameters
    theirs = inspect.signature(LogisticRegressionCV).parameters
    assert set(ours) - set(theirs) == {"device"}
    sweep = LogisticSweep(CS).fit(X, Y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(sweep)).predict(X), sweep.predict(X))
