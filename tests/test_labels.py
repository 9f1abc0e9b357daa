"""The order of classes, and several columns of labels: judged by scikit-learn and by the files."""

import csv
import json
import shlex
import warnings
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest, make_store
from PIL import Image
from sklearn.metrics import (
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    roc_auc_score,
)

import probe.commands.run
from cli import cli
from features.backbones import load_backbone
from features.datasets import Options, open_dataset
from features.errors import StaleStoreError
from features.extract import extract
from features.fingerprint import in_words
from features.manifest import digest
from features.plan import ExtractionSettings
from features.store import FeatureStore
from probe.cells import digest_of
from probe.results import load

rng = np.random.default_rng(0)
SMALL = ("-m", "timm:resnet10t", "--weights", "random", "--image-size", 64)
PROBED = ("--C", "0.01,1", "--folds", 3, "--bootstrap", 100)


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def table(folder, columns, name="scans.csv"):
    n = len(next(iter(columns.values())))
    rows = zip(*({"path": [f"{i:02d}.png" for i in range(n)]} | columns).values(), strict=True)
    lines = [",".join(map(str, row)) for row in rows]
    (folder / name).write_text("\n".join([",".join(["path", *columns]), *lines]))
    return f"csv:{folder / name}"


# --- the order of classes -----------------------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations(["mild", "moderate", "severe"])))
def test_classes_have_the_order_that_is_given_and_labels_follow(tmp_path, order):
    words = [("severe", "mild", "moderate", "")[i % 4] for i in range(40)]
    place = table(tmp_path, {"label": words})
    sorted_ = open_dataset(place)
    manifest = open_dataset(place, Options(classes=order))
    assert manifest.classes == order
    assert [(*manifest.classes, "")[k] for k in manifest.label] == words
    assert (manifest.order_from, sorted_.order_from) == ("given", "names")
    same = order == sorted_.classes
    assert (manifest.labels_digest() == sorted_.labels_digest()) is same
    assert manifest.digest() == sorted_.digest()
    assert manifest.split_digest() == sorted_.split_digest()


def test_findings_have_the_order_that_is_given(tmp_path):
    place = table(tmp_path, {"label": ["b|a", "a", "c", "", "b"] * 8})
    manifest = open_dataset(place, Options(label_sep="|", classes=("c", "a", "b")))
    assert manifest.classes == ("c", "a", "b")
    assert manifest.label[:5].tolist() == [[0, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("mild,moderat,severe", "moderat: no such class; moderate left out"),
        ("mild,severe", "moderate left out. Want each of mild, moderate, severe once"),
        ("mild,moderate,severe,dead", "dead: no such class"),
        ("mild,mild,moderate,severe", "a class is named twice"),
        ("mild,,severe", "want names with commas between them"),
    ],
)
def test_an_order_of_other_classes_is_refused_in_words(tmp_path, given, said):
    place = table(tmp_path, {"label": ["mild", "moderate", "severe"] * 10})
    result = call("extract", place, *SMALL, "--classes", given, "--dry-run")
    assert (result.exit_code, said in result.stderr) == (2, True), result.output


def test_a_class_with_a_comma_stands_in_quotes_also_in_a_config(tmp_path, monkeypatch):

    (tmp_path / "t.csv").write_text(
        "path,label\n"
        + "\n".join(f"{i}.png,{('x', chr(34) + 'a, b' + chr(34))[i % 2]}" for i in range(20))
    )
    words = ("extract", f"csv:{tmp_path / 't.csv'}", *SMALL, "--dry-run")
    wrong = call(*words, "--classes", "x,a, b")
    assert "a,b: no such class" in wrong.stderr.replace("a, b: no", "a,b: no")
    config = tmp_path / "c.toml"
    config.write_text(
        f'backbone = "efficientnet_lite0"\n[[dataset]]\nsource = "csv:{tmp_path / "t.csv"}"\n'
        'classes = ["x", "a, b"]\n'
    )
    found = []
    monkeypatch.setattr(probe.commands.run, "say_plan", lambda cells, _: found.extend(cells))
    assert call("run", config, "--dry-run", "--scenario", "frozen-linear").exit_code == 0
    assert found[0].manifest.classes == ("x", "a, b")


