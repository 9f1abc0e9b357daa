"""Calls as people write them: what works, what is refused, and in which words."""

import csv
import io
from dataclasses import replace
from statistics import mean, stdev

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store

from cli import cli
from features.datasets import Options, open_dataset
from features.errors import DatasetError
from features.store import FeatureStore
from probe.results import load, read_predictions

rng = np.random.default_rng(0)
QUICK = ("--C", "0.01,1", "--folds", 3, "--bootstrap", 100)
SMALL = ("-m", "timm:resnet10t", "--weights", "random", "--image-size", 64)


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def written(folder, header, rows, name="t.csv"):
    (folder / name).write_text("\n".join([header, *rows]))
    return f"csv:{folder / name}"


@pytest.fixture
def store(tmp_path):
    y = np.arange(120) % 3
    X = rng.standard_normal((120, 6)) + np.eye(6)[y]
    return make_store(tmp_path / "made" / "b.h5", X, make_manifest(y))


# --- labels of a table --------------------------------------------------------------------------


@pytest.mark.parametrize(("mark", "given"), [("|", ";"), (";", "|"), (",", ";"), ("/", "|")])
def test_a_label_separator_that_is_in_no_cell_is_refused_with_the_one_that_is(
    tmp_path, mark, given
):
    cells = ["edema", f"edema{mark}mass", "mass", "", f"mass{mark}nodule", "nodule"] * 5
    place = written(tmp_path, "path\tlabel", [f"{i}.png\t{c}" for i, c in enumerate(cells)])
    with pytest.raises(DatasetError, match="is in no cell") as told:
        open_dataset(place, Options(label_sep=given))
    assert f'want --label-sep "{mark}"' in str(told.value)
    assert open_dataset(place, Options(label_sep=mark)).classes == ("edema", "mass", "nodule")
    with pytest.warns(UserWarning, match="each combination a class of its own") as warned:
        assert len(open_dataset(place).classes) == 5
    assert f'give --label-sep "{mark}"' in str(warned[0].message)


def test_single_findings_are_allowed_with_a_word_and_an_empty_separator_is_not(tmp_path):
    rows = [f"{i}.png,{'ab'[i % 2]}" for i in range(20)]
    place = written(tmp_path, "path,label", rows)
    with pytest.warns(UserWarning, match="'|' is in no cell .*: each image has one finding"):
        assert open_dataset(place, Options(label_sep="|")).task == "multilabel"
    with pytest.raises(DatasetError, match="--label-sep is empty"):
        open_dataset(place, Options(label_sep=""))


@pytest.mark.parametrize(
    "classes",
    [
        ("melanoma, in situ", "melanoma, invasive", "naevus"),
        ("grade 1/2", "grade 3/4"),
        ("benign", "malignant"),
        ("a;b", "c;d"),
    ],
)
def test_marks_in_the_names_of_classes_are_no_separators(tmp_path, classes):
    rows = [f"{i}.png\t{classes[i % len(classes)]}" for i in range(30)]
    assert set(open_dataset(written(tmp_path, "path\tlabel", rows)).classes) == set(classes)


def test_what_label_columns_say_of_a_label_is_no_finding(tmp_path):
    rows = [f"{i}.png,{i % 2},{i % 3 % 2},{i % 2}" for i in range(30)]
    place = written(tmp_path, "path,label_edema,label_mass,label_ID", rows)
    with pytest.warns(UserWarning, match="label_ID is not taken for a finding beside label_edema"):
        assert open_dataset(place).classes == ("edema", "mass")
    alone = written(tmp_path, "path,label_id,label_name", [f"{i}.png,{i % 2},x" for i in range(9)])
    with pytest.raises(DatasetError, match="no column 'label'.*did you mean label_id or label_na"):
        open_dataset(alone)


@pytest.mark.parametrize("comment", ["# exported 2024-01-05", "# by A, B, C", "#sep;x;y"])
def test_a_comment_above_the_header_is_said(tmp_path, comment):
    rows = [f"{i}.png,{'ab'[i % 2]}" for i in range(20)]
    with pytest.raises(DatasetError, match="begins with a comment, '#.*the header in its first"):
        open_dataset(written(tmp_path, comment, ["path,label", *rows]))
    place = written(tmp_path, "#path,label", rows)
    with pytest.raises(DatasetError, match="no column 'path': found #path"):
        open_dataset(place)


# --- seeds, shots, neighbours, units ------------------------------------------------------------


