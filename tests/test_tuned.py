"""What is trained: blocks by name, an appended DeiT that equals timm's, each at its own rate."""

import pytest
import timm
import torch
from torch import nn

from features.backbones import load_backbone
from features.errors import ProbeError
from probe.train.token_head import TokenHead, grid_of, token_head
from probe.train.tuned import Tuned, feature_of, parameter_groups, recompute, unfreeze

NAME = "timm:test_vit"
STUDY = ["sam", "seem", "dinov2", "openclip", "blip", "deit", "dino", "resnet152"]


def test_computing_blocks_again_gives_the_same_gradients():
    grads = []
    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8)
    for again in (False, True):
        backbone = load_backbone(NAME, "random", 96)
        unfreeze(backbone, "all")
        torch.manual_seed(0)
        model = Tuned(backbone, backbone.spec.default_feature, nn.Linear(64, 3)).train()
        if again:
            recompute(backbone.network.blocks)
        nn.functional.cross_entropy(model(pixels), torch.tensor([0, 2])).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_the_appended_deit_equals_timm_s_on_its_own_embedding():
    torch.manual_seed(0)
    deit = timm.create_model("deit_tiny_patch16_224", num_classes=5).eval()
    for p in deit.parameters():
        p.data += 0.02 * torch.randn_like(p)
    head = TokenHead(deit, width=192, tokens=196, outputs=5).eval()
    head.projector, head.head = nn.Identity(), deit.head
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(head(deit.patch_embed(pixels)), deit(pixels))


def test_the_appended_deit_has_as_many_parameters_as_in_the_study():
    head = token_head("deit-base", "random", shape=(256, 768), outputs=5, seed=0)
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert trained == 85_804_037 + (256 - 196) * 768  # 60 more positions than at 14 x 14
    head = token_head("deit-base", "random", shape=(196, 768), outputs=5, seed=0)
    assert sum(p.numel() for p in head.parameters()) == 85_804_037
    with pytest.raises(ProbeError, match="200 tokens are no square grid"):
        grid_of(200)


def test_what_is_unfrozen_is_what_is_named():
    backbone = load_backbone(NAME, "random", 96)
    blocks = len(backbone.network.blocks)
    unfreeze(backbone, "last:1")
    trained = {n for n, p in backbone.module.named_parameters() if p.requires_grad}
    assert trained == {n for n, d in backbone.network.depths().items() if d >= blocks}
    assert any(n.startswith("norm.") for n in trained)
    assert not any(n.startswith(("patch_embed", "blocks.0.")) for n in trained)
    with pytest.raises(ProbeError, match="want all, none, or last:K"):
        unfreeze(backbone, "last:99")
    assert feature_of(backbone, tokens=False, drop_last=1) == f"block{blocks - 2:02d}/cls"


def test_layers_further_down_learn_more_slowly_and_norms_do_not_decay():
    backbone = load_backbone(NAME, "random", 96)
    unfreeze(backbone, "all")
    model = Tuned(backbone, "final/cls", nn.Linear(64, 3))
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rate) == len(list(model.parameters()))
    assert rate[id(model.head.weight)] == (1.0, 0.1)
    assert rate[id(model.head.bias)] == (1.0, 0)
    norm = backbone.module.norm.weight
    assert rate[id(norm)] == (0.5, 0)
    last = len(backbone.network.blocks)
    assert rate[id(backbone.network.blocks[-1].attn.qkv.weight)] == (0.25, 0.1)
    assert rate[id(backbone.module.patch_embed.proj.weight)] == (0.5 ** (last + 2), 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "deit"])
@pytest.mark.parametrize("name", STUDY)
def test_every_backbone_of_the_study_takes_steps(name, head):
    backbone = load_backbone(name, "random")
    feature = feature_of(backbone, tokens=head == "deit", drop_last=0)
    shape = backbone.network.features[feature]
    torch.manual_seed(0)
    if head == "linear":
        top = nn.Linear(shape[0], 3)
    else:
        top = token_head("deit-tiny", "random", shape=shape, outputs=3, seed=0)
    size = backbone.transform.size
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)
    target = torch.tensor([0, 2])
    for which in ("none", "all"):
        unfreeze(backbone, which)
        model = Tuned(backbone, feature, top).train()
        # Adam's first step moves every weight by lr, whatever its gradient: of two networks with
        # random weights, one on the other, 2e-5 is too far.
        groups = parameter_groups(model, lr=1e-6, weight_decay=1e-5, layer_decay=1.0)
        optimizer = torch.optim.AdamW(groups)
        losses = []
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(pixels), target)
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0], which
