"""--limit draws by split and class, and a store of some images grows: judged by counts and h5py."""

import itertools
import json
import shutil
from collections import Counter

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import make_manifest

from cli import cli
from features.backbones import load_backbone
from features.datasets import Options, open_dataset
from features.datasets.limit import limited
from features.errors import StaleStoreError
from features.extract import extract
from features.plan import ExtractionSettings

STORED = ("features/final/pooled", "checksums/features/final/pooled", "checksums/source")


@pytest.fixture(scope="module")
def small():
    """A backbone that costs little."""
    return load_backbone("timm:resnet10t", "random", 64)


def table(seed, findings=0):
    """A manifest of classes and splits of any share, or of so many findings; some have none."""
    r = np.random.default_rng(seed)
    n, classes = int(r.integers(20, 300)), int(r.integers(2, 8))
    share = r.dirichlet(np.ones(classes) * r.choice([0.3, 1, 5]))
    split = r.choice(["train", "test", "val", "none"], n, p=[0.6, 0.25, 0.1, 0.05])
    if findings:
        label = np.where(r.random((n, findings)) < 10 ** r.uniform(-2, 0, findings), 1, 0)
        label[r.random((n, findings)) < 0.1] = -2
        return make_manifest(label, split=split)
    label = r.choice(classes, n, p=share)
    label[r.random(n) < 0.05] = -1
    return make_manifest(label, split=split, classes=[f"class {k}" for k in range(classes)])


def rows_of(some, whole):
    place = {name: row for row, name in enumerate(whole.id.tolist())}
    return [place[name] for name in some.id.tolist()]


@pytest.mark.parametrize("findings", [0, 6])
def test_a_limit_is_nested_keeps_the_order_and_depends_on_the_seed_alone(findings):
    for seed in range(60):
        whole = table(seed, findings)
        r = np.random.default_rng(seed)
        sizes = sorted(r.integers(1, len(whole) + 5, 4).tolist())
        drawn = [limited(whole, n, seed=3) for n in sizes]
        assert [len(one) for one in drawn] == [min(n, len(whole)) for n in sizes]
        for one in drawn:
            assert rows_of(one, whole) == sorted(rows_of(one, whole))
        for less, more in itertools.pairwise(drawn):
            assert set(less.id) <= set(more.id)
        other = limited(whole.take(r.permutation(len(whole))), sizes[1], seed=3)
        assert set(other.id) == set(drawn[1].id)
        n = len(whole) // 2
        assert set(limited(whole, n, seed=4).id) != set(limited(whole, n, seed=5).id)
        assert limited(whole, n, seed=4).note == (
            f"{n} of {len(whole)} images, drawn by split and class, seed 4"
        )


def test_a_limit_has_each_class_of_each_split_and_of_none_much_more_than_its_share():
    for seed in range(150):
        whole = table(seed)
        used = (whole.split != "none") & (whole.label >= 0)
        groups = Counter(zip(whole.split[used], whole.label[used].tolist(), strict=True))
        for n in np.random.default_rng(seed).integers(1, used.sum() + 1, 5).tolist():
            one = limited(whole, n, seed=seed)
            assert (one.split != "none").all()
            assert (one.label >= 0).all()
            there = Counter(zip(one.split, one.label.tolist(), strict=True))
            assert len(there) == min(n, len(groups))
            for group, size in there.items():
                assert size <= max(1, np.ceil(n * groups[group] / used.sum()))


def test_a_limit_has_each_finding_of_each_split_there_and_absent():
    for seed in range(60):
        whole = table(seed, findings=5)
        used = whole.split != "none"
        n = min(3 * 2 * 5, len(whole))
        one = limited(whole, n, seed=seed)
        for split, state in itertools.product(("train", "test", "val"), (0, 1)):
            had = (whole.label[used & (whole.split == split)] == state).any(0)
            has = (one.label[one.split == split] == state).any(0)
            np.testing.assert_array_equal(has, had)


def test_a_hundred_and_fifty_of_idrid_have_all_grades_in_both_splits(shared_data):
    idrid = f"csv:{shared_data / 'idrid' / 'manifest.csv'}"
    found = open_dataset(idrid, Options(limit=150))
    assert len(found) == 150
    for split in ("train", "test"):
        assert set(found.label[found.split == split]) == set(range(5))


