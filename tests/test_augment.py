"""Views, judged by torchvision's own operations on the same draws."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as F

from features import augment

RNG = np.random.default_rng(0)
CROP = Image.fromarray(RNG.integers(0, 256, (224, 224, 3), dtype=np.uint8)).resize((224, 224))


@pytest.mark.parametrize("turn", [-0.1, -0.03, 0, 0.05, 0.1])
def test_hue_turns_as_torchvision_turns_it(turn):
    ours = np.asarray(augment.turn_hue(CROP, turn))
    np.testing.assert_array_equal(ours, np.asarray(F.adjust_hue(CROP, turn)))


def test_jitter_is_torchvision_s_steps_in_the_drawn_order():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        theirs = CROP
        for which in draw.permutation(4):
            if which == 3:
                theirs = F.adjust_hue(theirs, draw.uniform(-0.1, 0.1))
                continue
            step = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[which]
            most = (0.2, 0.2, 0.1)[which]
            theirs = step(theirs, draw.uniform(1 - most, 1 + most))
        ours = augment.jitter(CROP, np.random.default_rng(seed))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    # and the study's settings mean the same to torchvision
    jitter = ColorJitter(0.2, 0.2, 0.1, 0.1)
    assert jitter.brightness == pytest.approx((0.8, 1.2))
    assert jitter.saturation == pytest.approx((0.9, 1.1))
    assert jitter.hue == pytest.approx((-0.1, 0.1))


def test_boxes_are_spread_as_torchvision_s_are():
    rng, n = np.random.default_rng(1), 4000
    ours = np.array([augment.random_box(224, 224, rng) for _ in range(n)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [RandomResizedCrop.get_params(CROP, [0.8, 1.2], [3 / 4, 4 / 3]) for _ in range(n)]
    top, left, high, wide = np.array(found).T
    theirs = np.stack([left, top, left + wide, top + high], 1)
    for box in (ours, theirs):
        assert (box[:, :2] >= 0).all() and (box[:, 2:] <= 224).all()
    from scipy.stats import ks_2samp

    for k in range(4):
        assert ks_2samp(ours[:, k], theirs[:, k]).pvalue > 1e-3
    whole = [(boxes == (0, 0, 224, 224)).all(1).mean() for boxes in (ours, theirs)]
    assert abs(whole[0] - whole[1]) < 0.03


def test_a_view_depends_on_seed_bytes_and_number_alone():
    def view(seed, content, number):
        return augment.augment(CROP, augment.generator(seed, content, number)).tobytes()

    one = view(0, "ab" * 32, 0)
    assert one == view(0, "ab" * 32, 0)
    assert len({one, view(1, "ab" * 32, 0), view(0, "ac" * 32, 0), view(0, "ab" * 32, 1)}) == 4
