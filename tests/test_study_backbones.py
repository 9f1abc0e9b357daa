"""The study's eight backbones, each judged by its reference implementation on its official file."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from references import REFERENCES

from features.backbones import BACKBONES, load_backbone
from features.backbones.base import count_params
from features.errors import BackboneError

PARAMS = {
    "sam": 88_883_456,
    "seem": 29_922_288,
    "dinov2": 86_580_480,
    "openclip": 86_192_640,
    "blip": 85_798_656,
    "deit": 85_798_656,
    "dino": 85_798_656,
    "resnet152": 58_143_808,
}
OTHER_SIZE = {"sam": 256, "seem": 288, "dinov2": 518, "resnet152": 192}  # the rest: 256


def written(name, size, tmp_path):
    """Write the official file; return the reference, the file and its tensors."""
    torch.manual_seed(0)
    features, official = REFERENCES[name](size)
    file = tmp_path / f"{name}.pth"
    torch.save(official, file)
    return features, file, official


def check_parity(name, size, tmp_path):
    reference, file, _ = written(name, size, tmp_path)
    ours = load_backbone(name, str(file), size)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    default = ours.spec.default_feature
    with torch.inference_mode():
        found = ours.network(x, [default, "final/tokens"])
        wanted = reference(x)
    for ours_, theirs in (
        (found[default], wanted["default"]),
        (found["final/tokens"], wanted["tokens"]),
    ):
        assert ours_.shape == theirs.shape
        error = (ours_ - theirs).norm() / theirs.norm()
        assert error < 1e-4, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", REFERENCES)
def test_features_and_tokens_equal_the_reference_s_at_224(name, tmp_path):
    check_parity(name, 224, tmp_path)


@pytest.mark.parametrize("name", REFERENCES)
def test_features_and_tokens_equal_the_reference_s_at_another_size(name, tmp_path):
    check_parity(name, OTHER_SIZE.get(name, 256), tmp_path)


@pytest.mark.slow
def test_sam_equals_segment_anything_at_its_native_1024(tmp_path):
    check_parity("sam", 1024, tmp_path)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_table_counts_and_measures_what_is_there(name):
    backbone = load_backbone(name, "random")
    spec, features = BACKBONES[name], backbone.network.features
    # At 518 px DINOv2's position table is larger than at 224, and timm has no mask token.
    absent = (37**2 - 16**2) * 768 + 768 if name == "dinov2" else 0
    assert count_params(backbone.module) + absent == spec.params == PARAMS[name]
    assert features[spec.default_feature] == (spec.feature_dim,)
    assert features["final/tokens"][0] == spec.tokens
    assert backbone.network.layers[-2] == f"block{spec.layers - 1:02d}"
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = backbone.network(x, list(features))
        again = backbone.network(x, ["block00/mean", spec.default_feature])
    assert {k: tuple(v.shape[1:]) for k, v in found.items()} == features
    for layer in backbone.network.layers:  # every layer has its mean and tokens, from one pass
        mean, tokens = found[f"{layer}/mean"], found[f"{layer}/tokens"]
        if (name, layer) != ("dinov2", "final"):  # there the tokens are from before the last norm
            torch.testing.assert_close(mean, tokens.mean(1), rtol=1e-4, atol=1e-5)
    for feature, value in again.items():
        torch.testing.assert_close(value, found[feature])
    if name == "dinov2":
        torch.testing.assert_close(found["final/tokens"], found["block11/tokens"])


@pytest.mark.parametrize("name", REFERENCES)
def test_a_dropped_and_an_extra_tensor_are_named(name, tmp_path):
    _, file, official = written(name, 224, tmp_path)
    inner = official.get("teacher") or official.get("model") or official
    prefix = {
        "sam": "image_encoder.",
        "seem": "backbone.",
        "openclip": "visual.",
        "blip": "visual_encoder.",
        "dino": "module.backbone.",
    }.get(name, "")
    if name in ("openclip", "resnet152"):
        victim = f"{prefix}{'ln_pre' if prefix else 'bn1'}.bias"
    else:
        victim = next(k for k in inner if k.startswith(prefix) and k.endswith("norm1.bias"))
    kept = inner.pop(victim)
    torch.save(official, file)
    with pytest.raises(BackboneError, match="1 missing, the first"):
        load_backbone(name, str(file))
    inner[victim] = kept
    inner[f"{prefix}stranger.weight"] = torch.zeros(1)
    torch.save(official, file)
    with pytest.raises(BackboneError, match="1 unexpected, the first stranger.weight"):
        load_backbone(name, str(file))


def test_other_layouts_of_the_same_weights_give_the_same_backbone(tmp_path):
    from safetensors.torch import save_file

    _, file, official = written("openclip", 224, tmp_path)
    whole = load_backbone("openclip", str(file)).weights_digest
    visual = {k.removeprefix("visual."): v for k, v in official.items() if k.startswith("visual.")}
    save_file(visual, tmp_path / "visual.safetensors")
    assert load_backbone("openclip", str(tmp_path / "visual.safetensors")).weights_digest == whole
    _, file, official = written("dino", 224, tmp_path)
    teacher = load_backbone("dino", str(file)).weights_digest
    plain = {
        k.removeprefix("module.backbone."): v
        for k, v in official["teacher"].items()
        if "head" not in k
    }
    torch.save(plain, file)
    assert load_backbone("dino", str(file)).weights_digest == teacher


@pytest.mark.parametrize("name", ["sam", "dinov2", "openclip"])
def test_a_size_the_patches_do_not_fill_names_the_nearest(name):
    patch = BACKBONES[name].patch
    with pytest.raises(BackboneError, match=f"multiples of {patch}: found 225, the nearest are"):
        load_backbone(name, "random", 225)


def test_offline_the_error_says_which_file_to_get_and_which_option_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDPROBE_CACHE", str(tmp_path))

    def refuse(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    words = (
        r"no route to host\). Get sam_vit_b_01ec64.pth from https://.*give it with --weights FILE"
    )
    with pytest.raises(BackboneError, match=words):
        load_backbone("sam")


def test_the_study_s_one_channel_input_is_a_normalisation():
    """Its first convolution of red weights on one channel sees what green and blue at zero give."""
    backbone = load_backbone("resnet152", "random").normalised_by((0.286,) * 3, (0.267, 1e30, 1e30))
    grey = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    pixels = backbone.normalise(grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1), torch.float32)
    conv = backbone.module.conv1
    one = torch.nn.functional.conv2d(
        (grey / 255 - 0.286) / 0.267, conv.weight[:, :1], stride=conv.stride, padding=conv.padding
    )
    torch.testing.assert_close(conv(pixels), one, rtol=1e-5, atol=1e-5)


# A transformer and a convolutional one; bfloat16 is emulated, and slow, on many processors.
QUICK = ("deit", "seem")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in REFERENCES]
)
def test_bfloat16_keeps_the_direction_of_every_feature(name):
    x = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found = []
    for kind in (torch.float32, torch.bfloat16):
        backbone = load_backbone(name, "random")
        feature = backbone.spec.default_feature
        with torch.inference_mode():
            backbone.module.to(kind)
            found.append(backbone.network(x.to(kind), [feature])[feature].float())
    assert torch.nn.functional.cosine_similarity(*found).min() > 0.999


@pytest.mark.slow
def test_all_eight_extract_from_one_decode_within_8_gib(tmp_path, image_folder):
    """In a process of its own, whose peak memory is then known."""
    names = [word for name in REFERENCES for word in ("-m", name)]
    call = ["extract", f"folder:{image_folder}", *names, "--weights", "random", "--limit", "8"]
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    words = [sys.executable, "-c", code, sys.executable, str(ROOT / "cli.py"), *call]
    words += ["-o", str(tmp_path / "out")]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.count("8 images computed") == 8
    assert int(said.split()[-1]) < 8 << 20  # KiB