def test_the_positive_class_and_the_grades_are_those_given_as_scikit_learn_scores_them(tmp_path):
    """Names are sorted the wrong way round; what is said of it, and its metrics, turn with it."""
    n = 240
    X = rng.standard_normal((n, 5)).astype(np.float32)
    two = np.where(X[:, 0] + rng.standard_normal(n) > 0, "absent", "Present")
    three = np.digitize(X[:, 0] + 0.5 * rng.standard_normal(n), [-0.7, 0.7])
    grades = np.array(["mild", "bad", "worse"])
    for classes, names, metric in (
        (("Present", "absent"), two, "auroc"),
        (("absent", "Present"), two, "auroc"),
        (("absent", "Present"), two, "f1"),
        (("mild", "bad", "worse"), grades[three], "quadratic_kappa"),
        (("bad", "mild", "worse"), grades[three], "quadratic_kappa"),
    ):
        y = np.array([classes.index(name) for name in names])
        manifest = replace(
            make_manifest(y, classes=classes), label_from="finding", order_from="given"
        )
        store = make_store(tmp_path / "b.h5", X, manifest)
        out = tmp_path / "out" / "-".join(classes)
        done = call("probe", store, "-o", out, *PROBED, "--metric", metric)
        assert done.exit_code == 0, done.output
        result = load(out)[-1]
        with (out / result.predictions).open() as file:
            rows = list(csv.DictReader(file))
        truth = [row["label"] for row in rows]
        predicted = [row["predicted"] for row in rows]
        assert "; labels: finding" in done.stdout and result.label_from == "finding"
        if len(classes) == 2:
            assert f"; positive: {classes[1]}" in done.stdout and result.positive == classes[1]
            right = np.array(truth) == classes[1]
            p = [float(row[f"p:{classes[1]}"]) for row in rows]
            theirs = {
                "auroc": roc_auc_score(right, p),
                "average_precision": average_precision_score(right, p),
                "f1": f1_score(truth, predicted, pos_label=classes[1]),
            }
        else:
            assert result.positive == ""
            order = f"quadratic_kappa takes the classes in this order: {' < '.join(classes)}"
            assert order in done.stderr and "names are sorted" not in done.stderr
            theirs = {
                "quadratic_kappa": cohen_kappa_score(
                    truth, predicted, labels=list(classes), weights="quadratic"
                )
            }
        for name, value in theirs.items():
            assert result.metrics[name]["value"] == pytest.approx(value, abs=1e-9)


def test_quadratic_kappa_says_the_order_of_names_that_do_not_tell_it(tmp_path):
    y, X = np.arange(120) % 3, rng.standard_normal((120, 4))
    for k, (classes, told) in enumerate(
        (
            (("mild", "moderate", "severe"), True),
            (("0", "1", "2"), False),
            (("Grade 1", "Grade 2", "Grade 10"), False),
            (("T1", "N2", "M3"), True),
        )
    ):
        manifest = replace(make_manifest(y, classes=classes), order_from="names")
        store = make_store(tmp_path / f"{k}.h5", X, manifest)
        done = call("probe", store, "-o", tmp_path / "out", *PROBED, "--metric", "qwk")
        line = f"order: {' < '.join(classes)}; that is how their names are sorted: give the grades'"
        assert (line in done.stderr) is told
        other = call("probe", store, "-o", tmp_path / "out", *PROBED)
        assert "order:" not in other.stderr


