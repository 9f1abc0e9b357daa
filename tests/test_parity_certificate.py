"""Features of a few images are compared with what the model's library makes of them, once a store.

What is measured is judged by timm itself on Pillow's images, and by torch in two precisions.
"""

import json
import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from parity import hf, openclip, timm_
from PIL import Image
from test_parity import HF, VIT

from cli import cli
from features import parity, plan
from features.backbones import load_backbone
from features.backbones.base import Backbone, Library
from features.backbones.network import Network
from features.datasets import Options, open_dataset
from features.errors import BackboneError
from features.extract import extract
from features.images import picture
from features.parity import _least, certify
from features.plan import ExtractionSettings
from features.store import FeatureStore
from features.workers import ImageRecipe

SIZES = ((203, 297), (251, 170), (96, 130), (300, 90), (130, 131), (77, 200))


@pytest.fixture
def images(tmp_path):
    """Six oblong images of two classes."""
    for i, size in enumerate(SIZES):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(*size).save(folder / f"{i}.png")
    return tmp_path / "images"


def run(folder, backbone, out, ask=plan.run_locally, **settings):
    manifest = open_dataset(f"folder:{folder}", Options())
    settings = ExtractionSettings(**{"workers": 1, "batch_size": 2, **settings})
    return extract(manifest, [backbone], out=out, settings=settings, ask=ask)[0]


def measured(report):
    with FeatureStore.open(report.store) as store:
        return store.parity, store.fingerprint


def loaded(kind, folder):
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "timm":
            case = timm_("test_vit", None, folder)
        elif kind == "openclip":
            case = openclip(VIT, {"resize_mode": "longest"}, folder)
        else:
            config, processor, fields = HF[kind]
            case = hf(kind, config, processor, folder, **fields)
        return load_backbone(case.name, case.weights)


@pytest.mark.parametrize("kind", ["timm", "openclip", "ViT", "CLIP", "ViTMAE", "MobileViT", "Swin"])
def test_a_new_store_says_how_near_its_features_are_to_the_library_s(kind, images, tmp_path):
    backbone = loaded(kind, tmp_path / "model")
    found, made = measured(run(images, backbone, tmp_path / "out", precision="float32"))
    assert found["images"] == 4
    assert 0.9999 <= found["cosine"] <= 1 + 1e-9
    assert found["fast"] > 0.995
    assert found["within"] >= 0.99
    assert found["reduced"] is None
    assert "parity" not in json.dumps(made)


