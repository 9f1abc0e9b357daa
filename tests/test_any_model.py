"""Models that no table names: how they are found, what of them is refused, and that is in words."""

import json
import pickle
import re
import warnings
import zipfile

import pytest
import torch
from parity import apart, compared, files, hf, openclip, timm_
from references import stirred
from safetensors.torch import load_file, save_file
from test_parity import HF, VIT, trunk

from features.backbones import load_backbone, processors, seem
from features.backbones.from_timm import RECIPES
from features.backbones.network import leaves
from features.backbones.weights import read_state_dict
from features.errors import BackboneError
from features.images import picture


def folder_of(kind, folder, **more):
    """A folder as transformers writes it, of the table's row."""
    config, processor, fields = HF[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf(kind, config | more, processor, folder, **fields)
    return folder


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_resnet", "timm:test_efficientnet"])
def test_a_parameter_s_depth_is_the_first_block_that_changes_with_it(name):
    """Judged by changing each parameter and looking at every block."""
    network = load_backbone(name, "random", 96).network
    stirred(network.module)  # some branches begin as zeros
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    wanted = [f"{layer}/mean" for layer in network.layers]
    depths, seen = network.depths(), 0
    assert all(p.requires_grad is False for p in network.module.parameters())
    with torch.no_grad():
        before = network(x, wanted)
        for key, parameter in network.module.named_parameters():
            kept = parameter.clone()
            parameter += 0.5 * torch.rand_like(parameter) + 0.1
            after = network(x, wanted)
            parameter.copy_(kept)
            moved = [i for i, w in enumerate(wanted) if not torch.equal(before[w], after[w])]
            assert not moved or moved[0] == max(0, depths[key] - 1), key
            seen += len(moved) > 0
    assert seen > 0.9 * len(depths)  # rectifiers hide some


def test_the_stages_of_seem_are_unfrozen_with_their_norms(monkeypatch):
    monkeypatch.setattr(seem, "WIDTHS", (12, 24, 48, 96))
    monkeypatch.setattr(seem, "DEPTHS", (1, 1, 1, 1))
    depths = RECIPES["seem"].network(seem.build(), 64).depths()
    for key, depth in depths.items():
        stage = next((i for i in range(4) if key.startswith((f"layers.{i}.", f"norm{i}."))), None)
        wanted = 0 if key.startswith("stem.") else 4 if key.startswith("norm.") else stage + 1
        assert depth == wanted, key


def test_leaves_are_those_that_autograd_reaches():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    found = leaves([(a * b).sum(), a.exp()], set())
    assert {id(x) for x in found} == {id(a), id(b)}
    assert c.grad is None


# --- pools ----------------------------------------------------------------------------------------


def test_class_token_and_mean_stand_side_by_side(tmp_path):
    case = timm_("test_vit", None, tmp_path)
    backbone = load_backbone(case.name, case.weights)
    size = backbone.transform.size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        names = [
            f"{layer}/{p}" for layer in ("block02", "final") for p in ("cls", "mean", "cls+mean")
        ]
        found = backbone.network(x, names)
    for layer in ("block02", "final"):
        joined = torch.cat([found[f"{layer}/cls"], found[f"{layer}/mean"]], 1)
        torch.testing.assert_close(found[f"{layer}/cls+mean"], joined)
    assert backbone.select("all", ("cls+mean",), tokens=False)[-1] == "final/cls+mean"
    with pytest.raises(
        BackboneError, match="has no pool 'proj' there: it has cls, cls.mean, mean,"
    ):
        backbone.select("last", ("proj",), tokens=False)


@pytest.mark.parametrize(
    ("name", "default"),
    [("vit_small_patch16_dinov3", "final/cls"), ("convnext_tiny.dinov3_lvd1689m", "final/pooled")],
)
def test_where_authors_evaluate_otherwise_a_table_says_so(name, default):
    assert load_backbone(f"timm:{name}", "random", 64).spec.default_feature == default


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "patch"),
    [
        ("vit_tiny_patch16_224", 100, 16),
        ("deit_tiny_patch16_224", 230, 16),
        ("eva02_tiny_patch14_224", 225, 14),
        ("mixer_s32_224", 100, 32),
        ("swin_tiny_patch4_window7_224", 98, 4),
    ],
)
def test_a_size_whose_rest_timm_would_cut_off_is_refused(name, size, patch):
    near = size // patch * patch
    said = f"takes image sizes that are multiples of {patch}: found {size}, the nearest are {near} "
    with pytest.raises(BackboneError, match=f"timm:{name} {said}and {near + patch}"):
        load_backbone(f"timm:{name}", "random", size)


