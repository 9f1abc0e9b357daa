"""CKA by minibatches is what full matrices and the definition of HSIC give."""

import csv
from itertools import permutations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import FINGERPRINT, make_manifest, make_store

from cli import cli
from features.errors import ProbeError
from probe import cka
from probe.analysis import likeness

rng = np.random.default_rng(0)


def pair(n, seed=0):
    """Two sets of features that have some directions in common."""
    r = np.random.default_rng(seed)
    X = r.standard_normal((n, 7)) * np.arange(1, 8) + 5
    Y = X @ r.standard_normal((7, 11)) * 0.3 + 2 * r.standard_normal((n, 11))
    return X, Y


def full(X, Y):
    """Plain CKA (Kornblith et al. 2019) with centred N x N matrices: biased, for large N alike."""
    H = np.eye(len(X)) - 1 / len(X)
    K, L = H @ X @ X.T @ H, H @ Y @ Y.T @ H
    return (K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum())


def test_unbiased_hsic_is_its_definition_over_all_quadruples():
    X, Y = pair(6)
    K, L = X @ X.T, Y @ Y.T
    terms = [
        K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q]) for i, j, q, r in permutations(range(6), 4)
    ]
    found = cka.hsic([torch.from_numpy(X), torch.from_numpy(Y)])
    assert float(found[0, 1]) == pytest.approx(np.mean(terms), rel=1e-9)


def test_minibatches_give_what_the_full_matrix_gives():
    X, Y = pair(1600)
    whole = full(X, Y)

    def parts(n):
        return [(X[i : i + n], Y[i : i + n]) for i in range(0, len(X), n)]

    for n, tolerance in ((100, 0.01), (8, 0.03)):
        batches = [[torch.from_numpy(x) for x in part] for part in parts(n)]
        assert cka.cka(batches)[0, 1] == pytest.approx(whole, abs=tolerance)
    biased = np.mean([full(*part) for part in parts(8)])
    assert abs(biased - whole) > 0.05  # what the unbiased estimate is for


def test_turning_scaling_and_shifting_change_nothing_and_a_constant_has_none():
    X, _ = pair(200)
    turn, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    sets = [torch.from_numpy(x) for x in (X, 3 * X @ turn + 100, np.ones((200, 2)))]
    found = cka.cka([sets])
    assert found[0, 1] == pytest.approx(1, abs=1e-9)
    assert np.isnan(found[2]).all()
    with pytest.raises(ProbeError, match="4 images in a batch: found 3"):
        cka.cka([[X[:3] for X in sets]])


@pytest.fixture
def stores(tmp_path):
    X, Y = (x.astype(np.float32) for x in pair(120))
    layers = {"block00/cls": Y, "block01/cls": X, "final/cls": X}
    manifest = make_manifest(rng.integers(0, 3, 120))
    first = make_store(tmp_path / "a" / "made" / "b.h5", layers, manifest)
    layers = {"block00/cls": Y, "block01/cls": Y, "final/cls": Y}
    second = make_store(tmp_path / "tuned" / "made" / "b.h5", layers, manifest)
    return first, second


def test_two_stores_of_a_backbone_are_held_against_each_other_layer_by_layer(stores, tmp_path):
    command = [
        "analyze",
        "cka",
        *map(str, stores),
        "-o",
        str(tmp_path / "out"),
        "--batch-size",
        "120",
    ]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    [table] = (tmp_path / "out").glob("cka-*.csv")
    header, *rows = list(csv.reader(table.read_text().splitlines()))
    assert header[1:] == [row[0] for row in rows] == ["block00", "block01", "final"]
    found = np.array([[float(v) for v in row[1:]] for row in rows])
    X, Y = pair(120)
    direct = cka.cka([[torch.from_numpy(x.astype(np.float32)) for x in (X, Y)]])[0, 1]
    np.testing.assert_allclose(found[0], 1, atol=1e-6)
    np.testing.assert_allclose(found[1:], direct, atol=1e-6)
    assert {p.suffix for p in (tmp_path / "out").iterdir()} >= {".svg", ".png", ".csv"}


def test_images_are_matched_by_id_and_too_few_in_common_is_an_error(stores, tmp_path):
    X, _ = (x.astype(np.float32) for x in pair(120))
    order = rng.permutation(120)[:60]
    manifest = make_manifest(np.zeros(60, int), ids=[f"{i:03d}" for i in order])
    same = make_manifest(np.zeros(120, int), ids=[f"{i:03d}" for i in range(120)])
    other = FINGERPRINT | {"backbone": FINGERPRINT["backbone"] | {"name": "other"}}
    some = make_store(tmp_path / "x" / "made" / "c.h5", X[order], manifest)
    whole = make_store(tmp_path / "x" / "made" / "d.h5", X, same, fingerprint=other)
    likeness([some, whole], tmp_path / "out", batch_size=60, seed=0)
    rows = list(csv.reader((tmp_path / "out" / "cka-last-layers.csv").read_text().splitlines()))
    assert float(rows[1][2]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ProbeError, match="0 images in common"):
        likeness([some, stores[0]], tmp_path / "out", batch_size=60, seed=0)