def stored(path):
    """Each image's committed numbers and bytes by its id, by h5py."""
    with h5py.File(path) as file:
        ids = [name.decode() for name in file["manifest/id"][:]]
        columns = [file[name][:] for name in STORED]
        return {
            name: tuple(column[i].tobytes() for column in columns)
            for i, name in enumerate(ids)
            if file["done"][i] == 1
        }


def run(manifest, backbone, out, **given):
    return extract(
        manifest, [backbone], out=out, settings=ExtractionSettings(batch_size=4, workers=1), **given
    )[0]


def test_what_a_limit_computed_is_kept_to_the_bit_by_the_whole_set(
    tmp_path, images, small, one_thread
):
    before = {}
    for n in (9, 20, 40):
        some = limited(images, n, seed=0)
        report = run(some, small, tmp_path / "out")
        assert (report.images, report.reused) == (n, len(before))
        now = stored(report.store)
        assert before.items() <= now.items()
        before = now
    whole = stored(run(images, small, tmp_path / "whole").store)
    assert before.keys() == whole.keys()
    for name in whole:  # computed beside others: the same but for last bits
        here, there = (np.frombuffer(made[name][0], "<f4") for made in (before, whole))
        np.testing.assert_allclose(here, there, atol=1e-4)
    copies = [before[name][0] for name in ("cat/00.png", "cat/04.png", "dog/21.jpg")]
    assert len(set(copies)) == 1
    with h5py.File(report.store) as file:
        assert json.loads(file.attrs["fingerprint"])["manifest"]["images"] == 40
        assert file["manifest"].attrs["note"] in ("", b"")
    again = run(images, small, tmp_path / "out")
    assert (again.computed, len(again.bad)) == (0, 1)
    assert stored(report.store) == before
    shown = CliRunner().invoke(cli, ["verify", str(report.store)])
    assert shown.exit_code == 0, shown.output


def test_growing_that_was_stopped_goes_on_to_the_same_bits(tmp_path, images, small, one_thread):
    some = limited(images, 13, seed=1)
    for out in ("a", "b"):
        run(some, small, tmp_path / out)
    straight = stored(run(images, small, tmp_path / "a").store)
    for stop_after in (1, 3, 1):
        asked = itertools.count()
        with pytest.raises(KeyboardInterrupt):
            run(images, small, tmp_path / "b", stop=lambda a=asked, n=stop_after: next(a) >= n)
    report = run(images, small, tmp_path / "b")
    assert 0 < report.computed < 27
    assert stored(report.store) == straight


def test_a_limited_store_grows_by_images_and_features_at_once(tmp_path, images, small):
    some = limited(images, 13, seed=1)
    first = stored(run(some, small, tmp_path).store)
    settings = ExtractionSettings(batch_size=4, workers=1, layers="all")
    [report] = extract(images, [small], out=tmp_path, settings=settings)
    assert report.added
    assert "block00/mean" in report.added
    found = stored(report.store)
    assert first.keys() < found.keys()
    assert len(found) == 39
    shown = CliRunner().invoke(cli, ["verify", str(report.store)])
    assert shown.exit_code == 0, shown.output


def test_an_image_that_changed_keeps_a_store_from_growing(tmp_path, images, small):
    some = limited(images, 13, seed=1)
    store = run(some, small, tmp_path).store
    before = store.read_bytes()
    good = next(name for name in some.path.tolist() if name.endswith("bmp"))
    other = next(name for name in images.path.tolist() if name.endswith("bmp") and name != good)
    shutil.copy(images.root / other, images.root / good)
    with pytest.raises(StaleStoreError, match="1 images have changed"):
        run(images, small, tmp_path)
    assert store.read_bytes() == before
    stale = ExtractionSettings(batch_size=4, workers=1, overwrite="stale")
    [report] = extract(images, [small], out=tmp_path, settings=stale)
    assert (report.reused, len(report.bad)) == (len(some) - 1, 1)


def test_a_whole_store_is_not_made_smaller_unasked(tmp_path, images, small):
    store = run(images, small, tmp_path).store
    with pytest.raises(StaleStoreError, match="has all that is asked for, and more: leave --limit"):
        run(limited(images, 13, seed=1), small, tmp_path)
    assert len(stored(store)) == 39
