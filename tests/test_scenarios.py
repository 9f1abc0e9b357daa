"""All four scenarios on real images by the real classes, small: each beats chance, and says so."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from features.backbones import BACKBONES, load_backbone, seem
from features.backbones.base import Backbone
from features.backbones.from_timm import RECIPES
from features.datasets import Options, open_dataset
from features.extract import extract
from features.plan import ExtractionSettings
from probe import sweep
from probe.train.finetune import TrainSettings, finetune, train_on_store
from probe.train.training import Training

SIZE = 64


def tiny_seem(monkeypatch):
    monkeypatch.setattr(seem, "WIDTHS", (12, 24, 48, 96))
    monkeypatch.setattr(seem, "DEPTHS", (1, 1, 2, 1))
    return seem.build()


def tiny_sam(_):
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sam = VisionTransformerSAM(
        img_size=SIZE,
        patch_size=8,
        embed_dim=64,
        depth=3,
        num_heads=2,
        window_size=4,
        global_attn_indexes=(2,),
        use_rel_pos=True,
        num_classes=0,
    )
    sam.neck = torch.nn.Identity()
    return sam


def small(name, monkeypatch):
    """A backbone of the study's class with few parameters, at 64 pixels."""
    torch.manual_seed(0)
    module = (tiny_seem if name == "seem" else tiny_sam)(monkeypatch)
    spec = replace(BACKBONES[name], input_size=SIZE, native_size=SIZE, resize=SIZE)
    network = RECIPES[name].network(module, SIZE)
    return Backbone.of(spec, module, network, spec.transform(SIZE), "random")


@pytest.fixture(scope="module")
def manifest(shared_data):
    table = shared_data / "mednist_small" / "manifest.csv"
    whole = open_dataset(f"csv:{table}", Options(split="drawn"))
    return whole.take(np.arange(0, len(whole), 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_lite0", "timm:test_vit", "seem", "sam"])
def test_every_scenario_beats_chance_on_real_images(name, manifest, tmp_path, monkeypatch):
    def loaded():
        if name in ("seem", "sam"):
            return small(name, monkeypatch)
        return load_backbone(name, None if name == "efficientnet_lite0" else "random", SIZE)

    [report] = extract(
        manifest,
        [loaded()],
        out=tmp_path / "features",
        settings=ExtractionSettings(tokens=True, precision="float32"),
    )
    loop = Training(epochs=4, batch_size=32, lr=1e-3 if name != "efficientnet_lite0" else 1e-4)
    how = TrainSettings(head_size="deit-tiny", head_weights="random", training=loop, bootstrap=500)
    deit = replace(how, head="deit", training=replace(loop, lr=1e-3))
    out = tmp_path / "results"
    found = [
        sweep.probe(report.store, out=out, settings=sweep.ProbeOptions(bootstrap=500)),
        train_on_store(report.store, out=out, settings=deit),
        finetune(report.store, loaded(), out=out, settings=how),
        finetune(report.store, loaded(), out=out, settings=deit),
    ]
    kinds = ["frozen-linear", "frozen-deit", "unfrozen-linear", "unfrozen-deit"]
    assert [result.scenario for result in found] == kinds
    chance = 1 / len(manifest.classes)
    for result in found:
        accuracy = result.metrics["accuracy"]
        assert accuracy["ci_low"] > chance, (result.scenario, accuracy)
    # The unfrozen linear head starts at the probe's score, and is no worse at its best epoch.
    frozen, unfrozen = found[0], found[2]
    start = unfrozen.history[0]["value"]
    folds = np.nanmax(np.array(frozen.folds["scores"], dtype=float).mean(1))
    assert start == pytest.approx(folds, abs=0.08)  # of other validation images
    assert unfrozen.folds["score"] >= start
