"""What is not there, can't be read or is relabelled is said, with what to do, and counted."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from PIL import Image

from cli import cli
from features import presence
from features.datasets import open_dataset
from features.errors import MissingImagesError
from features.extract import extract
from features.store import FeatureStore
from probe.results import columns

BACKBONE = ("-m", "efficientnet_lite0")


def call(*words):
    return CliRunner().invoke(cli, [str(w) for w in words])


@pytest.fixture
def ward(tmp_path, monkeypatch):
    """24 images in ward/img, and tables of them beside: labels, task2, and two with wrong paths."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "ward" / "img").mkdir(parents=True)
    rows = []
    for i in range(24):
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "ward" / "img" / f"{i}.jpg")
        rows.append((f"img/{i}.jpg", "ab"[i % 2], "xyz"[i % 3], "test" if i % 4 == 0 else "train"))
    frame = pd.DataFrame(rows, columns=["path", "label", "other", "split"])
    folder = tmp_path / "ward"
    frame.to_csv(folder / "labels.csv", index=False)
    task2 = frame.assign(label=frame["other"])
    task2.to_csv(folder / "task2.csv", index=False)
    frame.assign(path="x/" + frame["path"]).to_csv(folder / "wrong.csv", index=False)
    some = frame["path"].where(~frame.index.isin([3, 4, 5]), "x/" + frame["path"])
    frame.assign(path=some).to_csv(folder / "some.csv", index=False)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("extract", "csv:{}", *BACKBONE),
        ("extract", "csv:{}", *BACKBONE, "--dry-run"),
        ("audit", "csv:{}"),
        ("finetune", "csv:{}", *BACKBONE),
        ("run", "-d", "csv:{}", *BACKBONE, "--scenario", "frozen-linear", "--dry-run"),
        ("run", "-d", "csv:{}", *BACKBONE, "--scenario", "frozen-linear"),
    ],
)
def test_a_table_of_wrong_paths_is_a_fault_with_its_facts(ward, tmp_path, words):
    result = call(*(word.format(ward / "wrong.csv") for word in words))
    assert result.exit_code == 1
    facts = f"24 of 24 files are not there: looked for in {ward}, such as {ward}/x/img/0.jpg"
    assert facts in result.output.replace("\n", " ")
    assert not (tmp_path / "features").exists()


def test_missing_images_are_bad_and_said_and_the_others_are_computed(ward):
    (ward / "img" / "7.jpg").write_bytes((ward / "img" / "7.jpg").read_bytes()[:400])
    facts = f"3 of 24 files are not there: looked for in {ward}, such as {ward}/x/img/3.jpg"
    for words in (("extract", *BACKBONE, "--dry-run"), ("audit",)):
        result = call(words[0], f"csv:{ward / 'some.csv'}", *words[1:])
        assert (result.exit_code, f"some: {facts}\n" in result.stdout) == (0, True)
    words = ("extract", f"csv:{ward / 'some.csv'}", *BACKBONE)
    with pytest.warns(UserWarning, match=f"some: {re.escape(facts)}; they are left out"):
        result = call(*words)
    assert result.exit_code == 0
    assert result.stdout.endswith(": 20 images computed, 0 already there, 4 bad\n")
    with pytest.warns(UserWarning, match=re.escape(facts)):
        again = json.loads(call(*words, "--json").stdout)
    assert [(r["computed"], r["reused"], len(r["bad"])) for r in again] == [(0, 20, 4)]
    grid = ("run", "-d", words[1], *BACKBONE, "--scenario", "frozen-linear", "--bootstrap", "100")
    with pytest.warns(UserWarning, match=re.escape(facts)):
        assert call(*grid, "--C", "1", "--folds", "3").exit_code == 0


def test_a_dry_run_and_an_audit_say_how_many_files_are_there(ward):
    table = f"csv:{ward / 'labels.csv'}"
    whole = f"ward-labels: 24 of 24 files are there, in {ward}\n"
    assert call("extract", table, *BACKBONE, "--dry-run").stdout.startswith(whole)
    found = json.loads(call("extract", table, *BACKBONE, "--dry-run", "--json").stdout)["files"]
    assert (found["images"], found["there"], found["missing"]) == (24, 24, 0)
    assert call("audit", table).stdout.startswith(whole)
    grid = ("run", "-d", table, *BACKBONE, "--scenario", "frozen-linear", "--dry-run")
    assert call(*grid).stdout.startswith(whole)
    listed = call(*grid, "--json")
    assert listed.stderr == whole
    assert json.loads(listed.stdout)[0][1] == "to do"


