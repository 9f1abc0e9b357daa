"""The Python face: paths as text, short reprs, results as a table; judged by pandas and by eye."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_manifest, make_store

from features.errors import ProbeError
from features.store import FeatureStore
from probe import results
from probe.heads import fit_heads
from probe.sweep import ProbeOptions, probe_all

r = np.random.default_rng(0)
X = r.standard_normal((90, 8)).astype(np.float32)
Y = (X[:, :3] + r.standard_normal((90, 3))).argmax(1)


def test_a_store_opens_by_a_path_as_text(tmp_path):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))
    with FeatureStore.open(str(path)) as store:
        np.testing.assert_array_equal(store.read("final/mean"), X)
        assert store.path == path


def test_reprs_fit_two_lines(tmp_path):
    manifest = make_manifest(Y, subject=[f"p{i // 2}" for i in range(90)])
    many = {f"block{i:02d}/mean": X for i in range(24)}
    path = make_store(tmp_path / "made" / "b.h5", many, manifest, bad={4: "file is empty"})
    heads = fit_heads(torch.from_numpy(X), torch.from_numpy(Y), C=[0.1, 1, 10])
    findings = np.eye(3, dtype=np.int32)[Y]
    with FeatureStore.open(path) as store:
        shown = [store, manifest, make_manifest(findings), heads, heads.head("abc", 1)]
        said = [repr(one) for one in shown]
    said.append(repr(store))  # closed by now
    assert all(len(one) < 200 and "\n" not in one for one in said), said
    assert "made: 89 done, 0 to be done, 1 bad; block00/mean (8,)" in said[0]
    assert "and 21 more" in said[0]
    assert said[1] == (
        "Manifest('made', 90 images of 45 subjects, 3 classes; 67 train, 23 test; split given)"
    )
    assert "3 findings" in said[2]
    assert said[3].startswith("Heads(softmax, 3 strengths x 1 groups x 1 labels, 3 outputs of 8 ")
    assert said[4] == "Head(softmax of 3 classes, 8 features, C = 1)"
    assert "closed" in said[5]


def test_results_are_a_table_in_one_line(tmp_path, monkeypatch):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))
    out = tmp_path / "out"
    found = probe_all(path, out=out, settings=ProbeOptions(C=(0.1, 1.0), shots=(2, None), folds=3))
    table = results.frame(str(out))
    raw = pd.read_json(out / "results.jsonl", lines=True)
    assert len(table) == len(raw) == len(found) == 2
    assert set(raw.columns) - {"metrics"} <= set(table.columns)
    for name in ("value", "ci_low", "n_train", "metric", "shots"):
        pd.testing.assert_series_equal(table[name], raw[name], check_dtype=False)
    for row, metrics in enumerate(raw["metrics"]):
        for name, numbers in metrics.items():
            for part, value in numbers.items():
                assert table.loc[row, f"metrics.{name}.{part}"] == pytest.approx(value, nan_ok=True)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ProbeError, match=r"needs pandas: pip install 'medprobe\[tables\]'"):
        results.frame(out)
