"""The table of backbones is true, and weights are read without running anything."""

import collections
import contextlib
import os
import pickle
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import save_file

from features.backbones import BACKBONES, load_backbone
from features.backbones.base import count_params
from features.backbones.weights import check_size, read_state_dict
from features.errors import BackboneError


def test_the_table_says_what_loading_finds(backbone):
    spec = BACKBONES["efficientnet_lite0"]
    assert count_params(backbone.module) == spec.params
    assert backbone.network.features[spec.default_feature] == (spec.feature_dim,)
    assert len(backbone.module.blocks) == spec.layers
    grid = backbone.module.forward_features(torch.zeros(1, 3, spec.input_size, spec.input_size))
    assert grid.shape[2] * grid.shape[3] == spec.tokens
    config = backbone.module.pretrained_cfg
    assert (spec.interpolation, spec.mean, spec.std) == (
        config["interpolation"],
        config["mean"],
        config["std"],
    )
    assert spec.resize == round(spec.input_size / config["crop_pct"])


def test_the_same_weights_have_the_same_digest_from_any_file(tmp_path, backbone):
    state = {name: t.contiguous() for name, t in backbone.module.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        loaded = load_backbone("efficientnet_lite0", str(tmp_path / name))
        assert loaded.weights == "file"
        assert loaded.weights_digest == backbone.weights_digest
    random = load_backbone("efficientnet_lite0", "random")
    assert random.weights == "random"
    assert random.weights_digest == load_backbone("efficientnet_lite0", "random").weights_digest
    assert random.weights_digest != backbone.weights_digest


def test_weights_that_do_not_fit_are_named(tmp_path, backbone):
    state = dict(backbone.module.state_dict())
    del state["bn2.weight"]
    state["extra"] = torch.zeros(1)
    state["bn1.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    words = (
        r"1 missing, the first bn2.weight; 1 unexpected, the first extra; "
        r"1 misshapen, the first bn1.bias is \(3,\)"
    )
    with pytest.raises(BackboneError, match=words):
        load_backbone("efficientnet_lite0", str(tmp_path / "w.pth"))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("was-executed",)


def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("w.pth", "raw.pth"):
        with pytest.raises(
            BackboneError, match="refused, because reading them would run code|can't be read"
        ):
            load_backbone("efficientnet_lite0", name)
    for name in ("text.pth", "text.safetensors", "none.pth"):
        with pytest.raises(BackboneError):
            load_backbone("efficientnet_lite0", name)
    assert not (tmp_path / "was-executed").exists()


def packed(file, out):
    """The same PyTorch file with its records deflated."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))


def test_weights_that_would_inflate_are_refused_before_they_do(tmp_path):
    state = {"a": torch.zeros(3_000_000), "b": torch.zeros(3, dtype=torch.int64)}
    torch.save(state, tmp_path / "plain.pt")
    packed(tmp_path / "plain.pt", tmp_path / "packed.pt")
    assert (tmp_path / "packed.pt").stat().st_size < 50_000
    with pytest.raises(BackboneError, match=r"take 12.0 MB .* and the file has 0.0 MB: refused"):
        read_state_dict(tmp_path / "packed.pt")
    # A pickle that declares more than there is, in both formats
    for name, modern in (("zip.pt", True), ("old.pt", False)):
        torch.save({"a": torch.zeros(1000)}, tmp_path / name, _use_new_zipfile_serialization=modern)
        data = (tmp_path / name).read_bytes()
        assert data.count(b"M\xe8\x03") == 2  # 1000: of the storage, and of the tensor
        more = data.replace(b"M\xe8\x03", b"M\xff\xff")
        (tmp_path / name).write_bytes(_mended(tmp_path / name, more))
        with pytest.raises(BackboneError, match=r"take 0.3 MB .*: refused"):
            read_state_dict(tmp_path / name)


def _mended(file, data):
    """A zip's bytes with the checksums that its records have now."""
    if not zipfile.is_zipfile(file):
        return data
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            start = data.index(b"PK\3\4", record.header_offset)
            name, extra = (
                int.from_bytes(data[start + k : start + k + 2], "little") for k in (26, 28)
            )
            body = data[start + 30 + name + extra :][: record.file_size]
            old, new = (n.to_bytes(4, "little") for n in (record.CRC, zlib.crc32(body)))
            data = data.replace(old, new)
    return data


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64])
def test_every_true_file_of_weights_is_read(tmp_path, modern, dtype):
    shared = torch.ones(5000).to(dtype)
    state = collections.OrderedDict(a=shared, b=shared[10:20], c=torch.nn.Parameter(torch.ones(3)))
    file = tmp_path / "w.pt"
    torch.save({"model": state, "epoch": 3}, file, _use_new_zipfile_serialization=modern)
    found = read_state_dict(file)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_reading_the_sizes_of_a_pickle_runs_nothing_and_takes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, "w.pt")
    with contextlib.suppress(Exception):
        check_size(tmp_path / "w.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Payload(), protocol=2) * 5)
    with contextlib.suppress(Exception):
        check_size(tmp_path / "raw.pt")
    assert not (tmp_path / "was-executed").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("efficientnet_lite", "did you mean efficientnet_lite0"),
        (
            "xyz",
            "want efficientnet_lite0, sam, .*, or any other as timm:NAME, openclip:NAME/TAG or hf",
        ),
        ("timm:resnet1888", "the closest are timm:resnet18"),
        ("timm:resnet18.nosuch", "want a tag of a1_in1k"),
    ],
)
def test_an_unknown_name_answers_with_the_closest(name, words):
    with pytest.raises(BackboneError, match=words):
        load_backbone(name, "random")


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "vit_small_patch14_reg4_dinov2",
    ],
)
def test_any_timm_model_pools_as_timm_does(name):
    loaded = load_backbone(f"timm:{name}", "random")
    size = loaded.spec.input_size if "dinov2" not in name else 518
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = loaded.network(x, list(loaded.network.features))
        pooled = loaded.module.forward_head(loaded.module.forward_features(x), pre_logits=True)
    assert loaded.spec.default_feature in found
    torch.testing.assert_close(found[loaded.spec.default_feature], pooled, rtol=1e-4, atol=1e-5)