def test_an_audit_names_what_can_t_be_read(ward):
    (ward / "img" / "7.jpg").write_bytes(b"no image")
    table = f"csv:{ward / 'labels.csv'}"
    assert "bad, in no group: img/7.jpg: not an image" in call("audit", table).stdout
    assert json.loads(call("audit", table, "--json").stdout)["bad"].keys() == {"img/7.jpg"}
    assert call("extract", table, *BACKBONE).exit_code == 0
    store = "features/ward-labels/efficientnet_lite0.h5"
    assert "bad, in no group: img/7.jpg: not an image" in call("audit", store).stdout


def test_files_are_asked_for_in_blocks_and_those_at_urls_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(presence, "BLOCK", 7)
    rng = np.random.default_rng(0)
    there = rng.random(60) < 0.7
    for i in np.flatnonzero(there):
        (tmp_path / f"{i}.png").touch()
    (tmp_path / "60.png").mkdir()  # a folder is no file
    names = [f"{i}.png" for i in range(61)] + ["memory://a.png"]
    lines = "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    (tmp_path / "t.csv").write_text("path,label\n" + lines)
    manifest = open_dataset(f"csv:{tmp_path / 't.csv'}")
    found = presence.look(manifest)
    assert (found.there, found.missing, found.not_checked) == (there.sum(), 61 - there.sum(), 1)
    assert found.example == str(tmp_path / f"{np.flatnonzero(~there)[0]}.png")
    assert found.line().endswith(f"{found.example}; 1 at URLs not checked")
    assert presence.look(manifest.take(np.array([61]))).line() == "1 files at URLs: not checked"


def test_a_store_is_never_replaced_by_one_without_images(ward, tmp_path, backbone):
    manifest = open_dataset(f"csv:{ward / 'labels.csv'}")
    [report] = extract(manifest, [backbone], out=tmp_path)
    before = report.store.read_bytes()
    (ward / "img").rename(ward / "away")
    words = ("extract", f"csv:{ward / 'labels.csv'}", *BACKBONE, "-o", tmp_path)
    assert call(*words, "--overwrite", "always").exit_code == 1
    assert report.store.read_bytes() == before
    with pytest.raises(MissingImagesError, match="24 of 24 files are not there"):
        extract(manifest, [backbone], out=tmp_path / "new")
    [again] = extract(manifest, [backbone], out=tmp_path)  # what is stored is as good as it was
    assert (again.computed, again.reused, again.bad) == (0, 24, {})


def test_no_image_that_can_be_read_is_a_fault(ward):
    for file in (ward / "img").iterdir():
        file.write_bytes(b"no image")
    result = call("extract", f"csv:{ward / 'labels.csv'}", *BACKBONE)
    assert result.exit_code == 1
    assert result.stdout.endswith(": 0 images computed, 0 already there, 24 bad\n")
    assert "none of its 24 images could be read: not an image of a known kind" in result.stderr


# --- predict ------------------------------------------------------------------------------------


