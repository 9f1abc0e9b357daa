"""The store's promises, judged by raw h5py, by other processes and by kill -9."""

import os
import signal
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest
from conftest import FINGERPRINT, make_manifest, make_store
from hypothesis import given, settings
from hypothesis import strategies as st

from features.columns import Column
from features.errors import StoreError, StoreLockedError
from features.lock import writing
from features.store import FeatureStore

X = np.random.default_rng(0).standard_normal((150, 7)).astype(np.float32)
Y = np.arange(150) % 3


def test_raw_h5py_reads_what_docs_format_says(tmp_path):
    manifest = make_manifest(Y)
    path = make_store(tmp_path / "s.h5", X, manifest, bad={3: "file not found"})
    with h5py.File(path, "r") as file:
        assert file.attrs["format"] == b"medprobe-features"
        assert file.attrs["version"] == 2
        done = file["done"][:]
        assert done[3] == 2
        assert (np.delete(done, 3) == 1).all()
        data = file["features/final/mean"]
        assert data.chunks is None  # contiguous: no structure changes while it is filled
        np.testing.assert_array_equal(np.delete(data[:], 3, 0), np.delete(X, 3, 0))
        assert [zlib.crc32(row.tobytes()) for row in data[4:]] == file[
            "checksums/features/final/mean"
        ][4:].tolist()
        assert file["reason"][3] == b"file not found"
        assert file["manifest/id"].asstr()[:].tolist() == manifest.id.tolist()
        assert file["manifest/label"][:].tolist() == Y.tolist()
        assert set(file["manifest"].attrs) >= {"classes", "task", "split_from", "split_digest"}


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    rows=st.lists(st.integers(0, 19), max_size=30),
    start=st.integers(-3, 25),
    stop=st.integers(-3, 25),
)
def test_columns_read_and_write_as_numpy_arrays_do(shape, rows, start, stop, tmp_path_factory):
    whole = np.random.default_rng(0).standard_normal((20, *shape)).astype("<f4")
    path = tmp_path_factory.mktemp("columns") / "file"
    path.write_bytes(b"header" + whole.tobytes() + b"rest")
    descriptor = os.open(path, os.O_RDWR)
    column = Column(descriptor, 6, whole.shape, whole.dtype)
    np.testing.assert_array_equal(column.take(np.array(rows, int)), whole[rows])
    np.testing.assert_array_equal(column.read(start, stop), whole[start:stop])
    joined = [block for _, block in column.blocks(3 * column.row_bytes)]
    np.testing.assert_array_equal(np.concatenate(joined), whole)
    unique = np.array(list(dict.fromkeys(rows)), int)
    column.write(unique, -whole[unique])
    whole[unique] *= -1
    assert path.read_bytes() == b"header" + whole.tobytes() + b"rest"
    os.close(descriptor)