def test_models_that_pad_or_overlap_their_patches_take_any_size(tmp_path):
    import timm

    assert load_backbone("timm:resnet10t", "random", 99).transform.size == 99
    assert load_backbone("timm:pvt_v2_b0", "random", 96).transform.size == 96  # 7 pixels each, by 4
    model = timm.create_model("test_vit", num_classes=0, dynamic_img_pad=True)
    about = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": model.pretrained_cfg}
    about["model_args"] = {"dynamic_img_pad": True}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = load_backbone(f"timm:local-dir:{tmp_path}", None, 100)
    x = torch.randn(1, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        options = {"num_classes": 0, "img_size": 100, "pretrained": True}
        wanted = timm.create_model(f"local-dir:{tmp_path}", **options).eval()(x)
        found = backbone.network(x, ["final/pooled"])["final/pooled"]
    torch.testing.assert_close(found, wanted)


def test_a_model_s_own_size_needs_no_whole_patches(tmp_path):
    """As SigLIP's of 384 pixels and patches of 14 (siglip2-so400m): judged by transformers."""
    import transformers

    vision = HF["Siglip"][0]["vision_config"] | {"patch_size": 14, "image_size": 64}
    folder_of("Siglip", tmp_path, vision_config=vision)
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for size in (None, 64):
        backbone = load_backbone(f"hf:{tmp_path}", None, size)
        with torch.no_grad():
            found = backbone.network(x, ["final/pooled", "final/tokens"])
            wanted = theirs.get_image_features(pixel_values=x).pooler_output
        torch.testing.assert_close(found["final/pooled"], wanted)
        assert found["final/tokens"].shape == (1, 16, 48)
    with pytest.raises(BackboneError, match="multiples of 14: found 72, the nearest are 70 and 84"):
        load_backbone(f"hf:{tmp_path}", None, 72)


@pytest.mark.parametrize(
    "name", ["timm:resnet10t", "hf:nowhere", "dinov2", "rad-dino", "openclip:RN50"]
)
def test_images_too_large_for_memory_are_refused_first(name):
    with pytest.raises(BackboneError, match=f"{name}: found images of 1000000 pixels .* want 4096"):
        load_backbone(name, "random", 10**6)


def test_so_are_those_of_a_model_s_own_configuration(tmp_path):
    case = openclip(VIT, {}, tmp_path)
    about = json.loads((tmp_path / "open_clip_config.json").read_text())
    about["model_cfg"]["vision_cfg"]["image_size"] = 10**6
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    with pytest.raises(BackboneError, match="found images of 1000000 pixels"):
        load_backbone(case.name)
    folder = folder_of("Dinov2", tmp_path)
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"image_size": 10**6}))
    with pytest.raises(BackboneError, match="found images of 1000000 pixels"):
        load_backbone(f"hf:{folder}")


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ViT", "Siglip", "CLIP", "Dinov2", "ConvNext", "ResNet"])
def test_a_configuration_with_fewer_blocks_than_the_file_is_refused(kind, tmp_path):
    folder_of(kind, tmp_path)
    load_backbone(f"hf:{tmp_path}")
    about = json.loads((tmp_path / "config.json").read_text())
    image = about.get("vision_config", about)
    if "depths" in image:
        image["depths"][-2] -= 1
    else:
        image["num_hidden_layers"] -= 1
    about = {k: v for k, v in about.items() if not k.startswith(("out_", "stage_"))}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(BackboneError, match=r"its file goes on after block \d with .*config\.json"):
        load_backbone(f"hf:{tmp_path}")


