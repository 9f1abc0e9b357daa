"""Stores filled in parts, by a worker in this process: judged by what one process fills at once."""

import shutil
from contextlib import contextmanager
from functools import partial

import h5py
import numpy as np
import pytest

from features import distributed, parts
from features.datasets import open_dataset
from features.datasets.limit import limited
from features.errors import StaleStoreError
from features.extract import extract
from features.manifest import Manifest
from features.plan import ExtractionSettings
from features.store import FeatureStore
from features.urls import Url

SETTINGS = ExtractionSettings(batch_size=4, workers=1)


class Pool:
    """A pool of one worker, in this process."""

    def __init__(self, worker):
        self.worker, self.filled = worker, []

    def room(self):
        return 2

    def asked(self, method):
        return [getattr(self.worker, method)()]

    def run(self, method, items, *, stop, tick, in_hand):
        for item in items:
            if stop():
                return
            yield item, getattr(self.worker, method)(item)
            if method == "fill":
                self.filled.append(item.rows.tolist())
            tick()


@pytest.fixture
def pools():
    return []


@pytest.fixture
def engine(pools, monkeypatch):
    """An engine whose parts are of 8 images, of one worker."""
    monkeypatch.setattr(parts, "MIN_IMAGES", 8)
    monkeypatch.setattr(parts, "PARTS", 100)

    @contextmanager
    def pool_of(kind, *args):
        worker = kind(*args)
        pools.append(Pool(worker))
        yield pools[-1]
        worker._close()

    return partial(distributed.fill_by, pool_of)


