"""What is called, by which rule, and what is said of images unlike those of training."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_manifest, make_store
from safetensors.torch import load_file, save_file
from sklearn.metrics import recall_score
from sklearn.preprocessing import StandardScaler

from cli import cli
from probe.likeness import PARTS, SHARE, measure
from probe.results import load

QUICK = ("--C", "0.01,1", "--folds", 3, "--bootstrap", 100)


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def probed(tmp_path, y, classes, *, N=240):
    rng = np.random.default_rng(0)
    signal = y[:, None] if y.ndim == 1 else y
    X = rng.standard_normal((N, 6)) + 1.5 * signal @ np.eye(signal.shape[1], 6)
    manifest = make_manifest(y, classes=classes)
    store = make_store(tmp_path / "made" / "b.h5", X, manifest)
    done = call("probe", store, "-o", tmp_path / "out", *QUICK)
    assert done.exit_code == 0, done.output
    return store, X, manifest


@pytest.mark.parametrize("kind", ["binary", "findings"])
def test_calls_at_the_threshold_have_the_report_s_sensitivity_and_specificity(tmp_path, kind):
    rng = np.random.default_rng(1)
    if kind == "binary":
        y, classes = (rng.random(240) < 0.25).astype(int), ("benign", "=malignant")
    else:
        y, classes = (rng.random((240, 3)) < 0.25).astype(int), ("Edema", "Mass", "+Nodule")
    store, _, manifest = probed(tmp_path, y, classes)
    [result] = load(tmp_path / "out")
    plain = call("predict", tmp_path / "out", store)
    said = call("predict", tmp_path / "out", store, "--threshold")
    assert "--threshold adds" in plain.stderr and "--threshold" not in said.stderr
    without, rows = rows_of(plain.stdout), rows_of(said.stdout)
    assert not [name for name in without[0] if name.startswith("call")]
    assert [{k: v for k, v in row.items() if not k.startswith("call")} for row in rows] == without
    assert list(rows[0])[-1] == "reason"
    test = manifest.split == "test"
    for k, (name, t) in enumerate(result.thresholds["outputs"].items()):
        if kind == "binary":
            assert "predicted is the class of the largest p" in plain.stderr
            assert f"where p:{name} is {t['threshold']:.3g} or more" in plain.stderr
            called = np.array([row["call"].lstrip("'") == name for row in rows])
            truth = y == 1
            assert any((row["call"] != row["predicted"]) for row in rows)
        else:
            called = np.array([row[f"call:{name}"] == "1" for row in rows])
            truth = y[:, k] == 1
        for side, rate in ((1, "sensitivity"), (0, "specificity")):
            theirs = recall_score(truth[test], called[test], pos_label=side)
            assert t[rate]["value"] == pytest.approx(theirs)


def test_where_there_is_no_threshold_it_is_refused_before_anything_is_computed(tmp_path):
    y = np.arange(240) % 3
    store, _, _ = probed(tmp_path, y, "abc")
    refused = call("predict", tmp_path / "out", store, "--threshold")
    assert refused.exit_code == 2 and "more than two classes; leave --threshold" in refused.stderr
    assert "--threshold" not in call("predict", tmp_path / "out", store).stderr
    y = np.arange(240) % 2
    store, _, _ = probed(tmp_path / "two", y, "ab")
    [head] = (tmp_path / "two").rglob("heads.json")
    about = json.loads(head.read_text())
    del about["thresholds"]  # as earlier versions wrote it
    head.write_text(json.dumps(about))
    refused = call("predict", head, store, "--threshold")
    assert refused.exit_code == 2 and "probe again with this version" in refused.stderr


def test_images_unlike_those_of_training_are_counted_and_named(tmp_path):
    y = np.arange(240) % 2
    store, X, manifest = probed(tmp_path, y, "ab")
    [head] = (tmp_path / "out").rglob("heads.json")
    away = X.copy()
    away[[3, 50, 77, 200]] += 8
    other = make_store(tmp_path / "other.h5", away, manifest)
    said = call("predict", head, other)
    found = re.search(
        r"(\d+) of 240 images are unlike .* may mean nothing: (.*), \.\.\.", said.stderr
    )
    assert found and 4 <= int(found[1]) <= 8 and said.exit_code == 0
    assert {*found[2].split(", ")} < {str(manifest.id[k]) for k in (3, 50, 77, 200)}
    assert list(rows_of(said.stdout)[0]) == list(rows_of(call("predict", head, store).stdout)[0])
    tensors = head.with_suffix(".safetensors")
    kept = load_file(tensors)
    save_file({k: kept[k] for k in ("coef", "intercept")}, tensors)
    old = call("predict", head, other)  # a head of earlier versions doesn't say it
    assert old.exit_code == 0 and "unlike" not in old.stderr and old.stdout == said.stdout
    save_file(kept | {"seen_scale": kept["seen_scale"][:3]}, tensors)
    wrong = call("predict", head, other)
    assert wrong.exit_code == 2 and "not a number per feature" in wrong.stderr


def test_distances_of_training_images_are_those_of_images_left_out(tmp_path):
    """By scikit-learn's scaler, fitted without the subjects that are measured."""
    rng = np.random.default_rng(3)
    X = (1e4 + rng.standard_normal((90, 7)) * np.arange(7)).astype(np.float32)  # one is constant
    subjects = np.array([f"p{i // 3}" for i in range(90)])
    seen = measure(lambda: iter(torch.from_numpy(X).split(17)), subjects)
    assert seen
    member = np.unique(subjects, return_inverse=True)[1] % PARTS
    theirs = np.empty(90)
    for part in range(PARTS):
        scaler = StandardScaler().fit(X[member != part][:, 1:].astype(float))
        z = scaler.transform(X[member == part][:, 1:].astype(float))
        theirs[member == part] = np.sqrt((z**2).mean(1))
    assert seen.usual == pytest.approx(np.quantile(theirs, SHARE), rel=1e-6)
    whole = StandardScaler().fit(X.astype(float))
    assert torch.allclose(seen.mean, torch.from_numpy(whole.mean_))
    assert np.allclose(seen.scale[1:], whole.scale_[1:]) and seen.scale[0] == 0
    assert measure(lambda: iter([torch.from_numpy(X)]), np.full(90, "one")) is None