def test_heads_and_text_towers_in_a_file_are_no_blocks_beyond(tmp_path):
    """A text tower of more blocks than the image tower, beside which it lies in the file."""
    import transformers

    text = HF["CLIP"][0]["text_config"] | {"num_hidden_layers": 5}
    folder_of("CLIP", tmp_path, text_config=text)
    about = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    transformers.CLIPVisionConfig(**about).save_pretrained(tmp_path)
    assert load_backbone(f"hf:{tmp_path}").spec.layers == 3
    vit = tmp_path / "vit"
    config = transformers.ViTConfig(**HF["ViT"][0])
    stirred(transformers.ViTForImageClassification(config)).save_pretrained(vit)
    (vit / "preprocessor_config.json").write_bytes(
        (tmp_path / "preprocessor_config.json").read_bytes()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_backbone(f"hf:{vit}").spec.layers == 3
    about = json.loads((vit / "config.json").read_text()) | {"num_hidden_layers": 2}
    (vit / "config.json").write_text(json.dumps(about))
    with pytest.raises(BackboneError, match="its file goes on after block 1 with"):
        load_backbone(f"hf:{vit}")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
    folder_of("Dinov2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = next(key for key in state if "norm1.weight" in key)
    state[key][3] = float(value)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"not finite: its weights hold NaN .*first in .*norm1"):
        load_backbone(f"hf:{tmp_path}")


def test_a_masked_autoencoder_sees_all_patches_in_their_order(tmp_path):
    from transformers import ViTModel

    folder_of("ViTMAE", tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (backbone.network(x, ["final/cls", "final/tokens"]) for _ in range(2))
        for key in one:
            torch.testing.assert_close(one[key], other[key])
        plain = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)(pixel_values=x)
    tokens = torch.nn.functional.cosine_similarity(
        one["final/tokens"], plain.last_hidden_state[:, 1:], dim=-1
    )
    assert tokens.min() > 0.99  # but for the epsilon of norms
    assert backbone.network.features["final/tokens"] == (16, 48)


def test_swin_has_no_class_token(tmp_path):
    backbone = load_backbone(f"hf:{folder_of('Swin', tmp_path)}")
    assert "final/cls" not in backbone.network.features
    assert "block00/cls" not in backbone.network.features


def test_of_two_towers_only_that_of_images_is_kept(tmp_path):
    backbone = load_backbone(f"hf:{folder_of('CLIP', tmp_path)}")
    names = [name for name, _ in backbone.module.named_parameters()]
    assert not [name for name in names if "text" in name]
    assert backbone.spec.params == sum(p.numel() for p in backbone.module.parameters())


def test_a_pooler_without_weights_gives_no_feature_and_that_is_said(tmp_path):
    file = folder_of("ViT", tmp_path) / "model.safetensors"
    state = load_file(file)
    kept = {key: value for key, value in state.items() if not key.startswith("pooler.")}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="no pooler.dense.bias, so that pooled would be random"):
        backbone = load_backbone(f"hf:{tmp_path}")
    assert backbone.spec.default_feature == "final/cls"
    assert "final/pooled" not in backbone.network.features
    lost = next(key for key in kept if key.endswith("patch_embeddings.projection.weight"))
    del kept[lost]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=f"its file has no {lost}, on which every feature"):
        load_backbone(f"hf:{tmp_path}")


def test_a_processor_that_cannot_be_followed_is_refused_and_not_approximated(tmp_path):
    import transformers

    folder_of("ViT", tmp_path)
    transformers.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}
    ).save_pretrained(tmp_path)
    words = "no resize, crop or padding gives the pixels of its SamImageProcessor.*--fit crop, sq"
    with pytest.raises(BackboneError, match=words):
        load_backbone(f"hf:{tmp_path}")
    fitted = load_backbone(f"hf:{tmp_path}", fit=("squash", None)).transform
    assert (fitted.fit, fitted.size, fitted.resize) == ("squash", 64, 64)


def test_a_processor_of_a_million_pixels_is_refused_before_it_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "_run", lambda *_: pytest.fail("it was run"))
    folder = folder_of("ViT", tmp_path)
    changed(folder, "preprocessor_config.json", None, size={"height": 10**6, "width": 10**6})
    with pytest.raises(BackboneError, match="its processor makes images of 1000000 pixels"):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize("layers", ["\u00b2", "0,\u2460", "-1"])
def test_a_layer_that_is_no_number_is_an_unknown_layer(layers):
    with pytest.raises(BackboneError, match="has no layer"):
        load_backbone("timm:test_vit", "random").select(layers, [], tokens=False)


