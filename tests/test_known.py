"""Backbones by the names that people use, each from a file or folder as its authors publish it.

Weights are random. Sizes are small where the structure stays the same; the rows' own options stay.
What comes out is judged by the model's own library, built as the authors' code builds it.
"""

import argparse
import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from parity import apart, compared, hf, openclip
from references import stirred
from test_parity import HF, VIT, both, trunk

from cli import cli
from features.backbones import BACKBONES, KNOWN, MODALITIES, Spec, load_backbone
from features.backbones.known import ROUTES
from features.errors import BackboneError
from features.images import Decoded, picture
from features.parsing import weights_of

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def noise(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def smaller(monkeypatch, name, **options):
    """Have a row of timm build a smaller model of the same structure."""
    row = KNOWN[name]
    build = replace(row.build, options={**row.build.options, **options})
    monkeypatch.setitem(KNOWN, name, replace(row, build=build, shape=None))


def of_any_shape(monkeypatch, name):
    """Have a row take a folder of a smaller model."""
    monkeypatch.setitem(KNOWN, name, replace(KNOWN[name], shape=None))


def test_the_table_is_of_routes_that_are_there_and_says_its_facts():
    assert not KNOWN.keys() & BACKBONES.keys()
    assert sum(row.modality != ("general",) for row in KNOWN.values()) >= 20
    fields = Spec.__dataclass_fields__
    for name, row in KNOWN.items():
        assert row.name == name
        assert row.name == name.lower()
        assert row.route.partition(":")[0] in ROUTES
        assert row.modality
        assert set(row.modality) <= set(MODALITIES)
        assert row.licence
        assert row.source
        assert row.page.startswith("https://"), name
        assert row.pixels.keys() <= fields.keys()
        assert bool(row.file) == (row.route.count(":") == 1 and not row.route.startswith("hf:"))


# --- timm -----------------------------------------------------------------------------------------


def repository(folder, architecture, model, **config):
    """Write a folder as repositories of timm's models are."""
    import timm

    cfg = timm.get_pretrained_cfg(architecture).to_dict() | {"num_classes": 0, **config}
    cfg["input_size"] = [3, 224, 224]
    about = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(about))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return str(folder)


def created(architecture, **options):
    import timm

    torch.manual_seed(0)
    return stirred(timm.create_model(architecture, num_classes=0, **options))


def swiglu():
    import timm

    return {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}


