"""Checkpoints as people have them: the same weights give the same backbone from each."""

import json

import pytest
import torch
from references import stirred
from safetensors.torch import save_file

from features.backbones import load_backbone
from features.backbones.wrappers import unwrapped
from features.errors import BackboneError

NAME = "timm:test_vit"


@pytest.fixture(scope="module")
def state():
    import timm

    torch.manual_seed(0)
    return stirred(timm.create_model("test_vit", num_classes=0)).state_dict()


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def other(state):
    return {name: torch.randn_like(value) for name, value in state.items()}


EXTRA = {"head.conv.weight": torch.ones(2)}
SHARDED = "_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module."
WAYS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "DataParallel": lambda s: {"model": under("module.", s)},
    "DataParallel, compiled": lambda s: under("module._orig_mod.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "Lightning, model": lambda s: {"state_dict": under("model.", s) | {"loss.w": torch.ones(1)}},
    "Lightning, encoder": lambda s: {"state_dict": under("net.encoder.", s) | EXTRA},
    "backbone of a segmenter": lambda s: under("backbone.", s) | EXTRA,
    "FSDP": lambda s: {k.replace("blocks.1.", SHARDED): v for k, v in s.items()},
    "EMA beside the last step": lambda s: {"state_dict": other(s), "state_dict_ema": s},
    "EMA in a wrapper": lambda s: {"model": other(s), "model_ema": {"decay": 0.99, "module": s}},
    "teacher beside student": lambda s: under("student.", other(s)) | under("teacher.", s),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapper_changes_nothing(way, state, tmp_path):
    save_file(state, tmp_path / "plain.safetensors")
    wanted = load_backbone(NAME, str(tmp_path / "plain.safetensors")).weights_digest
    torch.save(WAYS[way](state), tmp_path / "w.pt")
    assert load_backbone(NAME, str(tmp_path / "w.pt")).weights_digest == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_is_read_into_float32(dtype, state, tmp_path):
    low = {name: value.to(dtype) for name, value in state.items()}
    torch.save(low, tmp_path / "low.pt")
    module = load_backbone(NAME, str(tmp_path / "low.pt")).module
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, low[name].float()), name


def test_an_index_names_the_files_of_a_model(state, tmp_path):
    names = list(state)
    parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, some in parts.items():
        save_file({name: state[name] for name in some}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    about = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    index.write_text(json.dumps(about))
    module = load_backbone(NAME, str(index)).module
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    about["weight_map"][names[0]] = "../elsewhere.safetensors"
    index.write_text(json.dumps(about))
    with pytest.raises(BackboneError, match="want a weight_map of names to files beside the index"):
        load_backbone(NAME, str(index))
    about["weight_map"][names[0]] = "gone.safetensors"
    index.write_text(json.dumps(about))
    with pytest.raises(BackboneError, match="gone.safetensors: there is no such file"):
        load_backbone(NAME, str(index))


def test_adapters_apart_from_their_weights_are_refused_in_words(state, tmp_path):
    lora = state | {"blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(4, 64)}
    torch.save(lora, tmp_path / "lora.pt")
    with pytest.raises(BackboneError, match=r"hold adapters \(LoRA\) .*by merge_and_unload"):
        load_backbone(NAME, str(tmp_path / "lora.pt"))


def test_two_sets_of_weights_that_fit_alike_are_not_chosen_between(state, tmp_path):
    torch.save(under("left.", state) | under("right.", state), tmp_path / "two.pt")
    with pytest.raises(
        BackboneError, match=r"2 sets of tensors that fit alike, under left. and ri"
    ):
        load_backbone(NAME, str(tmp_path / "two.pt"))


def test_tensors_of_others_with_the_same_names_do_not_hide_a_module_s_own():
    """As in CLIP, whose text tower has the names of a part of its image tower."""
    own = {"blocks.0.w": torch.ones(1), "blocks.1.w": torch.ones(1), "conv.w": torch.ones(1)}
    whole = under("visual.", own) | {"blocks.0.w": torch.zeros(1), "blocks.1.w": torch.zeros(1)}
    found = unwrapped(whole, own, "weights")
    assert found.keys() == own.keys()
    assert all(value.item() == 1 for value in found.values())
    assert unwrapped({"a": torch.ones(1)}, own, "weights").keys() == {"a"}


@pytest.mark.parametrize("name", ["deit", "openclip"])
def test_the_study_s_backbones_are_read_from_lightning_s_checkpoints(name, tmp_path):
    module = load_backbone(name, "random").module
    state = {k: torch.full_like(v, 0.5) for k, v in module.state_dict().items()}
    torch.save({"state_dict": under("model.encoder.", state)}, tmp_path / "last.ckpt")
    loaded = load_backbone(name, str(tmp_path / "last.ckpt"), 192).module
    assert all(torch.all(v == 0.5) for v in loaded.parameters() if v.ndim == 1)