@pytest.mark.parametrize("kind", ["ViT", "CLIP", "Siglip", "Dinov2", "ConvNext", "Beit"])
def test_the_processor_s_other_backend_is_as_close_as_the_library_s_own_two(kind, tmp_path):
    """transformers resizes by torchvision too, which rounds otherwise than Pillow."""
    config, processor, fields = HF[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, errors = compared(hf(kind, config, processor, tmp_path, backend="torchvision", **fields))
    assert errors[0] < 1e-2


def test_another_size_is_taken_in_proportion(tmp_path):
    import transformers

    backbone = load_backbone(f"hf:{folder_of('DeiT', tmp_path)}", None, 96)
    assert (backbone.transform.size, backbone.transform.resize) == (96, 108)
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        found = backbone.network(x, ["final/pooled"])["final/pooled"]
        wanted = theirs(pixel_values=x, interpolate_pos_encoding=True).pooler_output
    assert apart(found, wanted) < 1e-4


def test_dinov3_loads_after_other_models_and_trains(tmp_path):
    load_backbone("deit", "random")  # its shapes come from a pass with fake tensors
    backbone = load_backbone(f"hf:{folder_of('DINOv3ViT', tmp_path, image_size=64)}", None, 64)
    x = torch.randn(1, 3, 64, 64)
    backbone.module.requires_grad_(True)
    with torch.inference_mode():
        backbone.network(x, ["final/cls"])
    backbone.network(x, ["final/cls"])["final/cls"].sum().backward()
    assert any(p.grad is not None for p in backbone.module.parameters())


# --- timm and open_clip ---------------------------------------------------------------------------


def local(folder, state, architecture="vit_tiny_patch16_224", **more):
    """A folder as repositories of timm's models are, such as UNI's: config.json says the rest."""
    import timm

    cfg = timm.get_pretrained_cfg(architecture).to_dict() | {"num_classes": 0, "mean": [0.5] * 3}
    about = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": cfg, **more}
    (folder / "config.json").write_text(json.dumps(about))
    save_file(state, folder / "model.safetensors")
    return f"timm:local-dir:{folder}"


def test_a_folder_s_config_says_the_architecture(tmp_path):
    import timm

    more = {"init_values": 1e-5, "reg_tokens": 2, "img_size": 96}
    torch.manual_seed(0)
    theirs = stirred(timm.create_model("vit_tiny_patch16_224", num_classes=0, **more))
    name = local(tmp_path, theirs.state_dict(), model_args=more)
    backbone = load_backbone(name)
    assert backbone.transform.mean == (0.5, 0.5, 0.5)
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    backbone = load_backbone(name, None, 96)
    with torch.no_grad():
        found = backbone.network(x, ["final/pooled", "final/tokens"])
        assert apart(found["final/pooled"], theirs(x)) < 1e-5
    assert found["final/tokens"].shape == (1, 36, 192)


def test_layer_scale_in_a_file_has_the_model_built_with_it(tmp_path):
    import timm

    theirs = stirred(timm.create_model("test_vit", num_classes=0, init_values=1e-5))
    torch.save(theirs.state_dict(), tmp_path / "uni.bin")
    backbone = load_backbone("timm:test_vit", str(tmp_path / "uni.bin"))
    x = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = backbone.network(x, ["final/pooled"])["final/pooled"]
        assert apart(found, theirs(x)) < 1e-5


def test_a_whole_classifier_s_file_is_read_without_its_head(tmp_path):
    import timm

    theirs = stirred(timm.create_model("test_resnet", num_classes=10))
    torch.save({"model": theirs.state_dict()}, tmp_path / "w.pth")
    backbone = load_backbone("timm:test_resnet", str(tmp_path / "w.pth"))
    x = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        assert apart(backbone.network(x, ["final/pooled"])["final/pooled"], wanted) < 1e-5


def changed(folder, file, part, **values):
    """The same folder, its weights untouched, with other values in a file of its configuration."""
    about = json.loads((folder / file).read_text())
    (about if part is None else about.setdefault(part, {})).update(values)
    (folder / file).write_text(json.dumps(about))


@pytest.mark.parametrize(
    "values", [{"hidden_act": "relu"}, {"layer_norm_eps": 0.5}, {"num_attention_heads": 1}]
)
def test_another_configuration_of_the_same_weights_is_another_model_of_transformers(
    values, tmp_path
):
    folder = folder_of("ViT", tmp_path)
    before, again = (load_backbone(f"hf:{folder}") for _ in range(2))
    changed(folder, "config.json", None, problem_type="regression", id2label={"0": "a"})
    idle = load_backbone(f"hf:{folder}")
    changed(folder, "config.json", None, **values)
    after = load_backbone(f"hf:{folder}")
    assert before.configuration == again.configuration == idle.configuration
    assert after.weights_digest == before.weights_digest
    assert after.configuration != before.configuration


@pytest.mark.parametrize(
    ("architecture", "values"),
    [("test_vit", {"act_layer": "relu"}), ("test_resnet", {"global_pool": "max"})],
)
def test_another_configuration_of_the_same_weights_is_another_model_of_timm(
    architecture, values, tmp_path
):
    import timm

    state = timm.create_model(architecture, num_classes=0).state_dict()
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": architecture, "pretrained_cfg": {}})
    )
    save_file(state, tmp_path / "model.safetensors")
    before = load_backbone(f"timm:local-dir:{tmp_path}")
    changed(tmp_path, "config.json", "model_args", **values)
    after = load_backbone(f"timm:local-dir:{tmp_path}")
    assert after.weights_digest == before.weights_digest
    assert after.configuration != before.configuration


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_attention_heads": 0}, r"ZeroDivisionError.*Want a folder that has config.json"),
        ({"hidden_size": 36}, r"config.json: \d+ misshapen, the first \S+ is \(.*\), want \("),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}, "code .* is never run"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_without_the_hub(values, said, tmp_path):
    folder = folder_of("ViT", tmp_path / "model")
    changed(folder, "config.json", None, **values)
    with pytest.raises(BackboneError, match=said) as caught:
        load_backbone(f"hf:{folder}")
    assert not re.search("huggingface.co|HF_TOKEN|trust_remote_code|report", str(caught.value))