def contents(path):
    """Everything in an HDF5 file but when it was made, and the checksum of that, by h5py."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update(
                {name: item[()].tobytes()} if isinstance(item, h5py.Dataset) else {}
            )
        )
        found.pop("checksums/structure")
        for item in (file, file["manifest"]):
            found |= {f"{item.name}@{k}": str(v) for k, v in item.attrs.items() if k != "created"}
    return found


def test_parts_make_the_store_of_one_process_to_the_bit(
    tmp_path, images, backbone, engine, pools, one_thread
):
    settings = ExtractionSettings(batch_size=4, workers=1, tokens=True, views=1)
    [here] = extract(images, [backbone], out=tmp_path / "here", settings=settings)
    shown = []
    [there] = extract(
        images, [backbone], out=tmp_path / "there", settings=settings, engine=engine,
        progress=lambda *now: shown.append(now),
    )  # fmt: skip
    assert contents(here.store) == contents(there.store)
    assert (there.computed, there.reused, there.bad) == (here.computed, here.reused, here.bad)
    assert len(pools[0].filled) == 5
    assert {path.suffix for path in there.store.parent.iterdir()} == {".h5", ".lock"}
    assert shown[-1] == (40, 40, 1)
    assert [done for done, _, _ in shown] == sorted(done for done, _, _ in shown)


def test_a_store_of_some_images_grows_in_parts_to_the_bit(
    tmp_path, images, backbone, engine, one_thread
):
    for out, some in (("here", None), ("there", engine)):
        first = limited(images, 13, seed=1)
        extract(first, [backbone], out=tmp_path / out, settings=SETTINGS, engine=some)
        [report] = extract(images, [backbone], out=tmp_path / out, settings=SETTINGS, engine=some)
        assert (report.computed, report.reused) == (26, 13)
    here, there = (tmp_path / out / "images" / "efficientnet_lite0.h5" for out in ("here", "there"))
    assert contents(here) == contents(there)


def test_two_backbones_of_other_batches_are_filled_together(
    tmp_path, images, backbone, engine, one_thread
):
    from features.backbones import load_backbone

    other = load_backbone("timm:resnet10t", "random", 64)
    for out, some in (("here", None), ("there", engine)):
        # One of the stores is half done before, in other batches than the second's.
        done = [0]

        def note(n, *_, done=done):
            done[0] = n

        with pytest.raises(KeyboardInterrupt):
            extract(
                images, [backbone], out=tmp_path / out, settings=SETTINGS, progress=note,
                stop=lambda done=done: done[0] > 12,
            )  # fmt: skip
        settings = ExtractionSettings(batch_size=8, workers=1)
        extract(images, [backbone, other], out=tmp_path / out, settings=settings, engine=some)
    for name in ("efficientnet_lite0.h5", "timm-resnet10t.h5"):
        here, there = (tmp_path / out / "images" / name for out in ("here", "there"))
        assert contents(here) == contents(there)


def begun(images, backbone, out, engine, pools, count):
    """Leave behind a store of which `count` parts are filled and not gathered, as a kill does."""

    class Killed(Exception):
        pass

    def run(self, method, items, **_):
        for item in items[:count] if method == "fill" else items:
            result = getattr(self.worker, method)(item)
            if method != "fill":
                yield item, result
        if method == "fill":
            raise Killed

    real, Pool.run = Pool.run, run
    try:
        with pytest.raises(Killed):
            extract(images, [backbone], out=out, settings=SETTINGS, engine=engine)
    finally:
        Pool.run = real
    return sorted((out / "images" / "efficientnet_lite0.h5.parts").glob("*.h5"))


@pytest.mark.parametrize("resumed_by", ["parts", "one process"])
def test_parts_of_a_run_that_was_killed_are_taken_in(
    tmp_path, images, backbone, engine, pools, one_thread, resumed_by
):
    [whole] = extract(images, [backbone], out=tmp_path / "whole", settings=SETTINGS)
    left = begun(images, backbone, tmp_path / "out", engine, pools, 3)
    assert len(left) == 3
    [report] = extract(
        images, [backbone], out=tmp_path / "out", settings=SETTINGS,
        engine=engine if resumed_by == "parts" else None,
    )  # fmt: skip
    assert contents(report.store) == contents(whole.store)
    with FeatureStore.open(whole.store) as store:
        hashes = store.source()["hash"]
    copies = {i for i in range(24) if hashes[i] in hashes[:i]}  # of the first three parts
    assert report.computed == 16 + len(copies) - len(report.bad)
    assert report.computed + report.reused + len(report.bad) == 40
    assert not left[0].parent.exists()


def test_parts_of_something_else_or_of_changed_images_are_never_taken_in(
    tmp_path, images, backbone, engine, pools
):
    left = begun(images, backbone, tmp_path, engine, pools, 2)
    file = images.file(0)
    was = file.read_bytes()
    file.write_bytes(images.file(1).read_bytes())
    with pytest.raises(StaleStoreError, match=r"1 images have changed .*00\.png"):
        extract(images, [backbone], out=tmp_path, settings=SETTINGS, engine=engine)
    file.write_bytes(was)
    store = left[0].parent.with_suffix("")
    store.unlink()
    [report] = extract(
        images,
        [backbone],
        out=tmp_path,
        settings=ExtractionSettings(batch_size=2, workers=1),
        engine=engine,
    )
    assert (report.computed, len(report.bad)) == (39, 1)


def test_an_image_that_changes_after_it_was_hashed_is_no_copy_any_more(
    tmp_path, images, backbone, engine, pools, monkeypatch
):
    changed = images.root / "dog" / "39.webp"
    fill = distributed.Worker.fill

    def change_then_fill(self, part):
        if not changed.with_suffix(".was").exists():
            changed.rename(changed.with_suffix(".was"))
            shutil.copy(images.root / "cat" / "02.bmp", changed)
            shutil.copy(images.root / "cat" / "06.bmp", images.root / "cat" / "00.png")
        return fill(self, part)

    monkeypatch.setattr(distributed.Worker, "fill", change_then_fill)
    [report] = extract(images, [backbone], out=tmp_path, settings=SETTINGS, engine=engine)
    with FeatureStore.open(report.store) as store:
        X, rows = store.read("final/mean"), {p: i for i, p in enumerate(images.path.tolist())}
    first, same, late = rows["cat/00.png"], rows["cat/06.bmp"], rows["dog/39.webp"]
    np.testing.assert_allclose(X[first], X[same], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(X[late], X[rows["cat/02.bmp"]], rtol=1e-4, atol=1e-4)
    assert abs(X[rows["cat/04.png"]] - X[first]).max() > 0.01  # still the image that both were


def test_images_at_urls_give_the_features_of_the_files(tmp_path, image_folder, backbone):
    [here] = extract(open_dataset(f"folder:{image_folder}"), [backbone], out=tmp_path / "a")
    remote = open_dataset(f"folder:file://{image_folder}")
    assert remote.path.tolist() == open_dataset(f"folder:{image_folder}").path.tolist()
    [there] = extract(remote, [backbone], out=tmp_path / "b")
    a, b = contents(here.store), contents(there.store)
    names = [name for name in a if name.startswith(("features", "manifest/hash", "done"))]
    assert len(names) == 3
    assert {name: a[name] for name in names} == {name: b[name] for name in names}
    [again] = extract(remote, [backbone], out=tmp_path / "b")
    assert again.computed == 0
    with FeatureStore.open(there.store) as store:
        assert store.manifest().root == Url(f"file://{image_folder}")


def test_a_table_and_its_images_may_be_at_urls():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe(
        "/ward/seven.csv", b"path,label\na.png,x\nmemory://ward/b.png,y\nc.png,x\nd.png,y\n"
    )
    memory.pipe("/ward/b.png", b"here")
    manifest = open_dataset("csv:memory://ward/seven.csv")
    assert isinstance(manifest, Manifest)
    assert manifest.dataset == "seven"
    assert [str(manifest.file(i)) for i in (0, 1)] == ["memory://ward/a.png", "memory://ward/b.png"]
    assert manifest.file(1).read(9)[0] == b"here"
    assert manifest.file(1).stat().st_size == 4
    assert manifest.file(1).stat().st_mtime_ns > 1e18
    with pytest.raises(FileNotFoundError):
        manifest.file(0).read(9)
