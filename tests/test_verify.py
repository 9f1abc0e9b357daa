"""What `verify` finds, judged by flips of bytes all over a file and by raw h5py."""

import itertools
import os

import h5py
import numpy as np
import pytest
from conftest import FINGERPRINT, make_manifest, make_store

from features.errors import StoreError
from features.manifest import Manifest
from features.store import FeatureStore

N, D = 12, 5
X = np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)
BAD, PENDING = 3, (10, 11)  # rows


def store_of_all_kinds(path, classes=3):
    """A store with a bad row, two that are still to be done, and attributes above 4 kB."""
    names = [f"finding {'y' * 40} {k}" for k in range(classes)]
    manifest = make_manifest(np.arange(N) % 3, classes=names)
    make_store(path, X, manifest, bad={BAD: "file is empty"}, batch=4)
    with FeatureStore.open(path, write=True) as store:
        store.forget(np.array(PENDING))
    return path


def places(path):
    """Where each dataset lies, and its bytes of a row."""
    found = {}
    with h5py.File(path) as file:

        def add(name, item):
            if isinstance(item, h5py.Dataset):
                size = item.id.get_storage_size()
                found[name] = (item.id.get_offset(), size, size // item.shape[0])

        file.visititems(add)
    return found


def meaningless(path):
    """The bytes that docs/format.md says mean nothing."""
    filled = ("features/", "views/", "checksums/features/", "checksums/views/")
    found = set()
    for name, (offset, _, row) in places(path).items():
        image = name in ("reason", "checksums/source", "manifest/hash", "manifest/size")
        of_pending = image or name == "manifest/mtime_ns"
        rows = PENDING if of_pending else ()
        rows = (*PENDING, BAD) if name.startswith(filled) else rows
        for k in rows:
            found |= set(range(offset + k * row, offset + (k + 1) * row))
    return found


def fault(path):
    """What verify says: nothing, the rows, or the error."""
    try:
        with FeatureStore.open(path) as store:
            return {name: rows.tolist() for name, rows in store.verify() if len(rows)}
    except StoreError as error:
        return str(error)


def test_a_thousand_flipped_bytes_of_a_thousand_are_found(tmp_path):
    path = store_of_all_kinds(tmp_path / "s.h5", classes=120)
    whole, nothing = path.read_bytes(), meaningless(path)
    assert fault(path) == {}
    assert len(nothing) < 0.1 * len(whole)
    rng = np.random.default_rng(0)
    missed, tried = [], 0
    regions = [range(o, o + size) for o, size, _ in places(path).values()]
    taken = set(itertools.chain(*regions))
    regions.append([i for i in range(len(whole)) if i not in taken])
    draws = iter(lambda: int(rng.choice(regions[rng.integers(len(regions))])), None)
    for place in draws:
        if place in nothing:
            continue
        spoilt = bytearray(whole)
        spoilt[place] ^= int(rng.integers(1, 256))
        path.write_bytes(spoilt)
        if not fault(path):
            missed.append(place)
        tried += 1
        if tried == 1000:
            break
    assert missed == []
    for place in rng.choice(sorted(nothing), 50, replace=False).tolist():
        spoilt = bytearray(whole)
        spoilt[place] ^= 255
        path.write_bytes(spoilt)
        assert fault(path) == {}, place


def test_a_cut_and_a_longer_file_are_found(tmp_path):
    path = store_of_all_kinds(tmp_path / "s.h5")
    whole = path.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole + b"\0"):
        path.write_bytes(data)
        assert fault(path)


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1), (1, 0), (0, 1), (0, 2), (1, 7)])
def test_a_mark_that_says_something_else_is_found_and_named(tmp_path, old, new):
    path = store_of_all_kinds(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        row = int(np.flatnonzero(file["done"][:] == old)[0])
        file["done"][row] = new
    assert any(row in rows for rows in fault(path).values())
    if old != 0:  # else its other bytes say that it was never committed
        with (
            FeatureStore.open(path) as store,
            pytest.raises(StoreError, match=f"marks of 1 images in /done are damaged.*row {row}"),
        ):
            _ = store.done
        with (
            pytest.warns(UserWarning, match="marks of 1 images were damaged"),
            FeatureStore.open(path, write=True) as store,
        ):
            assert store.done[row] == 0
        assert fault(path) == {}


def test_a_crash_between_a_mark_and_its_checksum_is_no_fault_and_is_mended(tmp_path):
    path = store_of_all_kinds(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        file["checksums/done"][4:8] = 0
    assert fault(path) == {}
    FeatureStore.open(path, write=True).close()
    with h5py.File(path) as file:
        assert (file["checksums/done"][4:8] != 0).all()


def test_every_moment_of_a_commit_and_of_forgetting_leaves_a_store_without_fault(
    tmp_path, monkeypatch
):
    """Every write that the system calls make is a moment at which it may be the last one."""
    path = store_of_all_kinds(tmp_path / "s.h5")
    source = {"hash": ["f" * 64] * 2, "size": [2] * 2, "mtime_ns": [2] * 2}
    rows, real, whole = np.array(PENDING), os.pwrite, path.read_bytes()

    class Killed(BaseException):
        pass

    for act, begun in ((False, 0), (True, 0)):
        for last in itertools.count(1):
            count = [begun]

            def pwrite(*given, count=count, last=last):
                count[0] += 1
                if count[0] == last:
                    raise Killed
                return real(*given)

            path.write_bytes(whole)
            store = FeatureStore.open(path, write=True)
            monkeypatch.setattr(os, "pwrite", pwrite)
            try:
                if act:
                    store.forget(np.array([5, 6]))
                else:
                    store.commit(rows, {"final/mean": -X[rows]}, source, {})
                done = True
            except Killed:
                done = False
            monkeypatch.setattr(os, "pwrite", real)
            store.close()
            assert fault(path) == {}, (act, last)
            if done:
                break
        assert last > 3


def test_a_store_without_its_features_is_a_fault(tmp_path):
    manifest = make_manifest(np.arange(N) % 3)
    named = FINGERPRINT | {"features": ["final/mean", "final/cls"]}
    path = make_store(tmp_path / "s.h5", X, manifest, fingerprint=named)
    assert "is without its final/cls" in fault(path)
    make_store(path, X, manifest)
    earlier(path)
    with h5py.File(path, "r+") as file:
        del file["features/final/mean"]
    assert "is without its features" in fault(path)


def earlier(path):
    """Make a store what the version before wrote."""
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        del file["checksums/done"], file["checksums/structure"]
    return path


def test_a_store_of_an_earlier_version_opens_and_says_what_cannot_be_checked(tmp_path):
    path = earlier(store_of_all_kinds(tmp_path / "s.h5"))
    assert fault(path) == {}
    with FeatureStore.open(path, write=True) as store:
        assert "attributes above 4 kB" in store.unverifiable()
        rows = np.array(PENDING)
        source = {"hash": ["f" * 64] * 2, "size": [2] * 2, "mtime_ns": [2] * 2}
        store.commit(rows, {"final/mean": X[rows]}, source, {})
        assert (store.done != 0).all()
        manifest: Manifest = store.manifest()
        store.relabel(manifest)  # what is built anew has all checksums
        assert store.unverifiable() == ""
    FeatureStore.open(path, write=True).close()
    with h5py.File(path) as file:
        assert (file["checksums/done"][:] != 0).all()
    assert fault(path) == {}
    with h5py.File(earlier(path), "r+") as file:
        file["done"][:8] = 2  # by their reasons it is seen even without checksums
    assert fault(path)["done"] == [0, 1, 2, 4, 5, 6, 7]


def test_a_remark_on_a_good_image_is_no_fault_and_is_covered(tmp_path):
    path = store_of_all_kinds(tmp_path / "s.h5")
    rows, source = np.array(PENDING), {"hash": ["f" * 64] * 2, "size": [2] * 2, "mtime_ns": [2] * 2}
    with FeatureStore.open(path, write=True) as store:
        store.commit(rows, {"final/mean": X[rows]}, source, {}, {10: "its window was not used"})
    assert fault(path) == {}
    with h5py.File(path, "r+") as file:
        file["reason"][10] = b"another"
    assert fault(path) == {"source": [10]}