def test_predict_has_a_row_for_every_image_with_the_reason_where_there_is_no_answer(ward):
    table = f"csv:{ward / 'labels.csv'}"
    assert call("extract", table, *BACKBONE).exit_code == 0
    store = "features/ward-labels/efficientnet_lite0.h5"
    probed = call("probe", store, "--C", "1", "--folds", "3", "--bootstrap", "100", "--json")
    head = f"results/{json.loads(probed.stdout)[0]['heads']}"
    whole = pd.read_csv(io.StringIO(call("predict", head, store).stdout))
    data = (ward / "img" / "7.jpg").read_bytes()
    (ward / "img" / "7.jpg").write_bytes(data[: len(data) // 2])  # a truncated JPEG
    (ward / "img" / "9.jpg").unlink()
    with pytest.raises(OSError, match="truncated"), Image.open(ward / "img" / "7.jpg") as image:
        image.load()
    with pytest.warns(UserWarning, match=r"1 of 24 files is not there: .*such as .*/img/9.jpg"):
        result = call("predict", head, f"csv:{ward / 'task2.csv'}", "-o", "said.csv")
    assert result.exit_code == 0
    assert "said.csv: 24 images\nWarning: 2 of 24 images have no answer: " in result.stderr
    found = pd.read_csv("said.csv")
    assert found["id"].tolist() == whole["id"].tolist()
    assert found.columns.tolist() == ["id", "predicted", *columns("ab"), "reason"]
    assert found.index[found["reason"].notna()].tolist() == [7, 9]
    assert "truncated" in found["reason"][7] and found["reason"][9] == "file not found"
    assert found.loc[[7, 9], ["predicted", "p:a", "p:b"]].isna().all().all()
    good = found["reason"].isna()
    np.testing.assert_allclose(found["p:a"][good], whole["p:a"][good], atol=1e-4)


def test_images_of_an_unfinished_or_bad_store_are_no_silent_gaps(tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((40, 4)), np.arange(40) % 2
    store = make_store(tmp_path / "made" / "b.h5", X, make_manifest(y))
    probed = call("probe", store, "-o", tmp_path, "--C", "1", "--bootstrap", "100", "--json")
    head = tmp_path / json.loads(probed.stdout)[0]["heads"]
    with FeatureStore.open(store, write=True) as opened:
        opened.forget(np.array([5]))
    result = call("predict", head, store)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [i for i, row in enumerate(rows) if row["reason"]] == [5]
    assert rows[5]["reason"].startswith("not computed yet")
    bad = dict.fromkeys(range(40), "file is empty")
    store = make_store(tmp_path / "bad" / "b.h5", X, make_manifest(y), bad=bad)
    result = call("predict", head, store)
    assert result.exit_code == 1
    assert "40 of 40 images have no answer: file is empty (40)" in result.stderr
    assert result.stdout.count("file is empty") == 40


# --- names and labels ---------------------------------------------------------------------------


def labels_of(store):
    with FeatureStore.open(store) as opened:
        return opened.manifest().classes


def test_two_tables_in_one_folder_are_two_data_sets(ward, tmp_path):
    for table in ("labels.csv", "task2.csv"):
        assert call("extract", f"csv:{ward / table}", *BACKBONE).exit_code == 0
    first, second = (
        tmp_path / "features" / n / "efficientnet_lite0.h5" for n in ("ward-labels", "task2")
    )
    assert (labels_of(first), labels_of(second)) == (("a", "b"), ("x", "y", "z"))
    with pytest.warns(
        UserWarning, match=r"ward-labels/.*has new labels: multiclass, a, b -> .*x, y"
    ):
        call("extract", f"csv:{ward / 'task2.csv'}", "--name", "ward-labels", *BACKBONE)
    assert labels_of(first) == ("x", "y", "z")


def test_features_under_another_name_of_the_same_images_are_copied(ward, tmp_path):
    words = ("extract", f"csv:{ward / 'labels.csv'}", *BACKBONE)
    assert call(*words, "--name", "ward").exit_code == 0
    said = call(*words, "--dry-run")
    assert "0 of " in said.stdout
    assert "features/ward/efficientnet_lite0.h5 has these features, and they are" in said.stdout
    made = call(*words)
    assert "nothing to compute" in made.stdout
    assert "its features are those of features/ward/efficientnet_lite0.h5" in made.stderr
    first, second = (
        tmp_path / "features" / name / "efficientnet_lite0.h5" for name in ("ward", "ward-labels")
    )
    with FeatureStore.open(first) as one, FeatureStore.open(second) as other:
        assert one.read("final/mean").tobytes() == other.read("final/mean").tobytes()
        assert other.manifest().dataset == "ward-labels"
    assert call("verify", second).exit_code == 0


def test_predicting_leaves_the_labels_of_a_store_alone(ward, tmp_path):
    table = f"csv:{ward / 'task2.csv'}"
    call("extract", table, *BACKBONE)
    store = tmp_path / "features" / "task2" / "efficientnet_lite0.h5"
    probed = call("probe", store, "--C", "1", "--folds", "3", "--bootstrap", "100", "--json")
    head = f"results/{json.loads(probed.stdout)[0]['heads']}"
    result = call("predict", head, table)
    assert result.exit_code == 0, result.output
    assert labels_of(store) == ("x", "y", "z")


def test_one_table_with_two_tasks_is_two_data_sets_of_a_grid_with_names(ward):
    source = f'[[dataset]]\nsource = "csv:{ward / "labels.csv"}"\n'
    text = f'backbone = ["efficientnet_lite0"]\nscenario = ["frozen-linear"]\n{source}'
    (ward / "grid.toml").write_text(f'{text}{source}label-col = "other"\n')
    result = call("run", ward / "grid.toml", "--dry-run")
    assert result.exit_code == 2
    assert "are both called ward-labels: give one a `name` of its own" in result.stderr
    (ward / "grid.toml").write_text(f'{text}{source}label-col = "other"\nname = "other"\n')
    cells = json.loads(call("run", ward / "grid.toml", "--dry-run", "--json").stdout)
    assert [name.split(" x ")[0] for name, _ in cells] == ["ward-labels", "other"]


def test_one_image_alone_is_predicted(ward, tmp_path):
    """The commonest use: there is nothing to split."""
    assert call("extract", f"csv:{ward / 'labels.csv'}", *BACKBONE).exit_code == 0
    store = "features/ward-labels/efficientnet_lite0.h5"
    done = call("probe", store, "--C", "1", "--folds", "3", "--bootstrap", "100")
    assert done.exit_code == 0, done.output
    [head] = (tmp_path / "results").rglob("heads.json")
    (tmp_path / "alone").mkdir()
    shutil.copy(ward / "img" / "3.jpg", tmp_path / "alone")
    done = call("predict", head, f"folder:{tmp_path / 'alone'}")
    assert done.exit_code == 0, done.output
    [row] = csv.DictReader(io.StringIO(done.stdout))
    assert row["predicted"] and not row["reason"]