def test_a_revision_or_an_adapter_of_a_folder_is_not_passed_over(tmp_path):
    folder = folder_of("ViT", tmp_path / "model")
    with pytest.raises(BackboneError, match=r"a folder has no revisions: leave @v1\.0 out"):
        load_backbone(f"hf:{folder}@v1.0")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(BackboneError, match="merge the adapter into the weights"):
        load_backbone(f"hf:{folder}")


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("levit_128s", "head_dist.bn.weight"),
        ("repvit_m0_9", "head.head_dist.bn.weight"),
        ("caformer_s18", "head.fc.fc1.weight"),
    ],
)
def test_what_goes_with_a_classifier_is_left_out_with_it(name, beside, tmp_path):
    """timm publishes these with the norm, or the first layer, of their classifier."""
    import timm

    whole = stirred(timm.create_model(name))
    state = whole.state_dict()
    assert beside in state
    torch.save(state, tmp_path / "w.pth")
    backbone = load_backbone(f"timm:{name}", str(tmp_path / "w.pth"))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = whole.forward_head(whole.forward_features(x), pre_logits=True)
        assert apart(backbone.network(x, ["final/pooled"])["final/pooled"], wanted) < 1e-5
    lost = list(backbone.network.module.state_dict())[1]
    torch.save({k: v for k, v in state.items() if k != lost}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=f"don't fit: 1 missing, the first {lost}$"):
        load_backbone(f"timm:{name}", str(tmp_path / "w.pth"))