def test_any_image_tower_of_open_clip_is_reached_by_its_name():
    import open_clip

    loaded = load_backbone("openclip:ViT-B-32-quickgelu", "random", 160)
    assert loaded.spec.source == "open_clip ViT-B-32-quickgelu"
    assert loaded.network.features["final/proj"] == (512,)
    assert loaded.network.features["final/tokens"] == (25, 768)
    assert loaded.spec.mean == tuple(open_clip.OPENAI_DATASET_MEAN)
    with pytest.raises(BackboneError, match="want openclip:ViT-B-32/TAG with a tag of openai"):
        load_backbone("openclip:ViT-B-32/none")
    with pytest.raises(BackboneError, match="the closest are ViT-B-3"):
        load_backbone("openclip:ViT-B-33/openai")


@pytest.mark.parametrize("family", ["ViT", "Dinov2", "ConvNextV2"])
def test_a_vision_model_of_transformers_is_read_from_its_folder(tmp_path, family):
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"image_size": 64, "patch_size": 16}
    if family == "ConvNextV2":
        small = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**small)
    theirs = getattr(transformers, f"{family}Model")(config).eval()
    theirs.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(
        size={"height": 64, "width": 64}, image_mean=[0.4] * 3, image_std=[0.2] * 3
    )
    processor.save_pretrained(tmp_path)
    ours = load_backbone(f"hf:{tmp_path}")
    assert ours.transform.mean == (0.4, 0.4, 0.4)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        found = ours.network(x, list(ours.network.features))
        last = theirs(x).last_hidden_state
    if family == "ConvNextV2":
        torch.testing.assert_close(found["final/mean"], last.mean((2, 3)))
    else:
        torch.testing.assert_close(found["final/cls"], last[:, 0])
        torch.testing.assert_close(found["final/tokens"], last[:, 1:])
    assert "block00/mean" in found
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="can't be loaded .* Want a folder that has config"):
        load_backbone(f"hf:{tmp_path}")
