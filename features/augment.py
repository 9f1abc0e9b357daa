"""Views: seeded random changes of an image's crop, the study's training augmentation.

A crop of 0.8 to 1.2 of the area resized back, both flips with probability 1/2, and with probability
0.8 brightness, contrast, saturation and hue moved by up to 0.2, 0.2, 0.1 and 0.1 in random order.
As torchvision's RandomResizedCrop, flips and ColorJitter do it to Pillow images, but drawn from a
generator of its own: a view depends on the seed, the image's bytes and the view's number only,
whoever computes it. No torch here, for the reason given in images.py.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance

RECIPE = "study-1"  # part of the fingerprint
AREA, RATIO = (0.8, 1.2), (3 / 4, 4 / 3)
TRIES = 10  # for a box that fits, as in torchvision
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.2, 0.2, 0.1, 0.1
P_FLIP, P_COLOUR = 0.5, 0.8


def generator(seed: int, content: str, view: int) -> np.random.Generator:
    """Return the generator of one view; content is the hex SHA-256 of the image's bytes."""
    return np.random.default_rng([seed, int(content, 16), view])


def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return a random view of a square RGB image, of the same size."""
    box = random_box(image.size[0], image.size[1], rng)
    image = image.crop(box).resize(image.size, Image.Resampling.BILINEAR)
    if rng.random() < P_FLIP:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < P_FLIP:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if rng.random() < P_COLOUR:
        image = jitter(image, rng)
    return image


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a random part; the whole where no draw fits."""
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return an RGB image with its colours moved."""
    enhancers = (
        (ImageEnhance.Brightness, BRIGHTNESS),
        (ImageEnhance.Contrast, CONTRAST),
        (ImageEnhance.Color, SATURATION),
    )
    for which in rng.permutation(4):
        if which == 3:
            image = turn_hue(image, rng.uniform(-HUE, HUE))
        else:
            enhancer, most = enhancers[which]
            image = enhancer(image).enhance(rng.uniform(1 - most, 1 + most))
    return image


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """Return an RGB image with its hue moved by a part (-0.5 to 0.5) of the circle."""
    hue, saturation, value = image.convert("HSV").split()
    moved = (np.asarray(hue).astype(np.int32) + int(turn * 255)).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(moved), saturation, value)).convert("RGB")