# What the authors' code gives to timm.create_model beside the repository's configuration.
TIMM = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5, "dynamic_img_size": True}, False),
    "uni2-h": ("vit_giant_patch14_224",
               {"img_size": 224, "patch_size": 14, "init_values": 1e-5, "mlp_ratio": 2.66667 * 2,
                "no_embed_class": True, "reg_tokens": 8, "dynamic_img_size": True}, True),
    "virchow": ("vit_huge_patch14_224",
                {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "",
                 "dynamic_img_size": True}, True),
    "virchow2": ("vit_huge_patch14_224",
                 {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "",
                  "reg_tokens": 4, "dynamic_img_size": True}, True),
    "prov-gigapath": ("vit_giant_patch14_dinov2",
                      {"img_size": 224, "patch_size": 16, "init_values": 1e-5,
                       "mlp_ratio": 5.33334}, False),
    "h-optimus-0": ("vit_giant_patch14_reg4_dinov2",
                    {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_histology_backbones_from_a_folder_as_their_repository_is(name, tmp_path, monkeypatch):
    architecture, options, packed = TIMM[name]
    theirs = created(architecture, **options, **(swiglu() if packed else {}), **SMALL)
    smaller(monkeypatch, name, **options, **SMALL)
    mean = KNOWN[name].pixels.get("mean", (0.5, 0.5, 0.5))
    folder = repository(tmp_path, architecture, theirs, mean=[0.5] * 3, crop_pct=1.0)
    backbone = load_backbone(name, folder)
    assert (backbone.spec.name, backbone.weights) == (name, "file")
    assert backbone.transform.mean == tuple(mean)
    x = noise(224)
    default = backbone.spec.default_feature
    with torch.no_grad():
        found = backbone.network(x, [default])[default]
        wanted = theirs(x)
    if name.startswith("virchow"):  # paige-ai's model card: 4 registers are left out
        first = 1 + options.get("reg_tokens", 0)
        wanted = torch.cat([wanted[:, 0], wanted[:, first:].mean(1)], 1)
        assert default == "final/cls+mean"
    assert found.shape == wanted.shape == (2, backbone.spec.feature_dim)
    assert apart(found, wanted) < 1e-5


def test_gigapath_s_images_are_resized_to_256_as_its_readme_says(tmp_path, monkeypatch):
    from torchvision import transforms

    architecture, options, _ = TIMM["prov-gigapath"]
    smaller(monkeypatch, "prov-gigapath", **options, **SMALL)
    theirs = created(architecture, **options, **SMALL)
    folder = repository(tmp_path, architecture, theirs, crop_pct=1.0)
    backbone = load_backbone("prov-gigapath", folder)
    image = picture(301, 437)
    bicubic = transforms.InterpolationMode.BICUBIC
    made = [transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(224)]
    wanted = transforms.Compose([*made, transforms.ToTensor(), transforms.Normalize(*IMAGENET)])
    pixels = torch.from_numpy(backbone.transform.prepare(Decoded(image, image.size), exact=True))
    found = backbone.normalise(pixels[None], torch.float32)[0]
    torch.testing.assert_close(found, wanted(image), rtol=0, atol=1e-5)


def masked_autoencoder(state):
    """Return a state as MAE's pre-training saves it: a norm, a decoder, a mask token."""
    state = {k: v for k, v in state.items() if not k.startswith("fc_norm.")}
    more = ("norm.weight", "norm.bias", "mask_token", "decoder_embed.weight", "decoder_pos_embed")
    return state | {key: torch.randn(3) for key in more}


@pytest.mark.parametrize("name", ["retfound", "retfound-oct"])
def test_retfound_from_its_file_as_its_authors_take_features(name, tmp_path, monkeypatch):
    """Their VisionTransformer's forward_features, with the norm that the file hasn't got."""
    smaller(monkeypatch, name, **SMALL)
    theirs = created("vit_large_patch16_224", global_pool="", **SMALL)
    state = masked_autoencoder(theirs.state_dict())
    arguments = argparse.Namespace(batch_size=16, epochs=800)
    file = tmp_path / f"{name}.pth"
    torch.save({"model": state, "epoch": 799, "args": arguments}, file)
    backbone = load_backbone(name, str(file))
    assert backbone.transform.resize == 256
    assert (backbone.transform.mean, backbone.transform.std) == IMAGENET
    x = noise(224)
    with torch.no_grad():
        y = theirs.patch_embed(x)
        y = torch.cat([theirs.cls_token.expand(2, -1, -1), y], 1) + theirs.pos_embed
        y = theirs.blocks(y)[:, 1:].mean(1)
        wanted = torch.nn.LayerNorm(48, eps=1e-6)(y)
        found = backbone.network(x, ["final/pooled"])["final/pooled"]
    assert backbone.spec.default_feature == "final/pooled"
    assert apart(found, wanted) < 1e-5


def test_code_beside_weights_is_still_refused(tmp_path):
    class Arguments(argparse.Namespace):
        pass

    globals()["Arguments"] = Arguments
    Arguments.__qualname__ = "Arguments"
    torch.save({"model": {"x": torch.zeros(1)}, "args": Arguments(a=1)}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="reading them would run code"):
        load_backbone("retfound", str(tmp_path / "w.pth"))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_eva_x_from_its_file(size, tmp_path, monkeypatch):
    """Judged by timm's Eva with what EVA-X's own eva_x.py gives it."""
    from timm.models.eva import Eva

    parts = {"swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (14, 14)}
    parts |= {"qkv_fused": False, "scale_mlp": True} if size == "base" else {}
    torch.manual_seed(0)
    theirs = stirred(Eva(img_size=224, patch_size=16, mlp_ratio=4 * 2 / 3, num_classes=0,
                         **parts, **SMALL))  # fmt: skip
    state = {k: v for k, v in theirs.state_dict().items() if "rope" not in k}
    for ours, named in (("mlp.fc1_g.", "mlp.w1."), ("mlp.fc1_x.", "mlp.w2."),
                        ("mlp.fc2.", "mlp.w3."), ("mlp.norm.", "mlp.ffn_ln."),
                        ("q_proj.bias", "q_bias"), ("fc_norm.", "norm.")):  # fmt: skip
        state = {k.replace(ours, named): v for k, v in state.items()}
    state |= {"mask_token": torch.zeros(1, 1, 48), "lm_head.weight": torch.zeros(9, 48)}
    torch.save({"module": state}, tmp_path / "w.pt")
    smaller(monkeypatch, f"eva-x-{size}", **SMALL)
    backbone = load_backbone(f"eva-x-{size}", str(tmp_path / "w.pt"))
    assert (backbone.transform.resize, backbone.transform.mean[0]) == (256, 0.49185243)
    x = noise(224)
    with torch.no_grad():
        wanted = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        found = backbone.network(x, ["final/pooled"])["final/pooled"]
    assert apart(found, wanted) < 1e-5


@pytest.mark.slow
def test_medsam_from_its_file(tmp_path, monkeypatch):
    """By the names of segment-anything; judged by timm's own SAM, from an encoder's output on."""
    import timm

    more = {"depth": 2, "embed_dim": 48, "num_heads": 3, "global_attn_indexes": (1,)}
    torch.manual_seed(0)
    theirs = stirred(timm.create_model("samvit_base_patch16", num_classes=0, img_size=1024, **more))
    state = {
        f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in theirs.state_dict().items()
    }
    state |= {"mask_decoder.iou_token.weight": torch.zeros(1, 256)}
    torch.save(state, tmp_path / "medsam_vit_b.pth")
    smaller(monkeypatch, "medsam", **more)
    full = load_backbone("medsam", str(tmp_path / "medsam_vit_b.pth"))
    assert (full.transform.fit, full.transform.resize) == ("squash", 1024)
    assert (full.transform.size, full.transform.std) == (1024, (1.0, 1.0, 1.0))
    x = noise(1024, 1)
    with torch.no_grad():
        wanted = theirs.forward_features(x).mean((2, 3))
        found = full.network(x, ["final/pooled"])["final/pooled"]
    assert apart(found, wanted) < 1e-5


# --- open_clip ------------------------------------------------------------------------------------


def test_chexzero_from_its_file(tmp_path, monkeypatch):
    """OpenAI's names, as its own CLIP has them; judged by open_clip's whole model."""
    import open_clip

    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    config["vision_cfg"] |= {"layers": 2, "width": 128}
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1, "vocab_size": 99}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32-quickgelu", config)
    torch.manual_seed(0)
    theirs = stirred(open_clip.create_model("ViT-B-32-quickgelu"))
    torch.save(theirs.state_dict(), tmp_path / "best_64_5e-05_original_22000_0.864.pt")
    backbone = load_backbone("chexzero", str(tmp_path / "best_64_5e-05_original_22000_0.864.pt"))
    x = noise(224)
    with torch.no_grad():
        wanted = theirs.encode_image(x)
        found = backbone.network(x, ["final/pooled"])["final/pooled"]
    assert apart(found, wanted) < 1e-5
    t = backbone.transform
    assert (t.fit, t.fill, t.size) == ("pad", (0, 0, 0), 224)
    pixels = torch.full((1, 224, 224, 3), 7, dtype=torch.uint8)
    value = backbone.normalise(pixels, torch.float32).unique()
    torch.testing.assert_close(value, torch.tensor([(7 - 101.48761) / 83.43944]))


OPENCLIP = {
    "biomedclip": (trunk("test_vit", "", "linear", 160), {}, {}),
    "dermlip": (VIT, {}, {}),
}


@pytest.mark.parametrize("name", OPENCLIP)
def test_open_clip_s_from_a_folder_as_their_repository_is(name, tmp_path, monkeypatch):
    of_any_shape(monkeypatch, name)
    vision, preprocess, more = OPENCLIP[name]
    case = openclip(vision, preprocess, tmp_path, **more)
    backbone = load_backbone(name, str(tmp_path))
    x = noise(backbone.transform.size)
    theirs = load_backbone(case.name)
    with torch.no_grad():
        found, wanted = (b.network(x, ["final/pooled"])["final/pooled"] for b in (backbone, theirs))
    assert torch.equal(found, wanted)
    assert backbone.spec.name == name


def test_conch_from_its_file(tmp_path, monkeypatch):
    """Judged by timm's trunk and open_clip's pooler, which CONCH's code took over."""
    import timm
    from open_clip.transformer import AttentionalPooler

    from features.backbones import from_conch

    for name, value in (("LAYERS", 2), ("TRUNK_HEADS", 3), ("WIDTH", 48), ("POOLED", 32)):
        monkeypatch.setattr(from_conch, name, value)
    torch.manual_seed(0)
    parts = {"img_size": 448, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    trunk_ = stirred(timm.models.VisionTransformer(**parts, dynamic_img_size=True))
    pooler = stirred(AttentionalPooler(32, 48, n_head=8, n_queries=1))
    norm = stirred(torch.nn.LayerNorm(32))
    state = {f"visual.trunk.{k}": v for k, v in trunk_.state_dict().items()}
    state |= {f"visual.attn_pool_contrast.{k}": v for k, v in pooler.state_dict().items()}
    state |= {f"visual.ln_contrast.{k}": v for k, v in norm.state_dict().items()}
    other = ("visual.proj_contrast", "visual.attn_pool_caption.query", "visual.ln_caption.bias")
    state |= {key: torch.zeros(2) for key in (*other, "text.cls_emb", "logit_scale")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    for size in (448, 224):
        backbone = load_backbone("conch", str(tmp_path / "pytorch_model.bin"), size)
        x = noise(size)
        with torch.no_grad():
            wanted = norm(pooler(trunk_.forward_features(x))[:, 0])
            found = backbone.network(x, ["final/pooled"])["final/pooled"]
        assert apart(found, wanted) < 1e-5
    assert (backbone.transform.size, backbone.transform.resize) == (224, 224)
    assert backbone.spec.default_feature == "final/pooled"
    assert backbone.network.features["block01/cls"] == (48,)


# --- transformers ---------------------------------------------------------------------------------

BY_CLASS = {
    "dinov3-vits16": "DINOv3ViT", "dinov3-vitb16": "DINOv3ViT", "dinov3-vitl16": "DINOv3ViT",
    "siglip2-base": "Siglip", "siglip2-so400m": "Siglip", "medsiglip": "Siglip",
    "rad-dino": "Dinov2", "phikon-v2": "Dinov2", "plip": "CLIP", "monet": "CLIP",
}  # fmt: skip


@pytest.mark.parametrize("name", BY_CLASS)
def test_those_of_transformers_from_a_folder_as_their_repository_is(name, tmp_path, monkeypatch):
    of_any_shape(monkeypatch, name)
    config, processor, fields = HF[BY_CLASS[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = hf(BY_CLASS[name], config, processor, tmp_path, **fields)
    _same_as_its_library(name, tmp_path, case)


@pytest.mark.parametrize("name", ["dinov3-convnext-tiny", "dinov3-convnext-base"])
def test_dinov3_s_convolutional_networks(name, tmp_path, monkeypatch):
    """Equal on the same pixels; its processor's are floats, which are no whole levels.

    Rounding the library's own pixels to levels moves its embedding as far as ours is from it.
    """
    import transformers

    of_any_shape(monkeypatch, name)
    config = {"hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 2, 1], "image_size": 224}
    case = hf("DINOv3ConvNext", config, "DINOv3ViTImageProcessor", tmp_path, **both(224))
    backbone, errors = compared(replace(case, name=name, weights=str(tmp_path), layer=None))
    assert errors[0] < 1e-2
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    prepare = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    x = prepare(picture(203, 297), return_tensors="pt")["pixel_values"].as_subclass(torch.Tensor)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in IMAGENET)
    levels = ((x * std + mean) * 255).round().clamp(0, 255) / 255
    default = backbone.spec.default_feature
    with torch.no_grad():
        wanted, rounded = (theirs(pixel_values=y).pooler_output for y in (x, (levels - mean) / std))
        assert apart(backbone.network(x, [default])[default], wanted) < 1e-6
    assert 1e-3 < apart(rounded, wanted) < 1e-2


def test_phikon_is_its_class_token_for_its_file_has_no_pooler(tmp_path, monkeypatch):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    of_any_shape(monkeypatch, "phikon")
    config = ViTConfig(**HF["ViT"][0])
    torch.manual_seed(0)
    theirs = stirred(ViTModel(config, add_pooling_layer=False))
    theirs.save_pretrained(tmp_path)
    ViTImageProcessor(**both(64)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="so that pooled would be random and is left out"):
        backbone = load_backbone("phikon", str(tmp_path))
    x = noise(64)
    with torch.no_grad():
        wanted = theirs(pixel_values=x).last_hidden_state[:, 0]
        found = backbone.network(x, ["final/cls"])["final/cls"]
    assert backbone.spec.default_feature == "final/cls"
    assert apart(found, wanted) < 1e-5


def _same_as_its_library(name, folder, case):
    backbone = load_backbone(name, str(folder))
    _, errors = compared(replace(case, name=name, weights=str(folder), layer=None))
    assert errors[0] < 2e-3
    assert (backbone.spec.name, backbone.spec.licence) == (name, KNOWN[name].licence)
    assert KNOWN[name].feature in ("", backbone.spec.default_feature)


# --- names, revisions, access ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:org/model@v1.0", ("org/model", "v1.0")),
        ("rad-dino@2ec9ca0", ("microsoft/rad-dino", "2ec9ca0")),
        ("timm:hf-hub:org/model@refs/pr/4", ("org/model", "refs/pr/4")),
        ("uni@v2", ("MahmoodLab/UNI", "v2")),
        ("openclip:hf-hub:org/model@refs/pr/4", ("org/model", "refs/pr/4")),
        ("eva-x-small@abc", ("MapleF/eva_x", "abc")),
        ("eva-x-small@refs/pr/4", ("MapleF/eva_x", "refs/pr/4")),
        ("rad-dino", ("microsoft/rad-dino", "main")),
    ],
)
def test_a_revision_is_what_the_hub_is_asked_for(name, asked, monkeypatch):
    """By what the hub's own client would fetch first."""
    from huggingface_hub import hf_hub_url

    urls = []

    def head(url, *_, **__):
        urls.append(url)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", head)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(BackboneError):
        load_backbone(name)
    assert urls
    wanted = hf_hub_url(asked[0], "x", revision=asked[1]).rpartition("x")[0]
    assert all(url.startswith(wanted) for url in urls), (urls, wanted)


@pytest.mark.parametrize("name", [row.name for row in KNOWN.values() if row.gated])
def test_of_a_gated_model_the_page_and_the_token_s_variable_are_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError) as raised:
        load_backbone(name)
    row, text = KNOWN[name], str(raised.value)
    assert f"asked for on https://huggingface.co/{row.repository}; then set the variable" in text
    assert "HF_TOKEN" in text
    assert len(text) < 1200


@pytest.mark.parametrize("name", [*KNOWN, "uni@", "rad-dino@a b", "retfound@..", "monet@/"])
@pytest.mark.parametrize("weights", [None, "nowhere.pth"])
def test_nothing_but_backbone_error_leaves_a_name(name, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError):
        load_backbone(name, weights)


def test_a_file_that_cannot_be_fetched_is_named_with_its_page():
    with pytest.raises(BackboneError, match="get it from https://github.com/rajpurkarlab/CheXz"):
        load_backbone("chexzero")


def test_a_revision_stands_in_the_fingerprint_and_in_the_store_s_name(tmp_path, monkeypatch):
    case = openclip(VIT, {}, tmp_path)
    row = replace(KNOWN["dermlip"], route=case.name, file="https://example.org")
    monkeypatch.setitem(KNOWN, "dermlip", row)
    assert load_backbone("dermlip", "random").spec.name == "dermlip"
    folder = tmp_path / "at@v1"
    folder.mkdir()
    for file in tmp_path.glob("open_clip*"):
        (folder / file.name).write_bytes(file.read_bytes())
    route = f"openclip:local-dir:{tmp_path / 'at'}"
    monkeypatch.setitem(KNOWN, "dermlip", replace(row, file="", route=route))
    assert load_backbone("dermlip@v1").spec.name == "dermlip@v1"


# --- folders --------------------------------------------------------------------------------------


def test_a_revision_of_a_folder_and_a_folder_that_is_not_there_are_refused(tmp_path):
    case = openclip(VIT, {}, tmp_path)
    with pytest.raises(BackboneError, match="a folder has no revisions: leave @v1 out"):
        load_backbone("dermlip@v1", str(tmp_path))
    for name in ("dermlip", "dermlip@v1", "rad-dino", "eva-x-tiny", case.name, "hf:org/model"):
        with pytest.raises(BackboneError, match="nofolder: there is no such file or folder"):
            load_backbone(name, str(tmp_path / "nofolder"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="want a folder in the layout of the model's repos"):
        load_backbone("rad-dino", str(tmp_path / "empty"))


def small_(kind, folder):
    config, processor, fields = HF[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf(kind, config, processor, folder, **fields)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("rad-dino", "Dinov2", r"its width of features is \d+, want 768\. Name it by.* -m hf:/"),
        ("rad-dino", "ViT", r"its class is ViTModel, want Dinov2\.\.\."),
        ("phikon", "ViT", r"its width of features is \d+, want 768"),
        ("monet", "Siglip", r"its class is SiglipModel, want CLIP\.\.\."),
        ("phikon", "ResNet", r"its class is ResNetModel, want ViT\.\.\."),
    ],
)
def test_a_folder_of_another_model_is_refused_under_a_known_name(name, kind, said, tmp_path):
    small_(kind, tmp_path)
    with pytest.raises(BackboneError, match=f"holds another model than {name}: {said}"):
        load_backbone(name, str(tmp_path))


def test_folders_of_open_clip_and_timm_too(tmp_path):
    openclip(VIT, {}, tmp_path)
    with pytest.raises(BackboneError, match=r"another model than dermlip: .* want 512\. .*-m open"):
        load_backbone("dermlip", str(tmp_path))
    folder = tmp_path / "timm"
    folder.mkdir()
    repository(folder, "vit_tiny_patch16_224", created("vit_tiny_patch16_224", init_values=1.0))
    with pytest.raises(BackboneError, match=r"another model than uni: its width .* 192, want 1024"):
        load_backbone("uni", str(folder))


@pytest.mark.parametrize(
    ("name", "kind", "change", "said"),
    [
        ("rad-dino", "Dinov2", {}, ""),
        ("rad-dino", "Dinov2", {"num_hidden_layers": 3}, r"its layers is 3, want 2"),
        ("rad-dino", "Dinov2", {"patch_size": 7}, r"its patch is 7, want 14"),
    ],
)
def test_a_folder_of_the_shape_is_taken(name, kind, change, said, tmp_path, monkeypatch):
    """At a small width and depth, which the row is told."""
    config, processor, fields = HF[kind]
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 14}
    shape = replace(KNOWN[name].shape, width=48, layers=2)
    monkeypatch.setitem(KNOWN, name, replace(KNOWN[name], shape=shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf(kind, {**config, **sizes, **change}, processor, tmp_path, **fields)
    if not said:
        assert load_backbone(name, str(tmp_path)).spec.name == name
        return
    with pytest.raises(BackboneError, match=said):
        load_backbone(name, str(tmp_path))


def test_names_near_one_of_the_table_are_said():
    with pytest.raises(BackboneError, match="did you mean rad-dino"):
        load_backbone("raddino")


def test_a_cell_is_another_after_a_change_in_a_model_s_folder(tmp_path):
    from probe.cells import _stat, _weights_file

    openclip(VIT, {}, tmp_path)
    before = _stat(_weights_file(str(tmp_path)))
    assert before
    file = tmp_path / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    os.utime(file, ns=(2**61, 2**61))
    assert _stat(_weights_file(str(tmp_path))) != before


def test_a_folder_has_one_name_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "y" / "n").mkdir(parents=True)
    for prefix in ("hf:", "timm:local-dir:", "openclip:local-dir:"):
        spelled = [f"{prefix}{path}" for path in ("y/n", "y/n/", "./y/n", "y//n", "y/./n")]
        assert weights_of(spelled, ()) == ([f"{prefix}y/n"], {f"{prefix}y/n": None})
        home = [f"{prefix}{path}" for path in ("~/y/n/", f"{tmp_path}/y/n")]
        assert weights_of(home, ())[0] == [f"{prefix}{tmp_path}/y/n"]
    assert weights_of(["hf:y/n/"], ["hf:y/n/=~/w.pt"])[1] == {"hf:y/n": f"{tmp_path}/w.pt"}
    assert weights_of(["hf:y/n/"], ["hf:y/n=w.pt"])[1] == {"hf:y/n": "w.pt"}
    assert weights_of(["uni=~/y/n/"], ())[1] == {"uni": f"{tmp_path}/y/n"}
    assert weights_of(["uni"], ["y/n/"])[1] == {"uni": "y/n"}
    for name in (
        "hf:org/model",
        "hf:org//model",
        "timm:hf-hub:org/model",
        "dinov2",
        "hf:~nobody-here/x",
    ):
        assert weights_of([name], ["random"]) == ([name], {name: "random"})


# --- the command ----------------------------------------------------------------------------------


def rows(*options):
    done = CliRunner().invoke(cli, ["backbones", "--json", *options])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_the_command_lists_the_study_s_first_and_filters_by_modality():
    every = rows()
    assert [row["name"] for row in every] == [*BACKBONES, *KNOWN]
    assert {frozenset(row) for row in every} == {frozenset(every[0])}
    wanted = "name params input_size feature_dim tokens layers mean std source licence"
    wanted += " pretraining_data route modality gated"
    assert set(wanted.split()) <= set(every[0])
    for modality in MODALITIES:
        found = rows("--modality", modality)
        assert [r["name"] for r in found] == [r["name"] for r in every if modality in r["modality"]]
        assert found
    assert "retfound" in [row["name"] for row in rows("--modality", "fundus")]
    assert "sam" in [row["name"] for row in rows("--modality", "general")]
    text = CliRunner().invoke(cli, ["backbones", "--modality", "derm"]).output
    assert "monet" in text
    assert "resnet152" not in text
