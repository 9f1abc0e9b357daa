"""What was damaged in a store is never taken for a feature, a label or a mark by what reads it."""

import csv
import io
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import make_manifest, make_store

from cli import cli
from features.errors import StoreError
from features.store import FeatureStore
from probe import data
from probe.heads import fit_heads
from probe.sweep import ProbeOptions, probe_all

N = 120
X = np.random.default_rng(1).standard_normal((N, 6)).astype(np.float32)
Y = np.arange(N) % 3
FAST = ProbeOptions(C=(0.1, 1.0), folds=3, bootstrap=100)


def call(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "s.h5", X + Y[:, None], make_manifest(Y), bad={4: "file is empty"})


def spoil(store, name, place):
    """Flip a bit; no library is told."""
    with h5py.File(store) as file:
        offset, row = file[name].id.get_offset(), file[name].id.get_storage_size() // N
    data = bytearray(store.read_bytes())
    data[offset + place * row + row - 1] ^= 0x40  # of a float its exponent
    store.write_bytes(data)


def test_predict_gives_a_damaged_row_its_reason_and_the_others_their_answers(tmp_path, store):
    [result] = probe_all(store, out=tmp_path / "out", settings=FAST)
    head = tmp_path / "out" / result.heads
    before = list(csv.DictReader(io.StringIO(call("predict", head, store).stdout)))
    spoil(store, "features/final/mean", 7)
    said = call("predict", head, store)
    assert said.exit_code == 1
    assert "2 of 120 images have no answer" in said.stderr
    rows = list(csv.DictReader(io.StringIO(said.stdout)))
    assert "`medprobe verify`" in rows[7]["reason"]
    assert {v for k, v in rows[7].items() if k not in ("id", "reason")} == {""}
    assert rows[4]["reason"] == "file is empty"
    assert [r for i, r in enumerate(rows) if i != 7] == [r for i, r in enumerate(before) if i != 7]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("features/final/mean", "final/mean of 1 images is damaged, from row 7 on"),
        ("manifest/label", "the manifest is damaged"),
        ("manifest/split", "the manifest is damaged"),
        ("done", "marks of 1 images in /done are damaged, from row 7 on"),
    ],
)
def test_probe_ends_at_what_is_damaged_and_names_verify(tmp_path, store, name, said):
    spoil(store, name, 7)
    found = call("probe", store, "-o", tmp_path / "out", "--C", "1", "--folds", "3")
    assert found.exit_code == 2
    assert said in found.stderr
    assert "medprobe verify" in found.stderr
    assert not list(Path(tmp_path, "out").glob("**/*.csv"))


def test_rows_that_stay_in_the_file_are_checked_once_and_found_damaged(
    tmp_path, store, monkeypatch
):
    monkeypatch.setattr(data, "COPIES", 1 << 40)  # nothing fits the memory
    with FeatureStore.open(store) as opened:
        source = data.load(opened, opened.manifest(), "final/mean", "zeros").features.source()
        y = np.delete(Y, 4)
        fit_heads(source, torch.from_numpy(y), C=[1.0])
        spoil(store, "features/final/mean", 7)
        list(source.chunks())  # what was whole once isn't checked at every pass
    with FeatureStore.open(store) as opened, pytest.raises(StoreError, match="from row 7 on"):
        source = data.load(opened, opened.manifest(), "final/mean", "zeros").features.source()
        fit_heads(source, torch.from_numpy(y), C=[1.0])


def test_rows_that_mean_nothing_are_not_checked(store):
    spoil(store, "features/final/mean", 4)  # of a bad image
    with FeatureStore.open(store) as opened:
        assert len(opened.read("final/mean")) == N
        values, wrong = opened.examine("final/mean", np.array([4, 9]))
        assert not len(wrong)
        np.testing.assert_array_equal(values[1], (X + Y[:, None])[9])
