"""SEEM's backbone is SEEM's: judged by an independent one in plain torch (seem_reference)."""

import math

import pytest
import torch
from seem_reference import Reference

from features.backbones.seem import build, rename
from features.backbones.weights import load_strictly
from features.errors import BackboneError

PARAMETERS = 29_922_288


@pytest.fixture(scope="module")
def reference():
    """Far from its initial state, so that no gain is 1, no bias 0 and no layer scale 1e-4."""
    rng = torch.Generator().manual_seed(0)
    module = Reference().eval().requires_grad_(False)
    for name, p in module.named_parameters():
        if p.ndim > 1:  # (o, i, ...), made to keep the variance
            p.normal_(0, 1 / math.sqrt(p[0].numel()), generator=rng)
        elif name.endswith("bias"):
            p.normal_(0, 0.3, generator=rng)
        else:
            p.uniform_(0.5, 1.5, generator=rng)
    return module


@pytest.fixture(scope="module")
def loaded(reference):
    module = build().eval().requires_grad_(False)
    load_strictly(module, rename(reference.state_dict()), "seem's weights")
    return module


def test_it_has_the_published_number_of_parameters(reference):
    for module in (reference, build()):
        assert sum(p.numel() for p in module.parameters()) == PARAMETERS


# Double precision tells a LayerNorm epsilon of 1e-6 from 1e-5. 75 x 107 divides by no stride.
@pytest.mark.parametrize(
    ("images", "dtype", "tolerance"),
    [
        ((1, 3, 224, 224), torch.float32, 1e-4),
        ((1, 3, 512, 512), torch.float32, 1e-4),
        ((2, 3, 75, 107), torch.float64, 1e-10),
    ],
)
def test_every_stage_gives_what_the_reference_gives(reference, loaded, images, dtype, tolerance):
    pixels = torch.randn(images, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = reference.to(dtype)(pixels)
    found = loaded.to(dtype).forward_stages(pixels)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.shape[1:] == (96 * 2**i, *(math.ceil(side / (4 * 2**i)) for side in images[2:]))
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_forward_features_is_the_last_stage(loaded):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(loaded.double().forward_features(pixels), loaded.forward_stages(pixels)[-1])


def test_every_official_tensor_has_one_place_and_strangers_are_named(reference):
    official = reference.state_dict()
    assert len(official) == 300
    renamed = rename(official)
    assert len(renamed) == 300
    # The same memory under both names: nothing is lost, doubled or copied.
    assert {t.data_ptr() for t in renamed.values()} == {t.data_ptr() for t in official.values()}

    changed = dict(official)
    del changed["layers.0.downsample.norm.bias"]
    changed["layers.3.blocks.2.gamma_1"] = torch.zeros(768)
    changed["layers.3.blocks.1.mlp.fc2.weight"] = torch.zeros(768, 3072, 1)
    words = (
        r"1 missing, the first layers.1.downsample.norm.bias; "
        r"1 unexpected, the first layers.3.blocks.2.gamma_1; "
        r"1 misshapen, the first layers.3.blocks.1.mlp.fc2.weight is \(768, 3072, 1\)"
    )
    with pytest.raises(BackboneError, match=words):
        load_strictly(build(), rename(changed), "seem's weights")


def test_a_name_of_its_own_never_takes_an_official_tensors_place(reference, loaded):
    own = loaded.state_dict()
    load_strictly(build(), rename(own), "seem's weights")
    assert all(tensor is own[name] for name, tensor in rename(own).items())
    mixed = dict(reference.state_dict()) | {"norm.weight": torch.zeros(768)}
    with pytest.raises(BackboneError, match="unexpected"):
        load_strictly(build(), rename(mixed), "seem's weights")
