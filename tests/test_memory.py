"""Features that stay in the file lead to the same result, within a real limit of memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_manifest, make_store

from features.store import FeatureStore
from probe import data
from probe.heads import fit_heads
from probe.solve.sources import FromStore, InMemory
from probe.sweep import ProbeOptions, probe

rng = np.random.default_rng(0)
N, D = 3000, 20
X = rng.standard_normal((N, D)).astype(np.float32)
Y = (X[:, :3] + 1.5 * rng.standard_normal((N, 3))).argmax(1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_heads_from_a_file_are_those_from_memory(tmp_path, kind):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))
    rows = np.sort(rng.choice(N, 2000, replace=False))
    y = torch.from_numpy(Y[rows])
    if kind == "sigmoid":
        y = torch.nn.functional.one_hot(y).double()
    weights = torch.from_numpy(rng.integers(0, 3, (3, 2000)).astype(np.float32))
    C = [1e-4, 1e-2, 1.0, 100.0]
    with FeatureStore.open(path) as store:
        stored = FromStore(lambda part: store.read("final/mean", part), rows, D, free_bytes=1)
        assert stored.chunk_rows == 256
        there = fit_heads(stored, y, C=C, weights=weights, tol=1e-9)
    here = fit_heads(torch.from_numpy(X[rows]), y, C=C, weights=weights, tol=1e-9)
    torch.testing.assert_close(there.value, here.value, rtol=1e-7, atol=0)
    torch.testing.assert_close(there.coef, here.coef, rtol=1e-3, atol=1e-4)


def test_a_file_is_read_in_order_and_whole():
    rows = np.array([0, 1, 2, 700, 701, 5000, 5001])
    table = np.arange(6000, dtype=np.float32)[:, None]
    stored = FromStore(lambda part: table[part], rows, 1, free_bytes=1)
    assert torch.cat(list(stored.chunks()))[:, 0].tolist() == rows.tolist()
    assert torch.equal(next(InMemory(torch.ones(2, 3)).chunks()), torch.ones(2, 3))


@pytest.mark.parametrize("head", ["linear", "knn"])
def test_a_probe_of_what_does_not_fit_says_the_same(tmp_path, monkeypatch, head):
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y))
    own = {"k": (5, 20)} if head == "knn" else {"C": (1e-3, 1.0)}
    settings = ProbeOptions(head=head, folds=3, **own)
    here = probe(path, out=tmp_path / "here", settings=settings)
    monkeypatch.setattr(data, "available", lambda *_: 4 * X.nbytes - 1)
    there = probe(path, out=tmp_path / "there", settings=settings)
    assert here.value == pytest.approx(there.value, abs=2e-3)
    assert here.C == there.C
    np.testing.assert_allclose(here.folds["scores"], there.folds["scores"], atol=2e-3)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from features.memory import _table
from probe.sweep import ProbeOptions, probe
torch.linalg.eigh(torch.eye(64).double())
used = _table(Path("/proc/self/status"))["VmData"]
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[3]),) * 2)
try:
    whole = bytearray(2 * int(sys.argv[3]))
    sys.exit("the limit does not hold")
except MemoryError:
    pass
settings = ProbeOptions(C=(0.01, 1.0), bootstrap=100)
result = probe(Path(sys.argv[1]), out=Path(sys.argv[2]), settings=settings)
print(repr(result.folds["scores"]), result.converged)
"""


@pytest.mark.slow
def test_a_quarter_of_the_store_is_memory_enough(tmp_path):
    n, d = 160_000, 768
    X = rng.standard_normal((n, d), dtype=np.float32)
    Y = (X[:, :4] + 2 * rng.standard_normal((n, 4))).argmax(1)
    split = np.where(
        np.arange(n) % 50 == 0, "test", np.where(np.arange(n) % 10 == 1, "val", "train")
    )
    path = make_store(tmp_path / "made" / "b.h5", X, make_manifest(Y, split=split), batch=8192)
    words = [sys.executable, "-c", LIMITED, path, tmp_path / "out", str(path.stat().st_size // 4)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    settings = ProbeOptions(C=(0.01, 1.0), bootstrap=100)
    here = probe(path, out=Path(tmp_path / "here"), settings=settings)
    scores, converged = done.stdout.strip().rsplit(" ", 1)
    np.testing.assert_allclose(np.array(eval(scores)), here.folds["scores"], atol=1e-4)
    assert converged == "True"
