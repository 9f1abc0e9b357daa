"""Time an epoch of training on stored tokens beside one with the frozen backbone in the loop.

An appended DeiT on random tokens of a ViT-B/16 with random weights: speed does not depend on them.
Also an epoch of images that have to be decoded, and one of crops that are still in memory.
"""

import argparse
import datetime
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from features.backbones import load_backbone
from features.datasets import open_dataset
from features.extract import extract
from features.plan import ExtractionSettings
from features.store import FeatureStore
from probe.train.feeds import Images, Stored, recipe_of
from probe.train.token_head import token_head
from probe.train.tuned import Tuned, unfreeze

BATCH = 16


def images(folder, count, size):
    """Write JPEGs with a sensor's noise in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        where = folder / "ab"[i % 2]
        where.mkdir(parents=True, exist_ok=True)
        smooth = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        whole = np.asarray(Image.fromarray(smooth).resize((size, size), Image.Resampling.BICUBIC))
        noisy = (whole + rng.normal(0, 6, whole.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(where / f"{i:04d}.jpg", quality=85)


def epoch(model, feed, rows, number):
    """Train on every batch of an epoch; return the seconds it took."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    start = time.perf_counter()
    for part, x in zip(parts, feed.batches(parts, number), strict=True):
        loss = nn.functional.cross_entropy(model(x), torch.from_numpy(part % 2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def main():
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--heads", nargs="*", default=["deit-tiny", "deit-small", "deit-base"])
    given = parser.parse_args()
    print(f"{datetime.date.today()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{given.images} JPEGs of {given.size} px, batches of {BATCH}, seconds per epoch\n")
    print("| appended | stored tokens | backbone in the loop | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        images(folder / "images", given.images, given.size)
        manifest = open_dataset(f"folder:{folder / 'images'}")
        backbone = load_backbone("deit", "random")
        [report] = extract(
            manifest,
            [backbone],
            out=folder,
            settings=ExtractionSettings(tokens=True, precision="float32"),
        )
        rows = np.arange(len(manifest))
        backbone = load_backbone("deit", "random")
        unfreeze(backbone, "none")
        with FeatureStore.open(report.store) as store:
            recipe = recipe_of(store, backbone.transform)
            stored = Stored(store, "final/tokens", 0)
            for size in given.heads:
                head = token_head(size, "random", width=768, tokens=196, outputs=2, seed=0).train()
                alone = min(epoch(head, stored, rows, e) for e in (1, 2))
                whole = Tuned(backbone, "final/tokens", head).train()
                looped = min(epoch(whole, Images(manifest, recipe, 0), rows, e) for e in (1, 2))
                print(f"| {size} | {alone:.1f} | {looped:.1f} | {looped / alone:.1f} |")
            feed = Images(manifest, recipe, 0)
            parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            took = []
            for number in (1, 2):
                start = time.perf_counter()
                for _ in feed.batches(parts, number):
                    pass
                took.append((time.perf_counter() - start) / len(rows) * 1000)
            print(
                f"\nimages alone: {took[0]:.1f} ms per image in the first epoch, {took[1]:.1f} "
                "from then on (decoded crops stay in memory)"
            )


if __name__ == "__main__":
    main()
