"""Groups, units and thresholds, judged by scikit-learn on what was selected by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from scipy.special import logit
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score, roc_curve

from cli import cli
from features.errors import ProbeError
from probe import results
from probe.score import groups as groups_
from probe.score.caveats import few
from probe.score.metrics import evaluate_log_odds, find, of_task
from probe.score.predictions import LabelledPredictions, aggregate
from probe.score.thresholds import choose_threshold
from probe.sweep import ProbeOptions, probe

rng = np.random.default_rng(0)
N = 240
TRUTH = rng.integers(0, 2, N // 2).repeat(2)  # two images of one label per patient
X = (rng.standard_normal((N, 6)) + 0.7 * TRUTH[:, None]).astype(np.float32)
SUBJECT = np.array([f"p{i // 2:03d}" for i in range(N)])
SPLIT = np.where(np.arange(N) // 2 % 3 == 0, "test", "train")
SEX = np.where(np.arange(N) // 2 % 5 == 0, "F", "M")
AGE = (20 + np.arange(N) // 2 % 60).astype(str)


@pytest.fixture
def store(tmp_path):
    manifest = make_manifest(TRUTH, split=SPLIT, subject=SUBJECT, classes=("ill", "well"))
    manifest = replace(manifest, columns={"sex": SEX, "age": AGE})
    return make_store(tmp_path / "made" / "b.h5", X, manifest)


def run(store, tmp_path, **settings):
    asked = ProbeOptions(C=(0.1, 1.0), folds=3, bootstrap=200, metric="auroc", **settings)
    result = probe(store, out=tmp_path / "out", settings=asked)
    return result, results.read_predictions(tmp_path / "out" / result.predictions)


def test_groups_are_scored_apart_with_intervals_and_small_ones_are_flagged(store, tmp_path):
    result, said = run(store, tmp_path, by=("sex",))
    sex = dict(zip([f"{i:05d}.png" for i in range(N)], SEX, strict=True))
    for group in result.subgroups:
        rows = np.array([sex[i] == group["group"] for i in said.ids])
        wanted = roc_auc_score(np.array(said.labels)[rows], said.probabilities[rows, 1])
        assert group["value"] == pytest.approx(wanted, abs=1e-9)
        assert group["ci_low"] <= group["value"] <= group["ci_high"]
        assert (group["n"], group["subjects"]) == (rows.sum(), rows.sum() // 2)
        assert group["small"] == (rows.sum() // 2 < 50)
    assert [g["group"] for g in result.subgroups] == ["F", "M"]


def test_many_numbers_become_quartiles(store, tmp_path):
    result, _ = run(store, tmp_path, by=("age",))
    assert len(result.subgroups) == 4
    assert sum(group["n"] for group in result.subgroups) == result.n_test
    assert result.subgroups[0]["group"].startswith("20 to ")


def test_a_column_that_is_not_there_is_named(store, tmp_path):
    with pytest.raises(ProbeError, match="has no column 'site': found age, sex"):
        run(store, tmp_path, by=("site",))


def test_patients_are_scored_by_the_mean_of_their_images(store, tmp_path):
    images, said = run(store, tmp_path)
    patients, joined = run(store, tmp_path, aggregate="mean")
    assert (patients.n_test, images.n_test) == (40, 80)
    assert patients.scored_by == "subject (mean)"
    mean = said.probabilities.reshape(40, 2, 2).mean(1)
    np.testing.assert_allclose(joined.probabilities, mean, atol=1e-7)
    truth = np.array(said.labels)[::2]
    assert patients.value == pytest.approx(roc_auc_score(truth, mean[:, 1]), abs=1e-9)
    assert patients.C == images.C  # what is scored at the end chooses nothing
    assert len(results.load(tmp_path / "out")) == 2


def test_findings_of_a_unit_are_those_of_any_image_and_max_takes_the_largest():
    y = np.array([[1, 0], [0, np.nan], [0, np.nan], [np.nan, np.nan]])
    p = np.array([[0.2, 0.9], [0.6, 0.1], [0.3, 0.3], [0.1, 0.5]])
    answers = LabelledPredictions(np.arange(4), np.array(["a", "a", "b", "b"]), y, logit(p), {})
    joined = aggregate(answers, answers.subjects, "max")
    np.testing.assert_array_equal(joined.y, [[1, 0], [0, np.nan]])
    np.testing.assert_allclose(joined.p, [[0.6, 0.9], [0.3, 0.5]], rtol=1e-15)


def test_units_of_two_classes_are_refused():
    answers = LabelledPredictions(
        np.arange(2), np.array(["a", "a"]), np.array([0, 1]), np.eye(2), {}
    )
    with pytest.raises(ProbeError, match="images of a have different classes: leave --aggregate"):
        aggregate(answers, answers.subjects, "mean")


def test_youden_s_threshold_is_scikit_learn_s_roc_curve_s_best():
    for seed in range(20):
        own = np.random.default_rng(seed)
        truth = own.integers(0, 2, 60).astype(float)
        score = np.round(own.random(60) + 0.4 * truth, 1)
        fpr, tpr, cut = roc_curve(truth, score, drop_intermediate=False)
        best = (tpr - fpr).max()
        ours = choose_threshold(truth, score, "youden")
        called = score >= ours
        gain = called[truth == 1].mean() - called[truth == 0].mean()
        assert gain == pytest.approx(best, abs=1e-12)
        assert ours == cut[np.flatnonzero(tpr - fpr >= best - 1e-12)[0]]
    assert choose_threshold(np.ones(5), np.arange(5), "youden") is None


def test_thresholds_are_chosen_on_what_was_held_out_of_training_only(store, tmp_path):
    result, said = run(store, tmp_path)
    found = result.thresholds["outputs"]["well"]
    assert result.thresholds["chosen_on"] == result.folds["kind"]
    called = said.probabilities[:, 1] >= found["threshold"]
    truth = np.array(said.labels)
    assert found["sensitivity"]["value"] == pytest.approx(recall_score(truth, called))
    assert found["specificity"]["value"] == pytest.approx(recall_score(truth, called, pos_label=0))
    spoilt = X.copy()
    spoilt[SPLIT == "test"] *= -3
    manifest = make_manifest(TRUTH, split=SPLIT, subject=SUBJECT, classes=("ill", "well"))
    other, _ = run(make_store(tmp_path / "x" / "b.h5", spoilt, manifest), tmp_path)
    assert other.thresholds["outputs"]["well"]["threshold"] == found["threshold"]
    assert other.value < result.value


def test_outputs_and_reliability_stand_in_the_result(store, tmp_path):
    result, said = run(store, tmp_path)
    truth = np.array(said.labels)
    assert result.outputs["well"]["auroc"] == pytest.approx(result.value)
    assert result.outputs["well"]["positives"] == truth.sum()
    assert sum(b["images"] for b in result.reliability) == result.n_test
    right = sum(b["images"] * b["frequency"] for b in result.reliability) / result.n_test
    assert right == pytest.approx(accuracy_score(truth, said.probabilities.argmax(1)))
    words = "Bayesian bootstrap by subject, corrected for few subjects, 200 resamples, 95 %"
    assert result.interval == words


def test_an_interval_without_width_says_what_it_can_t_exclude(tmp_path):
    easy = X + 100 * TRUTH[:, None]
    manifest = make_manifest(TRUTH, split=SPLIT, subject=SUBJECT, classes=("ill", "well"))
    store = make_store(tmp_path / "e" / "b.h5", easy, manifest)
    settings = ProbeOptions(C=(1.0,), folds=2, bootstrap=100, interval="percentile")
    result = probe(store, out=tmp_path / "o", settings=settings)
    assert (result.ci_low, result.ci_high) == (1, 1)
    # 40 subjects without an error: the exact binomial bound is 1 - .05 ** (1 / 40) = 7.2 %.
    assert result.notes[-1].endswith("with 40 subjects an error rate of 7.5% can't be excluded")


def test_answers_without_an_error_have_an_interval_with_a_width(tmp_path):
    manifest = make_manifest(TRUTH, split=SPLIT, subject=SUBJECT, classes=("ill", "well"))
    store = make_store(tmp_path / "e" / "b.h5", X + 100 * TRUTH[:, None], manifest)
    result = probe(
        store, out=tmp_path / "o", settings=ProbeOptions(C=(1.0,), folds=2, bootstrap=2000)
    )
    assert result.ci_high == 1
    assert result.ci_low == pytest.approx(0.025 ** (1 / 40), abs=0.02)  # Clopper and Pearson's
    assert "so the interval has no width" not in " ".join(result.notes)


def test_too_few_subjects_for_any_interval_are_said_of_the_main_result(tmp_path):
    rare = np.where(np.arange(N) // 2 < 6, 1, 0)  # two patients of the test split
    for k, (truth, rows, words) in enumerate((
        (TRUTH, N, ""),
        (rare, N, "few test subjects: 2 of class well; so few that no 95 % interval can be"),
        (TRUTH[:60], 60, "few test subjects: 10 in all"),
    )):  # fmt: skip
        manifest = make_manifest(
            truth, split=SPLIT[:rows], subject=SUBJECT[:rows], classes=("ill", "well")
        )
        store = make_store(tmp_path / str(k) / "b.h5", X[:rows], manifest)
        words_ = ["probe", store, "-o", tmp_path / f"o{k}", "--C", "1", "--folds", "2", "--json"]
        said = CliRunner().invoke(cli, [*map(str, words_), "--bootstrap", "100"])
        [line] = json.loads(said.stdout)
        assert line["few"].startswith(words) and bool(line["few"]) == bool(words)
        assert (line["few"] in line["notes"]) == bool(words)
        plain = CliRunner().invoke(cli, [*map(str, words_[:-1]), "--bootstrap", "100"])
        assert line["few"] in plain.stderr


@pytest.mark.parametrize("metric", [m.name for m in of_task("multilabel")])
def test_groups_of_a_column_are_scored_on_the_findings_that_all_of_them_have(metric):
    rng = np.random.default_rng(1)
    y = (rng.random((40, 4)) < 0.5).astype(float)
    sex = np.array(["F", "M"] * 20)
    y[sex == "F", 1] = np.nan  # none of them has a label
    y[sex == "M", 2] = 0  # none of them has it
    z = rng.normal(size=(40, 4))
    ids = np.arange(40).astype(str)
    how = {"n": 100, "seed": 0, "method": "bayesian"}
    groups = groups_.subgroups(y, z, ids, {"sex": sex}, find(metric, "multilabel"), "abcd", **how)
    for group in groups:
        rows = sex == group["group"]
        kept = [k for k in range(4) if "abcd"[k] not in group["left_out"]]
        some = evaluate_log_odds(find(metric, "multilabel"), y[rows][:, kept], z[rows][:, kept])
        assert some[0] == pytest.approx(group["value"]) and len(kept) >= 2
    ranks = find(metric, "multilabel").ranking or metric == "f1"  # what needs a positive
    assert groups[0]["left_out"] == groups[1]["left_out"] == (["b", "c"] if ranks else ["b"])
    said = groups_.uneven(groups)
    assert said.startswith("by sex, the mean is over what every group has, so without b")
    assert said.endswith("c") == ranks
    assert groups_.uneven([{"column": "a", "group": "b", "value": 1}]) == ""


def test_many_rare_findings_are_said_by_the_rarest_and_a_count():
    y = np.zeros((60, 9))
    for k in range(9):
        y[: k + 1, k] = 1
    names = [f"f{k}" for k in range(9)]
    said = few(y, np.arange(60).astype(str), names, "image")
    assert said == (
        "few test images: 1 with f0, 2 with f1, 3 with f2 and too few of 1 more; "
        "so few that no 95 % interval can be relied on"
    )
    assert few(np.array([1, 3, 3, 3]), np.arange(4), ["0", "1", "2", "3"]).startswith(
        "few test subjects: 4 in all, 1 of class 1, 3 of class 3;"
    )


def test_groups_and_the_audit_are_printed(store, tmp_path):
    words = ["probe", store, "-o", tmp_path / "o", "--C", "1", "--bootstrap", "100", "--by", "sex"]
    output = CliRunner().invoke(cli, [str(w) for w in words]).output
    assert "  sex F: accuracy " in output
    assert "subjects (few)" in output
    assert "no leak found: the splits share no subject and no identical file" in output
    document = CliRunner().invoke(cli, [*map(str, words), "--json"])
    assert json.loads(document.stdout)[0]["subgroups"][0]["column"] == "sex"


def test_the_report_says_groups_thresholds_their_origin_and_the_audit(store, tmp_path):
    from probe.report import write_report

    run(store, tmp_path, by=("sex",), interval="bca")
    page = write_report([tmp_path / "out"], tmp_path / "report").read_text()
    for words in (
        "sex F (few)</bdi>",
        "chosen by youden on 3 stratified folds by subject, seed 0, not on",
        "Interval: <bdi>BCa bootstrap by subject, 200 resamples, 95 %</bdi>",
        "Splits: <bdi>no leak found: the splits share no subject and no identical file</bdi>",
    ):
        assert words in page


def test_a_store_without_the_column_is_a_line_and_the_others_are_scored_by_it(tmp_path):
    y = np.random.default_rng(0).integers(0, 2, 120)
    X = np.random.default_rng(1).standard_normal((120, 4)) + y[:, None]
    plain = make_manifest(y)
    sexed = replace(
        plain, dataset="sexed", columns={"sex": np.where(np.arange(120) % 8 < 4, "f", "m")}
    )
    stores = [
        str(make_store(tmp_path / f"{name}" / "b.h5", X, manifest))
        for name, manifest in (("plain", plain), ("sexed", sexed))
    ]
    broken = tmp_path / "broken.h5"
    broken.write_bytes(b"no store")
    words = ["--C", "1", "--folds", "2", "--bootstrap", "100", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, ["probe", *stores, str(broken), "--by", "sex", *words])
    assert done.exit_code == 1, done.output
    assert f"{stores[0]} has no column sex: it is not scored by it" in done.stderr
    assert "1 of 3 stores have no result" in done.stderr
    assert "sex f: accuracy" in done.stdout and "sex m: accuracy" in done.stdout
    assert len(results.load(tmp_path / "out")) == 2
    done = CliRunner().invoke(cli, ["probe", *stores, "--by", "age", *words])
    assert done.exit_code == 1
    assert "has no column 'age'" in done.stderr


def test_where_no_subjects_are_known_images_are_said_to_be_taken_as_independent(tmp_path):
    y = np.random.default_rng(0).integers(0, 2, 120)
    X = np.random.default_rng(1).standard_normal((120, 4)) + y[:, None]
    how = ProbeOptions(C=(1.0,), folds=2, bootstrap=100)
    plain, known = (
        probe(make_store(tmp_path / name / "b.h5", X, manifest), out=tmp_path / name, settings=how)
        for name, manifest in (
            ("plain", make_manifest(y)),
            ("known", make_manifest(y, subject=np.arange(120).astype(str))),
        )
    )
    assert "by image" in plain.interval and "subject" not in plain.interval
    assert "no subjects are known: images are taken as independent" in plain.notes
    assert "by subject" in known.interval
    assert not [note for note in known.notes if "independent" in note]
    pages = [
        CliRunner().invoke(cli, ["report", str(tmp_path / name), "-o", str(tmp_path / name / "r")])
        for name in ("plain", "known")
    ]
    assert [page.exit_code for page in pages] == [0, 0]
    text = (tmp_path / "plain" / "r" / "index.html").read_text()
    assert "30 test images, taken as independent: no subjects are known" in text
    assert "30 test images of 30 subjects" in (tmp_path / "known" / "r" / "index.html").read_text()
