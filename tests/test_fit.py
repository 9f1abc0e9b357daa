"""How an oblong image becomes square, judged by timm's and torchvision's own transforms."""

import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from timm.data import create_transform

from cli import cli
from features.backbones import BACKBONES, load_backbone
from features.errors import StoreError
from features.fingerprint import fingerprint, in_words, transform_of
from features.images import FILTERS, Decoded, Transform, decode
from features.parsing import parse_fit

SHAPES = [(300, 500), (500, 301), (64, 64), (9, 7), (225, 1001), (57, 41), (1, 90)]
MODES = {"center": "crop", "squash": "squash", "border": "pad"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ["size", "resize", "interpolation", "decode"]


def picture(shape, mode="RGB"):
    bands = (3,) if mode == "RGB" else ()
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, *bands), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.875, 0.9, 0.95, 1.0])
def test_every_crop_mode_of_timm_is_the_same_pixels(mode, share, shape):
    size = 60
    for filter_ in ("bicubic", "bilinear"):
        theirs = create_transform(
            size, crop_pct=share, crop_mode=mode, interpolation=filter_, normalize=False, mean=MEAN
        )
        fill = tuple(round(255 * v) for v in MEAN)
        resize = math.floor(size / share)
        ours = Transform(size, resize, filter_, MEAN, STD, fit=MODES[mode], fill=fill)
        for image in (picture(shape), picture(shape, "L")):
            try:
                wanted = theirs(image.convert("RGB"))
            except ValueError:  # timm leaves less than a pixel of the shorter side
                assert mode == "border"
                continue
            found = ours.prepare(Decoded(image, image.size), exact=True)
            np.testing.assert_array_equal(found.transpose(2, 0, 1), wanted.numpy())


def test_every_filter_of_pillow_is_known():
    assert FILTERS.keys() >= {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}
    image = picture((90, 120))
    for name, resampling in FILTERS.items():
        found = Transform(60, 60, name, MEAN, STD, fit="squash").crop(
            Decoded(image, image.size), exact=True
        )
        assert found.tobytes() == image.resize((60, 60), resampling).tobytes()


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_short_cuts_of_decoding_stay_close_in_every_fit(tmp_path, fit):
    smooth = picture((12, 17)).resize((1700, 1200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    transform = Transform(64, 64, "bicubic", MEAN, STD, fit=fit)
    exact = transform.prepare(decode(data), exact=True).astype(float)
    quick = transform.prepare(decode(data, side=64), exact=False)
    assert abs(exact - quick).mean() < 2


class Manifest:
    def __len__(self):
        return 3

    def digest(self):
        return "m"


def made(backbone, transform, *, exact=False):
    one = SimpleNamespace(
        spec=backbone, transform=transform, weights="published", weights_digest="w"
    )
    features = [backbone.default_feature]
    return fingerprint(Manifest(), one, features, "float32", exact=exact, views=0, seed=0)


def test_stores_of_the_table_s_backbones_stay_valid():
    """The digest of what fingerprints said before there was a choice of fit."""
    found = {}
    for spec in BACKBONES.values():
        prints = [
            made(spec, spec.transform(spec.input_size * k), exact=exact)
            for k in (1, 2)
            for exact in (False, True)
        ]
        found[spec.name] = [{k: v for k, v in one.items() if k != "versions"} for one in prints]
        assert all(list(one["image"]) == NAMES for one in prints)
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    assert digest == "254ba38c873b19c208b8a1b76ba26b305b5039c90b1eb69c3740503b60497fd8"


def test_the_fingerprint_says_the_fit_and_gives_the_transform_back():
    spec = BACKBONES["deit"]
    own = spec.transform(None)
    one = made(spec, own)
    transforms = [own, own.fitted("squash", 256), own.fitted("pad"), replace(own, corner="floor")]
    for transform in transforms:
        assert transform_of(json.loads(json.dumps(made(spec, transform)))) == replace(
            transform, fill=transform.fill if transform.fit == "pad" else (0, 0, 0)
        )
    [line] = in_words(one, made(spec, own.fitted("squash")))
    assert line == "fit (--fit): stored none, asked squash"
    said = in_words(one, made(spec, own.fitted("pad")))
    assert "resized side: stored 256, asked 224" in said
    assert "colour of the padding: stored none, asked 124/116/104" in said
    with pytest.raises(StoreError, match="how images are prepared .resize is missing"):
        transform_of({"image": {"size": 3}, "normalize": {}})


def test_the_option_is_read_and_refused_in_words():
    assert parse_fit("model") is None
    assert parse_fit("pad") == ("pad", None)
    assert parse_fit("squash:256") == ("squash", 256)
    for text in ("squish", "squash:", "squash:0", "model:3", "crop:-1"):
        with pytest.raises(click.BadParameter, match=f"{text!r}: want model, crop, squash or pad"):
            parse_fit(text)
    with_fit = load_backbone("timm:test_resnet", "random", fit=("squash", None))
    assert with_fit.transform.fit == "squash"


@pytest.fixture
def oblong(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            picture((40 + i, 70)).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def test_features_are_those_of_the_fit_that_was_asked_for(oblong, tmp_path, backbone):
    def extracted(out, *options):
        words = [
            "extract",
            f"folder:{oblong}",
            "-m",
            "efficientnet_lite0",
            "-o",
            str(tmp_path / out),
        ]
        done = CliRunner().invoke(cli, [*words, "--precision", "float32", *options])
        assert done.exit_code == 0, done.output
        [file] = (tmp_path / out).rglob("*.h5")
        with h5py.File(file) as store:
            return store["features/final/mean"][:], json.loads(store.attrs["fingerprint"])["image"]

    own, about = extracted("own")
    assert about.keys() == set(NAMES)
    for option, side in (("crop", 256), ("squash:256", 256), ("pad", 224)):
        found, image = extracted(option.replace(":", "-"), "--fit", option)
        assert image["resize"] == side
        assert image.get("fit", "crop") == option.partition(":")[0]
        assert np.array_equal(found, own) == (option == "crop")
    again = ["extract", f"folder:{oblong}", "-m", "efficientnet_lite0", "-o", str(tmp_path / "own")]
    done = CliRunner().invoke(cli, [*again, "--precision", "float32", "--fit", "squash"])
    assert done.exit_code == 2
    assert "fit (--fit): stored none, asked squash" in done.stderr


def test_the_study_s_protocol_squashes_as_its_params_json_says(oblong, tmp_path):
    words = ["run", "-d", f"folder:{oblong}", "-m", "deit", "--weights", "random"]
    words += ["--protocol", "study", "--scenario", "frozen-linear", "--views", "0", "--epochs", "1"]
    words += ["--features", str(tmp_path / "stores"), "-o", str(tmp_path / "results")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    [file] = (tmp_path / "stores").rglob("*.h5")
    with h5py.File(file) as store:
        image = json.loads(store.attrs["fingerprint"])["image"]
    assert (image["fit"], image["resize"], image["size"]) == ("squash", 256, 224)


def test_a_head_is_applied_to_images_prepared_as_those_it_was_fitted_to(oblong, tmp_path):
    def run(*words):
        done = CliRunner().invoke(cli, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done

    stores, out = tmp_path / "stores", tmp_path / "results"
    run("extract", f"folder:{oblong}", "-m", "efficientnet_lite0", "-o", stores, "--fit", "pad")
    [store] = stores.rglob("*.h5")
    run("probe", store, "-o", out)
    [head] = out.rglob("heads.json")
    of_store = run("predict", head, store).stdout
    of_images = run("predict", head, f"folder:{oblong}").stdout
    assert of_images == of_store