def test_weights_of_any_library_that_do_not_fit_are_named(tmp_path):
    import timm

    state = timm.create_model("test_vit", num_classes=0).state_dict()
    del state["blocks.1.attn.qkv.bias"]
    state["stranger"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    words = (
        r"timm:test_vit's weights .*w.pth don't fit: 1 missing, the first blocks.1.attn.qkv.bias; "
        r"1 unexpected, the first stranger; 1 misshapen, the first norm.weight is \(3\), "
        r"want \(64\)"
    )
    with pytest.raises(BackboneError, match=words):
        load_backbone("timm:test_vit", str(tmp_path / "w.pth"))
    openclip(VIT, {}, tmp_path)
    with pytest.raises(BackboneError, match=r"weights .*w.pth don't fit: \d+ missing"):
        load_backbone(f"openclip:local-dir:{tmp_path}", str(tmp_path / "w.pth"))


def test_open_clip_s_activation_is_taken_and_a_mismatch_said():
    with pytest.warns(UserWarning, match="builds it with GELU.*want openclip:ViT-B-32-quickgelu/"):
        plain = load_backbone("openclip:ViT-B-32/openai", "random", 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick = load_backbone("openclip:ViT-B-32-quickgelu/openai", "random", 32)
    kinds = [
        {type(m).__name__ for m in b.module.modules() if "GELU" in type(m).__name__}
        for b in (plain, quick)
    ]
    assert kinds == [{"GELU"}, {"QuickGELU"}]


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated; OpenAI's files are in it
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript_is_read_as_tensors_and_never_run(tmp_path, how):
    """OpenAI's CLIP files are such archives, in half precision."""
    import open_clip

    openclip(VIT, {}, tmp_path)
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    class Visual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.scale = model.visual, torch.nn.Parameter(torch.ones(()))

        def forward(self, pixels):
            return self.visual(pixels) * self.scale

    whole = Visual().eval()
    wanted = whole(x).detach()
    made = torch.jit.trace(whole, x) if how == "trace" else torch.jit.script(whole)
    made.save(str(tmp_path / "ViT.pt"))
    found = read_state_dict(tmp_path / "ViT.pt")
    assert found.keys() == whole.state_dict().keys()
    backbone = load_backbone(f"openclip:local-dir:{tmp_path}", str(tmp_path / "ViT.pt"))
    with torch.no_grad():
        assert apart(backbone.network(x, ["final/pooled"])["final/pooled"], wanted) < 1e-5
    bad = tmp_path / "bad.pt"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("bad/constants.pkl", b"")
        archive.writestr("bad/data.pkl", pickle.dumps(Payload(), protocol=2))
    with pytest.raises(BackboneError, match="reading them would run code"):
        read_state_dict(bad)


BERT = {"hf_model_name": "org/own-code", "hf_tokenizer_name": "org/own-code", "hf_proj_type": "mlp"}
BERT |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 256}


def folder_with_a_text_tower_of_transformers(folder):
    """As BiomedCLIP's repository is: weights of both towers, the text's by another's name."""
    case = openclip(trunk("test_vit", "", "linear", 160), {}, folder)
    config = folder / "open_clip_config.json"
    made = json.loads(config.read_text())
    made["model_cfg"]["text_cfg"] = BERT
    config.write_text(json.dumps(made))
    file = folder / "open_clip_model.safetensors"
    state = {k: v for k, v in load_file(file).items() if k.startswith(("visual.", "logit_scale"))}
    state |= {"text.transformer.embeddings.word_embeddings.weight": torch.zeros(9, 8)}
    state |= {"text.transformer.embeddings.position_ids": torch.arange(9)[None]}
    state |= {"text.proj.0.weight": torch.zeros(4, 8)}
    save_file(state, file)
    return case


@pytest.mark.parametrize("weights", [None, "random", "file"])
@pytest.mark.parametrize("name", ["folder", "roberta-ViT-B-32/laion2b_s12b_b32k"])
def test_a_text_tower_of_transformers_is_neither_fetched_nor_asked_about(
    name, weights, tmp_path, monkeypatch
):
    """open_clip would get its configuration, weights and tokeniser from the hub."""
    import open_clip
    import transformers

    config = open_clip.get_model_config("roberta-ViT-B-32")
    config["vision_cfg"] |= {"layers": 1, "width": 64}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "roberta-ViT-B-32", config)
    case = folder_with_a_text_tower_of_transformers(tmp_path)
    file = tmp_path / "open_clip_model.safetensors"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for kind in ("AutoConfig", "AutoModel", "AutoTokenizer"):
        for how in ("from_pretrained", "from_config"):
            if hasattr(getattr(transformers, kind), how):
                refuse = classmethod(lambda *_, **__: pytest.fail("it fetched"))
                monkeypatch.setattr(getattr(transformers, kind), how, refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = str(file) if weights == "file" else weights
    if name == "folder":
        backbone = load_backbone(case.name, given)
        x = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = backbone.network(x, ["final/pooled"])["final/pooled"]
        assert found.shape == (1, 24)
        assert not [key for key in backbone.module.state_dict() if "text" in key]
    elif weights == "random":
        with pytest.warns(UserWarning, match="it has no name with the other"):
            found = load_backbone(f"openclip:{name}", given, 32)
        assert found.spec.feature_dim == 512
    else:  # its weights are not here, or another model's: in words
        with pytest.raises(BackboneError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_backbone(f"openclip:{name}", given, 32)


def test_names_in_a_folder_of_open_clip_need_its_config(tmp_path):
    with pytest.raises(BackboneError, match="open_clip_config.json: want open_clip's model_cfg"):
        load_backbone(f"openclip:local-dir:{tmp_path}", "random")


# --- nothing but BackboneError --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "timm:local-dir:nowhere", "timm:hf-hub:medprobe/none", "timm:", "timm:x/y", "timm:a:b",
        "timm:test_vit:1", "openclip:local-dir:nowhere", "openclip:hf-hub:medprobe/none",
        "openclip:/", "hf:medprobe/none", "hf:nowhere", "hf:/dev/null", "hf::",
    ],
)  # fmt: skip
@pytest.mark.parametrize("weights", [None, "random", "nowhere.pth"])
def test_nothing_but_backbone_error_leaves_a_loader(name, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError) as raised:
        load_backbone(name, weights)
    assert len(str(raised.value)) < 900


