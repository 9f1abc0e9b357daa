"""Compare features at reduced precision with float32, backbone by backbone; print a Markdown table.

Weights are random but for the embedded backbone's. Images are 16 crops of scikit-learn's two
photographs. Speeds are of the forward pass alone, in this run, at a batch of 16.
"""

import datetime
import os
import time

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from features.backbones import BACKBONES, load_backbone
from features.images import Decoded

REDUCED = (torch.bfloat16, torch.float16)


def images(transform):
    crops = []
    for picture in load_sample_images().images:
        whole = Image.fromarray(picture)
        for i in range(8):
            crops.append(whole.crop((40 * i, 20 * i, 40 * i + 300, 20 * i + 280)))
    pixels = [transform.prepare(Decoded(crop, crop.size), exact=True) for crop in crops]
    return torch.from_numpy(np.stack(pixels))


def main():
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| backbone | weights | bfloat16: least cosine | speed | float16: least cosine | speed |")
    print("|---|---|---|---|---|---|")
    for name in BACKBONES:
        weights = None if name == "efficientnet_lite0" else "random"
        cells = []
        for dtype in (torch.float32, *REDUCED):
            backbone = load_backbone(name, weights)
            backbone.to("cpu", dtype)
            pixels = backbone.normalise(images(backbone.transform), dtype)
            feature = backbone.spec.default_feature
            with torch.inference_mode():
                backbone.network(pixels[:2], [feature])
                start = time.perf_counter()
                found = backbone.network(pixels, [feature])[feature].float()
                seconds = time.perf_counter() - start
            if dtype is torch.float32:
                full, alone = found, seconds
                continue
            cosine = torch.nn.functional.cosine_similarity(full, found).min().item()
            cells += [f"{cosine:.5f}", f"{alone / seconds:.2f} x"]
        print(f"| {name} | {weights or 'published'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