def test_results_of_two_orders_are_two_and_cells_are_done_again(tmp_path):
    """The same images, features and words; only which class comes last is another."""
    y, X = np.arange(80) % 2, rng.standard_normal((80, 4))
    found = []
    for classes, labels in ((("a", "b"), y), (("b", "a"), 1 - y)):
        manifest = make_manifest(labels, classes=classes)
        store = make_store(tmp_path / "b.h5", X, manifest)
        assert call("probe", store, "-o", tmp_path / "out", *PROBED).exit_code == 0
        found.append((manifest.labels_digest(), digest_of(manifest)))
    assert len(set(found[0]) | set(found[1])) == 4
    one, other = load(tmp_path / "out")  # neither takes the other's place
    assert one.identity.data != other.identity.data
    assert one.identity.folder != other.identity.folder
    renamed = make_manifest(y, classes=("a", "c"))
    assert digest_of(renamed) != digest_of(make_manifest(y, classes=("a", "b")))


def test_another_positive_class_is_said_when_it_comes_and_when_it_goes(tmp_path, image_folder):
    backbone = load_backbone("timm:resnet10t", "random", 64)
    sorted_ = open_dataset(f"folder:{image_folder}")
    given = open_dataset(f"folder:{image_folder}", Options(classes=("dog", "cat")))
    extract(sorted_, [backbone], out=tmp_path / "out")
    with pytest.warns(UserWarning, match="cat, dog -> .*dog, cat; the positive class is cat now, "):
        [report] = extract(given, [backbone], out=tmp_path / "out")
    with FeatureStore.open(report.store) as store:
        kept = store.manifest()
    assert (kept.classes, kept.order_from, report.computed) == (("dog", "cat"), "given", 0)
    assert kept.labels_digest() == given.labels_digest()
    with pytest.warns(
        UserWarning,
        match="is dog now, and was cat; the order was given by --classes before, and is not now",
    ):
        extract(sorted_, [backbone], out=tmp_path / "out")