def test_forked_processes_and_threads_read_at_once_what_is_there(tmp_path):
    path = make_store(tmp_path / "s.h5", X, make_manifest(Y))
    with FeatureStore.open(path) as store:
        rng = np.random.default_rng(0)
        orders = [rng.permutation(150) for _ in range(8)]

        def right(order):
            return all((store.read("final/mean", order) == X[order]).all() for _ in range(50))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(right, orders))
        children = []
        for order in orders[:3]:
            with warnings.catch_warnings():  # forking beside torch's threads is what readers do
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                os._exit(0 if right(order) else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_filling_changes_no_byte_of_the_file_s_structure(tmp_path):
    path = tmp_path / "s.h5"
    FeatureStore.create(
        path,
        make_manifest(Y),
        {"final/mean": (7,)},
        fingerprint=FINGERPRINT,
        default_feature="final/mean",
        batch_size=64,
    )
    empty = path.read_bytes()
    with FeatureStore.open(path, write=True) as store:
        source = {"hash": ["0" * 64] * 150, "size": [1] * 150, "mtime_ns": [1] * 150}
        store.commit(np.arange(150), {"final/mean": X}, source, {3: "file is empty"})
    full = path.read_bytes()
    places = []
    with h5py.File(path) as file:
        file.visititems(
            lambda _, item: (
                places.append((item.id.get_offset(), item.id.get_storage_size()))
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    assert len(empty) == len(full)
    assert empty != full
    a, b = bytearray(empty), bytearray(full)
    for start, size in places:
        a[start : start + size] = b[start : start + size] = bytes(size)
    assert a == b


def test_a_flipped_byte_is_found_and_named(tmp_path):
    path = make_store(tmp_path / "s.h5", X, make_manifest(Y))
    with h5py.File(path) as file:
        offset = file["features/final/mean"].id.get_offset()
    with path.open("r+b") as file:
        file.seek(offset + 42 * 7 * 4 + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with FeatureStore.open(path) as store:
        assert damaged(store) == {"final/mean": [42]}


def damaged(store):
    return {name: rows.tolist() for name, rows in store.verify() if len(rows)}


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing_that_is_read(tmp_path):
    path = make_store(tmp_path / "s.h5", X, make_manifest(Y), bad={3: "file is empty"})

    def everything():
        with FeatureStore.open(path) as store:
            found = damaged(store)
            manifest = store.manifest()
            read = (
                np.delete(store.read("final/mean"), 3, 0).tobytes(), store.done.tobytes(),
                store.bad(), store.fingerprint, store.attributes, store.about, str(manifest),
                manifest.label.tobytes(), {k: v.tobytes() for k, v in store.source().items()},
            )  # fmt: skip
        return found, read

    whole = path.read_bytes()
    _, untouched = everything()
    rng = np.random.default_rng(0)
    found = 0
    for place in np.sort(rng.choice(len(whole), 400, replace=False)).tolist():
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        try:
            wrong, read = everything()
        except StoreError:
            found += 1
            continue
        found += bool(wrong)
        marks = np.frombuffer(read[1], np.uint8)
        # A mark turned to 0 says that a row is to be done again, which is never wrong.
        lost = (marks == 0) & (np.frombuffer(untouched[1], np.uint8) != 0)
        assert wrong or read == untouched or lost.any(), place
    assert found > 200  # most bytes mean something


def test_features_that_are_not_finite_are_refused_before_anything_is_written(tmp_path):
    path = make_store(tmp_path / "s.h5", X, make_manifest(Y))
    spoilt = X[:4].copy()
    spoilt[2, 1] = np.inf
    source = {"hash": ["0" * 64] * 4, "size": [1] * 4, "mtime_ns": [1] * 4}
    with FeatureStore.open(path, write=True) as store:
        with pytest.raises(StoreError, match=r"row 12 \(00012\.png\) is not finite"):
            store.commit(np.arange(10, 14), {"final/mean": spoilt}, source, {})
        np.testing.assert_array_equal(store.read("final/mean"), X)


def test_a_second_writer_is_told_who_holds_the_store(tmp_path):
    path = tmp_path / "s.h5"
    hold = f"""
from pathlib import Path
from features.lock import writing
with writing(Path({str(path)!r})):
    print("held", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(StoreLockedError, match=f"being written by process {other.pid} on"),
            writing(path),
        ):
            pass
        other.kill()  # and a lock ends with its process
        other.wait()
        with writing(path):
            pass


def test_relabelling_keeps_every_feature(tmp_path):
    path = make_store(tmp_path / "s.h5", X, make_manifest(Y), bad={3: "is empty"})
    with FeatureStore.open(path, write=True) as store:
        done = store.done
        store.relabel(make_manifest((Y + 1) % 3))
        assert store.manifest().label.tolist() == ((Y + 1) % 3).tolist()
    with FeatureStore.open(path) as store:
        np.testing.assert_array_equal(store.done, done)
        np.testing.assert_array_equal(np.delete(store.read("final/mean"), 3, 0), np.delete(X, 3, 0))
        assert store.bad() == {3: "is empty"}
        assert not any(rows.size for _, rows in store.verify())


def test_what_is_not_a_store_is_refused(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(StoreError, match="can't be opened as HDF5"):
        FeatureStore.open(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(StoreError, match="is not a feature store"):
        FeatureStore.open(tmp_path / "other.h5")
    with pytest.raises(StoreError, match="make it with `medprobe extract`"):
        FeatureStore.open(tmp_path / "none.h5")


def test_a_store_too_large_for_the_disk_is_refused_at_once(tmp_path):
    with pytest.raises(StoreError, match=r"needs \d+\.\d GB and .* are free"):
        FeatureStore.create(
            tmp_path / "s.h5",
            make_manifest(Y),
            {"final/mean": (10**13,)},
            fingerprint=FINGERPRINT,
            default_feature="final/mean",
            batch_size=64,
        )
    assert not (tmp_path / "s.h5").exists()


def test_kill_9_in_the_middle_loses_nothing_and_the_rest_is_the_same_to_the_bit(
    tmp_path, image_folder
):
    def command(out):
        return [
            sys.executable, "cli.py", "extract", f"folder:{image_folder}",
            "-m", "efficientnet_lite0", "--batch-size", "2", "-o", str(out),
        ]  # fmt: skip

    def store(out):
        return out / "images" / "efficientnet_lite0.h5"

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    subprocess.run(command(tmp_path / "calm"), check=True, cwd=root, capture_output=True)
    rough = store(tmp_path / "rough")
    survived = [0]
    for goal in (4, 16, 28):  # images committed before each kill
        with subprocess.Popen(
            command(tmp_path / "rough"),
            cwd=root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as run:
            while run.poll() is None:
                if rough.exists():
                    with FeatureStore.open(rough) as opened:
                        if (opened.done == 1).sum() >= goal:
                            break
                time.sleep(0.002)
            run.send_signal(signal.SIGKILL)
        with FeatureStore.open(rough) as opened:
            assert not any(rows.size for _, rows in opened.verify())
            survived.append(int((opened.done == 1).sum()))
            assert survived[-1] >= max(goal, survived[-2])
    assert survived[1] < 40
    subprocess.run(command(tmp_path / "rough"), check=True, cwd=root, capture_output=True)
    with FeatureStore.open(store(tmp_path / "calm")) as calm, FeatureStore.open(rough) as resumed:
        assert (resumed.done == 1).all()
        assert calm.read("final/mean").tobytes() == resumed.read("final/mean").tobytes()
        assert calm.fingerprint == resumed.fingerprint