def test_seeds_without_shots_are_refused_before_any_fit(store, tmp_path):
    said = "--seeds draws training images, and all are taken: give --shots"
    for words in (
        ["--seeds", 5],
        ["--seeds", 5, "--shots", "all"],
        ["--seeds", 2, "--head", "knn"],
    ):
        result = call("probe", store, "-o", tmp_path / "out", *words)
        assert (result.exit_code, said in result.stderr) == (2, True)
    result = call(
        "run", "-d", "sample", *SMALL[:4], "--seeds", 3, "--scenario", "frozen-linear", "--dry-run"
    )
    assert (result.exit_code, said in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
    assert (
        call(
            "probe",
            store,
            "-o",
            tmp_path / "out",
            "--protocol",
            "mieb",
            "--seeds",
            2,
            "--bootstrap",
            100,
        ).exit_code
        == 0
    )  # whose shots are its own


def test_few_shots_end_in_mean_and_deviation_over_the_seeds(store, tmp_path):
    words = (store, "-o", tmp_path / "out", *QUICK, "--shots", "1,4,all", "--seeds", 3)
    result = call("probe", *words)
    assert result.exit_code == 0, result.output
    for shots in (1, 4):
        values = [r.value for r in load(tmp_path / "out") if r.shots == shots]
        line = f"  {shots} shots: accuracy {mean(values):.3f}, sd {stdev(values):.3f} over 3 seeds"
        assert line in result.stdout.splitlines()
    assert result.stdout.count(" sd ") == 2
    assert "heads: in " in result.stdout and "  head: " not in result.stdout


def test_more_neighbours_than_images_that_vote_are_left_out_with_a_word_or_refused(store, tmp_path):
    result = call("probe", store, "-o", tmp_path / "out", "--protocol", "knn", "--bootstrap", 100)
    said = "k = 100, 200 left out: 72 training images vote on a fold"
    assert result.exit_code == 0 and f"  {said}\n" in result.stderr
    [found] = load(tmp_path / "out")
    assert found.folds["k"] == [10, 20] and said in found.notes
    for words in (["--k", "73"], ["--k", "5000,100"]):
        refused = call("probe", store, "-o", tmp_path / "out", "--head", "knn", *words)
        assert refused.exit_code == 2
        assert "more neighbours than the 72 training images that vote on a fold" in refused.stderr
    few = call("probe", store, "-o", tmp_path / "out", "--head", "knn", "--shots", 1, "--k", 4)
    assert few.exit_code == 2 and "the 3 training images that vote in all" in few.stderr


@pytest.mark.parametrize("how", ["mean", "max"])
def test_images_without_a_unit_are_scored_alone_and_not_as_one(tmp_path, how):
    y = np.arange(160) // 2 % 2
    X = rng.standard_normal((160, 4)) + y[:, None]
    units = np.array([f"u{i // 2}" if i // 2 % 3 else "" for i in range(160)])
    manifest = replace(
        make_manifest(y, split=np.where(np.arange(160) // 2 % 4, "train", "test")),
        columns={"lesion": units},
    )
    manifest = replace(manifest, subject=np.array([f"s{i // 2}" for i in range(160)]))
    store = make_store(tmp_path / "b.h5", X, manifest)
    words = ("probe", store, *QUICK)
    assert call(*words, "-o", tmp_path / "alone").exit_code == 0
    result = call(*words, "-o", tmp_path / "out", "--aggregate", how, "--unit", "lesion")
    tested = np.flatnonzero(manifest.split == "test")
    without = int((units[tested] == "").sum())
    assert result.exit_code == 0, result.output
    assert f"{without} test images have no lesion: each is scored as one of its" in result.stderr
    one, joined = (load(tmp_path / name)[0] for name in ("alone", "out"))
    single = read_predictions(tmp_path / "alone" / one.predictions)
    both = read_predictions(tmp_path / "out" / joined.predictions)
    p = dict(zip(single.ids, single.probabilities[:, 1], strict=True))
    wanted = {}
    for i in tested:
        wanted.setdefault(units[i] or manifest.id[i], []).append(p[manifest.id[i]])
    assert set(both.ids) == set(wanted) and "" not in both.ids
    for name, value in zip(both.ids, both.probabilities[:, 1], strict=True):
        if len(wanted[name]) == 1:
            assert value == pytest.approx(wanted[name][0], abs=1e-9)


# --- predict ------------------------------------------------------------------------------------


def answers(text):
    return {row["id"]: row for row in csv.DictReader(io.StringIO(text))}


def test_predict_takes_results_a_run_s_folder_and_what_probe_printed(store, tmp_path):
    out = tmp_path / "out"
    said = call("probe", store, "-o", out, *QUICK)
    [printed] = [line[8:] for line in said.stdout.splitlines() if line.startswith("  head: ")]
    [result] = load(out)
    assert printed == str(out / result.heads)
    wanted = call("predict", printed, store).stdout
    assert len(answers(wanted)) == 120
    for head in (out, out / "results.jsonl", (out / result.heads).parent):
        assert call("predict", head, store).stdout == wanted, head
    assert call("probe", store, "-o", out, *QUICK, "--metric", "auroc").exit_code == 0
    several = call("predict", out, store)
    assert several.exit_code == 2
    assert f"{out} has 2 heads: give one of\n  {out / result.heads}  (made x made, accuracy" in (
        several.stderr
    )
    (tmp_path / "empty").mkdir()
    nothing = call("predict", tmp_path / "empty", store)
    assert "has no heads.json, run.json or results.jsonl: want a saved head" in nothing.stderr
    knn = call("probe", store, "-o", tmp_path / "k", "--head", "knn", "--k", 3, "--bootstrap", 100)
    assert knn.exit_code == 0 and "head: " not in knn.stdout
    why = call("predict", tmp_path / "k", store).stderr
    assert "nearest neighbours have none, and finetune --outer keeps none" in why


def test_cells_of_several_findings_are_met_with_the_option_that_reads_them(tmp_path, image_folder):
    paths = sorted(p.relative_to(tmp_path).as_posix() for p in image_folder.rglob("*.*"))
    labels = [("Edema", "Mass", "Edema|Mass")[i % 3] for i in range(40)]
    labels[7] = "Edema|Mass|Nodule"
    table = written(
        tmp_path, "path,label", [f"{p},{y}" for p, y in zip(paths, labels, strict=True)]
    )
    with pytest.warns(UserWarning, match="give --label-sep"):
        refused = call("extract", table, *SMALL, "--limit", 20, "-o", tmp_path / "f")
    assert refused.exit_code == 2
    assert "'Edema|Mass|Nodule' is the label of one image" in refused.stderr
    assert 'if it is several findings, give --label-sep "|"' in refused.stderr
    given = ("--label-sep", "|", "-o", tmp_path / "f")
    assert call("extract", table, *SMALL, *given).exit_code == 0
    [made] = (tmp_path / "f").rglob("*.h5")
    shots = call("probe", made, "-o", tmp_path / "out", "--shots", "1,2")
    assert "leave --shots out, or extract one finding as a class of its own" in shots.stderr


def test_a_path_that_is_not_there_is_said_with_those_that_may_be_meant(store, tmp_path):
    out = tmp_path / "out"
    assert call("probe", store, "-o", out, *QUICK).exit_code == 0
    wrong = tmp_path / "mode" / "b.h5"
    for words in (("probe", wrong), ("predict", out, wrong), ("inspect", wrong), ("audit", wrong)):
        said = call(*words)
        assert said.exit_code == 2, words
        assert f"{wrong} (did you mean {store}?)" in said.stderr, words
        assert "unknown dataset" not in said.stderr
    gone = call("predict", out, tmp_path / "nowhere" / "x.png").stderr
    assert f"there is no file or folder {tmp_path / 'nowhere' / 'x.png'}; of data sets" in gone
    assert "unknown dataset 'mednits'" in call("predict", out, "mednits").stderr
    for command in ("compare", "report"):
        said = call(command, out / "made").stderr
        assert f"is a part of the results folder {out}: give {out}" in said
        assert f"no results at {tmp_path / 'oot'} (did you mean {out}?)" in (
            call(command, tmp_path / "oot").stderr
        )
        said = call(command, tmp_path).stderr
        assert f"has no results.jsonl, but folders in it have: give {out}" in said


def test_heads_are_all_named_and_a_folder_within_results_stands_for_its_own(store, tmp_path):
    other = make_store(
        tmp_path / "more" / "b.h5",
        rng.standard_normal((120, 6)),
        make_manifest(np.arange(120) % 3, dataset="more"),
    )
    out = tmp_path / "out"
    for C in range(22):
        strengths = ("--C", f"0.1,{C + 1}", "--folds", 3, "--bootstrap", 100)
        assert call("probe", store, "-o", out, *strengths).exit_code == 0
    assert call("probe", other, "-o", out, *QUICK).exit_code == 0
    *many, last = load(out)
    said = call("predict", out, store).stderr
    named = [line.split("  (")[0].strip() for line in said.splitlines()[1:]]
    assert named[:20] == [str(out / r.heads) for r in many[:20]]
    assert f"and 3 more: see {out / 'results.jsonl'}" in said
    one = call("predict", out / "more", other)
    assert one.exit_code == 0
    assert one.stdout == call("predict", out / last.heads, other).stdout
    assert "has 22 heads" in call("predict", out / "made", store).stderr


def test_of_several_heads_the_one_of_the_store_s_backbone_is_taken(store, tmp_path):
    made = {"backbone": {"name": "c", "weights": "published", "weights_digest": "1"}}
    other = make_store(
        tmp_path / "made" / "c.h5",
        rng.standard_normal((120, 6)),
        make_manifest(np.arange(120) % 3),
        fingerprint={**made, "manifest": {"images": 0}},
    )
    assert call("probe", store, other, "-o", tmp_path / "out", *QUICK).exit_code == 0
    heads = {r.backbone: tmp_path / "out" / r.heads for r in load(tmp_path / "out")}
    for path, name in ((store, "made"), (other, "c")):
        found = call("predict", tmp_path / "out", path)
        assert found.stdout == call("predict", heads[name], path).stdout
        assert found.exit_code == 0


def test_predict_takes_an_image_as_it_is_and_keeps_no_store_of_it(
    tmp_path, image_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert call("extract", f"folder:{image_folder}", *SMALL).exit_code == 0
    [store] = (tmp_path / "features").rglob("*.h5")
    assert call("probe", store, *QUICK).exit_code == 0
    whole = answers(call("predict", "results", store).stdout)
    before = sorted(tmp_path.rglob("*.h5"))
    one = image_folder / "cat" / "04.png"
    said = call("predict", "results", one)
    assert said.exit_code == 0, said.output
    [row] = answers(said.stdout).values()
    assert row["id"] == "04.png"
    for name in ("log_odds:cat", "log_odds:dog"):
        assert float(row[name]) == pytest.approx(float(whole["cat/04.png"][name]), abs=1e-3)
    assert sorted(tmp_path.rglob("*.h5")) == before
    table = written(tmp_path, "path", ["images/cat/00.png"], "new.csv")
    assert "did you mean csv:new.csv?" in call("predict", "results", "new.csv").stderr
    assert "did you mean folder:images?" in call("predict", "results", "images").stderr
    new = call("predict", "results", table)
    assert new.exit_code == 0, new.output
    assert "features/new/timm-resnet10t.h5: 1 images computed" in new.stderr


def test_fine_tuning_takes_a_limit(tmp_path, image_folder):
    result = call(
        "finetune", f"folder:{image_folder}", *SMALL, "--limit", 16, "--epochs", 1,
        "--bootstrap", 100, "-o", tmp_path / "out", "--features", tmp_path / "features",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    [store] = (tmp_path / "features").rglob("*.h5")
    with FeatureStore.open(store) as opened:
        assert len(opened.manifest()) == 16
    [found] = load(tmp_path / "out")
    assert f"  head: {tmp_path / 'out' / found.heads}\n" in result.stdout


# --- what is printed ----------------------------------------------------------------------------


def test_inspect_prints_no_long_line(store):
    result = call("inspect", store)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) < 120
    found = dict(line.strip().split(None, 1) for line in lines if line.startswith("  "))
    assert found["backbone.weights"] == "published" and found["manifest.images"] == "0"


def test_probe_names_the_stores_of_a_folder(store, tmp_path):
    other = make_store(
        tmp_path / "made" / "in" / "c.h5", np.eye(8), make_manifest(np.arange(8) % 2)
    )
    result = call("probe", store.parent)
    assert result.exit_code == 2
    assert f"{store.parent} is a folder: name the stores to probe, of {store}, {other}" in (
        result.stderr
    )
    (tmp_path / "none").mkdir()
    assert "a folder without stores" in call("probe", tmp_path / "none").stderr


@pytest.mark.parametrize(
    "words",
    [
        ("extract", "{}", "-m", "efficientnet_lite0", "--dry-run"),
        ("run", "-d", "{}", "-m", "efficientnet_lite0", "--scenario", "frozen-linear", "--dry-run"),
    ],
)
def test_a_dry_run_complains_once(tmp_path, words):
    rows = [f"{i}.png,{'ab'[i % 2]}" for i in range(20)]
    place = written(tmp_path, "path,label", rows)
    result = call(*(word.format(place) for word in words))
    assert result.exit_code == 1
    assert result.output.count("20 of 20 files are not there") == 1