def test_extract_says_the_positive_class_and_how_to_turn_it_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        Image.new("L", (40, 40), 9 * i).save(tmp_path / f"{i}.png")
    rows = [f'{i}.png,"{("ill, or so", "well")[i % 2]}",{"abc"[i % 3]}' for i in range(12)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,grade", *rows]) + "\n")
    said = call("extract", "csv:t.csv", *SMALL).stderr
    line = "positive class: well, the second of ill, or so, well; --classes "
    assert line in said
    order = shlex.split(said.split(line)[1])[0]
    with pytest.warns(UserWarning, match="the positive class is ill, or so now, and was well"):
        said = call("extract", "csv:t.csv", *SMALL, "--classes", order).stderr
    assert "positive class: ill, or so, the second of well, ill, or so as given" in said
    for given, told in (((), False), (("--classes", "c,a,b"), True)):
        column = ("--label-col", "grade", "--name", f"grades{len(given)}")
        said = call("extract", "csv:t.csv", *SMALL, *column, *given).stderr
        assert ("order of classes as given by --classes: c < a < b" in said) is told
        assert "positive" not in said


# --- several columns of labels ------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path, monkeypatch, image_folder):
    """A table of 40 images with two columns of labels, of the same words and of others."""
    monkeypatch.chdir(tmp_path)
    paths = sorted(p.relative_to(tmp_path).as_posix() for p in image_folder.rglob("*.*"))
    lines = [f"{p},{i % 2},{i // 2 % 2},{'uvw'[i % 3]}" for i, p in enumerate(paths)]
    (tmp_path / "scans.csv").write_text("\n".join(["path,grade,risk,kind", *lines]))
    return f"csv:{tmp_path / 'scans.csv'}"


def test_a_second_column_of_labels_computes_nothing_and_each_result_names_its_own(scans, tmp_path):
    assert call("extract", scans, *SMALL, "--label-col", "grade").exit_code == 0
    [store] = (tmp_path / "features").rglob("*.h5")
    with FeatureStore.open(store) as opened:
        before = opened.read("final/pooled").tobytes()
    assert call("probe", store, *PROBED).exit_code == 0
    with pytest.warns(
        UserWarning,
        match=r"new labels: multiclass, 0, 1 of column grade -> multiclass, 0, 1 of column risk",
    ):
        again = call("extract", scans, *SMALL, "--label-col", "risk")
    assert "nothing to compute" in again.stdout
    done = call("probe", store, *PROBED)
    assert "; labels: risk" in done.stdout
    assert [r.label_from for r in load(tmp_path / "results")] == ["grade", "risk"]
    rows = (tmp_path / "results" / "results.jsonl").read_text().splitlines()
    assert [json.loads(row)["label_from"] for row in rows] == ["grade", "risk"]
    with pytest.warns(UserWarning, match="has new labels"):
        call("extract", scans, *SMALL, "--label-col", "grade")
    with FeatureStore.open(store) as opened:
        assert opened.read("final/pooled").tobytes() == before


def test_each_result_names_the_command_that_gave_its_labels(scans, tmp_path, monkeypatch):
    """The one that is named gives the same labels again, though the store has others since."""
    wanted = []
    for column in ("grade", "risk"):
        words = ["extract", scans, *SMALL, "--label-col", column]
        monkeypatch.setattr("sys.argv", ["medprobe", *map(str, words)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert call(*words).exit_code == 0
        [store] = (tmp_path / "features").rglob("*.h5")
        monkeypatch.setattr("sys.argv", ["medprobe", "probe", str(store)])
        assert call("probe", store, *PROBED).exit_code == 0
        wanted.append(f"medprobe {shlex.join(map(str, words))}")
    found = load(tmp_path / "results")
    assert [r.labelled_by for r in found] == wanted
    assert {r.command for r in found} == {f"medprobe probe {store}"}
    with pytest.warns(UserWarning, match="has new labels"):
        call(*shlex.split(found[0].labelled_by)[1:])
    with FeatureStore.open(store) as opened:
        assert opened.manifest().labels_digest() == found[0].labels_digest


def test_another_name_copies_the_rows_to_the_bit(scans, tmp_path):
    assert call("extract", scans, *SMALL, "--label-col", "grade").exit_code == 0
    [first] = (tmp_path / "features").rglob("*.h5")
    made = call("extract", scans, *SMALL, "--label-col", "kind", "--name", "kinds")
    assert "nothing to compute, 40 already there" in made.stdout
    second = tmp_path / "features" / "kinds" / first.name
    with FeatureStore.open(first) as one, FeatureStore.open(second) as other:
        assert one.read("final/pooled").tobytes() == other.read("final/pooled").tobytes()
        assert one.fingerprint == other.fingerprint
        assert one.source()["hash"].tolist() == other.source()["hash"].tolist()
        assert (one.manifest().label_from, other.manifest().label_from) == ("grade", "kind")
        assert other.manifest().classes == ("u", "v", "w")
    assert call("verify", second).exit_code == 0


@pytest.mark.parametrize(
    "change", ["bytes", "root", "weights", "size", "more", "damaged", "nothing"]
)
def test_rows_are_copied_only_of_the_same_files_and_the_same_fingerprint(
    tmp_path, image_folder, change
):
    out = tmp_path / "out"
    settings = ExtractionSettings(batch_size=8, workers=1)
    backbone = load_backbone("timm:resnet10t", "random", 64)
    manifest = open_dataset(f"folder:{image_folder}")
    [first] = extract(manifest, [backbone], out=out, settings=settings)
    if change == "bytes":
        [*_, last] = sorted(image_folder.rglob("*.png"))
        last.write_bytes(sorted(image_folder.rglob("*.png"))[0].read_bytes())
    elif change == "root":
        other = image_folder.rename(tmp_path / "moved")
        manifest = open_dataset(f"folder:{other}")
    elif change == "weights":
        backbone = replace(backbone, weights_digest="0" * 64)
    elif change == "size":
        backbone = load_backbone("timm:resnet10t", "random", 96)
    elif change == "more":
        manifest = manifest.take(np.arange(39))
    elif change == "damaged":
        first.store.write_bytes(first.store.read_bytes()[:5000])
    renamed = replace(manifest, dataset="other")
    [report] = extract(renamed, [backbone], out=out, settings=settings)
    copied = change == "nothing"
    assert (report.computed == 0, report.twin == first.store) == (copied, copied)
    assert report.computed in (0, len(manifest))


# --- what a store was made from, in words -------------------------------------------------------

MADE = {
    "backbone": {
        "name": "b",
        "architecture": "a",
        "weights": "published",
        "weights_digest": digest("published") * 4,
    },
    "features": ["final/mean"],
    "image": {
        "size": 224,
        "resize": 224,
        "interpolation": "bicubic",
        "decode": "scaled",
        "dicom": {
            "window": "header",
            "frame": "middle",
            "rules": "dicom-2",
            "versions": {"pydicom": "3"},
        },
    },
    "normalize": {"mean": [0.5], "std": [0.5]},
    "views": {"count": 2, "seed": 0, "recipe": 1},
    "precision": "float32",
    "manifest": {"images": 40, "digest": digest("images")},
    "versions": {"torch": "2.0", "pillow": "12"},
}


def leaves(made, path=()):
    for key, value in made.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]


@pytest.mark.parametrize(
    "path", [*leaves(MADE), ("image", "dicom"), ("views",), ("image", "dicom", "versions")]
)
def test_each_field_of_a_fingerprint_that_differs_is_said_in_words_without_its_hash(path):
    assert in_words(MADE, json.loads(json.dumps(MADE))) == []
    changes = {"weights": "random", "weights_digest": digest("other") * 4, "digest": digest("x")}
    other = json.loads(json.dumps(MADE))
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    if isinstance(inner[path[-1]], dict):
        del inner[path[-1]]
    else:
        inner[path[-1]] = changes.get(path[-1], 7)
    for one, two in ((MADE, other), (other, MADE)):
        [line] = in_words(one, two)
        assert ": stored " in line and ", asked " in line
        assert not any(len(word) > 20 for word in line.split()), line
        assert "{" not in line and "." not in line.split(":")[0].replace("--", ""), line


def test_published_and_random_weights_in_one_folder_are_told_in_words(tmp_path, image_folder):
    backbone = load_backbone("timm:resnet10t", "random", 64)
    manifest = open_dataset(f"folder:{image_folder}")
    extract(manifest, [backbone], out=tmp_path / "out")
    other = replace(backbone, weights="published", weights_digest="1" * 64)
    with pytest.raises(StaleStoreError) as told:
        extract(manifest, [other], out=tmp_path / "out")
    said = str(told.value).partition("something else: ")[2]
    assert said == (
        "weights: stored random ones, asked the published ones. Give -o for another folder or "
        "--name for a store beside it; --overwrite stale makes it anew"
    )
    done = call("extract", f"folder:{image_folder}", *SMALL, "-o", tmp_path / "out")
    assert "random weights, not the published ones: timm:resnet10t" in done.stderr


def test_a_limit_of_another_column_and_two_tables_of_one_name_are_told_apart(scans, tmp_path):
    assert call("extract", scans, *SMALL, "--label-col", "grade", "--limit", 12).exit_code == 0
    result = call("extract", scans, *SMALL, "--label-col", "kind", "--limit", 12)
    assert result.exit_code == 2
    assert "images: stored 12, asked 12 others" in result.stderr
    assert "--limit draws by label and split" in result.stderr
    assert "--name" in result.stderr and "digest" not in result.stderr
    (tmp_path / "else").mkdir()
    (tmp_path / "images").rename(tmp_path / "else" / "images")
    lines = (tmp_path / "scans.csv").read_text().splitlines()
    (tmp_path / "else" / "scans.csv").write_text("\n".join(lines[:1] + lines[1:11]))
    result = call(
        "extract", f"csv:{tmp_path / 'else' / 'scans.csv'}", *SMALL, "--label-col", "kind"
    )
    assert f"It has images of {tmp_path}, and these are of {tmp_path / 'else'}: give --name" in (
        result.stderr
    )
    assert "--limit" not in result.stderr