def test_a_size_that_a_library_refuses_is_said(tmp_path):
    for name in ("test_vit", "xcit_nano_12_p16_224"):
        with pytest.raises(BackboneError, match=rf"timm:{name} .*(divi|multiples of)"):
            load_backbone(f"timm:{name}", "random", 100)
    folder_of("ViT", tmp_path)
    with pytest.raises(BackboneError, match="multiples of 16: found 100"):
        load_backbone(f"hf:{tmp_path}", None, 100)


@pytest.mark.parametrize("kind", ["timm", "openclip", *HF])
def test_a_loaded_model_goes_to_other_machines_as_it_is(kind, tmp_path):
    from ray import cloudpickle

    name = "timm:test_vit"
    if kind == "openclip":
        openclip(VIT, {}, tmp_path)
        name = f"openclip:local-dir:{tmp_path}"
    elif kind in HF:
        name = f"hf:{folder_of(kind, tmp_path)}"
    here = load_backbone(name, "random")
    there = cloudpickle.loads(cloudpickle.dumps(here))
    size = here.transform.size
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    wanted = [here.spec.default_feature, "block00/tokens"]
    with torch.inference_mode():
        both = [backbone.network(x, wanted) for backbone in (here, there)]
    assert all(torch.equal(both[0][key], both[1][key]) for key in wanted)


def test_a_text_model_is_refused(tmp_path):
    import transformers

    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="can't be loaded"):
        load_backbone(f"hf:{tmp_path}")


def test_no_loader_knows_a_model_by_its_name():
    from conftest import ROOT

    for file in (ROOT / "features" / "backbones").glob("*.py"):
        assert "name ==" not in file.read_text(), file


def test_images_of_comparison_are_oblong_and_rich():
    assert [picture(h, w).size for h, w in ((9, 7), (301, 437))] == [(7, 9), (437, 301)]
    assert len(files()) == 3


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_a_torchscript_tensor_takes_no_more_than_its_bytes_whatever_its_strides(tmp_path):
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("wide", torch.zeros(1).expand(1 << 40))

        def forward(self, pixels):
            return pixels

    torch.jit.script(Wide()).save(str(tmp_path / "wide.pt"))
    [found] = read_state_dict(tmp_path / "wide.pt").values()
    assert found.shape == (1 << 40,)
    assert found.untyped_storage().nbytes() == 4


def test_code_in_a_folder_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    """transformers asks whether it may run it, and does if it is told yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder = folder_of("ViT", tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Any: pass\n")
    for name in ("config.json", "preprocessor_config.json"):
        values = json.loads((folder / name).read_text())
        known = ("AutoConfig", "AutoModel", "AutoImageProcessor")
        values["auto_map"] = dict.fromkeys(known, "evil.Any")
        (folder / name).write_text(json.dumps(values))
    plain = folder_of("ViT", tmp_path / "plain")
    digests = {load_backbone(f"hf:{one}").weights_digest for one in (folder, plain)}
    assert len(digests) == 1
    values["auto_map"] = {"AutoModel": "evil.Any"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", **values}))
    with pytest.raises(BackboneError):
        load_backbone(f"hf:{folder}")
    assert not (tmp_path / "trace").exists()