def test_it_is_the_cosine_and_the_pixels_that_anyone_can_compute(images, tmp_path):
    """The library's transform takes the shorter side to 5 pixels less: by how much is known."""
    from timm.data import create_transform, resolve_model_data_config

    backbone = loaded("timm", tmp_path / "model")
    module = backbone.module
    config = resolve_model_data_config(module) | {"crop_pct": 0.9}
    other = create_transform(**config, is_training=False)
    manifest = open_dataset(f"folder:{images}", Options())
    assert parity._spread(6)[:4] == [0, 1, 2, 3]
    opened = [Image.open(images / manifest.path[i]).convert("RGB") for i in range(4)]
    with torch.no_grad():
        theirs, ours = (
            torch.stack([t(image) for image in opened]) for t in (other, backbone.library.pixels)
        )
        wanted, mine = (
            module.forward_head(module.forward_features(x), pre_logits=True) for x in (theirs, ours)
        )
    cosine = float(torch.nn.functional.cosine_similarity(wanted, mine).min())
    std = torch.tensor(backbone.transform.std).view(3, 1, 1)
    pixels = float(((theirs - ours) * std * 255).abs().max())
    backbone = replace(backbone, library=replace(backbone.library, pixels=other))
    found = certify(backbone, manifest, ImageRecipe(()), "cpu", "float32")
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    assert found.pixels == pytest.approx(pixels, abs=0.6)  # ours are whole levels
    words = (
        r"final/pooled is not what its library gives: of 4 images the least cosine is .* and "
        r"pixels differ by up to .* of 255. Choose how images are prepared with --fit"
    )
    with pytest.raises(BackboneError, match=words):
        run(images, backbone, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.h5"))
    report = run(images, replace(backbone, transform=backbone.transform.fitted("squash")),
                 tmp_path / "out", precision="float32")  # fmt: skip
    assert measured(report)[0]["pixels"] is None  # prepared as asked for: nothing is claimed
    assert measured(report)[0]["cosine"] > 0.9999


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_and_never_equal(value, images, tmp_path):
    backbone = loaded("timm", tmp_path / "model")
    with torch.no_grad():
        for parameter in backbone.module.parameters():
            parameter.fill_(value)
    with pytest.raises(BackboneError, match="final/pooled has values that are not finite"):
        run(images, backbone, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.h5"))
    odd = torch.tensor([[value, 1.0]])
    assert _least(odd, torch.ones(1, 2)) == -1


def test_another_forward_is_refused_too(images, tmp_path):
    backbone = loaded("timm", tmp_path / "model")
    embed = backbone.library.embed
    backbone = replace(
        backbone, library=replace(backbone.library, embed=lambda x: embed(x).roll(1, 1))
    )
    with pytest.raises(BackboneError, match="is not what its library gives"):
        run(images, backbone, tmp_path / "out")


def test_what_a_library_raises_leaves_as_an_error_in_words(images, tmp_path):
    backbone = loaded("timm", tmp_path / "model")

    def fails(image):
        raise KeyError("height")

    backbone = replace(backbone, library=replace(backbone.library, pixels=fails))
    with pytest.raises(BackboneError, match="timm:test_vit's library can't be loaded .KeyError"):
        run(images, backbone, tmp_path / "out")


def test_a_fast_decode_that_is_far_from_the_library_s_is_said(images, tmp_path, monkeypatch):
    backbone = loaded("timm", tmp_path / "model")
    monkeypatch.setattr(parity, "FAST", 1.1)
    with pytest.warns(UserWarning, match="decoded fast, .* take --exact-decode"):
        run(images, backbone, tmp_path / "out", precision="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(images, backbone, tmp_path / "exact", precision="float32", exact=True)


def test_bad_images_are_passed_over_and_none_at_all_is_said(images, tmp_path):
    backbone = loaded("timm", tmp_path / "model")
    files = sorted(images.rglob("*.png"))
    for file in files[:3]:
        file.write_bytes(b"no image")
    found, _ = measured(run(images, backbone, tmp_path / "out", precision="float32"))
    assert found["images"] == 3
    for file in files:
        file.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="no image could be read to compare"):
        report = run(images, backbone, tmp_path / "none", precision="float32")
    assert len(report.bad) == 6
    assert measured(report)[0]["images"] == 0


def test_numbers_that_are_measured_are_no_part_of_what_a_store_is(images, tmp_path, monkeypatch):
    backbone = loaded("timm", tmp_path / "model")
    one = run(images, backbone, tmp_path / "one", precision="float32")
    whole = parity.certify

    def otherwise(*args):
        return replace(whole(*args), cosine=0.99995)

    monkeypatch.setattr(plan, "certify", otherwise)
    other = run(images, backbone, tmp_path / "other", precision="float32")
    assert measured(one)[0] != measured(other)[0]
    with FeatureStore.open(one.store) as a, FeatureStore.open(other.store) as b:
        assert a.fingerprint_digest == b.fingerprint_digest


def test_it_is_made_once_and_a_changed_model_gets_its_own(images, tmp_path, monkeypatch):
    backbone, made = loaded("timm", tmp_path / "model"), []
    whole = parity.certify
    monkeypatch.setattr(plan, "certify", lambda *a: made.append(1) or whole(*a))
    run(images, backbone, tmp_path / "out", precision="float32")
    assert run(images, backbone, tmp_path / "out", precision="float32").computed == 0
    run(images, backbone, tmp_path / "out", precision="float32", layers="0,final")
    assert len(made) == 1
    other = load_backbone("timm:test_vit", "random")
    run(images, other, tmp_path / "out", precision="float32", overwrite="stale")
    assert len(made) == 2


def test_the_study_s_backbones_are_not_compared(images, tmp_path, monkeypatch, backbone):
    monkeypatch.setattr(plan, "certify", lambda *_: pytest.fail("it was compared"))
    found, _ = measured(run(images, backbone, tmp_path / "out"))
    assert found == {}


def test_inspect_shows_it(images, tmp_path):
    report = run(images, loaded("timm", tmp_path / "model"), tmp_path / "out", precision="float32")
    done = CliRunner().invoke(cli, ["inspect", str(report.store)])
    assert "beside its own library" in done.output
    assert "cosine" in done.output
    done = CliRunner().invoke(cli, ["inspect", str(report.store), "--json"])
    assert json.loads(done.output)["parity"]["images"] == 4


def test_a_damaged_certificate_is_said(images, tmp_path):
    report = run(images, loaded("timm", tmp_path / "model"), tmp_path / "out", precision="float32")
    with h5py.File(report.store, "a") as file:
        file.attrs["parity"] = '{"images": "many"}'
    done = CliRunner().invoke(cli, ["inspect", str(report.store)])
    assert done.exit_code != 0
    assert "parity" in done.output


def test_it_is_made_where_the_device_is(images, tmp_path):
    """Another machine gets everything by cloudpickle, as Ray sends it."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    asked = []

    def ask(question, *args, **given):
        asked.append(question.__name__)
        there = cloudpickle.loads(cloudpickle.dumps((question, args, given)))
        return there[0](*there[1], **there[2])

    backbone = loaded("ViT", tmp_path / "model")
    found, _ = measured(run(images, backbone, tmp_path / "out", ask=ask, precision="float32"))
    assert "certify" in asked
    assert found["cosine"] >= 0.9999


# --- precision ------------------------------------------------------------------------------------


class Cancelling(torch.nn.Module):
    """Features whose bits are lost in 8: a small signal beside a large constant."""

    def __init__(self, constant):
        super().__init__()
        self.proj = torch.nn.Linear(3 * 16 * 16, 8, bias=False)
        self.register_buffer("constant", torch.tensor(float(constant)))
        self.register_buffer("scratch", torch.tensor(1 / 3), persistent=False)

    def forward(self, x):
        return (self.proj(x.flatten(1)) + self.constant) - self.constant


def cancelling(constant):
    torch.manual_seed(0)
    module = Cancelling(constant)
    like = load_backbone("timm:test_vit", "random")
    spec = replace(
        like.spec,
        name=f"cancelling{constant}",
        feature_dim=8,
        input_size=16,
        resize=16,
        default_feature="final/pooled",
    )
    transform = replace(like.transform, size=16, resize=16)

    def forward(x, layers):
        return {"final": {"pooled": module(x)}}

    network = Network(forward, count=0, blocks=[], size=16, module=module)
    library = Library(replace(transform, fit="squash"), "final/pooled", lambda _: None, module)
    return Backbone.of(spec, module, network, transform, "random", library)


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """Have auto take bfloat16, as on a processor that multiplies it; every one can compute it."""
    monkeypatch.setattr("features.devices.multiplies_bfloat16", lambda _: True)


def test_auto_precision_is_checked_on_images_and_float32_taken_where_it_harms(
    images, tmp_path, fast_bfloat16
):
    harmed, whole = cancelling(1000), cancelling(0)
    with pytest.warns(UserWarning, match="bfloat16 features have a cosine of .*: float32 is taken"):
        report = run(images, harmed, tmp_path / "out")
    found, made = measured(report)
    assert made["precision"] == "float32"
    assert not found["reduced"]["bfloat16"] > 0.999
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(images, harmed, tmp_path / "out").computed == 0  # and nothing is said again
        found, made = measured(run(images, whole, tmp_path / "out"))
    assert made["precision"] == "bfloat16"
    assert found["reduced"]["bfloat16"] > 0.999
    _, made = measured(run(images, harmed, tmp_path / "asked", precision="bfloat16"))
    assert made["precision"] == "bfloat16"
    _, made = measured(run(images, whole, tmp_path / "full", precision="float32"))
    assert made["precision"] == "float32"


def test_features_in_float32_are_those_of_weights_that_never_were_in_another(
    images, tmp_path, fast_bfloat16
):
    with pytest.warns(UserWarning, match="float32 is taken"):
        auto = run(images, cancelling(1000), tmp_path / "auto")
    asked = run(images, cancelling(1000), tmp_path / "asked", precision="float32")
    with FeatureStore.open(auto.store) as one, FeatureStore.open(asked.store) as other:
        np.testing.assert_array_equal(one.read("final/pooled"), other.read("final/pooled"))


def test_weights_and_buffers_are_as_they_were_after_a_check(images):
    backbone = cancelling(3)
    before = [t.clone() for t in (*backbone.module.parameters(), *backbone.module.buffers())]
    manifest = open_dataset(f"folder:{images}", Options())
    found = certify(backbone, manifest, ImageRecipe(()), "cpu", "bfloat16")
    after = [*backbone.module.parameters(), *backbone.module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert found.reduced["bfloat16"] < 1


def test_the_check_is_torch_s_own_cosine(images):
    backbone = cancelling(5)
    manifest = open_dataset(f"folder:{images}", Options())
    found = certify(backbone, manifest, ImageRecipe(()), "cpu", "bfloat16").reduced["bfloat16"]
    module = backbone.module
    pixels = []
    for i in parity._spread(6)[:4]:
        image = Image.open(images / manifest.path[i]).convert("RGB")
        pixels.append(backbone.transform.crop(_decoded(image), exact=False))
    x = torch.stack([torch.from_numpy(np.array(p)) for p in pixels])
    x = backbone.normalise(x, torch.float32)
    with torch.no_grad():
        full = module(x)
        half = module.to(torch.bfloat16)(x.to(torch.bfloat16)).float()
    wanted = torch.nn.functional.cosine_similarity(full, half).min()
    assert found == pytest.approx(float(wanted), abs=1e-5)


def _decoded(image):
    from features.images import Decoded

    return Decoded(image, image.size)
